"""Extensions of the site: docstrings become reStructuredText, help texts become paragraphs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sphinx = pytest.importorskip("sphinx")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "extensions"))

from docstrings import convert, parameter_names  # noqa: E402
from pages import notebook_to_markdown, split_help  # noqa: E402

NO_NAMES: frozenset[str] = frozenset()


def converted(text: str, *names: str) -> str:
    return "\n".join(convert(text.split("\n"), frozenset(names), False)).strip()


def test_markup_is_escaped_outside_of_code() -> None:
    assert converted("Returns a * b | c_ of x_y.") == r"Returns a \* b \| c\_ of x_y."
    assert converted("[..., n, 4] -> [N, 4]") == "[..., n, 4] -> [N, 4]"
    assert converted("`a * b`, ``c|d_``") == "``a * b``, ``c|d_``"


def test_names_in_backticks_are_references_unless_they_are_parameters() -> None:
    assert converted("See `Batch.to` and `size`.", "size") == "See :name:`Batch.to` and ``size``."
    assert converted("All `nn.Module`s.") == r"All :name:`nn.Module`\ s."


def test_descriptions_of_parameters_become_a_section() -> None:
    text = "Clip.\n\nboxes: f32 [R, 4]; sizes,\nrank: of each.\nlast: x: y. Raises ValueError."
    assert converted(text, "boxes", "sizes", "last") == (
        "Clip.\n\nArgs:\n    boxes: f32 [R, 4]; sizes, rank: of each.\n    last: x: y.\n\n"
        "Raises ValueError."
    )
    assert converted("Note: this is text; so: is this.", "boxes") == (
        "Note: this is text; so: is this."
    )


def test_sections_and_lists_keep_their_lines() -> None:
    text = "Do it.\n\nArgs:\n    a: first,\n        `b` second.\n\n* one;\n* two."
    assert converted(text, "a", "b") == (
        "Do it.\n\nArgs:\n    a: first,\n        ``b`` second.\n\n* one;\n* two."
    )


def test_parameters_of_functions_and_classes() -> None:
    class Layer:
        def __init__(self, size: int) -> None:
            self.size = size

    assert parameter_names(Layer) == {"size"}
    assert parameter_names(property(lambda self: self)) == NO_NAMES


def test_help_texts_are_split_into_text_and_commands() -> None:
    text = "One\nline:\n  python a \\\n      b\n\nkeys: a,\n      b\nothers:  c"
    assert split_help(text) == [
        (False, "One\nline:"),
        (True, "python a \\\n    b"),
        (False, "keys: a,\n      b"),
        (False, "others:  c"),
    ]


def test_notebooks_become_pages() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": [{"text": "1"}]},
        {"cell_type": "markdown", "source": ["## Part"]},
    ]
    text = notebook_to_markdown(json.dumps({"cells": cells}))
    assert text == "Text.\n\n```python\na = 1\na\n```\n\n## Part"
