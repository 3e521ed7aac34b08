"""The comparison of runs: tables of hand-made runs, plots, and folders that are not runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskseg.cli import run_tool
from maskseg.commands.compare import (
    build_panels,
    compare,
    config_differences,
    draw_runs,
    metrics_table,
    read_runs,
    run_colour,
)
from maskseg.errors import UserError
from maskseg.visualization.layout import LINE_COLOURS

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
    """A table as first column -> the other columns, which are three spaces apart."""
    rows = [
        [cell.strip() for cell in line.split("   ") if cell.strip()] for line in text.splitlines()
    ]
    return {row[0]: row[1:] for row in rows if row}


def tool(*arguments):
    return run_tool("compare", [str(argument) for argument in arguments])


def test_numbers(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", lines=[{"step": 7, "kind": "train", "loss": 0.5}])
    table = cells(metrics_table(read_runs([a, b])))
    assert table == {
        "a": ["b"],
        "steps": ["30", "7"],
        "segm/AP best": ["0.300 at 20", "-"],
        "segm/AP last": ["0.200", "-"],
        "segm/AP50 best": ["0.600 at 20", "-"],
        "segm/AP50 last": ["0.400", "-"],
        "training loss, last": ["1.000", "0.500"],
        "validation loss, last": ["1.500", "-"],  # the sum of the terms, as the total is missing
        "images/s, median": ["8.0", "-"],
        "training time": ["0:30:00", "-"],
    }


def test_columns_are_aligned(tmp_path):
    runs = read_runs([write_run(tmp_path / "a_long_name_of_a_run"), write_run(tmp_path / "b")])
    lines = metrics_table(runs).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_runs_that_do_not_fit_into_a_line_are_in_another_block(tmp_path):
    runs = read_runs([write_run(tmp_path / f"{i}{30 * 'x'}", ap=(i / 10, 0, 0)) for i in range(6)])
    blocks = metrics_table(runs).split("\n\n")
    assert [cells(block)["segm/AP best"] for block in blocks] == [
        [f"0.{i}00 at 10" for i in part] for part in ((0, 1, 2, 3), (4, 5))
    ]
    assert max(map(len, "\n".join(blocks).splitlines())) <= 160
    long_name = read_runs([write_run(tmp_path / (200 * "y"))])
    assert len(metrics_table(long_name).split("\n\n")) == 1


def test_colours_differ():
    assert len({run_colour(i) for i in range(40)}) == 40


def test_odd_numbers(tmp_path):
    lines = [
        {"step": 5, "kind": "val", "bbox/AP": 0.5, "loss": 1.0},
        {"step": 9, "kind": "val", "bbox/AP": -1.0, "loss": float("nan")},
    ]
    table = cells(metrics_table(read_runs([write_run(tmp_path / "a", lines=lines)])))
    assert table == {
        "a": [],
        "steps": ["9"],
        "bbox/AP best": ["0.500 at 5"],
        "validation loss, last": ["nan"],
    }


def test_the_first_of_equal_values_is_the_best(tmp_path):
    table = cells(metrics_table(read_runs([write_run(tmp_path / "a", ap=(0.3, 0.1, 0.3))])))
    assert table["segm/AP best"] == ["0.300 at 10"]


CONFIG = """name: x
model: {norm: BN, sizes: [8, 16], head: null}
lr: 0.1
transforms: [{size: 256}, {flip: 0.5}]
empty: {}
"""


def test_differences(tmp_path):
    other = """name: x
