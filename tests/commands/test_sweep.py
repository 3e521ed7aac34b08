"""Sweeps as a user starts them: with Hydra's own sweeper, with Optuna, in jobs of a cluster; and what is refused."""

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
needs_extra = pytest.mark.skipif(not INSTALLED, reason="needs pip install maskseg[sweep]")
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
def place(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder."""
    (tmp_path / "scenes").symlink_to(scenes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set in here by what is tested; to be undone
    return tmp_path


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a cluster's commands leave what they were given."""
    folder = tmp_path_factory.mktemp("slurm")
    make_slurm(folder, monkeypatch)
    return folder


def sweep(place: Path, *words: str, tool: str = "sweep") -> tuple[int, str]:
    return finish(start(["--multirun", *TINY, *words], place, tool=tool), place, 250)


def trials(folder: Path) -> dict[str, dict[str, object]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(folder.glob("*/trial.json"))
    }


def assert_refused(said: tuple[int, str], *parts: str) -> None:
    """Exit code 2, and one clear line at the end."""
    code, text = said
    last = text.strip().splitlines()[-1]
    assert code == 2, text
    assert last.startswith("error: "), text
    assert "Traceback" not in text
    for part in parts:
        assert part in last, text


def refused(*words: str) -> str:
    """What is found before anything is started."""
    with pytest.raises(UserError) as raised:
        sweeps.prepare([*TINY, *words])
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
def test_each_value_of_a_grid(place: Path) -> None:
    words = [
        *SMALL,
        *SCENES,
        "trainer.max_steps=1",
        "optimizer.lr=1e-3,2e-3",
        "~model/heads@model.heads.mask",
        "trainer.best_metric=bbox/AP",
    ]
    code, said = finish(start(["--multirun", *words], place, tool="sweep"), place)
    assert code == 0, said
    (folder,) = (place / "runs" / "scenes_r18").iterdir()
    assert folder.name.startswith("sweep_20")
    found = trials(folder)
    assert list(found) == ["0", "1"]
    for trial, rate in (("0", 0.001), ("1", 0.002)):
        assert {"last.pt", "best.pt", "metrics.jsonl", "config.yaml"} <= {
            p.name for p in (folder / trial).iterdir()
        }
        assert OmegaConf.load(folder / trial / "config.yaml").optimizer.lr == rate
        assert found[trial]["value"] == sweeps.objective(folder / trial, "bbox/AP")
    assert "best trial: runs/scenes_r18/sweep_20" in said
    assert "optimizer.lr=0.002" in (folder / "results.txt").read_text()
    # Hydra's own folders are in the sweep's
    assert {p.name for p in place.iterdir()} == {"scenes", "runs", "said.txt"}


@pytest.mark.slow
@needs_extra
def test_optuna_searches(place: Path) -> None:
    code, said = sweep(
        place,
        *OPTUNA,
        "optimizer.weight_decay=choice(0.0, 0.1)",
        "hydra.sweep.dir=sweep",
        "hydra.sweeper.sampler.seed=3",
    )
    assert code == 0, said
    best = OmegaConf.load(place / "sweep" / "optimization_results.yaml")
    found = trials(place / "sweep")
    assert len(found) == 2
    assert best.best_value == max(t["value"] for t in found.values())  # type: ignore[type-var]
    assert set(best.best_params) == {"optimizer.lr", "optimizer.weight_decay"}
    rates = [
        OmegaConf.load(place / "sweep" / trial / "config.yaml").optimizer.lr for trial in found
    ]
    assert rates[0] != rates[1]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert "Directions: ['maximize']" in said
    assert said.strip().splitlines()[-1].startswith("best trial: sweep/")
    assert {p.name for p in place.iterdir()} == {"scenes", "sweep", "said.txt"}


@pytest.mark.slow
@needs_extra
def test_a_study_on_disk_goes_on(place: Path) -> None:
    # Guards against: SQLAlchemy 2, with which optuna 2 fails on a new database
    study = [
        *OPTUNA,
        "hydra.sweeper.n_trials=1",
        "hydra.sweeper.storage=sqlite:///study.db",
        "hydra.sweeper.study_name=one",
    ]
    for folder in ("first", "second"):
        code, said = sweep(place, *study, f"hydra.sweep.dir={folder}")
        assert code == 0, said
    assert "Using an existing study" in said


@pytest.mark.slow
@needs_extra
def test_jobs_on_this_machine(place: Path) -> None:
    code, said = sweep(
        place,
        *OPTUNA,
        "hydra.sweeper.n_jobs=2",
        "hydra/launcher=submitit_local",
        "hydra.sweep.dir=sweep",
    )
    assert code == 0, said
    assert len(trials(place / "sweep")) == 2
    assert len(list((place / "sweep" / ".submitit").glob("*/*_result.pkl"))) == 2
    assert "best trial: sweep/" in said
    assert {p.name for p in place.iterdir()} == {"scenes", "sweep", "said.txt"}


@needs_extra
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
def test_jobs_of_a_slurm_cluster(place: Path, slurm: Path) -> None:
    launcher = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.timeout_min=600",
    ]
    launcher.append("+hydra.launcher.additional_parameters.requeue=true")
    code, said = sweep(place, "seed=0,1", *launcher, "hydra.sweep.dir=sweep")
    assert code == 0, said + (slurm / "jobs.txt").read_text()
    assert list(trials(place / "sweep")) == ["0", "1"]
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
def test_a_preempted_job_goes_on(place: Path, slurm: Path) -> None:
    """SIGTERM: the trial saves itself and leaves no result, so that the job that is queued again finishes it."""
    words = [
        "--multirun",
        *TINY,
        "trainer.max_steps=20",
        "seed=0",
        "hydra/launcher=submitit_slurm",
        "hydra.sweep.dir=sweep",
    ]
    process = start(words, place, tool="sweep")
    wait_for_step(place / "sweep" / "0", 2, process)
    os.kill(int((slurm / "pids.txt").read_text().split()[0]), signal.SIGTERM)
    code, said = finish(process, place, 200)
    log = (slurm / "jobs.txt").read_text()
    assert code == 0, said + log
    assert len((slurm / "pids.txt").read_text().split()) == 2  # started twice
    assert "going on from sweep/0/last.pt" in log
    steps = [
        line["step"]
        for line in map(
            json.loads, (place / "sweep" / "0" / "metrics.jsonl").read_text().splitlines()
        )
        if line["kind"] == "train"
    ]
    assert steps == list(range(1, 21))
    assert list(trials(place / "sweep")) == ["0"]


