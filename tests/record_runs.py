"""Does a refactor change the numbers? Records short runs and compares them, bit for bit.

  python tests/record_runs.py FOLDER                      before the change: records all runs
  python tests/record_runs.py NEW --against FOLDER        after it: records again and compares
  python tests/record_runs.py NEW --only scenes_r18 ...   some of the runs

A record is the losses of 60 training steps (fp32, seed 0, one thread, no EMA) and the evaluation of
the checkpoint on 16 images: every JSON file that `tools/evaluate.py` writes. Numbers are compared
as
the text of their shortest exact decimal form, so that equal means equal bits. Everything runs
through the command line, which stays while the package behind it changes. A difference ends the
comparison with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUCLEI = ROOT.parent / "shared" / "data" / "nuclei"
STEPS = 60
IMAGES = 16
RUNS = (
    "scenes_r18",
    "scenes_keypoint_r18",
    "scenes_hash_r18",
    "scenes_cfm",
    "classify_scenes",
    "nuclei_r18",
)
# What depends on the time or the machine.
VOLATILE = ("images_per_second", "data_seconds", "step_seconds", "memory_gb", "seconds")


def call_tool(tool: str, arguments: list[str], log: Path) -> None:
    """Run one of `tools/` in a process of its own, on one thread; its output goes to `log`."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    with log.open("a") as file:
        code = subprocess.call(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if code:
        sys.exit(f"{tool} {' '.join(arguments)}: exit code {code}, see {log}")


def data_arguments(experiment: str, folder: Path) -> list[str]:
    """The data of a run; the synthetic dataset has the size that 60 steps use up."""
    if experiment == "nuclei_r18":
        return [f"data.root={NUCLEI}"]
    small = experiment == "classify_scenes"
    name = "scenes_small" if small else "scenes"
    return [
        f"data.root={folder / 'data' / name}",
        f"data.num_train={960 if small else 240}",
        f"data.num_val={IMAGES}",
    ]


def record_run(experiment: str, folder: Path) -> dict[str, list[str]]:
    """-> lines of text by the name of a file, volatile values removed."""
    run, output = folder / "runs" / experiment, folder / "evaluations" / experiment
    log = folder / f"{experiment}.log"
    data = data_arguments(experiment, folder)
    settings = [
        f"trainer.max_steps={STEPS}",
        "trainer.log_every=1",
        "trainer.device=cpu",
        "trainer.precision=fp32",
        "trainer.ema=0",
    ]
    shared = [
        *data,
        "data.num_workers=1",
        f"evaluation.max_images={IMAGES}",
        "evaluation.backend=pycocotools",
    ]
    call_tool(
        "train", [f"experiment={experiment}", "seed=0", f"run_dir={run}", *settings, *shared], log
    )
    call_tool("evaluate", [f"checkpoint={run / 'last.pt'}", f"output={output}", *shared], log)
    files = [run / "metrics.jsonl", *sorted(output.rglob("*.json"))]
    return {str(path.relative_to(folder)): read_lines(path) for path in files}


def read_lines(path: Path) -> list[str]:
    """A JSON file as lines without the volatile values: one a row of .jsonl, one an entry of a
    list or an object.
    """
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [
            json.dumps(without_volatile(json.loads(line)), sort_keys=True)
            for line in text.splitlines()
        ]
    content = without_volatile(json.loads(text))
    if isinstance(content, dict):
        return [json.dumps({key: content[key]}) for key in sorted(content)]
    return [json.dumps(entry, sort_keys=True) for entry in content]


def without_volatile(value: object) -> object:
    """The value without what depends on the time, at every depth."""
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [without_volatile(item) for item in value]
    return value


def compare(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[str]:
    """-> a message for each file that differs, with its first difference."""
    differences = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            differences.append(f"{name}: only in the {'old' if name in old else 'new'} records")
            continue
        pairs = zip(old[name], new[name], strict=False)
        unequal = [line for line, (a, b) in enumerate(pairs) if a != b]
        if unequal:
            first = unequal[0]
            differences.append(f"{name}: {len(unequal)} lines differ, the first is {first + 1}:")
            differences += [f"  {lines[name][first][:300]}" for lines in (old, new)]
        elif len(old[name]) != len(new[name]):
            differences.append(f"{name}: {len(old[name])} lines, now {len(new[name])}")
    return differences


def main() -> int:
    """-> the exit code: 1 where a number has changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="a folder of earlier records")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if folder.exists():
        parser.error(f"{folder} exists; records go to a new folder")
    (folder / "records").mkdir(parents=True)
    changed = False
    for experiment in arguments.only:
        record = record_run(experiment, folder)
        (folder / "records" / f"{experiment}.json").write_text(json.dumps(record, indent=1))
        if arguments.against is None:
            print(f"{experiment}: recorded {sum(map(len, record.values()))} lines", flush=True)
            continue
        differences = compare(
            json.loads((arguments.against / "records" / f"{experiment}.json").read_text()), record
        )
        print(
            "\n".join(differences)
            or f"{experiment}: equal, {sum(map(len, record.values()))} lines",
            flush=True,
        )
        changed = changed or bool(differences)
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
