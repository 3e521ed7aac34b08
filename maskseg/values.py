"""Types and ranges of the values that a config, or a caller, may hand to a constructor.

A range is a part of the type of a parameter or field: `radius: Annotated[int, Range(ge=0, le=9)]`.
Frequent ranges have names, such as `PositiveInt`. `maskseg.config.schema` checks the keys of a
composed config against these types, and docs/config.md shows them.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from maskseg.errors import UserError

Hint: TypeAlias = object  # a type annotation, such as `int | None`
_MAX_INT = 2**63  # integers are those of 64 bits


@dataclass(frozen=True)
class Range:
    """An interval of numbers: greater (`gt`), greater or equal (`ge`), less (`lt`) or equal (`le`).

    None where it has no such bound.
    """

    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    lt: float | None = None

    def allows(self, value: object) -> bool:
        """Whether a value is a number within the bounds."""
        if not isinstance(value, int | float):
            return False
        comparisons = (
            (operator.ge, self.ge),
            (operator.gt, self.gt),
            (operator.le, self.le),
            (operator.lt, self.lt),
        )
        return all(bound is None or compare(value, bound) for compare, bound in comparisons)

    def describe(self, kind: str) -> str:
        """`kind`, such as "a number", with the bounds in words."""
        if self.ge is not None and self.le is not None:
            return f"{kind} from {self.ge} to {self.le}"
        bounds = (
            ("of at least", self.ge),
            ("above", self.gt),
            ("of at most" if self.ge is None and self.gt is None else "at most", self.le),
            ("below", self.lt),
        )
        present = [f"{word} {bound}" for word, bound in bounds if bound is not None]
        return f"{kind} {' and '.join(present)}"


@dataclass(frozen=True)
class Length:
    """The minimum number of values of a list."""

    minimum: int

    def allows(self, value: object) -> bool:
        """Whether a value is a list that is long enough."""
        return isinstance(value, list | tuple) and len(value) >= self.minimum

    def describe(self, kind: str) -> str:
        """`kind`, such as "a list of values, each text", with the minimum in words."""
        values = "value" if self.minimum == 1 else "values"
        return kind.replace("a list of values", f"a list of at least {self.minimum} {values}", 1)


# Counts of steps, images, regions ... The limit keeps sums and products within 64 bits.
PositiveInt = Annotated[int, Range(ge=1, le=1_000_000_000)]
NonNegativeInt = Annotated[int, Range(ge=0, le=1_000_000_000)]
# Sides in pixels, channels, and images of a batch.
Size = Annotated[int, Range(ge=1, le=65_536)]
LayerCount = Annotated[int, Range(ge=0, le=100)]
# Bins and sampling points per side of RoIAlign.
BinCount = Annotated[int, Range(ge=1, le=256)]
# Sampling points per bin and side; 0: as many as the bin has cells.
SamplingRatio = Annotated[int, Range(ge=0, le=64)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
# Probabilities, scores, IoUs and shares.
Fraction = Annotated[float, Range(ge=0, le=1)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
# Rates of a decay and of dropout.
Decay = Annotated[float, Range(ge=0, lt=1)]
# Standard deviation of a Gaussian blur, in pixels.
BlurSigma = Annotated[float, Range(ge=0, le=100)]
IterationCount = Annotated[int, Range(ge=1, le=100_000)]
WorkerCount = Annotated[int, Range(ge=0, le=1024)]
# Batches are padded to a multiple of this number of pixels.
Divisor = Annotated[int, Range(ge=1, le=4096)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]


def type_hints(owner: object) -> Mapping[str, Hint]:
    """The annotations of a class or function, with their ranges.

    Raises NameError or TypeError where they cannot be evaluated.
    """
    return typing.get_type_hints(owner, include_extras=True)


def check_fields(instance: object, place: str) -> None:
    """Check the numbers of a dataclass against the ranges of its fields.

    place: the config group whose keys the fields are, for messages. Raises UserError.
    """
    hints = type_hints(type(instance))
    for name in hints:
        _check_range(f"{place}.{name}", getattr(instance, name), hints[name])


def check_arguments(function: object, place: str, **values: object) -> None:
    """Check arguments of a function against the ranges of its parameters.

    place: as in `check_fields`. Raises UserError.
    """
    hints = type_hints(function)
    for name, value in values.items():
        _check_range(f"{place}.{name}", value, hints[name])


def _check_range(key: str, value: object, hint: Hint) -> None:
    if has_range(hint) and not matches(value, hint):
        raise UserError(f"{key}={value!r}: expected {describe(hint)}")


def has_range(hint: Hint) -> bool:
    """Whether a type, or a part of it, has a range or a minimum length."""
    if typing.get_origin(hint) is Annotated:
        return True
    return any(has_range(argument) for argument in typing.get_args(hint))


def is_integer_type(hint: Hint) -> bool:
    """Whether integers are values of a type, and other numbers are not."""
    if typing.get_origin(hint) is Annotated:
        return is_integer_type(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(is_integer_type, typing.get_args(hint))) and not matches(0.5, hint)
    return hint is int


def matches(value: object, hint: Hint) -> bool:
    """Whether a plain value can be of the type; True for types that no plain value shows."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        ranges = [item for item in arguments[1:] if isinstance(item, Range | Length)]
        return matches(value, arguments[0]) and all(item.allows(value) for item in ranges)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if value is None:
        return _allows_null(hint)
    if isinstance(value, dict) and "_target_" in value:
        return hint not in (bool, int, float, str)
    if hint in (bool, int, float, str):
        return _is_scalar(value, hint)
    return _matches_collection(value, origin or hint, arguments)


