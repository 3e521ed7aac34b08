"""The results of the suites, as they are written to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict, final


class Machine(TypedDict):
    """The device and the versions that the measurements were made with."""

    device: str
    threads: int
    torch: str
    torchvision: str
    python: str


class Case(TypedDict):
    """Measurements of the functions of one case, by label.

    seconds: medians; times_faster: than the first function; memory_mb: peak, above the memory in
    use before; agreement: differences of the outputs, by their description.
    """

    name: str
    seconds: dict[str, float]
    times_faster: dict[str, float]
    memory_mb: dict[str, float]
    agreement: dict[str, float]


@final
class SuiteResult(TypedDict):
    """The cases of a suite. also: further numbers, by their description."""

    suite: str
    machine: Machine
    cases: list[Case]
    also: NotRequired[Mapping[str, float | str]]


class Measurement(TypedDict):
    """Time (median) and peak memory."""

    seconds: float
    memory_mb: float


class Point(Measurement):
    """The measurement at one value of an axis."""

    value: float


class Slopes(TypedDict):
    """Exponents of the power laws of time and memory; None if they cannot be fitted."""

    seconds: float | None
    memory_mb: float | None


class Axis(TypedDict):
    """One axis of suite `scaling`. label: of the values."""

    name: str
    label: str
    points: list[Point]
    slope: Slopes


@final
class ScalingResult(TypedDict):
    """The axes of suite `scaling`. about: the model and the size of its images."""

    suite: str
    machine: Machine
    about: str
    axes: list[Axis]
