"""Runs that are stopped in all the ways there are: what is left must go on as if nothing had
happened.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from made.runs import (
    GROUP_NORM,
    MASKS,
    ROOT,
    SCENES,
    SMALL,
    TORCHRUN_TWO,
    alive,
    assert_same_runs,
    call,
    children,
    finish,
    lines,
    start,
    wait_for_step,
)

from maskseg.cli import run_tool
from maskseg.data.datasets.scenes import make_scenes
from maskseg.engine.checkpoint import CheckpointManager, latest_valid, load_checkpoint

STEPS = 9
MANY_STEPS = 40
KILLS = 200
# Saved in the middle; with a moving average; augmented at random; in one test evaluated in the
# middle, too.
KEYS = [
    "batch_size=2",
    f"trainer.max_steps={STEPS}",
    "trainer.checkpoint_every=3",
    "trainer.ema=0.9",
]
RUN = [*SMALL, *MASKS, *SCENES, *KEYS, "data.val_json=null"]
EVALUATED = [*SMALL, *MASKS, *SCENES, *KEYS, "trainer.evaluate_every=5"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    return folder


@pytest.fixture(scope="session")
def whole(home: Path) -> Path:
    """The run that nobody stopped."""
    call([*RUN, "run_dir=whole"], home)
    return home / "whole"


@pytest.fixture(scope="session")
def evaluated(home: Path) -> Path:
    """The same with evaluations."""
    call([*EVALUATED, "run_dir=evaluated"], home)
    return home / "evaluated"


@pytest.fixture(scope="session")
def whole_two(home: Path) -> Path:
    """The same by two processes."""
    call([*RUN, "run_dir=whole_two"], home, ranks=2)
    return home / "whole_two"


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    (tmp_path / "scenes").symlink_to(home / "scenes")
    return tmp_path


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on_bit_for_bit(whole: Path, place: Path, workers: int) -> None:
    """SIGKILL in the middle of an epoch (4 steps) and between two checkpoints."""
    words = [*RUN, "run_dir=run", f"data.num_workers={workers}", "trainer.resume=auto"]
    process = start(words, place)
    wait_for_step(place / "run", 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = latest_valid(place / "run")
    assert found is not None
    assert found[1]["step"] == 3
    said = call(words, place)
    assert "resuming from run/last.pt, step 3" in said
    assert_same_runs(whole, place / "run")


@pytest.mark.slow
def test_killed_in_the_middle_of_an_evaluation(evaluated: Path, place: Path) -> None:
    # Guards against: the evaluation of that step, and its best.pt, are never made
    words = [*EVALUATED, "run_dir=run", "trainer.resume=auto"]
    process = start(words, place)
    end = time.monotonic() + 90
    while not ((place / "run" / "last.pt").exists() and load_step(place / "run" / "last.pt") == 5):
        assert time.monotonic() < end
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    call(words, place)
    assert_same_runs(evaluated, place / "run")
    assert (
        load_checkpoint(place / "run" / "best.pt")["step"]
        == load_checkpoint(evaluated / "best.pt")["step"]
    )


def load_step(path: Path) -> int:
    return int(load_checkpoint(path)["step"])


@pytest.mark.slow
def test_two_processes_killed_and_resumed(whole_two: Path, place: Path) -> None:
    words = [*RUN, "run_dir=run", "trainer.resume=auto"]
    process = start(words, place, torchrun=TORCHRUN_TWO)
    wait_for_step(place / "run", 7, process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    call(words, place, ranks=2)
    assert_same_runs(whole_two, place / "run")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_first(whole: Path, place: Path, number: int, code: int) -> None:
    words = [*RUN, "run_dir=run", "trainer.resume=auto", "data.num_workers=2"]
    process = start(words, place)
    wait_for_step(place / "run", 2, process)
    os.killpg(process.pid, number)  # to the loader's processes too, as a terminal does
    found, said = finish(process, place)
    assert found == code, said
    assert "Traceback" not in said
    step = load_step(place / "run" / "last.pt")
    assert (
        step == lines(place / "run")[-1]["step"]
    )  # the step that it was in, which no checkpoint_every asked for
    assert f"saved at step {step}" in said
    if number == signal.SIGTERM:
        call(words, place)
        assert_same_runs(whole, place / "run")


def test_ctrl_c_twice_leaves_at_once(place: Path) -> None:
    process = start(
        [*RUN, "run_dir=run", "trainer.max_steps=1000", "data.size=128", "batch_size=8"], place
    )
    wait_for_step(place / "run", 1, process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.01)
    if process.poll() is None:  # two signals may have come as one
        os.kill(process.pid, signal.SIGINT)
    code, _ = finish(process, place, 30)
    assert code in (130, -signal.SIGINT)


@pytest.mark.slow
def test_sigterm_to_torchrun(place: Path) -> None:
    words = [*RUN, "run_dir=run", "trainer.resume=auto"]
    process = start(words, place, torchrun=TORCHRUN_TWO)
    wait_for_step(place / "run", 2, process)
    below = children(process.pid)
    assert len(below) >= 2
    os.kill(process.pid, signal.SIGTERM)
    code, said = finish(process, place, 60)
    assert code != 0, said
    assert [pid for pid in below if alive(pid)] == []
    assert load_step(place / "run" / "last.pt") == lines(place / "run")[-1]["step"]
    assert list((place / "run").glob(".*.tmp")) == []


def test_a_killed_rank_ends_all(whole_two: Path, place: Path) -> None:
    words = [*RUN, "run_dir=run", "trainer.resume=auto"]
    process = start(words, place, torchrun=TORCHRUN_TWO)
    wait_for_step(place / "run", 4, process)
    ranks = [
        pid
        for pid in children(process.pid)
        if b"tools/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    code, said = finish(process, place, 60)
    assert time.monotonic() - began < 60
    assert code != 0
    assert "Signal 9 (SIGKILL)" in said
    assert [pid for pid in ranks if alive(pid)] == []
    call(words, place, ranks=2)
    assert_same_runs(whole_two, place / "run")


def test_two_processes_are_one_with_the_same_batch_size(place: Path) -> None:
    """Losses of every step, to rounding: the same regions are drawn, and sums are divided by what
    all processes have. Batch norm would see
    half the images each."""
    points = [
        "+model/heads@model.heads.keypoint=keypoint",
        "model.heads.keypoint.channels=16",
        "model.heads.keypoint.layers=1",
    ]
    words = [
        *RUN,
        *GROUP_NORM,
        *points,
        "model.heads.keypoint.max_regions=3",
        "batch_size=4",
        "trainer.max_steps=5",
    ]
    call([*words, "run_dir=one"], place)
    call([*words, "run_dir=two"], place, ranks=2)
    for one, two in zip(lines(place / "one"), lines(place / "two"), strict=True):
        for name in ("loss", *(k for k in one if k.startswith("loss/"))):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


@pytest.mark.slow
def test_two_machines(place: Path, whole_two: Path) -> None:
    """Two torchruns that meet at an address, each with one process, as on two machines that share
    a disk.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = f"localhost:{free.getsockname()[1]}"
    own = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-id",
        "a-run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        meeting,
    ]
    machines = [
        start([*RUN, "run_dir=run"], place, torchrun=own, said=f"said_{i}.txt") for i in range(2)
    ]
    for i, machine in enumerate(machines):
        assert machine.wait(120) == 0, (place / f"said_{i}.txt").read_text()
    assert sum("run folder: run" in (place / f"said_{i}.txt").read_text() for i in range(2)) >= 1
    assert_same_runs(whole_two, place / "run")


