"""Segment proposals of a dataset: from the command line, and missing ones in a training."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskseg import config as configs
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import make_scenes
from maskseg.engine.distributed import DistributedContext
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.variants.cfm.hierarchy import HierarchicalGrouping
from maskseg.variants.cfm.prepare import make_missing_segments, run_on_local_rank_zero
from maskseg.variants.cfm.propose import SegmentRecall, propose, stuff_masks, thing_masks
from maskseg.variants.cfm.store import SegmentStore


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    make_scenes(folder / "scenes", num_train=3, num_val=2, size=128, num_workers=0)
    return folder


@pytest.fixture
def words(home: Path) -> list[str]:
    """Overrides: data as if it were the user's, and a fast method."""
    scenes = home / "scenes"
    data = [f"data.{split}_json={scenes / split}.json" for split in ("train", "val")]
    return [
        "data=custom",
        *data,
        f"data.images={scenes / 'images'}",
        "workers=1",
        "method.superpixel_area=0.005",
        "method.scales=[40.0]",
    ]


def composed(words: list[str]) -> tuple[CocoSource, Any]:
    config = configs.compose("propose_segments", words)
    return configs.build_source(config.data), config


def test_a_dataset_from_the_command_line(
    home: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a" / "store"
    arguments = [
        *words,
        f"output={output}",
        "split=val",
        f"data.val_semantic={home / 'scenes' / 'stuff'}",
    ]
    propose(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"{output}: segments of 2 images \(2 computed now, \d+\.\d\d CPU s per image\)", lines[0]
    )
    assert re.fullmatch(r"\d+\.\d proposals of \d+\.\d superpixels per image", lines[1])
    assert re.fullmatch(
        r"recall of \d+ things: [01]\.\d{3} at IoU 0\.5, [01]\.\d{3} at IoU 0\.7", lines[2]
    )
    assert re.fullmatch(
        r"recall of \d+ stuff regions: [01]\.\d{3} at IoU 0\.5, [01]\.\d{3} at IoU 0\.7", lines[3]
    )
    source, _ = composed(words)
    record = source.val.images[1]
    proposals = SegmentStore(output, [(record.id, 128, 128)]).load(record.id, 128, 128)
    expected = HierarchicalGrouping(superpixel_area=0.005, scales=[40.0])(
        source.picture("val", record.id)
    )
    assert (proposals.labels == expected.labels).all()
    assert (proposals.members == expected.members).all()
    propose(arguments)
    assert capsys.readouterr().out.splitlines() == [
        f"{output}: segments of 2 images (all existed)",
        *lines[1:],
    ]


def test_a_file_of_masks(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported ground-truth masks have a recall of 1 and are stored unchanged."""
    source, _ = composed(words)
    file = source.val
    rows = []
    for i, record in enumerate(file.images):
        shapes = [
            s
            for s, crowd in zip(file.annotations(i).shapes, file.annotations(i).crowd, strict=True)
            if s is not None and not crowd
        ]
        rles = AnnotatedMasks.from_file(shapes, record.height, record.width).to_rle()
        rows += [
            {"image_id": record.id, "segmentation": rle, "score": 1 - 0.01 * k}
            for k, rle in enumerate(rles)
        ]
    assert len(rows) > 4
    (tmp_path / "masks.json").write_text(json.dumps(rows))
    store = tmp_path / "store"
    propose([*words, f"output={store}", "split=val", f"input={tmp_path / 'masks.json'}"])
    assert (
        f"recall of {len(rows)} things: 1.000 at IoU 0.5, 1.000 at IoU 0.7"
        in capsys.readouterr().out
    )
    proposals = SegmentStore(store, []).load(file.images[0].id, 128, 128)
    assert (proposals.members[:, proposals.labels] == thing_masks(file, 0)).all()
    assert SegmentMasks.of_image(
        proposals.labels, torch.from_numpy(proposals.members)
    ).to_rle() == [r["segmentation"] for r in rows[: len(proposals)]]
    # A training uses them, whatever its method, if they are complete and of its data.
    _, config = composed(words)
    make_missing_segments(composed(words)[0], "val", store, config.method)
    with pytest.raises(
        UserError, match=r"\(images='2, [0-9a-f]{16}' there, '3, [0-9a-f]{16}' here\)"
    ):
        make_missing_segments(composed(words)[0], "train", store, config.method)
    (store / f"{file.images[1].id}.npz").unlink()
    with pytest.raises(
        UserError, match=r"has no segments of image 2 \(1 of 2 images are missing\)"
    ):
        make_missing_segments(composed(words)[0], "val", store, config.method)
    with pytest.raises(
        UserError,
        match=r"holds segments made with other settings .*max_proposals=2000 there, 9 here",
    ):
        propose(
            [
                *words,
                f"output={store}",
                "split=val",
                f"input={tmp_path / 'masks.json'}",
                "method.max_proposals=9",
            ]
        )


def test_missing_segments_are_computed(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # no worker processes for three images
    source, config = composed(words)
    make_missing_segments(source, "train", tmp_path / "store", config.method)
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'store'}: computing the segments of 3 images; later runs reuse them\n"
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    assert len(before) == 4
    make_missing_segments(source, "train", str(tmp_path / "store"), config.method)
    assert capsys.readouterr().out == ""
    (tmp_path / "store" / "2.npz").unlink()
    make_missing_segments(source, "train", tmp_path / "store", config.method)
    assert "segments of 1 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    propose([*words, f"output={tmp_path / 'store'}"])
    assert "all existed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"method\.sigma=0\.5 there, 0\.8 here"):
        make_missing_segments(
            source, "train", tmp_path / "store", composed([*words, "method.sigma=0.8"])[1].method
        )


def test_a_moved_dataset(
    home: Path,
    tmp_path: Path,
    words: list[str],
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Segments are valid for a moved dataset and for some of its images, not for other images."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    source, config = composed(words)
    make_missing_segments(source, "train", tmp_path / "store", config.method)
    shutil.copytree(home / "scenes", tmp_path / "moved")
    (tmp_path / "moved" / "train.json").rename(tmp_path / "moved" / "renamed.json")
    moved = [
        *words,
        f"data.train_json={tmp_path / 'moved' / 'renamed.json'}",
        f"data.images={tmp_path / 'moved' / 'images'}",
    ]
    capsys.readouterr()
    for more in ([], ["data.max_images=2"], ["data.keep_empty=false"]):
        make_missing_segments(
            composed([*moved, *more])[0], "train", tmp_path / "store", config.method
        )
    assert capsys.readouterr().out == ""
    settings = tmp_path / "store" / "settings.json"
    old = {key: value for key, value in json.loads(settings.read_text()).items() if key != "images"}
    settings.write_text(json.dumps(old | {"data": "/elsewhere/renamed.json"}))
    make_missing_segments(composed(moved)[0], "train", tmp_path / "store", config.method)
    with pytest.raises(UserError, match=r"data='renamed\.json' there, 'train\.json' here"):
        make_missing_segments(source, "train", tmp_path / "store", config.method)


@pytest.mark.parametrize(
    ("key", "value"), [("id", 77), ("height", 120), ("width", 120), ("file_name", "other.png")]
)
def test_segments_of_other_images_are_refused(
    home: Path, tmp_path: Path, words: list[str], monkeypatch: Any, key: str, value: object
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    data = json.loads((home / "scenes" / "train.json").read_text())
    data["annotations"] = []
    data["images"][2][key] = value
    (tmp_path / "train.json").write_text(json.dumps(data))
    other, config = composed(
        [
            *words,
            f"data.train_json={tmp_path / 'train.json'}",
            "data.check_images=false",
            "data.max_images=1",
        ]
    )
    make_missing_segments(other, "train", tmp_path / "store", config.method)
    with pytest.raises(UserError, match=r"holds segments made with other settings \(images="):
        make_missing_segments(composed(words)[0], "train", tmp_path / "store", config.method)


def test_other_ranks_wait_as_long_as_the_work_takes() -> None:
    """Of two ranks (threads here), one works; the other gets heartbeats, so that none times out."""
    barrier = threading.Barrier(2)
    flags = [False, False]
    heard = threading.Semaphore(0)
    lines = list[str]()

    class Together(DistributedContext):
        def any_rank(self, *arguments: bool) -> tuple[bool, ...]:
            flags[self.rank] = arguments[0]
            barrier.wait(20)
            proposals = any(flags)
            barrier.wait(20)
            if self.rank == 1:
                heard.release()
            return (proposals,)

    def make() -> None:
        lines.extend("told" for _ in range(3) if heard.acquire(timeout=20))
        lines.append("made")

    def other() -> None:
        run_on_local_rank_zero(
            Together(1, 2, local_rank=1), lambda: lines.append("made twice"), 0.01
        )
        lines.append("goes on")

    waiting = threading.Thread(target=other, daemon=True)
    waiting.start()
    run_on_local_rank_zero(Together(0, 2), make, 0.01)
    waiting.join(20)
    assert lines == ["told", "told", "told", "made", "goes on"]
    run_on_local_rank_zero(DistributedContext(), lambda: lines.append("alone"))
    assert lines[-1] == "alone"


def test_only_images_of_the_training_are_computed(
    home: Path, tmp_path: Path, words: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    data = json.loads((home / "scenes" / "train.json").read_text())
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 1]
    (tmp_path / "few.json").write_text(json.dumps(data))
    source, config = composed(
        [
            *words,
            f"data.train_json={tmp_path / 'few.json'}",
            "data.keep_empty=false",
            "data.max_images=1",
        ]
    )
    make_missing_segments(source, "train", tmp_path / "store", config.method)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "2.npz",
        "settings.json",
    ]
    assert [source.train.images[i].id for i in source.dataset("train").images] == [2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "output=... is missing"),
        (["output=x", "split=test"], "split=test: there are train, val"),
        (["output=x", "workers=-1"], "workers=-1: expected a whole number from 0 to 1024"),
        (
            ["output=x", "method.scales=[]"],
            r"method\.scales=\[\]: expected a list of at least 1 value",
        ),
        (["output=x", "input=no.json"], r"no\.json: cannot be read"),
        (["output=x", "method.sgima=1"], "did you mean 'method.sigma'"),
        (["output=x", "data=bsds"], "the dataset is one of segments only"),
    ],
)
def test_errors(
    tmp_path: Path, words: list[str], more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = more if "data=bsds" in more else [*words, *more]
    with pytest.raises(UserError, match=message):
        propose(given)
    assert list(tmp_path.iterdir()) == []


def test_recall_literals() -> None:
    """A strip of eight superpixels; the proposals are the first four and the last two."""
    labels = np.arange(8, dtype=np.int32)[None].repeat(2, axis=0)
    members = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]], dtype=bool)
    recall = SegmentRecall()
    assert recall.summary() == "0.0 proposals of 0.0 superpixels per image"
    things = np.zeros((3, 2, 8), dtype=bool)
    things[0, :, :4], things[1, :, :6], things[2, :, 4:5] = True, True, True  # IoU 1, 4 / 6, 0
    stuff = np.zeros((1, 2, 8), dtype=bool)
    stuff[:, 1, 6:] = True  # 2 / 4
    recall.add(SegmentProposals(labels, members), things, stuff)
    assert recall.best == {
        "things": pytest.approx([1, 2 / 3, 0]),
        "stuff regions": pytest.approx([0.5]),
    }
    assert recall.recalls() == {
        "things": pytest.approx([2 / 3, 1 / 3]),
        "stuff regions": [1.0, 0.0],
    }
    recall.add(
        SegmentProposals(np.zeros((2, 8), dtype=np.int32), np.zeros((0, 1), dtype=bool)),
        things[:1],
        np.zeros((0, 0, 0), dtype=bool),
    )
    assert recall.summary().splitlines() == [
        "1.0 proposals of 4.5 superpixels per image",
        "recall of 4 things: 0.500 at IoU 0.5, 0.250 at IoU 0.7",
        "recall of 1 stuff regions: 1.000 at IoU 0.5, 0.000 at IoU 0.7",
    ]


def test_regions_of_stuff() -> None:
    """Two regions of one class of stuff, one of another.

    Specks, things and unlabeled pixels do not count.
    """
    semantic = np.full((20, 30), -1, dtype=np.int16)
    semantic[:6, :6] = semantic[:6, 10:16] = 92
    semantic[10:, :] = 0
    semantic[12:18, 3:9] = 4
    semantic[7, 20:24] = 92
    proposals = stuff_masks(semantic, (1, 4))
    assert [int(mask.sum()) for mask in proposals] == [36, 36, 300 - 36]
    assert proposals[0, :6, :6].all()
    assert proposals[1, :6, 10:16].all()
    assert (proposals[2] == (semantic == 0)).all()
    assert stuff_masks(None, (1,)).shape == (0, 0, 0)
    assert len(stuff_masks(np.full((20, 30), 4, dtype=np.int16), (4,))) == 0


def test_crowds_do_not_count_as_things(tmp_path: Path) -> None:
    square = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]
    crowd = {"size": [10, 12], "counts": [0, 60, 60]}
    rows = [
        {"segmentation": square, "bbox": [2, 2, 6, 6]},
        {"segmentation": crowd, "iscrowd": 1, "bbox": [0, 0, 6, 10]},
        {"bbox": [1, 1, 4, 4]},
    ]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "area": 36, "iscrowd": 0, **row}
        for i, row in enumerate(rows)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 12} for i in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    file = CocoSource.from_keys(
        val_json=str(tmp_path / "a.json"), images=str(tmp_path), check_images=False
    ).val
    assert thing_masks(file, 0).sum(axis=(1, 2)).tolist() == [36]
    assert thing_masks(file, 1).shape == (0, 0, 0)
