"""Runs beside each other: what the tables say of hand-made runs, what is drawn, and folders that are no runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskseg.cli import run_tool
from maskseg.commands import compare as module
from maskseg.commands.compare import compare, differences, draw_runs, numbers_table, read_runs
from maskseg.errors import UserError

ROOT = Path(__file__).parents[2]


def write_run(folder, rate=0.02, ap=(0.1, 0.3, 0.2), config=None, lines=None):
    """A run of 30 steps with three evaluations."""
    folder.mkdir(parents=True)
    if lines is None:
        lines = []
        for i, value in enumerate(ap):
            step = 10 * (i + 1)
            train = {
                "loss": 3 - i,
                "loss/mask": 2 - i / 2,
                "lr": rate,
                "images_per_second": (4.0, 9.0, 8.0)[i],
                "step_seconds": 60.0,
            }
            lines.append({"step": step, "kind": "train", **train})
            lines.append(
                {
                    "step": step,
                    "kind": "val",
                    "segm/AP": value,
                    "segm/AP50": 2 * value,
                    "segm/APl": -1.0,
                    "segm/AR100": 0.5,
                    "loss/mask": 1.5,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def cells(text):
    """A table as first column -> the others; the columns are three spaces apart."""
    rows = [
        [cell.strip() for cell in line.split("   ") if cell.strip()] for line in text.splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def tool(*words):
    return run_tool("compare", [str(w) for w in words])


def test_numbers(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", lines=[{"step": 7, "kind": "train", "loss": 0.5}])
    table = cells(numbers_table(read_runs([a, b])))
    assert table == {
        "a": ["b"],
        "steps": ["30", "7"],
        "segm/AP best": ["0.300 at 20", "-"],
        "segm/AP last": ["0.200", "-"],
        "segm/AP50 best": ["0.600 at 20", "-"],
        "segm/AP50 last": ["0.400", "-"],
        "training loss, last": ["1.000", "0.500"],
        "validation loss, last": ["1.500", "-"],  # the sum of its terms, where only they are there
        "images/s, median": ["8.0", "-"],
        "training time": ["0:30:00", "-"],
    }


def test_columns_are_aligned(tmp_path):
    runs = read_runs([write_run(tmp_path / "a_long_name_of_a_run"), write_run(tmp_path / "b")])
    lines = numbers_table(runs).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_runs_that_find_no_place_in_a_line_come_below(tmp_path):
    runs = read_runs([write_run(tmp_path / f"{i}{30 * 'x'}", ap=(i / 10, 0, 0)) for i in range(6)])
    blocks = numbers_table(runs).split("\n\n")
    assert [cells(block)["segm/AP best"] for block in blocks] == [
        [f"0.{i}00 at 10" for i in part] for part in ((0, 1, 2, 3), (4, 5))
    ]
    assert max(map(len, "\n".join(blocks).splitlines())) <= 160
    lengthy = read_runs([write_run(tmp_path / (200 * "y"))])
    assert len(numbers_table(lengthy).split("\n\n")) == 1


def test_colours_differ():
    assert len({module._colour(i) for i in range(40)}) == 40


def test_odd_numbers(tmp_path):
    lines = [
        {"step": 5, "kind": "val", "bbox/AP": 0.5, "loss": 1.0},
        {"step": 9, "kind": "val", "bbox/AP": -1.0, "loss": float("nan")},
    ]
    table = cells(numbers_table(read_runs([write_run(tmp_path / "a", lines=lines)])))
    assert table == {
        "a": [],
        "steps": ["9"],
        "bbox/AP best": ["0.500 at 5"],
        "validation loss, last": ["nan"],
    }


def test_the_first_of_equal_values_is_the_best(tmp_path):
    table = cells(numbers_table(read_runs([write_run(tmp_path / "a", ap=(0.3, 0.1, 0.3))])))
    assert table["segm/AP best"] == ["0.300 at 10"]


CONFIG = "name: x\nmodel: {norm: BN, sizes: [8, 16], head: null}\nlr: 0.1\ntransforms: [{size: 256}, {flip: 0.5}]\nempty: {}\n"


def test_differences(tmp_path):
    other = "name: x\nmodel: {norm: GN, sizes: [8], head: {layers: 4}}\nlr: 0.1\ntransforms: [{size: 256}, {flip: 0.25}, {flip: true}]\nempty: {}\n"
    runs = read_runs(
        [write_run(tmp_path / "a", config=CONFIG), write_run(tmp_path / "b", config=other)]
    )
    assert cells(differences(runs)) == {
        "config": ["a", "b"],
        "model.head": ["null", "-"],
        "model.head.layers": ["-", "4"],
        "model.norm": ["BN", "GN"],
        "model.sizes": ["[8, 16]", "[8]"],
        "transforms.1.flip": ["0.5", "0.25"],
        "transforms.2.flip": ["-", "true"],
    }


def test_equal_and_missing_configs(tmp_path):
    a, b, c = (
        write_run(tmp_path / "a", config=CONFIG),
        write_run(tmp_path / "b", config=CONFIG),
        write_run(tmp_path / "c"),
    )
    assert differences(read_runs([a, b])) == "the configs are equal"
    assert (
        differences(read_runs([a, b, c]))
        == f"{c}: there is no config.yaml in it\nthe configs are equal"
    )
    assert differences(read_runs([a, c])) == f"{c}: there is no config.yaml in it"


def test_names_are_distinct(tmp_path):
    folders = [write_run(tmp_path / name / "2026-01-01") for name in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/2026-01-01", "y/2026-01-01"]
    assert [run.name for run in read_runs(folders[:1])] == ["2026-01-01"]
    assert [run.name for run in read_runs([*folders, folders[0] / ".." / "2026-01-01"])] == [
        "x/2026-01-01",
        "y/2026-01-01",
    ]  # once


def test_curves_of_the_runs_lie_over_each_other(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", rate=0.1)
    panels = dict(module._panels(read_runs([a, b])))
    assert list(panels) == ["loss", "loss: mask", "learning rate", "segm AP"]
    assert [(name, dashed) for name, _, _, dashed in panels["loss"]] == [
        ("a", False),
        ("b", False),
        ("a", True),
        ("b", True),
    ]
    assert [line[2] for line in panels["loss"]] == [module.COLOURS[0], module.COLOURS[1]] * 2
    assert [line[1] for line in panels["learning rate"]] == [
        {10: 0.02, 20: 0.02, 30: 0.02},
        {10: 0.1, 20: 0.1, 30: 0.1},
    ]
    assert panels["segm AP"][0][1] == {10: 0.1, 20: 0.3, 30: 0.2}
    assert panels["segm AP"][3][1] == {10: 0.2, 20: 0.6, 30: 0.4}


def test_a_run_without_validation_keeps_its_colour(tmp_path):
    a, b = (
        write_run(tmp_path / "a", lines=[{"step": 1, "kind": "train", "lr": 1.0}]),
        write_run(tmp_path / "b"),
    )
    ((name, _, colour, _), _) = dict(module._panels(read_runs([a, b])))["segm AP"]
    assert (name, colour) == ("b", module.COLOURS[1])


def test_colours_are_seen(tmp_path):
    runs = read_runs(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", rate=0.1, ap=(0.2, 0.4, 0.6))]
    )
    draw_runs(runs, tmp_path / "new" / "out.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "out.png"))
    for colour in module.COLOURS[:2]:
        assert (picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum() > 50


def test_many_runs_with_long_names(tmp_path):
    runs = read_runs(
        [
            write_run(
                tmp_path / f"{i}_a_name_that_is_longer_than_any_line_of_the_legend_could_hold_twice"
            )
            for i in range(14)
        ]
    )
    draw_runs(runs, tmp_path / "out.png")
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 0


def test_the_tool(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (
        write_run(tmp_path / "a", config=CONFIG),
        write_run(tmp_path / "b", config=CONFIG.replace("BN", "GN")),
    )
    assert tool("a", b, "output=both.png") == 0
    out = capsys.readouterr().out
    assert "0.300 at 20" in out
    assert cells(out)["model.norm"] == ["BN", "GN"]
    assert out.endswith("curves: both.png\n")
    assert (tmp_path / "both.png").is_file()
    assert tool(a) == 0  # one run is fine
    assert "config" not in capsys.readouterr().out
    assert (tmp_path / "compare.png").is_file()


def test_a_folder_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "lr=0.1")
    assert tool("lr=0.1") == 0


def test_help_shows_five_commands(capsys):
    assert tool("--help") == 0
    assert (
        sum("python tools/compare.py" in line for line in capsys.readouterr().out.splitlines()) == 5
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run folder is named"),
        (["good", "missing"], "missing: there is no such run folder"),
        (["good", "good/metrics.jsonl"], "metrics.jsonl: there is no such run folder"),
        (["good", "bare"], "bare: there is no metrics.jsonl in it"),
        (["good", "empty"], "empty: its metrics.jsonl has no training or validation numbers"),
        (["good", "binary"], "binary: its metrics.jsonl has no training or validation numbers"),
        (["speed"], "speed: there are no losses, learning rates or AP to draw"),
        (["good", "broken"], "broken/config.yaml cannot be read"),
        (["good", "listed"], "listed/config.yaml is no config"),
        (["good", "outputs=x.png"], "outputs=x.png: there is no such key"),
        (["good", "output="], "output= is empty"),
        (["good", "output=bare"], "cannot write the picture to bare"),
    ],
)
def test_what_is_no_run(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good")
    (tmp_path / "bare").mkdir()
    write_run(tmp_path / "empty", lines=[])
    write_run(tmp_path / "binary", lines=[])
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(bytes(range(256)))
    write_run(tmp_path / "speed", lines=[{"step": 1, "kind": "train", "images_per_second": 2.0}])
    write_run(tmp_path / "broken", config="a: [1\nb: {")
    write_run(tmp_path / "listed", config="- 1\n")
    before = sorted(tmp_path.rglob("*"))
    assert tool(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_are_for_the_user(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        compare([str(tmp_path / "missing")])
