"""JSON and YAML documents of unknown origin."""

from __future__ import annotations

import pytest

from maskseg.files import check_yaml, parse_json, parse_yaml


def test_valid_documents() -> None:
    assert parse_yaml("a: [1, 2.5, x, null, true]\nb: {c: 'd'}\n") == {
        "a": [1, 2.5, "x", None, True],
        "b": {"c": "d"},
    }
    assert parse_json('{"a": [1]}') == {"a": [1]}
    assert parse_json(b"[1]", object_hook=None) == [1]


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "alias"),
        ("a: !!python/object/apply:os.system [true]", "tag"),
        ("a: !!python/object/apply:pathlib.Path [x]", "tag"),
        ("!!set {a, b}", "tag"),
        ("[" * 60 + "]" * 60, "levels"),
        ("[" * 100_000, "levels"),
        ("[" + "a," * 200_000 + "]", "values"),
        ("x" * 2_000_000, "characters"),
        ("a: " + "1:1" * 10_000, "characters"),
        ("a: " + "9" * 100_000, "characters"),
        ("{" + ", ".join(f"{k * (2**61 - 1)}: 1" for k in range(10)) + "}", "not a string"),
        ("? [a]\n: b", "not a string"),
        ("a: {1: x}", "not a string"),
        ("a: [", "expected"),
        ("a: b: c", "not allowed"),
        ("\x00", "allowed|control"),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=reason):
        check_yaml(text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000, "{", ""]
)
def test_json_that_is_refused(text: str) -> None:
    # Guards against: a RecursionError, which is not a ValueError, ends in a traceback.
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