@pytest.mark.slow
def test_evaluation_by_two_processes_is_that_of_one(evaluated: Path, place: Path) -> None:
    """Every number and every row, bit for bit."""
    for ranks, output in ((1, "one"), (2, "two")):
        words = [
            f"checkpoint={evaluated}",
            f"output={output}",
            "model.classifier.score_threshold=0.0",
            "evaluation.batch=1",
            "data.root=scenes",
        ]
        call(words, place, ranks=ranks, tool="evaluate")
    for name in ("metrics.json", "per_class.json", "detections.json"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes(), name


def test_a_batch_size_that_does_not_go_round(place: Path) -> None:
    code, said = finish(start([*RUN, "run_dir=run", "batch_size=3"], place, ranks=2), place)
    assert code != 0
    assert (
        said.count(
            "error: batch_size=3 must be a multiple of 2 processes x "
            "trainer.accumulate_grad_batches=1"
        )
        == 1
    )
    assert not (place / "run").exists()


def test_a_loader_process_that_is_killed_is_one_line(place: Path) -> None:
    """The kernel does so when memory is short; torch reports it in the middle of a step as well."""
    process = start([*RUN, "run_dir=run", "trainer.max_steps=1000", "data.num_workers=2"], place)
    wait_for_step(place / "run", 2, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, said = finish(process, place)
    assert code == 2, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: data.train_json=scenes/train.json: loader worker")
    assert "out of memory?" in last


def checkpoint(step: int) -> dict[str, object]:
    weights = torch.full((200_000,), float(step))
    return {"step": step, "model": {"w": weights}, "best": None}


def test_fifty_kills_while_saving_lose_nothing(tmp_path: Path) -> None:
    """A child saves one checkpoint after the other and is killed at a random moment, fifty times;
    each goes on where the last one ended.
    """
    rng, reached = random.Random(0), 0
    for kill in range(50):
        child = os.fork()
        if child == 0:
            keeper = CheckpointManager(tmp_path, keep=1)
            step = reached
            while True:
                step += 1
                keeper.save(checkpoint(step))
                (tmp_path / "done.txt").write_text(str(step))
        if kill >= 5:  # the first ones may come before anything is saved
            wait_for_number(tmp_path / "done.txt", above=reached)
        time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = latest_valid(tmp_path)
        if found is None:
            assert not (tmp_path / "done.txt").exists(), f"kill {kill}: everything is lost"
            continue
        step = int(found[1]["step"])
        done = (tmp_path / "done.txt").read_text() if (tmp_path / "done.txt").exists() else ""
        assert step >= (int(done) if done else reached), (
            f"kill {kill}: a finished checkpoint is lost"
        )
        assert torch.equal(found[1]["model"]["w"], checkpoint(step)["model"]["w"])  # type: ignore[index]
        assert list(tmp_path.glob(".*.tmp")) == []
        reached = step
    assert reached > 50


def wait_for_number(path: Path, above: int) -> None:
    """Wait until the number in a file is above another, for up to 20 s."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        text = path.read_text() if path.exists() else ""
        if text and int(text) > above:
            return
        time.sleep(0.002)


def train_in_child(words: list[str], place: Path) -> int:
    """Start a training in a fork of this process, which has imported everything. Returns its id."""
    child = os.fork()
    if child == 0:
        os.chdir(place)
        code = 1
        with (place / "said.txt").open("a", buffering=1) as said:
            sys.stdout = said
            sys.stderr = said
            try:
                code = run_tool("train", words)
            finally:
                os._exit(code)
    return child


def last_line(run: Path) -> tuple[int, str]:
    """Return step and kind of the last complete line of the metrics; step 0 if there is none."""
    text = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
    complete = text[: text.rfind(b"\n") + 1].splitlines()
    if not complete:
        return 0, ""
    entry = json.loads(complete[-1])
    return entry["step"], entry["kind"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_lose_no_run(place: Path) -> None:
    """Trainings that save each step and evaluate every second one, killed at random moments.

    No checkpoint is lost, and each finished run is that which nobody killed, bit for bit.
    """
    words = [*EVALUATED, f"trainer.max_steps={MANY_STEPS}"]
    words += ["trainer.checkpoint_every=1", "trainer.evaluate_every=2"]
    child = train_in_child([*words, "run_dir=whole"], place)
    assert os.waitpid(child, 0)[1] == 0, (place / "said.txt").read_text()
    rng = random.Random(0)
    kills: Counter[str] = Counter()
    runs = 0
    while kills.total() < KILLS:
        run = place / f"run_{runs}"
        steps = resume_until_finished([*words, f"run_dir={run.name}"], place, rng, kills)
        assert steps == MANY_STEPS
        assert_same_runs(place / "whole", run)
        shutil.rmtree(run)
        runs += 1
    print(f"{kills.total()} kills, {dict(kills)}, {runs} runs")


def resume_until_finished(
    words: list[str], place: Path, rng: random.Random, kills: Counter[str]
) -> int:
    """Resume a run and kill it, until it has ended by itself. Returns its last step.

    kills: counts the kills by what the last line of the metrics was.
    """
    run = place / words[-1].removeprefix("run_dir=")
    reached = 0
    while True:
        child = train_in_child([*words, "trainer.resume=auto"], place)
        is_killed = kills.total() < KILLS and kill_later(child, run, reached, rng)
        _, status = os.waitpid(child, 0)
        said = (place / "said.txt").read_text()[-3000:]
        if not is_killed or not os.WIFSIGNALED(status):
            assert status == 0, said
            return load_step(run / "last.pt")
        kills[last_line(run)[1]] += 1
        found = latest_valid(run)
        if found is None:
            assert reached == 0, said
            continue
        assert int(found[1]["step"]) >= reached, said
        reached = int(found[1]["step"])


def kill_later(child: int, run: Path, reached: int, rng: random.Random) -> bool:
    """Kill a training at a random moment after its first step. Returns False if it has ended."""
    end = time.monotonic() + 300
    while last_line(run)[0] <= reached:
        assert time.monotonic() < end
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.005)
    time.sleep(rng.random())
    os.kill(child, signal.SIGKILL)
    return True


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(place: Path) -> None:
    """The limit on the size of a file acts as a full disk does: in the middle of a write."""
    words = [*RUN, "run_dir=run", "trainer.resume=auto"]
    call([*words, "trainer.max_steps=2"], place)
    before = (place / "run" / "last.pt").read_bytes()
    script = place / "full_disk.py"
    half = len(before) // 2
    limits = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({half},) * 2)"
    )
    run = "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    script.write_text(f"import resource, runpy, signal, sys\n{limits}\n{run}\n")
    code, said = finish(
        start([str(ROOT / "tools" / "train.py"), *words], place, tool=str(script)), place
    )
    assert code == 2, said
    last = [line for line in said.strip().splitlines() if line][-1]
    assert last.startswith(
        "error: run/last.pt: the checkpoint could not be written (File too large); "
    )
    assert last.endswith("an older one there is intact")
    assert (place / "run" / "last.pt").read_bytes() == before
    assert list((place / "run").glob(".*.tmp")) == []


def test_a_damaged_checkpoint_that_is_named_is_an_error(whole: Path, place: Path) -> None:
    content = bytearray((whole / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "bad.pt").write_bytes(content)
    code, said = finish(start([*RUN, "run_dir=run", "trainer.resume=bad.pt"], place), place)
    assert code == 2
    assert said.strip().splitlines()[-1].startswith("error: bad.pt: damaged, the checksum of")
    assert not (place / "run").exists()
