"""Decisions on masks: content of the file, crashes at any moment, and number of writes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from made.reviews import proposals, write_proposals

from maskseg.annotation.review import state
from maskseg.annotation.review.state import NewMask, ReviewFile
from maskseg.errors import UserError
from maskseg.files import replacing

NEW = {"size": [40, 60], "counts": "abc"}
NEVER = 1e6  # seconds: the file is written only on request


def read_tree(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


def killed(path: Path, to: Path) -> Path:
    """Copy the files that a kill would leave at this moment."""
    shutil.copytree(path.parent, to)
    return to / path.name


def expected(changes: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """`proposals` with changed fields of some annotations, by id."""
    tree = proposals()
    for annotation in tree["annotations"]:
        annotation |= changes.get(annotation["id"], {})
    return tree


EDITED = {
    "segmentation": NEW,
    "bbox": [1, 2, 3, 4],
    "area": 9,
    "mask_by": {"technique": "review"},
    "review": "edited",
}
AFTER = {1: {"review": "accepted"}, 2: {"review": "rejected"}, 5: EDITED}


def decide(file: ReviewFile) -> None:
    file.decide(1, "accepted")
    file.decide(2, "rejected")
    file.replace_mask(5, NewMask(NEW, [1, 2, 3, 4], 9))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_proposals(tmp_path / "data")


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The written files, one entry per write."""
    seen: list[Path] = []

    @contextmanager
    def counted(path: Path, what: str) -> Iterator[IO[bytes]]:
        seen.append(path)
        with replacing(path, what) as file:
            yield file

    monkeypatch.setattr(state, "replacing", counted)
    return seen