@pytest.mark.slow
def test_a_signal_ends_a_sweep(place: Path) -> None:
    process = start(
        ["--multirun", *TINY, "trainer.max_steps=200", "seed=0,1", "hydra.sweep.dir=sweep"],
        place,
        tool="sweep",
    )
    wait_for_step(place / "sweep" / "0", 1, process)
    process.terminate()
    code, said = finish(process, place)
    assert code == 143, said
    assert "Traceback" not in said
    assert not (place / "sweep" / "1").exists()


@pytest.mark.slow
def test_a_training_that_breaks_off_does_not_end_the_sweep(place: Path) -> None:
    make_scenes(place / "broken", num_train=8, num_val=4, size=128, num_workers=0)
    picture = sorted((place / "broken" / "images").glob("train_*"))[2]
    picture.write_bytes(picture.read_bytes()[:700])  # the header is whole: the check sees nothing
    words = ["data.root=broken", "trainer.max_steps=4", "hydra.sweep.dir=sweep"]
    code, said = sweep(place, "data.skip_bad=0,3", *words)
    assert code == 0, said
    found = trials(place / "sweep")
    assert found["0"]["value"] == sweeps.FAILED
    assert "cut short" in str(found["0"]["problem"])
    assert found["1"]["value"] != sweeps.FAILED
    assert said.strip().splitlines()[-1] == "best trial: sweep/1"
    # where no trial comes to its end there is no result to be believed
    assert_refused(
        sweep(place, "seed=0", *words[:2], "hydra.sweep.dir=other"), "no trial was completed"
    )


def test_an_error_before_a_training_is_one_line(place: Path) -> None:
    assert_refused(sweep(place, "data.train_json=nowhere.json", "seed=0,1"), "nowhere.json")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizer.lrr=1e-3,2e-3"], ["optimizer.lr'"]),
        (["optimizer.lr=1e-3,hello"], ["expected a number"]),
        (["optimizer=sgd,adam"], ["optimizer has no 'adam'", "adamw"]),
        (["total_batch=interval(1, 4)"], ["expected a whole number"]),
        (["seed=0,1", "seed=2"], ["seed is given twice"]),
        (["optimizer.lr=1e-3,2e-3", "hydra.sweep.dr=x"], ["hydra.sweep.dr"]),
        (
            ["seed=0,1", "hydra/launcher=slurm"],
            ["hydra/launcher has no 'slurm'", "basic", "maskseg[sweep]"],
        ),
        (["seed=0,1", "data.val_json=null"], ["data.val_json"]),
        (["seed=0,1", "run_dir=here"], ["hydra.sweep.dir"]),
        (["seed=0,1", "hydra.sweep.dir=scenes"], ["scenes is not empty"]),
        (["seed"], ["seed"]),
    ],
)
def test_refused_before_the_first_trial(words: list[str], parts: list[str]) -> None:
    said = refused(*words)
    for part in parts:
        assert part in said


@needs_extra
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["hydra.sweeper.n_trial=3"], ["hydra.sweeper.n_trial"]),
        (["hydra.sweeper.direction=minimize"], ["always maximize"]),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=8"], ["one process"]),
    ],
)
def test_refused_of_the_plugins(words: list[str], parts: list[str]) -> None:
    said = refused(*OPTUNA, *words)
    for part in parts:
        assert part in said


def test_a_missing_plugin_is_one_line(place: Path) -> None:
    empty = place / "path" / "hydra_plugins"  # an ordinary package hides what has been installed
    empty.mkdir(parents=True)
    (empty / "__init__.py").write_text("")
    hide = f"import runpy, sys\nsys.path.insert(0, {str(empty.parent)!r})\nrunpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    (place / "hidden.py").write_text(hide)
    said = sweep(place, "seed=0,1", "hydra/sweeper=optuna", tool=str(place / "hidden.py"))
    assert_refused(said, "hydra/sweeper has no 'optuna'", "pip install maskseg[sweep]")
    assert not (place / "runs").exists()


def test_bad_keys_and_help_on_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        (run_tool("sweep", words), *capsys.readouterr())
        for words in (["--multirun", "optimizer.lrr=1e-3,2e-3"], ["seed=0,1"], ["--help"])
    ]
    assert_refused((said[0][0], said[0][2]), "did you mean 'optimizer.lr'?")
    assert_refused((said[1][0], said[1][2]), "--multirun", "tools/train.py")
    assert said[2][0] == 0
    assert said[2][1].count("python tools/sweep.py") == 5
    assert_refused(sweep(place, "optimizer.lr=interval(1e-3, 1e-2)"), "hydra/sweeper=optuna")
    assert not (place / "runs").exists()


def test_a_sweep_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("seed=0,1")
