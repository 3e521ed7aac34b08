"""Hostile inputs: mutated bytes, and mutated values of valid documents.

The strategies of hypothesis serve the default suite and `make fuzz`; `mutate` is the fast variant
for bytes, without hypothesis.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Values in the place of those of a valid document. All can be written as JSON.
HOSTILE: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    10**400,
    -(10**400),
    1e308,
    -1e308,
    5e-324,
    0.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "1",
    "\0",
    "\ud800",
    "../x",
    "/etc/passwd",
    "é" * 300,
    "9" * 5000,
    [],
    {},
    [[]],
    [None],
    [1e308] * 6,
    [float("nan")] * 6,
    [-1, -1, -1, -1],
    [2**62, 2**62],
    {"id": 1},
    {"size": [1, 1], "counts": [2**63 - 1, 2**63 - 1, 3]},
    {"size": [2**31, 2**31], "counts": "0"},
    {"size": [20, 30], "counts": "ooooooooo0"},
    {"size": [20, 30], "counts": [0] * 50 + [600]},
]
_NESTED: Any = 1
for _ in range(300):
    _NESTED = [_NESTED]
HOSTILE.append(_NESTED)

# Bytes that formats use as lengths and counts.
_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_FORMATS = ("B", "<H", ">H", "<I", ">I", "<Q", ">Q")
_MAX_EDITS = 4
_MAX_SIZE = 2**17  # bytes of a mutated file


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key or index) of a document."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


@st.composite
def trees(draw: st.DrawFn, seeds: list[Any]) -> Any:
    """Draw a valid document with a few values that are replaced, removed, repeated or renamed."""
    tree = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, _MAX_EDITS))):
        options = places(tree) if isinstance(tree, dict | list) else []
        if not options:
            return draw(st.sampled_from(HOSTILE))
        container, key = options[draw(st.integers(0, len(options) - 1))]
        edit = draw(st.sampled_from(("replace", "replace", "replace", "remove", "repeat", "swap")))
        if edit == "replace":
            container[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif edit == "remove":
            del container[key]
        elif edit == "repeat" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            other, other_key = options[draw(st.integers(0, len(options) - 1))]
            container[key] = copy.deepcopy(other[other_key])
    return tree


def to_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def documents(seeds: list[Any], encode: Callable[[Any], bytes] = to_json) -> Any:
    """Strategy of files with a mutated document."""
    return trees(seeds).map(encode)


def lines(seeds: list[Any]) -> Any:
    """Strategy of files with one JSON document per line."""
    return trees([seeds]).map(
        lambda tree: b"".join(
            to_json(entry) + b"\n" for entry in (tree if isinstance(tree, list) else [tree])
        )
    )


def mutated(seeds: list[bytes]) -> Any:
    """Strategy of valid files with mutated bytes."""
    return st.builds(lambda number: mutate(random.Random(number), seeds), st.integers(0, 2**64 - 1))


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a valid file with a few mutations."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, _MAX_EDITS)):
        at = rng.randrange(len(data) + 1)
        rng.choice(_MUTATIONS)(rng, data, at, seeds)
    return bytes(data[:_MAX_SIZE])


def _flip(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    if at < len(data):
        data[at] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    if at < len(data):
        data[at] = rng.randrange(256)


def _write_number(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    kind = rng.choice(_FORMATS)
    size = struct.calcsize(kind)
    number = rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)
    data[at : at + size] = struct.pack(kind, number)


def _truncate(_: random.Random, data: bytearray, at: int, __: list[bytes]) -> None:
    del data[at:]


def _delete(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    del data[at : at + rng.randint(1, 16)]


def _insert(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    data[at:at] = rng.randbytes(rng.randint(1, 16))


def _repeat(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    data[at:at] = bytes(data[at : at + rng.randint(1, 64)]) * rng.randint(1, 50)


def _move(rng: random.Random, data: bytearray, at: int, _: list[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    size = rng.randint(1, 32)
    data[at : at + size] = data[start : start + size]


def _splice(rng: random.Random, data: bytearray, at: int, seeds: list[bytes]) -> None:
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    data[at:] = other[start:]


_MUTATIONS = (
    _flip,
    _set,
    _set,
    _write_number,
    _write_number,
    _truncate,
    _delete,
    _insert,
    _repeat,
    _move,
    _splice,
)
