"""Types with ranges: which values they allow, and how they are described."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import pytest

from maskseg.errors import UserError
from maskseg.values import (
    Decay,
    Fraction,
    Length,
    PositiveFloat,
    PositiveInt,
    Range,
    check_arguments,
    check_fields,
    describe,
    is_integer_type,
    matches,
)

Sizes = Annotated[Sequence[PositiveInt], Length(2)]


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (PositiveInt, [1, 10**9], [0, -1, 10**9 + 1, 1.0, True, None, "1"]),
        (PositiveInt | None, [1, None], [0]),
        (Fraction, [0, 0.0, 1, 1.0], [-0.1, 1.1, math.nan, math.inf]),
        (Decay, [0, 0.999], [1, 1.0]),
        (PositiveFloat, [1e-300, 1], [0, 0.0, -1e-300, math.nan, math.inf, 2**63, 10**400]),
        (float, [-1e300, 3], [math.nan, -math.inf, 10**400, None]),
        (int, [-(2**63) + 1, 2**63 - 1], [2**63, -(2**63), 1.0]),
        (Sizes, [[1, 2], (1, 2)], [[], [1], [1, 0], 3]),
        (tuple[Fraction, Fraction], [[0, 1]], [[0], [0, 2]]),
        (Mapping[str, PositiveInt], [{}, {"p2": 4}], [{"p2": 0}, [4]]),
        (list[Range], [[{"_target_": "x.Y"}]], [[1], ["a"], [{"a": 1}], [None], [[]]]),
    ],
)
def test_allowed_and_refused_values(
    hint: object, allowed: list[object], refused: list[object]
) -> None:
    assert [value for value in allowed if not matches(value, hint)] == []
    assert [value for value in refused if matches(value, hint)] == []


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[int, Range(ge=1, le=9)], "a whole number from 1 to 9"),
        (Annotated[int, Range(ge=1, le=9)] | None, "a whole number from 1 to 9 or null"),
        (PositiveFloat, "a number above 0"),
        (Decay, "a number of at least 0 and below 1"),
        (Annotated[float, Range(gt=0, le=2)], "a number above 0 and at most 2"),
        (Annotated[float, Range(le=2)], "a number of at most 2"),
        (
            Annotated[list[Fraction], Length(1)],
            "a list of at least 1 value, each a number from 0 to 1",
        ),
        (Mapping[str, Fraction], "a group of keys, each a number from 0 to 1"),
    ],
)
def test_ranges_in_words(hint: object, text: str) -> None:
    assert describe(hint) == text


def test_integer_types() -> None:
    assert all(map(is_integer_type, (int, PositiveInt, PositiveInt | None)))
    assert not any(map(is_integer_type, (float, Fraction, int | float, str, list[int])))


@dataclass(frozen=True)
class Settings:
    """Settings with and without ranges."""

    steps: PositiveInt = 1
    name: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "group")


def test_fields_and_arguments_are_checked_like_keys() -> None:
    assert Settings(3).steps == 3
    with pytest.raises(UserError, match=r"^group\.steps=0: expected a whole number from 1 to"):
        Settings(0)

    def build(share: Fraction = 0.5) -> None:
        check_arguments(build, "part", share=share)

    build(1.0)
    with pytest.raises(UserError, match=r"^part\.share=nan: expected a number from 0 to 1$"):
        build(math.nan)
