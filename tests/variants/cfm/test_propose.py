"""Segment proposals of a data set from the command line, and where a training finds that they are missing."""

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
from maskseg.engine.distributed import Group
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.variants.cfm.hierarchy import HierarchicalGrouping
from maskseg.variants.cfm.prepare import ensure, once_a_machine
from maskseg.variants.cfm.propose import SegmentRecall, propose, stuff_masks, thing_masks
from maskseg.variants.cfm.store import SegmentStore


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    make_scenes(folder / "scenes", num_train=3, num_val=2, size=128, num_workers=0)
    return folder


@pytest.fixture
def words(home: Path) -> list[str]:
    """Data as a user's own, methods that are quick."""
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
    return configs.build(config.data), config


def test_a_data_set_from_the_command_line(
    home: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a" / "store"
    own = [
        *words,
        f"output={output}",
        "split=val",
        f"data.val_semantic={home / 'scenes' / 'stuff'}",
    ]
    propose(own)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"{output}: segments of 2 images \(2 made now, \d+\.\d\d s of a CPU an image\)", said[0]
    )
    assert re.fullmatch(r"\d+\.\d proposals of \d+\.\d superpixels an image", said[1])
    assert re.fullmatch(
        r"recall of \d+ things: [01]\.\d{3} at IoU 0\.5, [01]\.\d{3} at IoU 0\.7", said[2]
    )
    assert re.fullmatch(
        r"recall of \d+ stuff regions: [01]\.\d{3} at IoU 0\.5, [01]\.\d{3} at IoU 0\.7", said[3]
    )
    source, _ = composed(words)
    record = source.val.images[1]
    found = SegmentStore(output, [(record.id, 128, 128)]).of(record.id, 128, 128)
    expected = HierarchicalGrouping(superpixel_area=0.005, scales=[40.0])(
        source.picture("val", record.id)
    )
    assert (found.labels == expected.labels).all()
    assert (found.members == expected.members).all()
    propose(own)
    assert capsys.readouterr().out.splitlines() == [
        f"{output}: segments of 2 images (all were there)",
        *said[1:],
    ]


