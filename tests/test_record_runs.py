"""The comparison of records finds what changed and passes over what depends on the time."""

from __future__ import annotations

import json
from pathlib import Path

from record_runs import compare, read_lines


def write_metrics(path: Path, loss: float, seconds: float) -> Path:
    rows = [
        {"step": 1, "loss": 0.5, "step_seconds": seconds},
        {"step": 2, "loss": loss, "step_seconds": seconds},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_bit_of_a_loss_is_found_and_time_is_not(tmp_path: Path) -> None:
    old = {"metrics.jsonl": read_lines(write_metrics(tmp_path / "old.jsonl", 0.1, seconds=1.0))}
    slower = {
        "metrics.jsonl": read_lines(write_metrics(tmp_path / "slower.jsonl", 0.1, seconds=2.0))
    }
    changed = {
        "metrics.jsonl": read_lines(
            write_metrics(tmp_path / "changed.jsonl", 0.10000000000000002, seconds=1.0)
        )
    }
    assert compare(old, slower) == []
    assert len(compare(old, changed)) == 3
    assert "1 lines differ, the first is 2" in compare(old, changed)[0]


def test_missing_files_and_entries_are_found(tmp_path: Path) -> None:
    detections = tmp_path / "detections.json"
    detections.write_text(
        json.dumps([{"image_id": 1, "score": 0.5}, {"image_id": 2, "score": 0.25}])
    )
    old = {"detections.json": read_lines(detections)}
    detections.write_text(json.dumps([{"image_id": 1, "score": 0.5}]))
    new = {"detections.json": read_lines(detections)}
    assert compare(old, new) == ["detections.json: 2 lines, now 1"]
    assert compare(old, {}) == ["detections.json: only in the old records"]
    assert compare({}, new) == ["detections.json: only in the new records"]
