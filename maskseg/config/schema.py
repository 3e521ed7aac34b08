"""The types of all config keys, and the check of values against them.

A group with a `_target_` has the types of the parameters of that class or function. The keys that
no class takes (the top level of each tool's config, `evaluation`, `fit`) are declared here. A value
is checked whatever its default is, so that a key whose default is null has a type too.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Literal, TypedDict

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.auto import with_usual_numbers
from maskseg.config.levels import FILLED_KEYS
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.options import ClassOptions, LoaderOptions, ReadOptions
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.values import (
    Decay,
    Fraction,
    Hint,
    IterationCount,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    Seed,
    Size,
    WorkerCount,
    describe,
    has_range,
    is_integer_type,
    matches,
    type_hints,
)


class TrainKeys(TypedDict, total=False):
    """The top level of `train.yaml`."""

    name: str
    run_dir: str | None
    seed: Seed
    batch_size: Size


class EvaluationKeys(TypedDict, total=False):
    """The group `evaluation`."""

    max_detections: PositiveInt
    backend: Literal["auto", "faster", "pycocotools"]
    batch: Size
    max_images: PositiveInt | None
    pictures: NonNegativeInt
    oks_sigmas: Annotated[list[PositiveFloat], Length(1)] | None
    min_score: Fraction


class FitKeys(TypedDict, total=False):
    """The group `fit` of `fit_hash.yaml` and `fit_svm.yaml`."""

    split: str
    max_samples: Annotated[int, Range(ge=2, le=1_000_000_000)]
    iterations: IterationCount
    max_images: PositiveInt | None
    C: PositiveFloat
    positive_weight: PositiveFloat
    norm: PositiveFloat
    intercept_scaling: PositiveFloat
    negatives: PositiveInt
    negative_below: PositiveFraction
    flip: bool


class OptimizerKeys(TypedDict, total=False):
    """The keys of the group `optimizer`: one that no optimizer takes, and ranges for torch's.

    torch's optimizers have types without ranges.
    """

    base_batch_size: Size | None
    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    momentum: Decay
    dampening: Decay
    betas: tuple[Decay, Decay]
    eps: PositiveFloat


class DataKeys(TypedDict, total=False):
    """The keys of `data` that belong to no option of `maskseg.data.options`."""

    root: str | None
    images: str | None
    size: Size | Literal["auto"]
    size_range: tuple[Size, Size]
    min_proposals: PositiveInt
    train_json: str | list[str] | None
    val_json: str | list[str] | None
    train_images: str | None
    val_images: str | None
    train_proposals: str | None
    val_proposals: str | None
    train_semantic: str | None
    val_semantic: str | None
    train_segments: str | None
    val_segments: str | None
    segment_sampler: dict[str, object] | None
    train_transforms: list[Transform]
    test_transforms: list[Transform]
    split: str


class ToolKeys(TypedDict, total=False):
    """The top level of the other tools' configs."""

    checkpoint: str | None
    output: str | None
    overwrite: bool
    split: str
    pictures: NonNegativeInt
    input: str | None
    min_score: Fraction | None
    workers: WorkerCount
    source: str
    weights: str | None
    categories: str | None
    suite: str
    trunk: str
    size: Annotated[int, Range(ge=32, le=65_536)]
    batch: Size
    rounds: PositiveInt
    steps: PositiveInt
    base: str
    sweep: Annotated[list[PositiveFloat], Length(1)]
    scales: Annotated[list[PositiveFloat], Length(1)]
    by: str
    masks: str
    technique: str
    threshold: Fraction | None
    thresholds: Annotated[list[Annotated[float, Range(gt=0, lt=1)]], Length(1)]
    tune_images: PositiveInt
    iterations: IterationCount
    margin: Annotated[float, Range(gt=0, le=100)]
    side: Annotated[int, Range(ge=0, le=65_536)]
    normalise: str
    segmentation: str
    evaluate: bool
    min_area: NonNegativeFloat
    classifier: str | None
    map_side: Annotated[int, Range(ge=32, le=65_536)] | None
    device: str
    file: str
    images: str
    export: str
    fix: str | None
    host: str
    host_names: list[str]
    port: Annotated[int, Range(ge=0, le=65_535)]
    max_pixels: PositiveInt
    max_upload_mb: Annotated[float, Range(gt=0, le=1_000_000)]
    uploads_at_once: Annotated[int, Range(ge=1, le=1024)]


# Keys of groups beside the parameters of their `_target_`.
GROUPS: dict[str, type] = {
    "evaluation": EvaluationKeys,
    "fit": FitKeys,
    "optimizer": OptimizerKeys,
}


