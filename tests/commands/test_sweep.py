"""Sweeps as a user starts them: with Hydra's sweeper, with Optuna and as jobs of a cluster.

Also, which overrides are refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from made.runs import MASKS, SCENES, SMALL, finish, start, wait_for_step
from made.slurm import make_slurm
from omegaconf import OmegaConf

from maskseg.cli import run_tool
from maskseg.commands import sweep as sweeps
from maskseg.data.datasets.scenes import make_scenes
from maskseg.errors import UserError

INSTALLED = all(importlib.util.find_spec(name) for name in ("optuna", "submitit"))
needs_extra = pytest.mark.skipif(not INSTALLED, reason="needs pip install -e '.[sweep]'")
TOOL = Path(__file__).parents[2] / "tools" / "sweep.py"
TINY = [*SMALL, *MASKS, *SCENES, "trainer.max_steps=1"]
OPTUNA = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=2",
    "optimizer.lr=tag(log, interval(1e-4, 1e-2))",
]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps") / "scenes"
    make_scenes(folder, num_train=8, num_val=4, size=128, num_workers=0)
    return folder


@pytest.fixture
def home(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user."""
    (tmp_path / "scenes").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # sweeps set it; undone afterwards
    return tmp_path


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A simulated cluster; the folder in which its commands write their arguments."""
    folder = tmp_path_factory.mktemp("slurm")
    make_slurm(folder, monkeypatch)
    return folder


def sweep(home: Path, *overrides: str, tool: str = "sweep") -> tuple[int, str]:
    return finish(start(["--multirun", *TINY, *overrides], home, tool=tool), home, 250)


def trials(folder: Path) -> dict[str, dict[str, object]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(folder.glob("*/trial.json"))
    }


def assert_refused(output: tuple[int, str], *parts: str) -> None:
    """Assert exit code 2 and an error in the last line."""
    code, text = output
    last = text.strip().splitlines()[-1]
    assert code == 2, text
    assert last.startswith("error: "), text
    assert "Traceback" not in text
    for part in parts:
        assert part in last, text


def refusal(*overrides: str) -> str:
    """The error that is raised before a trial starts."""
    with pytest.raises(UserError) as raised:
        sweeps.prepare([*TINY, *overrides])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
def test_each_value_of_a_grid(home: Path) -> None:
    overrides = [
        *SMALL,
        *SCENES,
        "trainer.max_steps=1",
        "optimizer.lr=1e-3,2e-3",
        "~model/heads@model.heads.mask",
        "trainer.best_metric=bbox/AP",
    ]
    code, output = finish(start(["--multirun", *overrides], home, tool="sweep"), home)
    assert code == 0, output
    (folder,) = (home / "runs" / "scenes_r18").iterdir()
    assert folder.name.startswith("sweep_20")
    results = trials(folder)
    assert list(results) == ["0", "1"]
    for trial, rate in (("0", 0.001), ("1", 0.002)):
        assert {"last.pt", "best.pt", "metrics.jsonl", "config.yaml"} <= {
            p.name for p in (folder / trial).iterdir()
        }
        assert OmegaConf.load(folder / trial / "config.yaml").optimizer.lr == rate
        assert results[trial]["value"] == sweeps.objective(folder / trial, "bbox/AP")
    assert "best trial: runs/scenes_r18/sweep_20" in output
    assert "optimizer.lr=0.002" in (folder / "results.txt").read_text()
    # Hydra's own folders are in that of the sweep.
    assert {p.name for p in home.iterdir()} == {"scenes", "runs", "said.txt"}


@pytest.mark.slow
@needs_extra
def test_optuna_searches(home: Path) -> None:
    code, output = sweep(
        home,
        *OPTUNA,
        "optimizer.weight_decay=choice(0.0, 0.1)",
        "hydra.sweep.dir=sweep",
        "hydra.sweeper.sampler.seed=3",
    )
    assert code == 0, output
    best = OmegaConf.load(home / "sweep" / "optimization_results.yaml")
    results = trials(home / "sweep")
    assert len(results) == 2
    assert best.best_value == max(t["value"] for t in results.values())  # type: ignore[type-var]
    assert set(best.best_params) == {"optimizer.lr", "optimizer.weight_decay"}
    rates = [
        OmegaConf.load(home / "sweep" / trial / "config.yaml").optimizer.lr for trial in results
    ]
    assert rates[0] != rates[1]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert "Directions: ['maximize']" in output
    assert output.strip().splitlines()[-1].startswith("best trial: sweep/")
    assert {p.name for p in home.iterdir()} == {"scenes", "sweep", "said.txt"}


@pytest.mark.slow
@needs_extra
def test_a_study_on_disk_continues(home: Path) -> None:
    # Guards against: SQLAlchemy 2, with which Optuna 2 fails for a new database
    study = [
        *OPTUNA,
        "hydra.sweeper.n_trials=1",
        "hydra.sweeper.storage=sqlite:///study.db",
        "hydra.sweeper.study_name=one",
    ]
    for folder in ("first", "second"):
        code, output = sweep(home, *study, f"hydra.sweep.dir={folder}")
        assert code == 0, output
    assert "Using an existing study" in output


@pytest.mark.slow
@needs_extra
def test_jobs_on_this_machine(home: Path) -> None:
    code, output = sweep(
        home,
        *OPTUNA,
        "hydra.sweeper.n_jobs=2",
        "hydra/launcher=submitit_local",
        "hydra.sweep.dir=sweep",
    )
    assert code == 0, output
    assert len(trials(home / "sweep")) == 2
    assert len(list((home / "sweep" / ".submitit").glob("*/*_result.pkl"))) == 2
    assert "best trial: sweep/" in output
    assert {p.name for p in home.iterdir()} == {"scenes", "sweep", "said.txt"}


@needs_extra
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
def test_jobs_of_a_slurm_cluster(home: Path, slurm: Path) -> None:
    launcher = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.timeout_min=600",
    ]
    launcher.append("+hydra.launcher.additional_parameters.requeue=true")
    code, output = sweep(home, "seed=0,1", *launcher, "hydra.sweep.dir=sweep")
    assert code == 0, output + (slurm / "jobs.txt").read_text()
    assert list(trials(home / "sweep")) == ["0", "1"]
    script = (slurm / "script.sh").read_text()
    for line in (
        "--partition=gpu",
        "--gpus-per-node=1",
        "--time=600",
        "--array=0-1%2",
        "--nodes=1",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in script


@pytest.mark.slow
@needs_extra
@pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
def test_a_preempted_job_continues(home: Path, slurm: Path) -> None:
    """After SIGTERM, a trial saves a checkpoint and no result; the requeued job finishes it."""
    overrides = [
        "--multirun",
        *TINY,
        "trainer.max_steps=20",
        "seed=0",
        "hydra/launcher=submitit_slurm",
        "hydra.sweep.dir=sweep",
    ]
    process = start(overrides, home, tool="sweep")
    wait_for_step(home / "sweep" / "0", 2, process)
    os.kill(int((slurm / "pids.txt").read_text().split()[0]), signal.SIGTERM)
    code, output = finish(process, home, 200)
    log = (slurm / "jobs.txt").read_text()
    assert code == 0, output + log
    assert len((slurm / "pids.txt").read_text().split()) == 2  # started twice
    assert "resuming from sweep/0/last.pt" in log
    steps = [
        line["step"]
        for line in map(
            json.loads, (home / "sweep" / "0" / "metrics.jsonl").read_text().splitlines()
        )
        if line["kind"] == "train"
    ]
    assert steps == list(range(1, 21))
    assert list(trials(home / "sweep")) == ["0"]


@pytest.mark.slow
def test_a_signal_ends_a_sweep(home: Path) -> None:
    process = start(
        ["--multirun", *TINY, "trainer.max_steps=200", "seed=0,1", "hydra.sweep.dir=sweep"],
        home,
        tool="sweep",
    )
    wait_for_step(home / "sweep" / "0", 1, process)
    process.terminate()
    code, output = finish(process, home)
    assert code == 143, output
    assert "Traceback" not in output
    assert not (home / "sweep" / "1").exists()


@pytest.mark.slow
def test_a_failed_training_does_not_end_the_sweep(home: Path) -> None:
    make_scenes(home / "broken", num_train=8, num_val=4, size=128, num_workers=0)
    image = sorted((home / "broken" / "images").glob("train_*"))[2]
    image.write_bytes(image.read_bytes()[:700])  # the check reads the header only
    overrides = ["data.root=broken", "trainer.max_steps=4", "hydra.sweep.dir=sweep"]
    code, output = sweep(home, "data.skip_bad=0,3", *overrides)
    assert code == 0, output
    results = trials(home / "sweep")
    assert results["0"]["value"] == sweeps.FAILED
    assert "damaged or truncated" in str(results["0"]["problem"])
    assert results["1"]["value"] != sweeps.FAILED
    assert output.strip().splitlines()[-1] == "best trial: sweep/1"
    # Without a completed trial there is no result.
    assert_refused(
        sweep(home, "seed=0", *overrides[:2], "hydra.sweep.dir=other"), "no trial was completed"
    )


def test_an_error_before_a_training_is_one_line(home: Path) -> None:
    assert_refused(sweep(home, "data.train_json=nowhere.json", "seed=0,1"), "nowhere.json")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optimizer.lrr=1e-3,2e-3"], ["optimizer.lr'"]),
        (["optimizer.lr=1e-3,hello"], ["expected a number"]),
        (["optimizer=sgd,adam"], ["optimizer has no 'adam'", "adamw"]),
        (["batch_size=interval(1, 4)"], ["expected a whole number"]),
        (["seed=0,1", "seed=2"], ["seed is given twice"]),
        (["optimizer.lr=1e-3,2e-3", "hydra.sweep.dr=x"], ["hydra.sweep.dr"]),
        (
            ["seed=0,1", "hydra/launcher=slurm"],
            ["hydra/launcher has no 'slurm'", "basic", "pip install -e '.[sweep]'"],
        ),
        (["seed=0,1", "data.val_json=null"], ["data.val_json"]),
        (["seed=0,1", "run_dir=here"], ["hydra.sweep.dir"]),
        (["seed=0,1", "hydra.sweep.dir=scenes"], ["scenes is not empty"]),
        (["seed"], ["seed"]),
    ],
)
def test_refused_before_the_first_trial(overrides: list[str], parts: list[str]) -> None:
    output = refusal(*overrides)
    for part in parts:
        assert part in output


@needs_extra
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["hydra.sweeper.n_trial=3"], ["hydra.sweeper.n_trial"]),
        (["hydra.sweeper.direction=minimize"], ["always maximize"]),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=8"], ["one process"]),
    ],
)
def test_refused_keys_of_plugins(overrides: list[str], parts: list[str]) -> None:
    output = refusal(*OPTUNA, *overrides)
    for part in parts:
        assert part in output


def test_a_missing_plugin_is_one_line(home: Path) -> None:
    empty = home / "path" / "hydra_plugins"  # a regular package hides the namespace package
    empty.mkdir(parents=True)
    (empty / "__init__.py").write_text("")
    script = [
        "import runpy, sys",
        f"sys.path.insert(0, {str(empty.parent)!r})",
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')",
    ]
    (home / "hidden.py").write_text("\n".join(script))
    output = sweep(home, "seed=0,1", "hydra/sweeper=optuna", tool=str(home / "hidden.py"))
    assert_refused(output, "hydra/sweeper has no 'optuna'", "pip install -e '.[sweep]'")
    assert not (home / "runs").exists()


def test_bad_keys_and_help_on_the_command_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [
        (run_tool("sweep", overrides), *capsys.readouterr())
        for overrides in (["--multirun", "optimizer.lrr=1e-3,2e-3"], ["seed=0,1"], ["--help"])
    ]
    assert_refused((output[0][0], output[0][2]), "did you mean 'optimizer.lr'?")
    assert_refused((output[1][0], output[1][2]), "--multirun", "tools/train.py")
    assert output[2][0] == 0
    assert output[2][1].count("python tools/sweep.py") == 5
    assert_refused(sweep(home, "optimizer.lr=interval(1e-3, 1e-2)"), "hydra/sweeper=optuna")
    assert not (home / "runs").exists()


def test_a_sweep_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refusal("seed=0,1")


TRIAL = {"overrides": ["optimizer.lr=1"], "metric": "bbox/AP", "value": 0.5, "problem": ""}


@pytest.mark.parametrize(
    "content",
    ["", "[", "3", "[]", "{}", '{"overrides": 3, "value": 1}', '{"overrides": [], "value": "x"}']
    + [json.dumps({**TRIAL, "value": value}) for value in (None, 10**400)],
)
def test_a_damaged_result_is_one_error(tmp_path: Path, content: str) -> None:
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial.json").write_text(json.dumps(TRIAL))
    (tmp_path / "1" / "trial.json").write_text(content)
    with pytest.raises(UserError, match=r"1/trial\.json: not the result of a trial, or damaged"):
        sweeps.report_trials(tmp_path, set())
    (tmp_path / "1").rename(tmp_path / "damaged")
    assert sweeps.report_trials(tmp_path, set()) == 1
    assert (tmp_path / "results.txt").read_text().count("0.5000") == 1


def test_text_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    trial = {**TRIAL, "overrides": ["name=\ud800"], "problem": "\udcff"}
    (tmp_path / "0" / "trial.json").write_text(json.dumps(trial))
    assert sweeps.report_trials(tmp_path, {"name"}) == 0
    assert "name=?  ?" in (tmp_path / "results.txt").read_text()


def test_the_objective_is_the_best_finite_value(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "kind": "val", "bbox/AP": 0.25},
        {"step": 2, "kind": "train", "bbox/AP": 0.75},
        {"step": 3, "kind": "val", "bbox/AP": 0.5, "segm/AP": float("nan")},
        {"step": 4, "kind": "val", "bbox/AP": float("nan"), "loss": 1},
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "ki')
    assert sweeps.objective(tmp_path, "bbox/AP") == 0.5
    assert sweeps.objective(tmp_path, "segm/AP") == sweeps.FAILED
    with pytest.raises(UserError, match="'AP' is not among the metrics: bbox/AP, segm/AP"):
        sweeps.objective(tmp_path, "AP")
