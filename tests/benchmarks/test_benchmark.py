"""The benchmark suites: they run and print their results. Times are not checked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made.runs import MASKS, SCENES, SMALL, call
from made.tools import assert_refused, said
from PIL import Image

from maskseg import config
from maskseg.benchmarks import scaling as suite_scaling
from maskseg.benchmarks.evaluate import by_hand, evaluate, simulate
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.benchmarks.paste import paste
from maskseg.benchmarks.report import chart, table
from maskseg.benchmarks.roi_align import roi_align
from maskseg.benchmarks.scaling import scaling, slope
from maskseg.benchmarks.trainer import trainer
from maskseg.data.datasets.scenes import make_scenes


def test_functions_are_measured_in_turn() -> None:
    order: list[str] = []
    seconds = in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, torch.device("cpu")
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(v) for v in seconds.values()] == [3, 3]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_pasting_beside_the_peers() -> None:
    numbers = paste(SimpleNamespace(rounds=1), detections=20, height=120, width=160)
    assert [list(c["seconds"]) for c in numbers["cases"]] == [
        ["torchvision + pycocotools", "maskseg"],
        ["detectron2's way + pycocotools", "maskseg"],
    ]
    assert all(c["agreement"]["pixels that differ"] < 1e-4 for c in numbers["cases"])
    assert "rule continuous: 20 masks, 160 x 120" in table(numbers)


def test_evaluating_beside_pycocotools() -> None:
    numbers = evaluate(SimpleNamespace(rounds=1), images=8, detections=20)
    assert [c["name"][:5] for c in numbers["cases"]] == ["bbox:", "segm:"]
    for case in numbers["cases"]:
        assert list(case["seconds"])[:2] == ["pycocotools by hand", "maskseg, pycocotools"]
        assert case["agreement"]["largest difference"] < 1e-12
    truth, rows = simulate(8, 20)
    masks = [{k: v for k, v in row.items() if k != "bbox"} for row in rows]
    assert 0.01 < by_hand(truth, masks, "segm")[0] < 0.99


def test_roi_align_beside_torchvisions() -> None:
    numbers = roi_align(
        SimpleNamespace(rounds=1), shapes=((20, 7), (5, 14)), channels=8, height=128, width=160
    )
    assert [one["name"].split(":")[0] for one in numbers["cases"]] == ["forward", "backward"] * 4
    assert "5 regions of 14 x 14, aligned=False" in numbers["cases"][-1]["name"]
    for case in numbers["cases"]:
        assert list(case["seconds"]) == ["torchvision", "maskseg", "maskseg, NCHW maps"]
        assert max(case["agreement"].values()) < 1e-5


@pytest.mark.slow
def test_the_trainers_suite(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    said = call(
        [*SMALL, *MASKS, *SCENES, "steps=3", "trainer.ema=0.9", "output=out.json"],
        tmp_path,
        tool="benchmark",
    )
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(said[said.index("{") :]) == numbers
    seconds = numbers["seconds"]
    every = numbers["every"]
    shares = numbers["overhead"]
    assert every == {"log": 1, "checkpoint": 2, "pictures": 4}  # those of debug=smoke
    for part in every:
        assert shares[part] == pytest.approx(seconds[part] / (every[part] * seconds["bare_step"]))
    assert shares["all"] == pytest.approx(sum(v for k, v in shares.items() if k != "all"))
    assert min(seconds.values()) > 0
    assert {p.name for p in tmp_path.iterdir()} == {"scenes", "out.json", "said.txt"}


def test_a_training_in_epochs_with_numbers_of_its_data(tmp_path: Path) -> None:
    images = []
    annotations = []
    for number in range(1, 5):
        Image.new("RGB", (64, 48), (9 * number, 40, 90)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        corners = [10, 10, 40, 10, 40, 30, 10, 30]
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [10, 10, 30, 20],
                "area": 600,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    categories = [{"id": 1, "name": "a"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    keys = [
        *("suite=trainer", "experiment=custom_r18", "steps=1", "batch_size=2"),
        *(f"data.train_json={tmp_path}/data.json", f"data.images={tmp_path}"),
        *("data.val_fraction=0.5", "data.size_range=[64,96]", "data.num_workers=0"),
        *("trainer.device=cpu", "model.backbone.trunk.out_level=c3", "model.backbone.channels=32"),
        *("model.classifier.mlp.width=32", *MASKS),
    ]
    numbers = trainer(config.compose("benchmark", keys))
    # An epoch of two images is a step.
    assert numbers["every"] == {"log": 20, "checkpoint": 5, "pictures": 10}


TINY = [
    *SCENES,
    "trainer.device=cpu",
    "data.num_workers=0",
    "trunk=resnet18",
    "size=96",
    "rounds=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["inference", "train"])
def test_a_model_beside_torchvisions(tmp_path: Path, suite: str) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    said = call([*TINY, f"suite={suite}", "output=out.json"], tmp_path, tool="benchmark")
    numbers = json.loads((tmp_path / "out.json").read_text())
    first = numbers["cases"][0]
    assert next(iter(first["seconds"])) == "torchvision"
    assert all(min(case["seconds"].values()) > 0 for case in numbers["cases"])
    assert set(first["times_faster"]) == set(first["seconds"]) - {"torchvision"}
    assert "resnet18, 1 x 96 px" in said
    assert (tmp_path / "out.png").stat().st_size > 1000
    if suite == "inference":
        apart = first["agreement"]
        assert apart["detections apart"] == 0
        assert (
            max(apart["boxes apart, px"], apart["scores apart"], apart["soft masks apart"]) < 1e-3
        )
        shares = [float(v[:-1]) for k, v in numbers["also"].items() if k.startswith("share of")]
        assert sum(shares) == pytest.approx(100, abs=20)
        assert numbers["also"]["floor, s"] > 0
    else:
        assert numbers["also"]["joint training over proposals from a file"] > 0


@pytest.mark.slow
def test_curves_from_equal_weights(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    call([*TINY, "suite=curve", "steps=2", "output=out.json"], tmp_path, tool="benchmark")
    also = json.loads((tmp_path / "out.json").read_text())["also"]
    names = ("torchvision", "torchvision, other draws", "maskseg", "maskseg bf16")
    expected: set[str] = set()
    for i in (1, 2):
        expected |= {f"loss of steps {i}-{i}, {name}" for name in names}
    assert set(also) == expected
    assert also["loss of steps 1-1, maskseg"] == pytest.approx(
        also["loss of steps 1-1, torchvision"], rel=0.2
    )


@pytest.mark.slow
def test_the_data_suite(tmp_path: Path) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    said = call(
        [
            *SCENES,
            "suite=data",
            "data.num_workers=1",
            "data.max_images=4",
            "rounds=1",
            "output=out.json",
        ],
        tmp_path,
        tool="benchmark",
    )
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert [list(case["seconds"]) for case in numbers["cases"]] == [["torchvision", "maskseg"]] * 4
    assert all(min(case["seconds"].values()) > 0 for case in numbers["cases"])
    apart = numbers["cases"][0]["agreement"]
    assert apart["pixels apart, grey levels of 255"] < 1e-3
    assert apart["boxes apart, px"] < 1e-3
    assert numbers["cases"][3]["agreement"]["cells that differ"] < 0.1
    assert sum(key.startswith("images a second") for key in numbers["also"]) == 6
    assert "share of decode: " in said


def test_slopes_of_the_upper_half() -> None:
    values = (1, 2, 4, 8, 16)
    assert slope(values, [9, 9, 3 * 4**1.5, 3 * 8**1.5, 3 * 16**1.5]) == pytest.approx(1.5)
    assert slope((0, 1, 2, 4), [4, 4, 2, 1]) == pytest.approx(-1)
    assert slope(values, [1, 1, 0, 0, 1]) is None


@pytest.mark.slow
def test_the_scaling_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    few = {
        "SIZES": (64, 96),
        "DETECTIONS": (3, 9),
        "OBJECTS": (1, 60),
        "CLASSES": (1, 400),
        "WORKERS": (0, 1),
    }
    for name, values in few.items():
        monkeypatch.setattr(suite_scaling, name, values)
    words = [
        "trainer.device=cpu",
        "trunk=resnet18",
        "size=64",
        "rounds=1",
        f"data.root={tmp_path / 'scenes'}",
        "data.num_train=8",
        "data.num_val=4",
    ]
    numbers = scaling(config.compose("benchmark", [*words, "data.size=128"]))
    assert [tuple(p["value"] for p in axis["points"]) for axis in numbers["axes"]] == [
        *list(few.values())[:3],
        (1, 400),
        (1, 400),
        (0, 1),
    ]
    for axis in numbers["axes"]:
        assert all(point["seconds"] > 0 for point in axis["points"])
    assert numbers == json.loads(json.dumps(numbers))
    text = table(numbers)
    assert text.count("slope time ") == len(numbers["axes"]) == 6
    chart(numbers, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("suite=nothing", "suite must be one of "),
        ("steps=0", "steps=0: expected a whole number from 1"),
        ("step=3", "'steps'"),
        ("suite=train size=8", "size=8: expected a whole number from 32"),
        ("suite=paste rounds=0", "rounds=0: expected a whole number from 1"),
        ("suite=inference batch=9", "batch=9, but the split val has only 4 images"),
    ],
)
def test_invalid_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, message: str
) -> None:
    make_scenes(tmp_path / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    monkeypatch.chdir(tmp_path)
    assert_refused(said("benchmark", *SMALL, *SCENES, *overrides.split()), message)
