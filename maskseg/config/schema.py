"""The types of all config keys, and the check of values against them.

A group with a `_target_` has the types of the parameters of that class or function. The keys that
no class takes (the top level of each tool's config, `evaluation`, `fit`) are declared here. A value
is checked whatever its default is, so that a key whose default is null has a type too.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.levels import FILLED_KEYS
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.options import ClassOptions, LoaderOptions, ReadOptions
from maskseg.errors import UserError

Hint: TypeAlias = object  # a type annotation, such as `int | None`


class TrainKeys(TypedDict, total=False):
    """The top level of `train.yaml`."""

    name: str
    run_dir: str | None
    seed: int
    batch_size: int


class EvaluationKeys(TypedDict, total=False):
    """The group `evaluation`."""

    max_detections: int
    backend: str
    batch: int
    max_images: int | None
    pictures: int
    oks_sigmas: list[float] | None
    min_score: float


class FitKeys(TypedDict, total=False):
    """The group `fit` of `fit_hash.yaml` and `fit_svm.yaml`."""

    split: str
    max_samples: int
    iterations: int
    max_images: int | None
    C: float
    positive_weight: float
    norm: float
    intercept_scaling: float
    negatives: int
    negative_below: float
    flip: bool


class OptimizerKeys(TypedDict, total=False):
    """The key of the group `optimizer` that the optimizer's class does not take."""

    base_batch_size: int | None


class DataKeys(TypedDict, total=False):
    """The keys of `data` that belong to no option of `maskseg.data.options`."""

    root: str | None
    images: str | None
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
    train_transforms: list[object]
    test_transforms: list[object]
    split: str


class ToolKeys(TypedDict, total=False):
    """The top level of the other tools' configs."""

    checkpoint: str | None
    output: str | None
    split: str
    pictures: int
    input: str | None
    min_score: float
    workers: int
    source: str
    weights: str | None
    categories: str | None
    suite: str
    trunk: str
    size: int
    batch: int
    rounds: int
    steps: int
    base: str
    sweep: list[float]
    scales: list[float]
    by: str
    masks: str
    technique: str
    threshold: float | None
    thresholds: list[float]
    tune_images: int
    iterations: int
    margin: float
    side: int
    normalise: str
    segmentation: str
    evaluate: bool
    min_area: float
    classifier: str | None
    map_side: int | None
    device: str
    file: str
    images: str
    export: str
    fix: str | None
    host: str
    port: int
    max_pixels: int
    max_upload_mb: float
    uploads_at_once: int


# Keys of groups beside the parameters of their `_target_`.
GROUPS: dict[str, type] = {
    "evaluation": EvaluationKeys,
    "fit": FitKeys,
    "optimizer": OptimizerKeys,
}


def check_types(config: DictConfig) -> set[str]:
    """Check the types of all values; a float such as 10.0 becomes an integer where one is expected.

    Null is accepted where a key refers to another one, such as the number of classes, which is
    read from the data later. -> the keys whose type is known.
    Raises UserError for the first value of another type, and for a reference to no key.
    """
    references = set(_references(OmegaConf.to_container(config, resolve=False)))
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_explain_reference(config, references, error)) from error
    assert isinstance(resolved, dict)
    integers: dict[str, int] = {}
    typed: set[str] = set()
    for key, value, hint in walk({str(key): value for key, value in resolved.items()}):
        typed.add(key)
        if _is_set_later(key, value, references):
            continue
        if isinstance(value, float) and _is_integer_as_float(value, hint):
            integers[key] = int(value)
        elif not _matches(value, hint):
            raise UserError(f"{key}={value!r}: expected {describe(hint)}")
    for key, number in integers.items():
        if key not in references:
            OmegaConf.update(config, key, number)
    return typed


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


def _is_integer_as_float(value: float, hint: Hint) -> bool:
    """Whether a value such as 10.0 or 1e1 stands for an integer."""
    return value.is_integer() and _matches(0, hint) and not _matches(0.0, hint)


def _references(node: object, place: str = "") -> Iterator[str]:
    """The keys whose values are interpolations."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _references(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, str) and "${" in node:
        yield place


def walk(config: Mapping[str, object]) -> Iterator[tuple[str, object, Hint]]:
    """Each key whose type is known, with its value and its type."""
    top = {**typing.get_type_hints(ToolKeys), **typing.get_type_hints(TrainKeys)}
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
    hints = types_of(target) if isinstance(target, str) else {}
    if place in GROUPS:
        hints = {**hints, **typing.get_type_hints(GROUPS[place])}
    values = {key: value for key, value in node.items() if not str(key).startswith("_")}
    yield from _walk_group(place, values, hints)


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
            hints = {**typing.get_type_hints(options), **hints}
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
        known = typing.get_type_hints(built)
        hints |= {field.name: known[field.name] for field in fields(built)}
    return hints


def _hints(function: object) -> dict[str, Hint]:
    if not callable(function):
        return {}
    try:
        hints = typing.get_type_hints(function)
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
            types_by_name |= typing.get_type_hints(typing.get_args(hints[name])[0])
    return types_by_name


def _matches(value: object, hint: Hint) -> bool:
    """Whether a plain value can be of the type; True for types that no plain value shows."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is type(None):
        return value is None
    if value is None:
        return not _is_plain(hint)
    if isinstance(value, dict) and "_target_" in value:
        return hint not in (bool, int, float, str)
    if hint in (bool, int, str):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    return _matches_collection(value, origin or hint, arguments)


def _matches_collection(value: object, kind: object, arguments: tuple[Hint, ...]) -> bool:
    if kind in (list, collections.abc.Sequence):
        inner = arguments[0] if arguments else object
        return isinstance(value, list) and _all_match(value, inner)
    if kind is tuple:
        return isinstance(value, list) and _matches_tuple(value, arguments)
    if kind in (dict, collections.abc.Mapping):
        inner = arguments[1] if len(arguments) == 2 else object
        return isinstance(value, dict) and _all_match(value.values(), inner)
    is_other_class = inspect.isclass(kind) and kind not in (object, Any, Path)
    return not (is_other_class and isinstance(value, bool | int | float | str))


def _all_match(values: Iterable[object], hint: Hint) -> bool:
    return all(_matches(value, hint) for value in values)


def _matches_tuple(values: list[object], arguments: tuple[Hint, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return _all_match(values, arguments[0])
    if len(values) != len(arguments):
        return False
    return all(_matches(value, hint) for value, hint in zip(values, arguments, strict=True))


def _is_plain(hint: Hint) -> bool:
    """Whether null is no value of the type."""
    plain = (bool, int, float, str, list, tuple, dict)
    abstract = (collections.abc.Sequence, collections.abc.Mapping)
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
    if origin in (typing.Union, types.UnionType):
        # A parameter such as `float | Tensor` takes a number in a config.
        plain = [option for option in arguments if _is_plain(option)]
        shown = [*plain, type(None)] if plain else arguments
        return " or ".join(describe(option) for option in shown if option in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if hint in _NAMES:
        return _NAMES[hint]
    kind = origin or hint
    if kind in (list, tuple, collections.abc.Sequence):
        return _describe_list(kind, arguments)
    if kind in (dict, collections.abc.Mapping):
        return "a group of keys"
    return "a group with _target_"


def _describe_list(kind: object, arguments: tuple[Hint, ...]) -> str:
    items = [argument for argument in arguments if argument is not Ellipsis]
    text = "a list of values"
    if kind is tuple and Ellipsis not in arguments:
        text = f"a list of {len(items)} values"
    if not items:
        return text
    return f"{text}, each {' or '.join(dict.fromkeys(describe(item) for item in items))}"