model: {norm: GN, sizes: [8], head: {layers: 4}}
lr: 0.1
transforms: [{size: 256}, {flip: 0.25}, {flip: true}]
empty: {}
"""
    runs = read_runs(
        [write_run(tmp_path / "a", config=CONFIG), write_run(tmp_path / "b", config=other)]
    )
    assert cells(config_differences(runs)) == {
        "config": ["a", "b"],
        "model.head": ["null", "-"],
        "model.head.layers": ["-", "4"],
        "model.norm": ["BN", "GN"],
        "model.sizes": ["[8, 16]", "[8]"],
        "transforms.1.flip": ["0.5", "0.25"],
        "transforms.2.flip": ["-", "true"],
    }


def test_equal_and_missing_configs(tmp_path):
    a = write_run(tmp_path / "a", config=CONFIG)
    b = write_run(tmp_path / "b", config=CONFIG)
    c = write_run(tmp_path / "c")
    assert config_differences(read_runs([a, b])) == "the configs are equal"
    assert (
        config_differences(read_runs([a, b, c]))
        == f"{c}: there is no config.yaml in it\nthe configs are equal"
    )
    assert config_differences(read_runs([a, c])) == f"{c}: there is no config.yaml in it"


def test_names_are_distinct(tmp_path):
    folders = [write_run(tmp_path / name / "2026-01-01") for name in ("x", "y")]
    assert [run.name for run in read_runs(folders)] == ["x/2026-01-01", "y/2026-01-01"]
    assert [run.name for run in read_runs(folders[:1])] == ["2026-01-01"]
    assert [run.name for run in read_runs([*folders, folders[0] / ".." / "2026-01-01"])] == [
        "x/2026-01-01",
        "y/2026-01-01",
    ]  # without duplicates


def test_panels_have_the_curves_of_all_runs(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", rate=0.1)
    panels = dict(build_panels(read_runs([a, b])))
    assert list(panels) == ["loss", "loss: mask", "learning rate", "segm AP"]
    assert [(name, dashed) for name, _, _, dashed in panels["loss"]] == [
        ("a", False),
        ("b", False),
        ("a", True),
        ("b", True),
    ]
    assert [line[2] for line in panels["loss"]] == [LINE_COLOURS[0], LINE_COLOURS[1]] * 2
    assert [line[1] for line in panels["learning rate"]] == [
        {10: 0.02, 20: 0.02, 30: 0.02},
        {10: 0.1, 20: 0.1, 30: 0.1},
    ]
    assert panels["segm AP"][0][1] == {10: 0.1, 20: 0.3, 30: 0.2}
    assert panels["segm AP"][3][1] == {10: 0.2, 20: 0.6, 30: 0.4}


def test_a_run_without_validation_keeps_its_colour(tmp_path):
    a = write_run(tmp_path / "a", lines=[{"step": 1, "kind": "train", "lr": 1.0}])
    b = write_run(tmp_path / "b")
    ((name, _, colour, _), _) = dict(build_panels(read_runs([a, b])))["segm AP"]
    assert (name, colour) == ("b", LINE_COLOURS[1])


def test_colours_are_in_the_plot(tmp_path):
    runs = read_runs(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", rate=0.1, ap=(0.2, 0.4, 0.6))]
    )
    draw_runs(runs, tmp_path / "new" / "out.png")
    image = np.asarray(Image.open(tmp_path / "new" / "out.png"))
    for colour in LINE_COLOURS[:2]:
        assert (image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum() > 50


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
    a = write_run(tmp_path / "a", config=CONFIG)
    b = write_run(tmp_path / "b", config=CONFIG.replace("BN", "GN"))
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
    ("arguments", "message"),
    [
        ([], "no run folder is named"),
        (["good", "missing"], "missing: there is no such run folder"),
        (["good", "good/metrics.jsonl"], "metrics.jsonl: there is no such run folder"),
        (["good", "bare"], "bare: there is no metrics.jsonl in it"),
        (["good", "empty"], "empty: its metrics.jsonl has no training or validation metrics"),
        (["good", "binary"], "binary: its metrics.jsonl has no training or validation metrics"),
        (["speed"], "speed: there are no losses, learning rates or AP to draw"),
        (["good", "broken"], "broken/config.yaml cannot be read"),
        (["good", "listed"], "listed/config.yaml is not a config"),
        (["good", "outputs=x.png"], "outputs=x.png: there is no such key"),
        (["good", "output="], "output= is empty"),
        (["good", "output=bare"], "cannot write the image to bare"),
    ],
)
def test_refused_arguments(tmp_path, monkeypatch, capsys, arguments, message):
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
    assert tool(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_link_to_the_latest_run_is_no_other_run(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    latest = tmp_path / "latest"
    latest.symlink_to("b")
    paths = sorted(tmp_path.iterdir())
    assert [run.name for run in read_runs(paths)] == ["a", "b"]
    assert [run.name for run in read_runs([latest])] == ["latest"]
    latest.unlink()
    latest.write_text("b\n")  # where the disk has no links
    assert [run.name for run in read_runs(paths)] == ["a", "b"]


def test_missing_folders_raise_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        compare([str(tmp_path / "missing")])
