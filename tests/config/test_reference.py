"""docs/config.md lists every key with its default, type and meaning, and is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskseg.config.reference import config_reference, read_files
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
PASTE_MODE = "model.heads.mask.paste_mode"


def write(folder: Path, **files: str) -> Path:
    """Write YAML files, of which `group__name` is `group/name.yaml`."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def rows(heading: str) -> dict[str, list[str]]:
    """The default, type and meaning of each key in a section of the page."""
    section = (
        PAGE.read_text(encoding="utf-8").partition(f"### `{heading}`\n")[2].partition("\n#")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_is_up_to_date() -> None:
    command = "python -m maskseg.config.reference > docs/config.md"
    assert PAGE.read_text(encoding="utf-8") == config_reference(), f"run {command}"


def test_every_key_and_file_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for file in read_files(config_folder()):
        assert f"`{file.name}`" in page
        for key in file.keys if file.group != "experiment" else ():
            assert f"| `{file.place_of(key)}` |" in page


def test_defaults_are_those_of_the_files() -> None:
    (trainer,) = [file for file in read_files(config_folder()) if file.group == "trainer"]
    content = parse_yaml((config_folder() / "trainer" / "default.yaml").read_text())
    assert isinstance(content, dict)
    defaults = {key.name: parse_yaml(key.default) for key in trainer.keys}
    assert defaults == {key: value for key, value in content.items() if key != "_target_"}


def test_keys_with_their_place_type_and_meaning() -> None:
    steps = rows("trainer=default")["trainer.max_steps"]
    kind = "a whole number from 1 to 1000000000 or null"
    assert steps == ["`90000`", kind, "number of steps; null: see trainer.epochs"]
    # The comment is above the key, and a defaults list puts the file elsewhere.
    trunk = rows("model/trunk@model.backbone.trunk=resnet")
    default, kind, meaning = trunk["model.backbone.trunk.weights"]
    assert (default, kind) == ("`IMAGENET1K_V1`", "text or null")
    assert meaning.startswith("pretrained weights: torchvision's name")
    # A variant that only overrides a value: type and meaning are those of the file it builds on.
    mask = rows("model=torchvision_mask_rcnn")["model.heads.mask.paste_mode"]
    assert mask == ["`torchvision`", *rows("model/heads@model.heads.mask=mask")[PASTE_MODE][1:]]
    assert mask[2]
    # Types that no class declares.
    assert (
        rows("optimizer=sgd")["optimizer.base_batch_size"][1]
        == "a whole number from 1 to 65536 or null"
    )
    assert rows("fit_svm")["fit.C"][1] == "a number above 0"


def test_a_key_without_a_meaning_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, tool="size: 3  # pixels\n", data__small="root: x\n")
    with pytest.raises(UserError, match=r"data/small\.yaml: root$"):
        config_reference(folder)


def test_a_meaning_is_written_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        trainer__a="# Long run.\n_target_: x.Y\n# Number of\n# steps.\nsteps: 9\n",
        trainer__b="_target_: x.Y\nsteps: 3\n",
        model__big="defaults:\n  - /trainer@part: a\npart: {steps: 4}\n",
        experiment__one="# @package _global_\n# The first.\ntrainer: {steps: 5, other: 6}\n",
    )
    page = config_reference(folder)
    assert page.count("number of steps") == 3
    assert "| `model.part.steps` | `4` |" in page
    assert "Long run." in page
    assert "| `one` | The first. |" in page
    assert "other" not in page.partition("## experiment")[2].partition("##")[0]


def test_a_comment_at_the_top_is_that_of_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, data__small="# A small dataset.\nroot: x\n")
    with pytest.raises(UserError, match="root"):
        config_reference(folder)
