"""Names of tensors, ours and another framework's, as pairs of patterns that can be read both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from torch import Tensor

Pairs = tuple[tuple[str, str], ...]  # beginnings of names; {i}, {i+2}, {2i} are numbers
_PLACE = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")


def translate(name: str, pairs: Pairs, back: bool = False) -> str | None:
    """The other side's name of a tensor; None where it has none. The first pair that matches wins. `back`: from theirs to ours."""
    for ours, theirs in pairs:
        here, there = (theirs, ours) if back else (ours, theirs)
        found = _numbers(name, here)
        if found is not None:
            numbers, rest = found
            return (
                _PLACE.sub(lambda m: str(int(m[1] or 1) * numbers[m[2]] + int(m[3] or 0)), there)
                + rest
            )  # noqa: B023 - called at once
    return None


def _numbers(name: str, pattern: str) -> tuple[dict[str, int], str] | None:
    """The numbers that a pattern stands for at the beginning of a name, and the rest of it."""
    match = _expression(pattern).match(name)
    if match is None:
        return None
    numbers = {}
    for (factor, letter, offset), digits in zip(
        _PLACE.findall(pattern), match.groups(), strict=True
    ):
        number, left = divmod(int(digits) - int(offset or 0), int(factor or 1))
        if left or number < 0:
            return None
        numbers[letter] = number
    return numbers, name[match.end() :]


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    literal = _PLACE.split(pattern)[::4]
    return re.compile(r"(\d+)".join(map(re.escape, literal)))


def fit(
    state: Mapping[str, Tensor], wanted: Iterable[str], pairs: Pairs
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Their tensors under our names. -> those of `wanted` (ours) that are there; what is missing and what is left over, by their names."""
    names = {ours: translate(ours, pairs) or ours for ours in wanted}
    theirs = set(names.values())
    found = {ours: state[name] for ours, name in names.items() if name in state}
    return (
        found,
        [n for n in names.values() if n not in state],
        [n for n in state if n not in theirs],
    )


def told(**lists: list[str]) -> str:
    """`3 missing (a, b, c); 8 left over (d, e, f, g, h ...)`, of those that are not empty; the keywords are the kinds, _ for a space."""
    parts = [
        f"{len(names)} {kind.replace('_', ' ')} ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})"
        for kind, names in lists.items()
        if names
    ]
    return "; ".join(parts)
