"""Files: written whole or not at all, and read within limits, whoever wrote them."""

from maskseg.files.atomic import remove_left, replacing, write_json
from maskseg.files.documents import check_yaml, parse_json, parse_yaml

__all__ = ["check_yaml", "parse_json", "parse_yaml", "remove_left", "replacing", "write_json"]