def check_types(config: DictConfig) -> set[str]:
    """Check the types and ranges of all values; where an integer is expected, 10.0 becomes 10.

    Null is accepted where a key refers to another one, such as the number of classes, which is
    read from the data later. -> the keys whose type is known.
    Raises UserError for a value of another type or out of its range, and for a reference to no key.
    A value that others refer to is reported under its own key.
    """
    references = set(_references(OmegaConf.to_container(config, resolve=False)))
    try:
        resolved = OmegaConf.to_container(with_usual_numbers(config), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain_reference(config, references, error)) from error
    assert isinstance(resolved, dict)
    integers: dict[str, int] = {}
    typed: set[str] = set()
    problems: dict[str, str] = {}
    for key, value, hint in walk({str(key): value for key, value in resolved.items()}):
        typed.add(key)
        if _is_set_later(key, value, references):
            continue
        if isinstance(value, float) and value.is_integer() and is_integer_type(hint):
            value = int(value)
            integers[key] = value
        if not matches(value, hint):
            advice = _device_advice(value) if key == "trainer.device" else ""
            problems[key] = f"{key}={value!r}: expected {describe(hint)}{advice}"
    if problems:
        raise UserError(problems[min(problems, key=lambda key: key in references)])
    for key, number in integers.items():
        if key not in references:
            OmegaConf.update(config, key, number)
    return typed


def _device_advice(value: object) -> str:
    """What to write for the number of a GPU."""
    return f"; write trainer.device=cuda:{value}" if type(value) is int else ""


def _explain_reference(config: DictConfig, references: Collection[str], error: Exception) -> str:
    """One line for a value that refers to a key that does not exist."""
    for key in sorted(references):
        try:
            OmegaConf.select(config, key)
        except OmegaConfBaseException as reason:
            return f"{key}: {str(reason).splitlines()[0]}"
    return f"config: {str(error).splitlines()[0]}"


def _is_set_later(key: str, value: object, references: Collection[str]) -> bool:
    """Whether a key has no value yet: it is missing, or is filled in from the data or the model."""
    if value is None:
        return key in references or key.rpartition(".")[2] in FILLED_KEYS
    return bool(value == "???")


def _references(node: object, place: str = "") -> Iterator[str]:
    """The keys whose values are interpolations."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _references(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _references(value, f"{place}.{index}")
    elif isinstance(node, str) and "${" in node:
        yield place


def top_level_types() -> dict[str, Hint]:
    """The types of the keys at the top level of the tools' configs."""
    return {**type_hints(ToolKeys), **type_hints(TrainKeys)}


def walk(config: Mapping[str, object]) -> Iterator[tuple[str, object, Hint]]:
    """Each key whose type is known, with its value and its type."""
    top = top_level_types()
    for key, value in config.items():
        if isinstance(value, dict) and key not in top:
            yield from _walk_node(key, value)
        elif key in top:
            yield key, value, top[key]


def _walk_group(
    place: str, node: Mapping[str, object], hints: Mapping[str, Hint]
) -> Iterator[tuple[str, object, Hint]]:
    for key, value in node.items():
        path = f"{place}.{key}"
        if key in hints:
            yield path, value, hints[key]
        if isinstance(value, dict):
            yield from _walk_node(path, value)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                if isinstance(inner, dict):
                    yield from _walk_node(f"{path}.{index}", inner)


def _walk_node(place: str, node: Mapping[str, object]) -> Iterator[tuple[str, object, Hint]]:
    target = node.get("_target_")
    hints = types_at(place, target if isinstance(target, str) else None)
    values = {key: value for key, value in node.items() if not str(key).startswith("_")}
    yield from _walk_group(place, values, hints)


def types_at(place: str, target: str | None) -> dict[str, Hint]:
    """The types of the keys of a group with this `_target_` at this place of a config.

    Of a key that `GROUPS` has too, the type with a range counts, first that of the target.
    """
    hints = {} if target is None else dict(types_of(target))
    for key, hint in type_hints(GROUPS[place]).items() if place in GROUPS else ():
        if not has_range(hints.get(key)):
            hints[key] = hint
    return hints


@functools.cache
def types_of(target: str) -> dict[str, Hint]:
    """The types of the keys of a group with this `_target_`; of a dataset, those of its options."""
    try:
        built = hydra.utils.get_object(target)
    except Exception:  # reported, with the reason, by whoever builds the object
        return {}
    hints = _parameter_types(built)
    if inspect.isclass(built) and issubclass(built, CocoSource):
        for options in (ReadOptions, LoaderOptions, ClassOptions, DataKeys):
            hints = {**type_hints(options), **hints}
    return hints


def _parameter_types(built: object) -> dict[str, Hint]:
    """The annotated parameters of a class or function, with those of the base classes."""
    if not inspect.isclass(built):
        return _hints(built)
    hints: dict[str, Hint] = {}
    for base in reversed(built.__mro__):
        if "__init__" in vars(base):
            hints |= _hints(vars(base)["__init__"])
    if is_dataclass(built):
        known = type_hints(built)
        hints |= {field.name: known[field.name] for field in fields(built)}
    return hints


def _hints(function: object) -> dict[str, Hint]:
    if not callable(function):
        return {}
    try:
        hints = type_hints(function)
        kinds = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):
        return {}
    types_by_name: dict[str, Hint] = {}
    for name, parameter in kinds.items():
        if name not in hints or parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            types_by_name[name] = hints[name]
        elif typing.get_origin(hints[name]) is typing.Unpack:  # **options: Unpack[a TypedDict]
            types_by_name |= type_hints(typing.get_args(hints[name])[0])
    return types_by_name
