"""Training steps: gradient accumulation, EMA, mixed precision, and values that are not finite."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from made.runs import assert_equal
from made.training import (
    RANDOM,
    Killed,
    Run,
    Scripted,
    assert_same_run,
    log,
    make_source,
    write_scenes,
)
from torch import Tensor, nn

from maskseg.engine.checkpoint import inference_weights, latest_valid, load_checkpoint
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.state import TrainState, build_ema
from maskseg.engine.step import TrainStep
from maskseg.errors import UserError
from maskseg.structures import Batch


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5)
    return folder


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return log(folder, kind)


class Poison:
    """Makes a model's loss NaN or its gradients infinite, at given calls of its forward pass.

    kind: `loss` or `gradient`.
    """

    def __init__(self, model: nn.Module, calls: set[int], kind: str) -> None:
        self.forward = model.forward
        self.calls = calls
        self.kind = kind
        self.count = 0
        model.forward = self  # type: ignore[method-assign]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.count += 1
        losses: dict[str, Tensor] = self.forward(batch)
        if self.count in self.calls and self.kind == "loss":
            losses["mask"] = losses["mask"] * math.nan
        if self.count in self.calls and self.kind == "gradient":
            losses["mask"].register_hook(lambda g: g * math.inf)
        return losses


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Weights, running means of batch norm, momentum and EMA are unchanged.

    The forward pass has updated the running means already.
    """
    keys: dict[str, Any] = {"checkpoint_every": 1, "ema": 0.9, "keep_checkpoints": 9}
    short = Run(make_source(scenes), tmp_path / "short", steps=3, **keys)
    Poison(short.model, {3}, kind)
    short.go()  # the last step is saved in any case
    before = load_checkpoint(tmp_path / "short" / "step_0000002.pt")
    after = load_checkpoint(tmp_path / "short" / "last.pt")
    assert after["step"] == 3
    capsys.readouterr()
    run = Run(make_source(scenes), tmp_path, steps=4, **keys)
    Poison(run.model, {3}, kind)
    run.go()
    assert not (tmp_path / "step_0000003.pt").exists()
    for part in ("model", "optimizer", "ema"):
        assert_equal(
            {k: v for k, v in flat(before[part]) if "lr" not in k},
            {k: v for k, v in flat(after[part]) if "lr" not in k},
        )
    assert after["scheduler"]["last_epoch"] == before["scheduler"]["last_epoch"] + 1
    output = capsys.readouterr().out
    assert "warning: step 3 is skipped" in output
    assert ("mask = nan" if kind == "loss" else "the gradient of") in output
    skipped = lines(tmp_path, "skipped")
    assert [line["step"] for line in skipped] == [3]
    batch = next(iter(run.source.train_loader(2, 4, 0, 2)))
    for image_id, name in zip(batch.image_ids, batch.file_names, strict=True):
        assert f"image {image_id} ({name})" in skipped[0]["why"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4]
    assert all(
        torch.isfinite(v).all() for v in load_checkpoint(tmp_path / "last.pt")["model"].values()
    )


@pytest.mark.parametrize("keep", [0, 1])
def test_a_run_that_diverges_leaves_its_last_good_checkpoint(
    scenes: Path, tmp_path: Path, keep: int
) -> None:
    keys: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": keep, "max_bad_steps": 3}
    run = Run(make_source(scenes), tmp_path, steps=9, **keys)
    Poison(run.model, {3, *range(5, 10)}, "loss")
    with pytest.raises(UserError, match=r"last\.pt is now .*diverged_0000004\.pt"):
        run.go()
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    # Step 3 is skipped and not saved; the weights of step 4 are those that fail.
    assert names == ["diverged_0000004.pt", "step_0000002.pt"]
    latest = latest_valid(tmp_path)
    assert latest is not None
    again = Run(make_source(scenes), tmp_path, steps=4, **keys)
    again.go(latest[1])
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    kept = [] if keep == 0 else ["step_0000003.pt"]
    assert names == ["diverged_0000004.pt", "last.pt", *kept]


def test_a_run_that_diverges_at_once_starts_anew(scenes: Path, tmp_path: Path) -> None:
    run = Run(make_source(scenes), tmp_path, steps=9, checkpoint_every=1, max_bad_steps=2)
    Poison(run.model, {2, 3}, "loss")
    with pytest.raises(UserError, match=r"last\.pt is now .*diverged_0000001\.pt"):
        run.go()
    assert latest_valid(tmp_path) is None


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """List the leaves of nested dictionaries and lists by their paths."""
    if not isinstance(value, dict | list):
        return [(name, value)]
    leaves = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        leaves += flat(inner, f"{name}.{key}")
    return leaves


