"""A damaged training state is refused before anything is restored, with the name of its key."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made.states import ADAM, FACTORED, SGD, STEPS, MakeOptimizer, build_state

from maskseg.engine import run_folder
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.engine.loop import TrainSettings
from maskseg.errors import UserError


def set_at(checkpoint: dict[str, Any], path: str, value: object) -> None:
    """Set the value at a path such as `optimizer/state/0/step`; `DELETE` deletes the key."""
    *parents, last = path.split("/")
    node: Any = checkpoint
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    key_of_value = int(last) if last.isdigit() else last
    if value is DELETE:
        del node[key_of_value]
    else:
        node[key_of_value] = value


DELETE = object()
COUNT = [-1, 1.5, "3", None, True, [3], torch.tensor(3)]
NUMBER = ["0.1", None, [0.1], math.nan, math.inf, 10**400]
TENSOR = [torch.zeros(5), torch.zeros(6, 4, dtype=torch.int64), "x", 1.0, [0.0]]
STEP = [-1.0, 0.5, math.nan, 1e9, "3", torch.tensor(-1.0), torch.tensor(math.nan), torch.zeros(2)]
RNG = torch.get_rng_state()
GROUP = "optimizer/param_groups/0"
FAULTS: dict[str, list[object]] = {
    "step": [*COUNT, DELETE, 10**18],
    "evaluated": [*COUNT, DELETE, STEPS + 1],
    "stale": [*COUNT, DELETE, 10**9],
    "best": ["0.5", [0.5], True, torch.tensor(0.5), DELETE],
    "metrics": [None, [], 3, {"segm/AP": "high"}, {"segm/AP": None}, {3: 0.5}, DELETE],
    "ema": [3, [], {}, DELETE],
    "ema/updates": [*COUNT, DELETE, 10**9],
    "ema/model": [DELETE],
    "ema/model/0.weight": [torch.zeros(6, 5), torch.zeros(6, 4, dtype=torch.float64), DELETE],
    "ema/model/new": [torch.zeros(1)],
    "model/0.weight": [torch.zeros(6, 4, dtype=torch.float16)],
    "optimizer": [None, [], 3, {}, DELETE],
    "optimizer/state": [None, [], 3, DELETE, {"0": {}}, {-1: {}}, {99: {}}, {0: None}],
    "optimizer/state/0": [None, [], 3, {}],
    "optimizer/state/0/step": [*STEP, DELETE],
    "optimizer/state/0/exp_avg": [*TENSOR, torch.full((6, 4), math.nan), DELETE],
    "optimizer/state/0/exp_avg_sq": [*TENSOR, torch.full((6, 4), math.inf), DELETE],
    "optimizer/param_groups": [None, {}, [], 3, [None], DELETE],
    GROUP: [None, [], {}],
    f"{GROUP}/params": [None, [], [0], [0, 0, 1], [1, 2, 3], ["0", 1, 2], {}, DELETE],
    f"{GROUP}/lr": [*NUMBER, -0.1, 1e30, DELETE],
    f"{GROUP}/initial_lr": [*NUMBER, -0.1, 1e30, DELETE],
    f"{GROUP}/betas": [0.9, [0.9], [0.9, "x"], [0.9, None], [0.9, 5.0], None, DELETE],
    f"{GROUP}/eps": [*NUMBER, -1.0, DELETE],
    f"{GROUP}/weight_decay": [*NUMBER, -1.0, DELETE],
    f"{GROUP}/amsgrad": ["yes", 3, [], DELETE],
    f"{GROUP}/foreach": ["yes", [], DELETE],
    f"{GROUP}/unknown": [3],
    "scheduler": [None, [], 3, {}, DELETE],
    "scheduler/last_epoch": [*COUNT, 0, 10**18, DELETE],
    "scheduler/_step_count": [*COUNT, 10**18],
    "scheduler/base_lrs": [None, 3, [], [0.1], ["x", "y"], [math.nan, 0.1], [9.0, 9.0], DELETE],
    "scheduler/_last_lr": [None, 3, [], [0.1], ["x", "y"], [math.nan, 0.1], [9.0, 9.0], DELETE],
    "scheduler/_is_initial": ["x", [1]],
    "scaler": [None, [], 3, DELETE],
    "scaler/scale": [*NUMBER, 0.0, -1.0, DELETE],
    "scaler/growth_factor": [*NUMBER, 0.0, DELETE],
    "scaler/backoff_factor": [*NUMBER, 0.0, DELETE],
    "scaler/growth_interval": [*COUNT, 0, DELETE],
    "scaler/_growth_tracker": [*COUNT, DELETE],
    "rng": [None, [], {}, 3, RNG, [None], DELETE],
    "rng/0": [None, [], {}],
    "rng/0/cpu": [None, 3, RNG[:-8], RNG.float(), torch.zeros(8), torch.zeros_like(RNG), DELETE],
    "rng/0/cuda": [3, [], torch.zeros(16), torch.zeros(7, dtype=torch.uint8), DELETE],
}


@pytest.mark.parametrize("path", FAULTS)
def test_a_damaged_state_is_refused_and_its_key_is_named(path: str, tmp_path: Path) -> None:
    state = build_state()
    file = tmp_path / "last.pt"
    for value in FAULTS[path]:
        checkpoint = copy.deepcopy(state.checkpoint()) | {"model": state.model.state_dict()}
        checkpoint["model"] = dict(checkpoint["model"])
        set_at(checkpoint, path, value)
        # As a checkpoint that was saved with this state; `load_checkpoint` may refuse it already.
        save_checkpoint(file, checkpoint)
        with pytest.raises(UserError) as raised:
            state.check(load_checkpoint(file), file, "trainer.resume=auto")
        message = str(raised.value)
        assert message.startswith(str(file)), (path, value)
        assert "\n" not in message
        assert len(message) < 400
        parts = [part for part in path.split("/") if not part.isdigit()]
        is_whole_group = "another optimizer" in message
        assert is_whole_group or parts[0] in message.lower(), (path, value, message)


@pytest.mark.parametrize("make", [ADAM, SGD, FACTORED])
@pytest.mark.parametrize("steps", [0, STEPS])
@pytest.mark.parametrize("ema", [True, False])
def test_a_valid_state_is_accepted_and_restored(
    make: MakeOptimizer, steps: int, ema: bool, tmp_path: Path
) -> None:
    state = build_state(make, ema, steps)
    save_checkpoint(tmp_path / "a.pt", state.checkpoint())
    for other in (build_state(make, ema, 0), build_state(make, not ema, 0)):
        checkpoint = load_checkpoint(tmp_path / "a.pt")
        other.check(checkpoint, "a.pt", "a.pt")
        other.load(checkpoint)
        assert other.step == steps
        expected = state.optimizer.state_dict()["state"]
        assert other.optimizer.state_dict()["state"].keys() == expected.keys()


def test_another_optimizer_or_model_is_no_damage() -> None:
    checkpoint = build_state(SGD).checkpoint()
    with pytest.raises(UserError, match=r"a\.pt: the checkpoint is of another optimizer"):
        build_state(ADAM).check(checkpoint, "a.pt", "trainer.resume=auto")
    checkpoint = build_state().checkpoint()
    checkpoint["model"].pop("0.weight")
    with pytest.raises(UserError, match=r"trainer\.resume=auto does not fit .* 1 missing"):
        build_state().check(checkpoint, "a.pt", "trainer.resume=auto")


def test_values_of_another_version_of_torch_are_ignored() -> None:
    state = build_state()
    checkpoint = state.checkpoint()
    checkpoint["scheduler"] |= {"verbose": "no", "get_lr": 5}
    state.check(checkpoint, "a.pt", "a.pt")
    state.load(checkpoint)
    state.scheduler.step()


def test_an_error_of_an_optimizer_is_one_line() -> None:
    state = build_state()
    checkpoint = state.checkpoint()
    checkpoint["optimizer"]["param_groups"] = []
    with pytest.raises(UserError, match=r"cannot be restored \(.*\): start from its weights"):
        state.load(checkpoint)


def test_a_damaged_last_checkpoint_falls_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, name in ((1, "step_0000001.pt"), (2, "last.pt")):
        checkpoint = build_state(steps=step).checkpoint()
        if name == "last.pt":
            checkpoint["rng"][0]["cpu"] = torch.zeros(8)
        save_checkpoint(tmp_path / name, checkpoint)
    folder = run_folder.choose("test", str(tmp_path), TrainSettings(9, "cpu", resume="auto"))
    folder.close()
    assert folder.candidates == [tmp_path / "step_0000001.pt"]
    assert "last.pt: its training state is damaged: rng[0].cpu is not" in capsys.readouterr().out