def _allows_null(hint: Hint) -> bool:
    return hint in (object, Any, type(None)) or not (_is_plain(hint) or inspect.isclass(hint))


def _is_scalar(value: object, hint: Hint) -> bool:
    """Whether a value has the type; integers are those of 64 bits, and floats are finite."""
    if hint in (bool, str):
        return type(value) is hint
    if type(value) is int:
        return abs(value) < _MAX_INT
    return hint is float and type(value) is float and math.isfinite(value)


def _matches_collection(value: object, kind: object, arguments: tuple[Hint, ...]) -> bool:
    if kind in (list, collections.abc.Sequence):
        inner = arguments[0] if arguments else object
        return isinstance(value, list | tuple) and _all_match(value, inner)
    if kind is tuple:
        return isinstance(value, list | tuple) and _matches_tuple(value, arguments)
    if kind in (dict, collections.abc.Mapping):
        inner = arguments[1] if len(arguments) == 2 else object
        return isinstance(value, Mapping) and _all_match(value.values(), inner)
    is_other_class = inspect.isclass(kind) and kind not in (object, Any, Path)
    return not (is_other_class and isinstance(value, bool | int | float | str | list | dict))


def _all_match(values: Iterable[object], hint: Hint) -> bool:
    return all(matches(value, hint) for value in values)


def _matches_tuple(values: list[object] | tuple[object, ...], arguments: tuple[Hint, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _all_match(values, arguments[0])
    if len(values) != len(arguments):
        return False
    return all(matches(value, hint) for value, hint in zip(values, arguments, strict=True))


def _is_plain(hint: Hint) -> bool:
    """Whether null is no value of the type."""
    plain = (bool, int, float, str, list, tuple, dict)
    abstract = (collections.abc.Sequence, collections.abc.Mapping)
    if typing.get_origin(hint) is Annotated:
        return _is_plain(typing.get_args(hint)[0])
    return (typing.get_origin(hint) or hint) in (*plain, *abstract)


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def describe(hint: Hint) -> str:
    """A type in words."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        return _describe_ranges(arguments)
    if origin in (typing.Union, types.UnionType):
        # A parameter such as `float | Tensor` takes a number in a config.
        plain = [option for option in arguments if _is_plain(option)]
        shown = [*plain, type(None)] if plain else arguments
        return " or ".join(describe(option) for option in shown if option in arguments)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if hint in _NAMES:
        return _NAMES[hint]
    kind = origin or hint
    if kind in (list, tuple, collections.abc.Sequence):
        return _describe_list(kind, arguments)
    if kind in (dict, collections.abc.Mapping):
        has_plain_values = len(arguments) == 2 and _is_plain(arguments[1])
        suffix = f", each {describe(arguments[1])}" if has_plain_values else ""
        return f"a group of keys{suffix}"
    return "a group with _target_"


def _describe_ranges(arguments: tuple[Hint, ...]) -> str:
    text = describe(arguments[0])
    for item in arguments[1:]:
        if isinstance(item, Range | Length):
            text = item.describe(text)
    return text


def _describe_list(kind: object, arguments: tuple[Hint, ...]) -> str:
    items = [argument for argument in arguments if argument is not Ellipsis]
    text = "a list of values"
    if kind is tuple and Ellipsis not in arguments:
        text = f"a list of {len(items)} values"
    if not items:
        return text
    return f"{text}, each {' or '.join(dict.fromkeys(describe(item) for item in items))}"
