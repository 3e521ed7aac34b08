"""Paths on the command line are taken as they are typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made.tools import assert_refused, said
from omegaconf import OmegaConf

from maskseg import config as configs
from maskseg.config.path_values import find_path, is_path_key, path_value, quote_swept_paths
from maskseg.config.restore import checkpoint_argument
from maskseg.config.sweeps import sweep_points
from maskseg.errors import UserError

ODD_NAMES = [
    "photo (1).png",
    "a=b.png",
    "x,y.png",
    "[01].jpg",
    "it's.png",
    'say "a".png',
    "a#1.png",
    "Übung 训练 🦊.png",
    "2024",
    "1e3",
    "true",
    "a b",
    " a ",
    "a\\b",
    "a\\",
    "it\\'s",
    "$x",
    "{a}",
    "a:b",
    "@x",
    "*.png",
    "choice(1,2)",
    "-",
    "~no_such_user",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, below a home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def review_file(value: str) -> object:
    return configs.compose("review", [f"file={value}"]).file


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_read_as_typed(folder: Path, name: str) -> None:
    assert review_file(name) == name  # a file to write, or one that is missing
    (folder / name).touch()
    assert review_file(name) == name


@pytest.mark.parametrize("name", ["${x}.png", "'quoted'", "[a.json,b.json]", "~", "null (1)"])
def test_a_file_that_exists_comes_before_hydras_grammar(folder: Path, name: str) -> None:
    (folder / name).touch()
    assert review_file(name) == name
    config = configs.compose("train", ["data=custom", f"data.train_json={name}"])
    assert config.data.train_json == name


def test_hydras_grammar_is_still_read(folder: Path) -> None:
    assert review_file("'a b'") == "a b"
    assert review_file('"it\'s"') == "it's"
    assert review_file("~/x y") == f"{folder.parent}/x y"
    assert review_file("'~/x'") == f"{folder.parent}/x"
    overrides = ["data=coco", "data.val_json=${data.root}/x.json", "data.train_json=null"]
    data = configs.compose("train", [*overrides, "data.root=/a b"]).data
    assert data.val_json == "/a b/x.json"
    assert data.train_json is None


def test_a_list_of_files_is_a_list() -> None:
    config = configs.compose("train", ["data=custom", "data.train_json=[a.json,b.json]"])
    assert config.data.train_json == ["a.json", "b.json"]


def test_other_keys_keep_hydras_grammar() -> None:
    config = configs.compose("train", ["data.max_images=5", "optimizer.lr=1e-3", "name='a b'"])
    assert (config.data.max_images, config.optimizer.lr, config.name) == (5, 1e-3, "a b")


@pytest.mark.parametrize(
    "key",
    [
        "input",
        "output",
        "checkpoint",
        "weights",
        "file",
        "images",
        "run_dir",
        "categories",
        "export",
        "data.root",
        "data.images",
        "data.train_json",
        "data.val_images",
        "data.stuff_json",
        "data.train_proposals",
        "data.val_segments",
        "trainer.init",
        "trainer.resume",
        "model.backbone.trunk.weights",
    ],
)
def test_keys_that_hold_paths(key: str) -> None:
    assert is_path_key(key)


def test_each_key_that_names_a_file_or_folder_holds_a_path() -> None:
    words = re.compile(r"\b(file|folder|JSON|PNG)\b")
    missing = []
    for path in sorted(configs.config_folder().rglob("*.yaml")):
        place = path.relative_to(configs.config_folder()).parent
        comment = ""
        for line in path.read_text().splitlines():
            match = re.match(r"([a-z]\w*):(?:.*?# (.*))?", line)
            if match is None or match[1] == "defaults":
                comment = line if line.startswith("#") else ""
                continue
            key = ".".join([*place.parts, match[1]])
            if words.search(f"{comment} {match[2]}") and not is_path_key(key):
                missing.append(key)
            comment = ""
    # The name of an experiment is part of a folder's name, and two keys say what may be done.
    assert set(missing) <= {"name", "trainer.resume_changed_data", "overwrite"}


CUSTOM = ["data=custom"]
TOOL_KEYS = {
    "train": "run_dir trainer.init data.train_json data.val_json data.images data.train_proposals",
    "check_data": "fix data.train_json data.images data.stuff_json",
    "convert": "weights output categories",
    "annotate": "output checkpoint weights data.val_json data.images",
    "review": "file images output export",
    "benchmark": "output data.train_json",
    "propose_segments": "output input data.train_json",
    "fit_backbone": "output checkpoint",
    "segments": "output checkpoint",
}
CHECKPOINT_KEYS = {
    "predict": "checkpoint input output",
    "evaluate": "checkpoint output data.root data.val_json data.val_images",
    "propose": "checkpoint output data.train_json",
    "fit_svm": "checkpoint output",
    "fit_hash": "checkpoint output",
}
TYPED = ["2024", "photo (1).png", "a=b,c.png", "[01].jpg", "it's.png", "Übung.png"]


@pytest.mark.parametrize("tool", TOOL_KEYS)
def test_the_paths_of_a_tool_are_read_as_typed(tool: str) -> None:
    keys = TOOL_KEYS[tool].split()
    has_data = any(key.startswith("data.") for key in keys)
    typed = [name for _, name in zip(keys, TYPED, strict=False)]
    overrides = [f"{key}={name}" for key, name in zip(keys, typed, strict=True)]
    config = configs.compose(tool, [*CUSTOM, *overrides] if has_data else overrides)
    assert [OmegaConf.select(config, key) for key in keys] == typed


@pytest.mark.parametrize("tool", CHECKPOINT_KEYS)
def test_the_paths_beside_a_checkpoint_are_read_as_typed(trained: str, tool: str) -> None:
    keys = CHECKPOINT_KEYS[tool].split()
    for names in (TYPED, TYPED[::-1]):
        pairs = list(zip(keys, names, strict=False))
        overrides = [f"{key}={name}" for key, name in pairs]
        config = configs.from_checkpoint(trained, overrides, tool)
        assert [OmegaConf.select(config, key) for key in keys] == [name for _, name in pairs]


@pytest.fixture(scope="module")
def trained() -> str:
    """The config of a trained model."""
    return configs.to_yaml(configs.compose("train", []))


@pytest.mark.parametrize("key", ["data.max_images", "name", "data.check_images", "trainer.ema"])
def test_keys_that_hold_no_paths(key: str) -> None:
    assert not is_path_key(key)


@pytest.mark.parametrize("name", ["a=b (1).pt", "2024", "~no_such_user/x"])
def test_the_checkpoint_is_found_before_the_config_is_read(name: str) -> None:
    assert checkpoint_argument(["output=x", f"checkpoint={name}"], "predict") == Path(name)
    assert checkpoint_argument([f"checkpoint='{name}'"], "predict") == Path(name)
    assert find_path(["output=x"], "checkpoint") == ""


def test_home_is_expanded(folder: Path) -> None:
    assert path_value("~/runs/a b") == f"{folder.parent}/runs/a b"
    (folder / "~").mkdir()
    assert path_value("~") == "~"


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("data.images=p (1),q", ["p (1)", "q"]),
        ("data.images=r,s", ["r,s"]),
        ("data.images=p (1)", ["p (1)"]),
        ("data.images=new,other", ["new", "other"]),
        ("data.images=choice(new,other)", ["new", "other"]),
        ("data.images='p (1)',q", ["p (1)", "q"]),
    ],
)
def test_the_comma_lists_of_a_sweep(folder: Path, override: str, values: list[str]) -> None:
    for name in ("p (1)", "q", "r,s"):
        (folder / name).mkdir()
    points = list(sweep_points(quote_swept_paths(["data=custom", override])))
    assert [configs.compose("train", point).data.images for point in points] == values


def test_a_tool_names_the_path_as_typed() -> None:
    words = ["file=a=b (1).json", "images=2024"]
    assert_refused(said("review", *words), "images=2024: no such folder")


def test_a_key_that_is_cut_short_is_completed() -> None:
    with pytest.raises(UserError, match=r"did you mean 'trainer\.keep_checkpoints'\?"):
        configs.compose("train", ["trainer.keep=3"])
    with pytest.raises(UserError, match=r"did you mean 'trainer\.max_steps'\?"):
        configs.compose("train", ["trainer.max_step=3"])