def test_a_file_of_masks(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks that are the truth have a recall of 1, and come back."""
    source, _ = composed(words)
    file, rows = source.val, []
    for i, record in enumerate(file.images):
        shapes = [
            s
            for s, crowd in zip(file.annotations(i).shapes, file.annotations(i).crowd, strict=True)
            if s is not None and not crowd
        ]
        rles = FileMasks.from_file(shapes, record.height, record.width).to_rle()
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
    found = SegmentStore(store, []).of(file.images[0].id, 128, 128)
    assert (found.members[:, found.labels] == thing_masks(file, 0)).all()
    assert SegmentMasks.of_image(found.labels, torch.from_numpy(found.members)).to_rle() == [
        r["segmentation"] for r in rows[: len(found)]
    ]
    # A training takes them, whatever its method, if they are whole and of its data.
    _, config = composed(words)
    ensure(composed(words)[0], "val", store, config.method)
    with pytest.raises(
        UserError, match=r"\(images='2, [0-9a-f]{16}' there, '3, [0-9a-f]{16}' here\)"
    ):
        ensure(composed(words)[0], "train", store, config.method)
    (store / f"{file.images[1].id}.npz").unlink()
    with pytest.raises(
        UserError, match=r"has no segments of image 2 \(1 of 2 images are missing\)"
    ):
        ensure(composed(words)[0], "val", store, config.method)
    with pytest.raises(
        UserError, match=r"holds segments made otherwise .*max_proposals=2000 there, 9 here"
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


def test_a_training_makes_what_is_missing(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # no processes for three images
    source, config = composed(words)
    ensure(source, "train", tmp_path / "store", config.method)
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'store'}: making the segments of 3 images, once for all trainings\n"
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    assert len(before) == 4
    ensure(source, "train", str(tmp_path / "store"), config.method)
    assert capsys.readouterr().out == ""
    (tmp_path / "store" / "2.npz").unlink()
    ensure(source, "train", tmp_path / "store", config.method)
    assert "segments of 1 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    propose([*words, f"output={tmp_path / 'store'}"])
    assert "all were there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"method\.sigma=0\.5 there, 0\.8 here"):
        ensure(
            source, "train", tmp_path / "store", composed([*words, "method.sigma=0.8"])[1].method
        )


def test_a_data_set_that_was_moved(
    home: Path,
    tmp_path: Path,
    words: list[str],
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its segments serve wherever it lies, part of its images too; those of other images do not."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    source, config = composed(words)
    ensure(source, "train", tmp_path / "store", config.method)
    shutil.copytree(home / "scenes", tmp_path / "moved")
    (tmp_path / "moved" / "train.json").rename(tmp_path / "moved" / "renamed.json")
    moved = [
        *words,
        f"data.train_json={tmp_path / 'moved' / 'renamed.json'}",
        f"data.images={tmp_path / 'moved' / 'images'}",
    ]
    capsys.readouterr()
    for more in ([], ["data.max_images=2"], ["data.keep_empty=false"]):
        ensure(composed([*moved, *more])[0], "train", tmp_path / "store", config.method)
    assert capsys.readouterr().out == ""
    settings = tmp_path / "store" / "settings.json"
    old = {key: value for key, value in json.loads(settings.read_text()).items() if key != "images"}
    settings.write_text(json.dumps(old | {"data": "/elsewhere/renamed.json"}))
    ensure(composed(moved)[0], "train", tmp_path / "store", config.method)
    with pytest.raises(UserError, match=r"data='renamed\.json' there, 'train\.json' here"):
        ensure(source, "train", tmp_path / "store", config.method)


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
    ensure(other, "train", tmp_path / "store", config.method)
    with pytest.raises(UserError, match=r"holds segments made otherwise \(images="):
        ensure(composed(words)[0], "train", tmp_path / "store", config.method)


def test_processes_wait_as_long_as_the_work_takes() -> None:
    """Of two processes, threads here, one makes what both need; the other hears from it all the while, so that no message takes long."""
    barrier, flags, heard, said = (
        threading.Barrier(2),
        [False, False],
        threading.Semaphore(0),
        list[str](),
    )

    class Together(Group):
        def any(self, *own: bool) -> tuple[bool, ...]:
            flags[self.rank] = own[0]
            barrier.wait(20)
            found = any(flags)
            barrier.wait(20)
            if self.rank == 1:
                heard.release()
            return (found,)

    def make() -> None:
        said.extend("told" for _ in range(3) if heard.acquire(timeout=20))
        said.append("made")

    def other() -> None:
        once_a_machine(Together(1, 2, local_rank=1), lambda: said.append("made twice"), 0.01)
        said.append("goes on")

    waiting = threading.Thread(target=other, daemon=True)
    waiting.start()
    once_a_machine(Together(0, 2), make, 0.01)
    waiting.join(20)
    assert said == ["told", "told", "told", "made", "goes on"]
    once_a_machine(Group(), lambda: said.append("alone"))
    assert said[-1] == "alone"


def test_only_the_images_that_a_training_has(
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
    ensure(source, "train", tmp_path / "store", config.method)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "2.npz",
        "settings.json",
    ]
    assert [source.train.images[i].id for i in source.dataset("train").images] == [2]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "output=... is missing"),
        (["output=x", "split=test"], "split=test: there are train, val"),
        (["output=x", "workers=-1"], "workers must be at least 0"),
        (["output=x", "method.scales=[]"], "scales must be above 0"),
        (["output=x", "input=no.json"], r"no\.json: cannot be read"),
        (["output=x", "method.sgima=1"], "did you mean 'method.sigma'"),
        (["output=x", "data=bsds"], "the data set is one for measures of segments"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, words: list[str], more: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = more if "data=bsds" in more else [*words, *more]
    with pytest.raises(UserError, match=told):
        propose(given)
    assert list(tmp_path.iterdir()) == []


def test_recall_literals() -> None:
    """A strip of eight superpixels; proposals: the first four, the last two."""
    labels = np.arange(8, dtype=np.int32)[None].repeat(2, axis=0)
    members = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]], dtype=bool)
    recall = SegmentRecall()
    assert recall.text() == "0.0 proposals of 0.0 superpixels an image"
    things = np.zeros((3, 2, 8), dtype=bool)
    things[0, :, :4], things[1, :, :6], things[2, :, 4:5] = True, True, True  # IoU 1, 4 / 6, 0
    stuff = np.zeros((1, 2, 8), dtype=bool)
    stuff[:, 1, 6:] = True  # 2 / 4
    recall.add(SegmentProposals(labels, members), things, stuff)
    assert recall.best == {
        "things": pytest.approx([1, 2 / 3, 0]),
        "stuff regions": pytest.approx([0.5]),
    }
    assert recall.shares() == {"things": pytest.approx([2 / 3, 1 / 3]), "stuff regions": [1.0, 0.0]}
    recall.add(
        SegmentProposals(np.zeros((2, 8), dtype=np.int32), np.zeros((0, 1), dtype=bool)),
        things[:1],
        np.zeros((0, 0, 0), dtype=bool),
    )
    assert recall.text().splitlines() == [
        "1.0 proposals of 4.5 superpixels an image",
        "recall of 4 things: 0.500 at IoU 0.5, 0.250 at IoU 0.7",
        "recall of 1 stuff regions: 1.000 at IoU 0.5, 0.000 at IoU 0.7",
    ]


def test_regions_of_stuff() -> None:
    """Two pieces of one stuff class, one of another; a speck, a thing and pixels without a category are none."""
    semantic = np.full((20, 30), -1, dtype=np.int16)
    semantic[:6, :6] = semantic[:6, 10:16] = 92
    semantic[10:, :] = 0
    semantic[12:18, 3:9] = 4
    semantic[7, 20:24] = 92
    found = stuff_masks(semantic, (1, 4))
    assert [int(mask.sum()) for mask in found] == [36, 36, 300 - 36]
    assert found[0, :6, :6].all()
    assert found[1, :6, 10:16].all()
    assert (found[2] == (semantic == 0)).all()
    assert stuff_masks(None, (1,)).shape == (0, 0, 0)
    assert len(stuff_masks(np.full((20, 30), 4, dtype=np.int16), (4,))) == 0


def test_crowds_are_no_things(tmp_path: Path) -> None:
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
    file = CocoSource(
        val_json=str(tmp_path / "a.json"), images=str(tmp_path), check_images=False
    ).val
    assert thing_masks(file, 0).sum(axis=(1, 2)).tolist() == [36]
    assert thing_masks(file, 1).shape == (0, 0, 0)
