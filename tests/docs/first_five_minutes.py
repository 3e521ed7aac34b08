"""README's first five minutes with data of one's own, as a new user follows them, unattended.

  python tests/docs/first_five_minutes.py clone FOLDER    in a fresh clone, with `make venv`
  python tests/docs/first_five_minutes.py wheel FOLDER    in another folder, from a built wheel

The commands are those of README.md. The data are 20 photographs with a COCO file as a stranger has
it: ids from 7, three images without objects, a class without objects. It needs the photographs of
`../shared/data/coco_tiny` beside this repository, a network for the installation, and FOLDER must
not exist yet. Prints the seconds of each command; exit code 1 if one fails or leaves no images.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "coco_tiny"
NUM_IMAGES = 20
NUM_EMPTY = 3
NUM_CLASSES = 3
FIRST_ID = 7


def write_data(folder: Path) -> None:
    """Write `my photos/` with 20 photographs, and `labels.json`, a COCO file for them."""
    source = json.loads((PHOTOGRAPHS / "annotations/instances_train2017.json").read_text())
    frequent = Counter(row["category_id"] for row in source["annotations"] if not row["iscrowd"])
    chosen = [number for number, _ in frequent.most_common(NUM_CLASSES)]
    names = {row["id"]: row["name"] for row in source["categories"]}
    labels = {number: FIRST_ID + i for i, number in enumerate(chosen)}
    categories = [{"id": labels[number], "name": names[number]} for number in chosen]
    categories.append({"id": FIRST_ID + NUM_CLASSES, "name": "never seen"})
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in source["annotations"]:
        if row["category_id"] in labels:
            rows.setdefault(row["image_id"], []).append(row)
    photographs = sorted(source["images"], key=lambda image: -len(rows.get(image["id"], [])))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "my photos").mkdir(parents=True)
    for i, image in enumerate(photographs[:NUM_IMAGES]):
        name = f"photo ({i + 1}).jpg"
        shutil.copy(PHOTOGRAPHS / "train2017" / image["file_name"], folder / "my photos" / name)
        size = {"height": image["height"], "width": image["width"]}
        images.append({"id": FIRST_ID + i, "file_name": name, **size})
        for row in rows.get(image["id"], []) if i < NUM_IMAGES - NUM_EMPTY else []:
            changes = {
                "id": FIRST_ID + len(annotations),
                "image_id": FIRST_ID + i,
                "category_id": labels[row["category_id"]],
            }
            annotations.append({**row, **changes})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "labels.json").write_text(json.dumps(content))


def readme_commands() -> list[str]:
    """The commands of README for data of one's own, without those for a GPU."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    (block,) = [block for block in blocks if "experiment=custom_r18" in block]
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and "on a GPU" not in line]


def install(mode: str, folder: Path) -> tuple[Path, list[str]]:
    """Return the working directory, and the commands that install the package for it."""
    if mode == "clone":
        place = folder / "maskseg"
        return place, [f"git clone --quiet '{ROOT}' '{place}'", f"cd '{place}' && make venv"]
    place = folder / "work"
    place.mkdir()
    python = f"'{place}/.venv/bin/python'"
    pins = f"--constraint '{ROOT}/constraints.txt'"
    return place, [
        f"git clone --quiet '{ROOT}' '{folder}/source'",
        f"'{sys.executable}' -m venv '{place}/.venv'",
        f"{python} -m pip wheel --quiet --no-deps --wheel-dir '{folder}' '{folder}/source'",
        f"{python} -m pip install --quiet {pins} '{folder}'/maskseg-*.whl",
    ]


def as_installed(command: str) -> str:
    """The command with the console script instead of the file in `tools`."""
    return re.sub(
        r"python tools/(\w+)\.py", lambda match: f"maskseg-{match[1].replace('_', '-')}", command
    )


def run(command: str, place: Path) -> float:
    """Run a command with the environment of `place` activated. Returns the seconds."""
    print(f"$ {command}", flush=True)
    began = time.monotonic()
    search = f"{place}/.venv/bin:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": search}
    cwd = place if place.is_dir() else place.parent
    subprocess.run(["bash", "-ec", command], cwd=cwd, env=environment, check=True)
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s", flush=True)
    return seconds


def main() -> None:
    """Follow README, and check what it leaves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["clone", "wheel"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True)
    data = folder / "stranger"
    write_data(data)
    place, commands = install(arguments.mode, folder)
    seconds = sum(run(command, place) for command in commands)
    for command in readme_commands():
        words = command.replace("ALL.json", f"'{data}/labels.json'")
        words = words.replace("DIR", f"'{data}/my photos'")
        seconds += run(words if arguments.mode == "clone" else as_installed(words), place)
    latest = place / "runs/custom_r18/latest"
    for name in ("labels.png", "train_batch_1.png", "results.png", "validation.png", "best.pt"):
        assert (latest / name).is_file(), f"{latest / name} is missing"
    drawn = len(list((place / "predictions").glob("*.png")))
    assert drawn == NUM_IMAGES, f"{drawn} predictions are drawn"
    print(f"from the installation to {drawn} images with predictions: {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
