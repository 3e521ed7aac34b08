"""tools/propose.py, and trainings from its files."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from made.runs import MASKS, SCENES, SMALL, SMALL_WITHOUT_RPN, lines
from made.tools import assert_refused, done, said

from maskseg.data.datasets.scenes import make_scenes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("propose")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    with contextlib.chdir(folder):
        done("train", *SMALL, *MASKS, *SCENES, "trainer.max_steps=2", "run_dir=run")
        for split in ("train", "val"):
            output = done(
                "propose",
                "checkpoint=run",
                f"output={split}.proposals",
                f"split={split}",
                "data.root=scenes",
            )
            count = 8 if split == "train" else 4
            assert re.search(
                rf"{split}\.proposals: \d+ proposals of {count} images .*"
                r"recall of \d+ objects: 0\.\d+ at IoU 0\.5",
                output,
            )
    return folder


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def test_training_from_a_file(home: Path) -> None:
    files = ["data.train_proposals=train.proposals", "data.val_proposals=val.proposals"]
    words = [*SMALL_WITHOUT_RPN, *SCENES, *MASKS, "model/proposer=file"]
    done("train", *words, *files, "run_dir=fast")
    log = lines(home / "fast")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert not any(key.startswith("loss/rpn") for key in log[0])
    assert "loss/mask" in log[0]
    assert "AP50" in done("evaluate", "checkpoint=fast", "output=evaluated")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train", ["model/proposer=file", "run_dir=no"], "data.train_proposals is not set"),
        (
            "train",
            ["model/proposer=file", "data.train_proposals=val.proposals", "run_dir=no"],
            "val.proposals is of another dataset",
        ),
        ("propose", ["checkpoint=run"], "output=... is missing"),
        (
            "propose",
            ["checkpoint=run", "output=absent/a.proposals", "data.root=scenes"],
            "there is no folder absent",
        ),
        (
            "propose",
            ["checkpoint=run", "output=a.proposals", "split=test", "data.root=scenes"],
            "split=test",
        ),
    ],
)
def test_refused_arguments(home: Path, tool: str, arguments: list[str], message: str) -> None:
    extra = [*SMALL_WITHOUT_RPN, *SCENES] if tool == "train" else []
    assert_refused(said(tool, *extra, *arguments), message)
    assert not (home / "no").exists()
    assert not (home / "a.proposals").exists()