def test_too_many_bad_steps_in_a_row_stop_the_run(scenes: Path, tmp_path: Path) -> None:
    run = Run(make_source(scenes), tmp_path, steps=20, checkpoint_every=2, max_bad_steps=3)
    Poison(run.model, {2, *range(6, 21)}, "loss")
    with pytest.raises(
        UserError,
        match=r"3 steps in a row with losses or gradients that are not finite, "
        r"the last: .*mask = nan.*image \d",
    ):
        run.go()
    assert [line["step"] for line in lines(tmp_path, "skipped")] == [2, 6, 7, 8]
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert all(torch.isfinite(v).all() for v in latest[1]["model"].values())


def test_gradient_accumulation_gives_the_gradient_of_the_batch(
    scenes: Path, tmp_path: Path
) -> None:
    """With norms of single images. The losses are close, but not equal.

    The losses of a micro-batch are normalized by its own counts.
    """
    logs = {}
    for count in (1, 2):
        run = Run(
            make_source(scenes),
            tmp_path / str(count),
            steps=3,
            batch=4,
            accumulate_grad_batches=count,
            norm="GN",
        )
        run.go()
        logs[count] = lines(tmp_path / str(count))
    assert [line["step"] for line in logs[2]] == [1, 2, 3]
    for one, two in zip(logs[1], logs[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)
    assert logs[1][0]["loss/rpn_objectness"] == pytest.approx(
        logs[2][0]["loss/rpn_objectness"], rel=1e-5
    )  # the same number of samples in every image: equal


def test_the_ema_step_by_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = build_ema(model, 0.5)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for update in range(4):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.ones_like(value))
        ema.update_parameters(model)
        # AveragedModel copies the weights at its first update.
        decay = 0.0 if update == 0 else min(0.5, (1 + update) / (10 + update))
        for k, v in model.state_dict().items():
            expected[k] = (
                decay * expected[k] + (1 - decay) * v if v.is_floating_point() else v.clone()
            )
    for k, v in ema.module.state_dict().items():
        assert torch.allclose(v, expected[k], atol=1e-6), k


def test_the_ema_is_evaluated_saved_used_and_resumed(scenes: Path, tmp_path: Path) -> None:
    evaluated: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module, _: int, __: Any) -> dict[str, float]:
        # The proposer has no norms, which inference fuses.
        evaluated.append(
            {k: v.clone() for k, v in model.state_dict().items() if k.startswith("proposer.")}
        )
        return {"segm/AP": 0.5}

    whole = Run(make_source(scenes, RANDOM), tmp_path / "whole", ema=0.99)
    whole.go(evaluate=evaluate)
    checkpoint = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert len(evaluated[0]) == 6
    assert_equal(
        {k: v for k, v in inference_weights(checkpoint).items() if k in evaluated[0]}, evaluated[0]
    )
    assert any(not torch.equal(v, checkpoint["model"][k]) for k, v in evaluated[0].items())
    first = Run(make_source(scenes, RANDOM), tmp_path / "cut", ema=0.99, checkpoint_every=2)
    with pytest.raises(Killed):
        first.go(stop=3)
    latest = latest_valid(tmp_path / "cut")
    assert latest is not None
    second = Run(make_source(scenes, RANDOM), tmp_path / "cut", ema=0.99)
    second.go(latest[1], evaluate=evaluate)
    assert_same_run(whole, second)
    # An EMA that is enabled by a resumed run starts from the weights.
    plain = load_checkpoint(tmp_path / "whole" / "last.pt") | {"ema": None}
    late = Run(make_source(scenes), tmp_path / "late", steps=7, ema=0.99)
    late.go(plain)
    assert load_checkpoint(tmp_path / "late" / "last.pt")["ema"]["updates"] == 1


