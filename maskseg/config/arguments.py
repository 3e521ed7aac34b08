"""The form of a command line: words other than `key=value` are reported with a correction."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from maskseg.config.compose import compose, keys_of, nearest
from maskseg.config.foreign_names import find_advice, find_key
from maskseg.config.overrides import key_of
from maskseg.config.show import SHOW_CONFIG, SHOW_GROUPS
from maskseg.errors import UserError
from maskseg.files.configs import experiments, is_group

_OPTIONS = (SHOW_CONFIG, SHOW_GROUPS)
_ALLOWED = {"sweep": (*_OPTIONS, "--multirun", "-m"), "compare": ()}  # of other tools: _OPTIONS
_DASHES = ("-", "\N{EN DASH}", "\N{EM DASH}")
_WITH_CHECKPOINT = ("evaluate", "predict", "propose", "fit_hash", "fit_svm")
_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


def check_form(tool: str, arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is neither `key=value` nor an option of the tool.

    The arguments of `compare` without "=" are run folders.
    """
    _check_blanks(arguments)
    allowed = _ALLOWED.get(tool, _OPTIONS)
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument.startswith(_DASHES):
            if argument not in allowed and not _exists(argument):
                raise UserError(_explain_option(tool, argument, following, arguments))
        elif "=" not in argument and not argument.startswith("~") and tool != "compare":
            before = arguments[index - 1] if index else ""
            _check_quotes(before, argument)
            raise UserError(_explain_word(tool, argument, following, arguments))


def _check_quotes(before: str, word: str) -> None:
    """Raise UserError for the second part of a path with a blank."""
    if "=" in before and _exists(f"{before.partition('=')[2]} {word}"):
        raise UserError(f"{word}: quote a value with blanks: '{before} {word}'")


def _check_blanks(arguments: Sequence[str]) -> None:
    """Raise UserError for blanks around the equals sign of `key=value`."""
    for index, argument in enumerate(arguments):
        before = arguments[index - 1] if index else ""
        after = arguments[index + 1] if index + 1 < len(arguments) else ""
        words = _words_of_pair(before, argument, after)
        if words and not _exists(argument):
            raise UserError(
                f"{' '.join(words)}: write {''.join(words)}, without blanks around the equals sign"
            )


def _words_of_pair(before: str, argument: str, after: str) -> list[str]:
    """The words that together are `key=value`, [] where the argument needs no other one."""
    if argument == "=" and before and after:
        return [before, argument, after]
    if argument.startswith("=") and before and "=" not in before:
        return [before, argument]
    if argument.endswith("=") and after and "=" not in after and after[0] not in "-~+":
        return [argument, after]
    return []


def _explain_option(tool: str, option: str, following: str, arguments: Sequence[str]) -> str:
    """One line for an option such as `--epochs 100`."""
    name, equals, value = option.partition("=")
    shown = option
    if not equals and _is_value(following):
        value = following
        shown = f"{option} {following}"
    name = name.lstrip("".join(_DASHES)).replace("-", "_")
    if name == "cfg":
        return f"{shown}: write --cfg job, which prints the config"
    problem = f"{shown}: arguments are key=value, without dashes"
    if tool == "compare":
        return f"{problem}; the keys are output and overwrite"
    return f"{problem}; {_instead(tool, name, value, arguments)}"


def _explain_word(tool: str, word: str, following: str, arguments: Sequence[str]) -> str:
    """One line for an argument without "=", such as `best.pt`, `SOLVER.BASE_LR 0.01` or `a:1`."""
    problem = f"{word!r} is not of the form key=value"
    if word in experiments():
        return f"{problem}: write experiment={word}"
    key = _key_for_path(tool, word, arguments)
    if key is not None:
        return f"{problem}: write {key}={word}"
    name, colon, value = word.partition(":")
    if not colon:
        value = following if _is_value(following) else ""
    config = _known_config(tool, arguments)
    if find_key(name, set(keys_of(config))) or find_advice(name) or name in set(keys_of(config)):
        return f"{problem}: {_instead(tool, name, value, arguments)}"
    return f"{problem}; --help shows commands"


def _instead(tool: str, name: str, value: str, arguments: Sequence[str]) -> str:
    """What to write instead of a setting in another form."""
    config = _known_config(tool, arguments)
    known = set(keys_of(config))
    key = name if name in known else find_key(name, known)
    if key is not None:
        return f"write {key}={value or '...'}"
    advice = find_advice(name)
    return f"in maskseg: {advice}" if advice else nearest(name, config)


def _is_value(argument: str) -> bool:
    return bool(argument) and "=" not in argument and not argument.startswith("--")


def _known_config(tool: str, arguments: Sequence[str]) -> DictConfig:
    """A config with the keys that the tool may have, for the groups that the arguments choose."""
    choices = [argument for argument in arguments if "=" in argument and is_group(key_of(argument))]
    name = "train" if tool == "sweep" else tool
    if tool not in _WITH_CHECKPOINT:
        return _compose_valid(name, choices)
    trained = _compose_valid("train", choices)
    OmegaConf.set_struct(trained, False)
    merged = OmegaConf.merge(trained, compose(name, []))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, False)
    for key in ("name", "run_dir", "seed", "batch_size"):
        merged.pop(key, None)
    return merged


def _compose_valid(name: str, choices: Sequence[str]) -> DictConfig:
    """A config with the choices of groups, without them where they are wrong themselves."""
    try:
        return compose(name, choices)
    except UserError:
        return compose(name, [])


def _key_for_path(tool: str, word: str, arguments: Sequence[str]) -> str | None:
    """The key of a tool that a file or folder probably belongs to, None for other words."""
    path = Path(word)
    kinds: dict[str, Callable[[Path], bool]] = {
        "image": lambda path: path.suffix.lower() in _IMAGES or "*" in path.name,
        "weights": lambda path: path.suffix.lower() in (".pt", ".pth", ".pkl", ".safetensors"),
        "json": lambda path: path.suffix.lower() == ".json",
        "run": _is_run,
        "folder": Path.is_dir,
    }
    given = {key_of(argument) for argument in arguments}
    for kind, key in _PATH_KEYS.get(tool, ()):
        if key not in given and kinds[kind](path):
            return key
    return None


_CHECKPOINT = (("weights", "checkpoint"), ("run", "checkpoint"))
_JSON = (("json", "data.train_json"), ("json", "data.val_json"), ("folder", "data.images"))
# The kinds of files that a tool reads, and their keys; the first that the command line lacks.
_PATH_KEYS: dict[str, Sequence[tuple[str, str]]] = {
    "predict": (*_CHECKPOINT, ("image", "input"), ("folder", "input")),
    "evaluate": (*_CHECKPOINT, ("folder", "checkpoint"), ("json", "data.val_json")),
    "propose": (*_CHECKPOINT, ("folder", "checkpoint"), *_JSON),
    "fit_hash": (*_CHECKPOINT, ("folder", "checkpoint")),
    "fit_svm": (*_CHECKPOINT, ("folder", "checkpoint")),
    "review": (("json", "file"), ("folder", "images")),
    "annotate": (("json", "data.val_json"), ("folder", "data.images"), *_CHECKPOINT),
    "check_data": _JSON,
    "convert": (("weights", "weights"), ("weights", "output"), ("folder", "weights")),
    "train": (("weights", "trainer.init"), ("run", "trainer.resume"), *_JSON),
    "sweep": (("weights", "trainer.init"), *_JSON),
}


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("best.pt", "last.pt"))


def _exists(argument: str) -> bool:
    try:
        return os.path.lexists(argument)
    except (OSError, ValueError):  # too long, or with a null byte
        return False
