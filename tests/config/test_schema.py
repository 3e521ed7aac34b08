"""Every key has a type, also those whose default is null."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from maskseg import config as configs
from maskseg.config.schema import walk
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder
from maskseg.values import describe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: expected a whole number"),
        ("name=5", "name=5: expected text"),
        ("trainer.best_metric=[a]", "trainer.best_metric=['a']: expected text"),
        ("evaluation.oks_sigmas=5", "evaluation.oks_sigmas=5: expected a list"),
        ("evaluation.oks_sigmas=[a]", "evaluation.oks_sigmas=['a']: expected a list"),
        ("data.max_images=few", "data.max_images='few': expected a whole number from 1 to"),
        ("data.flip_pairs=[left]", "data.flip_pairs=['left']: expected a list"),
        ("model.heads.mask.norm=3", "model.heads.mask.norm=3: expected text or null"),
        ("model.proposer.strides=4", "model.proposer.strides=4: expected a group of keys"),
    ],
)
def test_wrong_types_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        configs.compose("train", [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("text", "value"), [("1e1", 10), ("10.0", 10), ("7", 7)])
def test_whole_numbers_in_other_forms(text: str, value: int) -> None:
    steps = configs.compose("train", [f"trainer.max_steps={text}"]).trainer.max_steps
    assert steps == value
    assert type(steps) is int


@pytest.mark.parametrize("experiment", configs.experiments())
def test_every_key_of_every_experiment_has_a_type(experiment: str) -> None:
    config = configs.compose("train", [f"experiment={experiment}"])
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    typed = {key for key, _, _ in walk(plain)}
    for key in leaves(plain):
        assert any(key == known or key.startswith(f"{known}.") for known in typed), key


@pytest.mark.parametrize(
    "path", sorted(config_folder().glob("*.yaml")), ids=lambda path: str(path.stem)
)
def test_every_key_of_every_tool_has_a_type(path: Path) -> None:
    # Guards against: a key is renamed, and its type is declared for the old name only
    content = parse_yaml(path.read_text())
    assert isinstance(content, dict)
    own = {key: value for key, value in content.items() if key != "defaults"}
    typed = {key for key, _, _ in walk(own)}
    assert set(leaves(own)) - {""} <= typed


def test_paths_are_text() -> None:
    words = ["data=custom", "data.images=3", "run_dir=2024", "trainer.resume=5", "trainer.init=[a]"]
    config = configs.compose("train", words)
    assert (config.data.images, config.run_dir) == ("3", "2024")
    assert (config.trainer.resume, config.trainer.init) == ("5", "[a]")


def leaves(node: object, place: str = "") -> list[str]:
    """The paths of all values but Hydra's own keys."""
    if not isinstance(node, dict):
        return [place]
    keys = [key for key in node if not str(key).startswith("_")]
    return [leaf for key in keys for leaf in leaves(node[key], f"{place}.{key}".lstrip("."))]


def test_types_in_words() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(tuple[float, float]) == "a list of 2 values, each a number"
    assert describe(list[list[str]]) == "a list of values, each a list of values, each text"
