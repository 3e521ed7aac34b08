"""Annotation jobs, and the journal from which a run resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made.coco_files import SQUARE, dataset, write

from maskseg.annotation.jobs import AnnotationJob, annotation_jobs, run_jobs, sha256_of
from maskseg.annotation.write import (
    class_annotations,
    object_annotations,
    write_annotations,
)
from maskseg.data.coco.file import CocoFile, read_coco
from maskseg.errors import UserError
from maskseg.files.outputs import check_outputs

JOBS = [AnnotationJob(number, 5, 6, "", f"{number}.png") for number in (7, 3, 9)]


def area(job: AnnotationJob) -> dict[str, int]:
    return {"area": job.height * job.width + job.image_id}


def never(job: AnnotationJob) -> None:
    raise AssertionError(f"image {job.image_id} is done again")


def read(folder: Path) -> CocoFile:
    box = {"bbox": [1, 2, 5, 6]}
    content = dataset(
        box,
        {**box, "iscrowd": 1},
        {"bbox": [20, 2, 50, 6], "segmentation": SQUARE, "note": "mine"},
        {"bbox": [40, 2, 5, 6]},
    )
    del content["annotations"][1]["id"]
    content["info"], content["images"][0]["licence"] = {"year": 2020}, 5
    return read_coco(write(folder, content))


def test_objects_and_classes(tmp_path: Path) -> None:
    file = read(tmp_path)
    first, second = annotation_jobs(file, "root", 100, "object", ground_truth=False)
    assert (first.root, first.max_pixels, first.file_name, [w.id for w in first.requests]) == (
        "root",
        100,
        "1.png",
        [1],
    )
    assert [w.box for w in second.requests] == [
        (1, 2, 6, 8),
        (20, 2, 30, 8),
    ]  # without the crowd and the box outside the image
    assert all(w.ground_truth is None for w in second.requests)
    with_truth = list(annotation_jobs(file, "", 100, "object", ground_truth=True))
    assert [[w.id for w in job.requests] for job in with_truth] == [[1], [12]]
    mask = with_truth[0].requests[0].ground_truth_mask()
    assert mask is not None
    assert (mask.shape, mask.sum()) == ((20, 30), 60)
    by_class = list(annotation_jobs(file, "", 100, "class", ground_truth=False, max_images=1))
    assert [[(w.id, w.label, w.box) for w in job.requests] for job in by_class] == [[(0, 0, None)]]
    assert [
        len(job.requests) for job in annotation_jobs(file, "", 100, "class", ground_truth=True)
    ] == [
        1,
        0,
    ]  # a mask of the second image is missing


def test_jobs_are_generated_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = read(tmp_path), []
    monkeypatch.setattr(
        file, "annotations", lambda index: asked.append(index) or CocoFile.annotations(file, index)
    )
    assert next(annotation_jobs(file, "", 100, "object", ground_truth=True)).image_id == 1
    assert asked == [0]


def test_checksums_change_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = sha256_of(path)
    assert sha256_of(path) == first
    path.write_bytes(b"two")
    assert sha256_of(path) != first
    with pytest.raises(UserError, match="b: cannot be read"):
        sha256_of(tmp_path / "b")


@pytest.mark.parametrize("cut", [1, 5])
def test_a_run_resumes_from_its_journal(tmp_path: Path, cut: int) -> None:
    path, settings = tmp_path / "a" / ".out.masks", {"data": "x", "keys": (1, 2)}
    results = run_jobs(JOBS, area, path, settings, 1, "masks")
    assert list(results.items()) == [(7, {"area": 37}), (3, {"area": 33}), (9, {"area": 39})]
    whole = path.read_bytes()
    assert run_jobs(JOBS, never, path, settings, 1, "masks") == results
    path.write_bytes(whole[:-cut])  # truncates the last line
    with pytest.raises(AssertionError, match="image 9 is done again"):
        run_jobs(JOBS, never, path, settings, 1, "masks")
    assert run_jobs(JOBS, area, path, settings, 1, "masks") == results
    assert path.read_bytes() == whole
    with pytest.raises(UserError, match=r"keys=\[1, 2\] there, \[1\] here"):
        run_jobs(JOBS, area, path, {**settings, "keys": [1]}, 1, "masks")
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="not the journal"):
        run_jobs(JOBS, area, path, settings, 1, "masks")
    path.write_text('{"format": "mask')  # killed while writing the first line
    assert run_jobs(JOBS, area, path, settings, 1, "masks") == results


@pytest.mark.parametrize(
    "line", ["3", "[]", "[1]", '["x", 2]', "[1, 2, 3]", "{}", f"[{10.0**300}, 1]"]
)
def test_a_journal_is_cut_at_a_damaged_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal"
    results = run_jobs(JOBS, area, path, {}, 1, "masks")
    whole = path.read_text()
    header, first, *rest = whole.splitlines(keepends=True)
    path.write_text("".join((header, first, line + "\n", *rest)))
    assert run_jobs(JOBS, area, path, {}, 1, "masks") == results
    assert path.read_text() == whole


@pytest.mark.slow  # test_annotate.py compares one process with two in the whole tool
def test_processes_change_nothing(tmp_path: Path) -> None:
    one, two = (
        run_jobs(JOBS, area, tmp_path / str(workers), {}, workers, "masks") for workers in (1, 2)
    )
    assert list(one.items()) == list(two.items())


def test_the_content_of_the_file_is_kept(tmp_path: Path) -> None:
    file = read(tmp_path)
    before = json.loads(file.path.read_text())
    row = {
        "id": 12,
        "label": 0,
        "segmentation": [[1.0, 2, 5, 2, 5, 6]],
        "area": 4,
        "bbox": [1, 2, 4, 4],
        "mask_by": {"technique": "box"},
    }
    content = object_annotations(file, {12: row})
    assert {key: content[key] for key in ("info", "images", "categories")} == {
        key: before[key] for key in ("info", "images", "categories")
    }
    rows = {a["id"]: a for a in content["annotations"]}
    assert rows[12] == {
        **before["annotations"][3],
        "iscrowd": 0,
        **{k: row[k] for k in ("segmentation", "area", "mask_by")},
    }
    assert [a["id"] for a in content["annotations"]] == [1, 14, 11, 12, 13]
    assert rows[1] == before["annotations"][0]
    assert rows[13] == before["annotations"][4]  # outside its image
    assert len(rows) == 5
    assert sorted(rows)[-1] == 14  # the annotation without an id
    write_annotations(tmp_path / "out.json", content)
    assert len(read_coco(tmp_path / "out.json").annotations(1)) == 3
    assert json.loads(file.path.read_text()) == before
    classes = class_annotations(
        file, {2: [{"label": 0, "segmentation": [], "area": 3, "bbox": [0, 0, 1, 3]}]}
    )["annotations"]
    assert classes == [
        {
            "id": 1,
            "image_id": 2,
            "category_id": 4,
            "iscrowd": 0,
            "segmentation": [],
            "area": 3,
            "bbox": [0, 0, 1, 3],
        }
    ]


def test_annotations_without_an_id_or_with_0_are_kept_whole(tmp_path: Path) -> None:
    box = {"bbox": [1, 2, 5, 6], "note": "mine"}
    content = dataset(
        {**box, "id": 0},
        {**box, "id": None, "review": "accepted"},
        {**box, "bbox": [40, 2, 5, 6]},
        {**box, "image_id": 1},
    )
    for entry in (content["annotations"][3], content["annotations"][4]):
        del entry["id"]
    content["annotations"][1]["review"] = content["annotations"][4]["review"] = "rejected"
    file = read_coco(write(tmp_path, content))
    numbers = [file.annotations(index).ids.tolist() for index in (0, 1)]
    assert numbers == [[1, 5], [2, 3]]  # 4 lies outside its image
    masks = {
        number: {
            "id": number,
            "label": 0,
            "bbox": [0, 0, 1, 1],
            "segmentation": [],
            "mask_by": {"at": number},
        }
        for number in (2, 3)
    }
    results = object_annotations(file, masks)["annotations"]
    assert [(a["id"], a["note"], a.get("mask_by"), a.get("review")) for a in results[1:]] == [
        (0, "mine", {"at": 2}, None),
        (3, "mine", {"at": 3}, None),  # the decision on the old mask is gone
        (6, "mine", None, None),
        (5, "mine", None, "rejected"),
    ]
    assert [a["bbox"] for a in results[1:]] == [a["bbox"] for a in content["annotations"][1:]]


def test_crowds_that_image_labels_stand_for_are_not_written(tmp_path: Path) -> None:
    content = dataset({"bbox": [1, 2, 5, 6]})
    content["categories"].append({"id": 5, "name": "dog"})
    content["images"].append({**content["images"][0], "id": 3, "category_ids": [5]})
    file = read_coco(write(tmp_path, content))
    assert file.annotations(2).crowd.tolist() == [True]
    results = object_annotations(file, {})
    assert [a["id"] for a in results["annotations"]] == [1, 10]
    assert results["images"] == content["images"]


def test_outputs_that_would_destroy_something(tmp_path: Path) -> None:
    file = read(tmp_path)
    (tmp_path / "link.json").symlink_to(file.path)
    for name in (file.path, tmp_path / "link.json", tmp_path / "x" / ".." / file.path.name):
        with pytest.raises(UserError, match="is an input file"):
            check_outputs([name], [None, str(file.path)])
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        check_outputs([tmp_path / "done.json"], [str(file.path)])
    check_outputs([tmp_path / "new.json"], [str(file.path)])
