"""Atomic writing of files, and safe, bounded reading of files of unknown origin."""

from maskseg.files.atomic import remove_stale, replacing, write_json
from maskseg.files.documents import check_yaml, parse_json, parse_yaml

__all__ = ["check_yaml", "parse_json", "parse_yaml", "remove_stale", "replacing", "write_json"]
