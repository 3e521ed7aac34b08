"""The suites run and print what they should; no time is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made.runs import MASKS, SCENES, SMALL, call, finish, start

from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.data.scenes import make_scenes


def test_things_are_measured_in_turn() -> None:
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, torch.device("cpu"))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(v) for v in found.values()] == [3, 3]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_the_trainers_suite(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    said = call([*SMALL, *MASKS, *SCENES, "steps=3", "trainer.ema=0.9", "output=out.json"], tmp_path, tool="benchmark")
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(said[said.index("{") :]) == numbers
    seconds, every, shares = numbers["seconds"], numbers["every"], numbers["overhead"]
    assert every == {"log": 1, "checkpoint": 2, "pictures": 4}  # those of debug=smoke
    for part in every:
        assert shares[part] == pytest.approx(seconds[part] / (every[part] * seconds["bare_step"]))
    assert shares["all"] == pytest.approx(sum(v for k, v in shares.items() if k != "all"))
    assert min(seconds.values()) > 0
    assert {p.name for p in tmp_path.iterdir()} == {"scenes", "out.json", "said.txt"}


def test_the_suite_of_a_step(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    said = call([*SMALL, *MASKS, *SCENES, "suite=train", "steps=2"], tmp_path, tool="benchmark")
    numbers = json.loads(said[said.index("{") :])
    assert set(numbers["step_seconds"]) == {"joint", "from_file"}
    assert numbers["joint_over_from_file"] > 0


@pytest.mark.parametrize(
    ("word", "told"), [("suite=nothing", "suite must be one of train, trainer"), ("steps=0", "steps must be at least 1"), ("step=3", "'steps'")]
)
def test_what_makes_no_sense(tmp_path: Path, word: str, told: str) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    code, said = finish(start([*SMALL, *SCENES, word], tmp_path, tool="benchmark"), tmp_path)
    assert code == 2
    assert told in said.strip().splitlines()[-1]
