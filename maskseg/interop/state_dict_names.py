"""Names of tensors here and in another framework, as pairs of patterns for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from torch import Tensor

# Pairs of prefixes (ours, theirs); {i}, {i+2} and {2i} stand for numbers.
Pairs = tuple[tuple[str, str], ...]
_PLACEHOLDER = re.compile(r"\{(\d*)([a-z])([+-]\d+)?\}")
MAX_NAMES = 5  # names in a message, per list


def translate(name: str, pairs: Pairs, back: bool = False) -> str | None:
    """Return the other framework's name of a tensor, or None if there is none.

    The first pair that matches is used. back: translate from their name to ours.
    """
    for ours, theirs in pairs:
        source, target = (theirs, ours) if back else (ours, theirs)
        match = _match(name, source)
        if match is not None:
            numbers, rest = match
            return _fill(target, numbers) + rest
    return None


def _match(name: str, pattern: str) -> tuple[dict[str, int], str] | None:
    """Return the numbers of a pattern's placeholders and the rest of a name.

    None if the name does not start with the pattern.
    """
    match = _expression(pattern).match(name)
    if match is None:
        return None
    numbers = {}
    for (factor, letter, offset), digits in zip(
        _PLACEHOLDER.findall(pattern), match.groups(), strict=True
    ):
        number, remainder = divmod(int(digits) - int(offset or 0), int(factor or 1))
        if remainder or number < 0:
            return None
        numbers[letter] = number
    return numbers, name[match.end() :]


def _fill(pattern: str, numbers: Mapping[str, int]) -> str:
    """Replace the placeholders of a pattern by numbers."""

    def evaluate(placeholder: re.Match[str]) -> str:
        factor, letter, offset = placeholder.groups()
        return str(int(factor or 1) * numbers[letter] + int(offset or 0))

    return _PLACEHOLDER.sub(evaluate, pattern)


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    # Splitting by an expression with three groups returns each literal part and three groups.
    literals = _PLACEHOLDER.split(pattern)[::4]
    return re.compile(r"(\d+)".join(map(re.escape, literals)))


def match_state_dict(
    state: Mapping[str, Tensor], names: Iterable[str], pairs: Pairs
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return their tensors under our names.

    names: our names of the tensors that a model needs.
    Returns the tensors among these, and, by their names, the missing and the unexpected ones.
    """
    their_names = {name: translate(name, pairs) or name for name in names}
    expected = set(their_names.values())
    matched = {}
    for name, their_name in their_names.items():
        if their_name in state:
            matched[name] = state[their_name]
    missing = [their_name for their_name in their_names.values() if their_name not in state]
    unexpected = [name for name in state if name not in expected]
    return matched, missing, unexpected


def describe_names(**lists: list[str]) -> str:
    """Describe non-empty lists of names: `3 missing (a, b, c); 8 left over (d, e, f, g, h ...)`.

    The keywords are the kinds of the lists, with _ for a space.
    """
    descriptions = []
    for kind, names in lists.items():
        if names:
            ellipsis = " ..." if len(names) > MAX_NAMES else ""
            first_names = ", ".join(names[:MAX_NAMES])
            descriptions.append(f"{len(names)} {kind.replace('_', ' ')} ({first_names}{ellipsis})")
    return "; ".join(descriptions)