def test_the_file_keeps_everything_but_the_decisions(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    file.close()
    assert read_tree(path) == expected(AFTER)
    assert list(read_tree(path)) == list(proposals())
    assert [p.name for p in path.parent.iterdir() if "masks" in p.name] == ["masks.json"]


def test_nothing_decided_nothing_written(path: Path, writes: list[Path]) -> None:
    before = path.read_bytes()
    file = ReviewFile(path)
    file.merge_journal()
    assert file.undo() is None
    file.close()
    assert writes == []
    assert path.read_bytes() == before


def test_rows(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    assert [tuple(row) for row in file.rows()] == [
        (1, 7, 4, "accepted"),
        (2, 3, 4, "rejected"),
        (5, 7, 9, "edited"),
        (9, 3, 9, "unreviewed"),
    ]
    file.close()


def test_undo_restores_every_field(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    file.decide(1, "rejected")
    assert file.undoable() == 4
    assert [file.undo() for _ in range(5)] == [1, 5, 2, 1, None]
    file.close()
    assert read_tree(path) == proposals()


def test_undo_of_the_last_decision_alone(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    file.undo()
    file.close()
    assert read_tree(path) == expected({k: v for k, v in AFTER.items() if k != 5})


def test_the_same_decision_twice_is_one(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    file.decide(1, "accepted")
    file.decide(1, "accepted")
    assert file.undoable() == 1
    file.close()


def test_an_edited_annotation_stays_edited_when_it_is_accepted(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    file.decide(5, "accepted")
    assert file.annotation(5)["review"] == "edited"
    file.decide(5, "rejected")
    assert file.annotation(5)["review"] == "rejected"
    file.close()


def test_an_unknown_value_of_review_is_open(path: Path) -> None:
    tree = proposals()
    tree["annotations"][0]["review"] = {"by": "me"}
    path.write_text(json.dumps(tree))
    file = ReviewFile(path, delay=NEVER)
    assert file.rows()[0].review == "unreviewed"
    file.decide(1, "accepted")
    file.undo()
    file.close()
    assert read_tree(path) == tree


def test_a_kill_after_any_decision_loses_none(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    steps: list[Callable[[], Any]] = [
        lambda: file.decide(1, "accepted"),
        lambda: file.decide(2, "rejected"),
        lambda: file.replace_mask(5, NewMask(NEW, [1, 2, 3, 4], 9)),
        file.undo,
    ]
    results = [{1: AFTER[1]}, {1: AFTER[1], 2: AFTER[2]}, AFTER, {1: AFTER[1], 2: AFTER[2]}]
    for number, (step, result) in enumerate(zip(steps, results, strict=True)):
        step()
        left = killed(path, tmp_path / str(number))
        assert read_tree(left) == proposals()
        reopened = ReviewFile(left, delay=NEVER)
        assert reopened.recovered == number + 1
        assert read_tree(left) == expected(result)
        assert journal(left).stat().st_size == 0
        reopened.close()
    file.close()


def test_a_kill_within_a_line_loses_that_line_alone(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    whole = journal(path).read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    before = {1: AFTER[1], 2: AFTER[2]}
    for number, (length, result) in enumerate(
        [
            (5, {}),
            (second + 1, before),
            ((second + len(whole)) // 2, before),
            (len(whole) - 1, before),
        ]
    ):
        left = killed(path, tmp_path / str(number))
        journal(left).write_bytes(whole[:length])
        reopened = ReviewFile(left, delay=NEVER)
        reopened.decide(9, "accepted")
        in_between = killed(left, tmp_path / f"{number}b")
        reopened.close()
        for found in (left, in_between):
            ReviewFile(found).close()
            assert read_tree(found) == expected({**result, 9: {"review": "accepted"}})
    file.close()


def test_a_kill_between_the_file_and_the_end_of_its_journal(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    lines = journal(path).read_bytes()
    file.merge_journal()
    assert journal(path).read_bytes() == b""
    left = killed(path, tmp_path / "left")
    journal(left).write_bytes(lines)
    ReviewFile(left).close()
    assert read_tree(left) == expected(AFTER)
    file.close()


def test_a_decision_while_the_file_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ReviewFile(path, delay=NEVER)
    file.decide(1, "accepted")

    @contextmanager
    def slow(path: Path, what: str) -> Iterator[IO[bytes]]:
        with replacing(path, what) as opened:
            file.decide(2, "rejected")
            yield opened

    with monkeypatch.context() as patched:
        patched.setattr(state, "replacing", slow)
        file.merge_journal()
    assert read_tree(path) == expected({1: AFTER[1]})
    left = killed(path, tmp_path / "left")
    ReviewFile(left).close()
    assert read_tree(left) == expected({1: AFTER[1], 2: AFTER[2]})
    file.close()
    assert read_tree(path) == read_tree(left)


def test_the_file_is_written_in_the_background(path: Path) -> None:
    file = ReviewFile(path, delay=0.05)
    for change, result in ((lambda: decide(file), AFTER), (file.undo, {1: AFTER[1], 2: AFTER[2]})):
        change()
        end = time.monotonic() + 20
        while read_tree(path) != expected(result) and time.monotonic() < end:
            time.sleep(0.02)
        assert read_tree(path) == expected(result)
    file.close()


def test_decisions_do_not_rewrite_a_large_file(tmp_path: Path, writes: list[Path]) -> None:
    tree = proposals()
    tree["images"] = [
        {"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(5000)
    ]
    tree["annotations"] = [
        {**tree["annotations"][0], "id": i + 1, "image_id": i} for i in range(5000)
    ]
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(tree))
    file = ReviewFile(path, delay=NEVER)
    for number in range(1, 201):
        file.decide(number, "accepted")
    assert writes == []
    assert journal(path).stat().st_size < 200 * 300
    file.close()
    assert writes == [path]
    assert [
        a["id"] for a in read_tree(path)["annotations"] if a.get("review") == "accepted"
    ] == list(range(1, 201))


def test_a_full_disk_refuses_the_decision(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ReviewFile(path, delay=NEVER)
    file.decide(1, "accepted")
    before = journal(path).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"could not be saved \(No space left"):
            file.decide(2, "rejected")
        with pytest.raises(UserError, match="could not be saved"):
            file.undo()
    assert journal(path).read_bytes() == before
    assert [row.review for row in file.rows()[:2]] == ["accepted", "unreviewed"]
    assert file.undo() == 1
    file.close()
    assert read_tree(path) == proposals()


def test_a_file_that_cannot_be_written_keeps_its_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ReviewFile(path, delay=0.01)

    @contextmanager
    def full(path: Path, what: str) -> Iterator[IO[bytes]]:
        raise UserError(f"{path}: {what} could not be written")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(state, "replacing", full)
        decide(file)
        end = time.monotonic() + 20
        while not file.write_error and time.monotonic() < end:
            time.sleep(0.01)
        assert "could not be written" in file.write_error
        with pytest.raises(UserError, match="could not be written"):
            file.close()
    assert read_tree(path) == proposals()
    reopened = ReviewFile(path)
    assert reopened.recovered == 3
    reopened.close()
    assert read_tree(path) == expected(AFTER)


def test_one_review_of_a_file_at_a_time(path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    file.decide(1, "accepted")
    with pytest.raises(UserError, match="reviewed by another process"):
        ReviewFile(path)
    file.close()
    ReviewFile(path).close()
    assert read_tree(path) == expected({1: AFTER[1]})


def test_a_separate_output(path: Path, tmp_path: Path) -> None:
    source, output = path.read_bytes(), tmp_path / "reviewed.json"
    file = ReviewFile(path, output, delay=NEVER)
    assert file.current == path
    file.decide(1, "accepted")
    file.close()
    assert read_tree(output) == expected({1: AFTER[1]})
    reopened = ReviewFile(path, output, delay=NEVER)
    assert reopened.current == output
    reopened.decide(2, "rejected")
    reopened.close()
    assert read_tree(output) == expected({1: AFTER[1], 2: AFTER[2]})
    assert path.read_bytes() == source


def test_a_kill_before_the_output_was_there(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, path.with_name("out.json"), delay=NEVER)
    file.decide(1, "accepted")
    left = killed(path, tmp_path / "left")
    file.close()
    reopened = ReviewFile(left, left.with_name("out.json"))
    assert reopened.current == left.with_name("out.json")
    assert read_tree(reopened.current) == expected({1: AFTER[1]})
    reopened.close()


def test_an_output_of_other_annotations_is_refused(path: Path, tmp_path: Path) -> None:
    tree = proposals()
    tree["annotations"].pop()
    (tmp_path / "out.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"out.json: .* other annotations than .*masks.json"):
        ReviewFile(path, tmp_path / "out.json")


def test_a_journal_of_another_file_is_refused(path: Path) -> None:
    journal(path).write_text('{"id": 77, "image_id": 7, "category_id": 4}\n')
    with pytest.raises(UserError, match=r"masks.json.journal: annotation 77 is not in"):
        ReviewFile(path)
    assert journal(path).exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', "\x00\x00"])
def test_a_damaged_journal_is_named(path: Path, line: str) -> None:
    journal(path).write_text('{"id": 1, "image_id": 7, "category_id": 4}\n' + line + "\n")
    with pytest.raises(UserError, match=r"masks.json.journal: line 2 is damaged"):
        ReviewFile(path)
    assert read_tree(path) == proposals()


def test_export_drops_the_rejected(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    decide(file)
    assert file.export(tmp_path / "clean.json") == {
        "unreviewed": 1,
        "added": 0,
        "accepted": 1,
        "rejected": 1,
        "edited": 1,
    }
    file.close()
    tree = expected(AFTER)
    tree["annotations"] = [a for a in tree["annotations"] if a["id"] != 2]
    assert read_tree(tmp_path / "clean.json") == tree


def test_a_file_without_annotations(path: Path, tmp_path: Path) -> None:
    tree = {**proposals(), "annotations": []}
    path.write_text(json.dumps(tree))
    file = ReviewFile(path)
    assert file.rows() == []
    file.export(tmp_path / "clean.json")
    file.close()
    assert read_tree(tmp_path / "clean.json") == tree


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "truncated or damaged"),
        ("[]", "not a COCO data set"),
        ('{"images": [], "annotations": {}, "categories": []}', "not a COCO data set"),
        (
            '{"images": [], "annotations": [{"image_id": 1, "category_id": 1}], "categories": []}',
            "no integer id",
        ),
        ('{"images": [], "annotations": [3], "categories": []}', "no integer id"),
        (
            json.dumps(
                {
                    **proposals(),
                    "annotations": [*proposals()["annotations"], proposals()["annotations"][0]],
                }
            ),
            "not unique",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "masks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"masks.json: .*{message}"):
        ReviewFile(path)
    assert [p.name for p in tmp_path.iterdir()] == ["masks.json"]


def test_a_missing_file_and_unknown_ids(path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        ReviewFile(path.with_name("none.json"))
    file = ReviewFile(path)
    with pytest.raises(KeyError):
        file.decide(3, "accepted")
    file.close()


def test_a_link_stays_a_link_and_is_locked_as_the_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.json"
    link.symlink_to(path)
    folder_link = tmp_path / "folder"
    folder_link.symlink_to(path.parent)
    file = ReviewFile(link, delay=NEVER)
    for other in (path, folder_link / path.name, link):
        with pytest.raises(UserError, match="is being reviewed by another process"):
            ReviewFile(other)
    with pytest.raises(UserError, match="is being reviewed by another process"):
        ReviewFile(path, link)
    decide(file)
    file.close()
    assert link.is_symlink()
    assert read_tree(path) == expected(AFTER)
    assert [p.name for p in link.parent.iterdir()] == ["link.json"]
    assert not journal(path).exists()


def test_an_output_can_be_a_link_to_a_new_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "data" / "new.json")
    file = ReviewFile(path, link, delay=NEVER)
    decide(file)
    file.close()
    assert link.is_symlink()
    assert read_tree(tmp_path / "data" / "new.json") == expected(AFTER)
    assert read_tree(path) == proposals()


def test_links_that_form_a_loop(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to(tmp_path / "b.json")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json: cannot be read"):
        ReviewFile(tmp_path / "a.json")


# Added annotations and classes


def test_added_annotations_survive_a_kill(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path, delay=NEVER)
    assert file.add(7, 4, NewMask(NEW, [1, 2, 3, 4], 9)) == 10
    assert file.add(3, 9, NewMask(NEW, [1, 2, 3, 4], 9, "empty")) == 11
    file.decide(10, "accepted")
    file.set_category(10, 9)
    file.replace_mask(10, NewMask(NEW, [5, 6, 7, 8], 3))
    assert file.decide(11, "rejected") is False
    left = killed(path, tmp_path / "left")
    added = {
        "id": 10,
        "image_id": 7,
        "category_id": 9,
        "iscrowd": 0,
        **{**EDITED, "bbox": [5, 6, 7, 8], "area": 3, "review": "added"},
    }
    expected_tree = expected({})
    expected_tree["annotations"].append(added)
    file.close()
    assert read_tree(path) == expected_tree
    again = ReviewFile(left)
    assert again.recovered == 5
    assert [row.id for row in again.rows()] == [1, 2, 5, 9, 10]
    assert again.export(tmp_path / "clean.json")["added"] == 1
    again.close()
    assert read_tree(left) == expected_tree


def test_an_output_with_added_annotations_is_continued(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    file = ReviewFile(path, output)
    number = file.add(7, 4, NewMask(NEW, [1, 2, 3, 4], 9))
    file.close()
    again = ReviewFile(path, output)
    assert again.annotation(number)["review"] == "added"
    again.decide(number, "rejected")
    assert again.is_removed(number)
    with pytest.raises(KeyError):
        again.annotation(number)
    assert again.undo() == number
    assert not again.is_removed(number)
    again.close()
    assert [a["id"] for a in read_tree(output)["annotations"]] == [1, 2, 5, 9, number]


def test_a_source_with_added_annotations_keeps_them(path: Path, tmp_path: Path) -> None:
    file = ReviewFile(path)
    old = file.add(7, 4, NewMask(NEW, [1, 2, 3, 4], 9))
    file.close()
    source, output = path.read_bytes(), tmp_path / "out.json"
    for decision, review in (("rejected", "rejected"), ("accepted", "accepted")):
        file = ReviewFile(path, output)  # new, then continued
        assert not file.is_removable(old)
        assert file.decide(old, decision) is True  # type: ignore[arg-type]
        assert file.annotation(old)["review"] == review
        new = file.add(7, 4, NewMask(NEW, [1, 2, 3, 4], 9))
        file.close()
    file = ReviewFile(path, output)
    assert file.decide(new, "rejected") is False
    file.close()
    assert [a["id"] for a in read_tree(output)["annotations"]] == [1, 2, 5, 9, old, new - 1]
    assert path.read_bytes() == source


def test_an_added_annotation_of_an_earlier_session_is_removed(path: Path) -> None:
    file = ReviewFile(path)
    number = file.add(7, 4, NewMask(NEW, [1, 2, 3, 4], 9))
    file.close()
    before = path.read_bytes()
    file = ReviewFile(path)
    assert file.decide(number, "rejected") is False
    assert file.undo() == number
    assert file.annotation(number)["review"] == "added"
    file.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"image_id": 3}, {"review": "added"}, {"id": 77}, {"id": 77, "review": "added"}]
)
def test_an_output_of_another_annotation_with_the_same_id(
    path: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    (tmp_path / "out.json").write_text(json.dumps(expected({1: change})))
    with pytest.raises(UserError, match=r"out.json: .* other annotations than .*masks.json"):
        ReviewFile(path, tmp_path / "out.json")


def test_unknown_ids_are_not_added(path: Path) -> None:
    file = ReviewFile(path)
    for image_id, category_id in ((8, 4), (7, 5)):
        with pytest.raises(KeyError):
            file.add(image_id, category_id, NewMask(NEW, [1, 2, 3, 4], 9))
    with pytest.raises(KeyError):
        file.set_category(1, 5)
    file.close()
    assert read_tree(path) == proposals()


def test_an_edited_class_stays_edited_when_it_is_accepted(path: Path) -> None:
    file = ReviewFile(path)
    file.set_category(1, 9)
    assert file.decide(1, "accepted") is True
    assert file.annotation(1)["review"] == "edited"
    file.decide(1, "rejected")
    file.decide(1, "accepted")
    assert file.annotation(1)["review"] == "accepted"
    file.close()