def test_fp16_scales_the_loss_and_saves_the_scale(scenes: Path, tmp_path: Path) -> None:
    run = Run(make_source(scenes), tmp_path, precision="fp16", steps=3)
    run.go()
    assert {v.dtype for v in run.model.state_dict().values()} == {torch.float32, torch.int64}
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert checkpoint["scaler"]["scale"] > 1
    plain = Run(make_source(scenes), tmp_path / "fp32", steps=3)
    plain.go()
    assert lines(tmp_path)[0]["loss"] == pytest.approx(
        lines(tmp_path / "fp32")[0]["loss"], rel=0.02
    )
    assert lines(tmp_path)[0]["loss_scale"] >= 1
    again = Run(make_source(scenes), tmp_path, precision="fp16", steps=4)
    again.go(checkpoint)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_fp16_overflows_reduce_the_loss_scale_without_a_warning(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(make_source(scenes), tmp_path, precision="fp16", steps=3, ema=0.9)
    Poison(run.model, {2}, "gradient")
    run.go()
    assert "warning" not in capsys.readouterr().out
    scales = [line["loss_scale"] for line in lines(tmp_path)]
    assert scales[1] == scales[0] / 2


def test_the_compiled_backbone_gives_the_same_losses(scenes: Path, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.compiler.reset()
        run = Run(make_source(scenes), tmp_path / str(compiled), steps=2, compile=compiled)
        run.go()
        losses.append([line["loss"] for line in lines(tmp_path / str(compiled))])
        assert all(
            not k.startswith("_orig_mod")
            for k in load_checkpoint(tmp_path / str(compiled) / "last.pt")["model"]
        )
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"trainer\.compile=true needs a C\+\+ compiler"):
        Run(make_source(scenes), tmp_path / "run", compile=True)


def test_patience(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(make_source(scenes), tmp_path, steps=20, evaluate_every=1, patience=2)
    evaluate = Scripted(0.2, 0.3, 0.1, 0.3, 0.9)
    run.go(evaluate=evaluate)
    assert evaluate.steps == [1, 2, 3, 4]  # equal is not better
    assert "no better segm/AP in 2 evaluations: early stopping at step 4" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    resumed = Run(run.source, tmp_path, steps=20, evaluate_every=1, patience=2)
    resumed.go(load_checkpoint(tmp_path / "last.pt"), Scripted())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    longer = Run(run.source, tmp_path, steps=20, evaluate_every=1, patience=3)
    longer.go(load_checkpoint(tmp_path / "last.pt"), Scripted(0.3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_the_entries_of_a_line(scenes: Path, tmp_path: Path) -> None:
    Run(make_source(scenes), tmp_path, steps=1).go()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {
        "loss",
        "loss/mask",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_seconds",
        "step_seconds",
        "memory_gb",
    } <= line.keys()
    assert 0.05 < line["memory_gb"] < 20
    assert 0 <= line["data_seconds"] < line["step_seconds"]


def test_checkpoints_are_kept_by_step(scenes: Path, tmp_path: Path) -> None:
    Run(make_source(scenes), tmp_path, steps=6, checkpoint_every=1, keep_checkpoints=2).go()
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "last.pt",
        "step_0000004.pt",
        "step_0000005.pt",
    ]
    for name, step in (("last.pt", 6), ("step_0000005.pt", 5), ("step_0000004.pt", 4)):
        assert load_checkpoint(tmp_path / name)["step"] == step
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "step_0000005.pt").write_bytes((tmp_path / "step_0000005.pt").read_bytes()[:1000])
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert latest[0].name == "step_0000004.pt"


def test_a_fused_optimizer_is_not_run_after_an_overflow() -> None:
    """Its first step would keep uninitialized momentum buffers."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = TrainState(model, optimizer, scheduler, scaler, None, {}, DistributedContext())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    factors = iter([float("inf"), 1.0])

    class Forward(nn.Module):
        def forward(self, batch: Any) -> dict[str, Tensor]:
            del batch
            total = model(torch.ones(1, 3)).sum()
            factor = next(factors)
            if factor != 1.0:
                total.register_hook(lambda gradient: gradient * factor)
            return {"a": total}

    train_step = TrainStep(state, Forward(), torch.device("cpu"), nullcontext, 0.0)
    batch = Batch(
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        torch.tensor([[2, 2]]),
        torch.tensor([[2, 2]]),
        [0],
        [""],
    )
    train_step([batch], lambda: False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state
    assert scaler.get_scale() == 2.0
    train_step([batch], lambda: False)
    assert not torch.equal(model.weight, before["weight"])
    assert torch.allclose(optimizer.state[model.weight]["momentum_buffer"], torch.ones(2, 3))


@pytest.mark.parametrize(("saved", "current"), [(False, True), (True, False)])
def test_a_resume_keeps_the_configured_optimizer_kernel(saved: bool, current: bool) -> None:
    model = nn.Linear(3, 2)
    states = []
    for fused in (saved, current):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        states.append(
            TrainState(
                model,
                optimizer,
                scheduler,
                torch.amp.GradScaler("cpu", enabled=False),
                None,
                {},
                DistributedContext(),
            )
        )
    model(torch.ones(1, 3)).sum().backward()
    states[0].optimizer.step()
    states[1].load(states[0].checkpoint())
    assert bool(states[1].optimizer.param_groups[0]["fused"]) == current
    states[1].optimizer.step()
    assert float(states[1].optimizer.state[model.weight]["step"]) == 2
