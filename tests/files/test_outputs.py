"""The guard of the user's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskseg.errors import Interrupted, UserError, warn_if_not_drawn
from maskseg.files.outputs import (
    RECORD,
    check_no_run,
    check_outputs,
    find_free_name,
    make_unique,
    record_outputs,
)


def test_an_input_is_no_output(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    source.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(source)
    os.link(source, tmp_path / "hard.png")
    for name in ("a.png", "link.png", "hard.png", "missing/../a.png"):
        with pytest.raises(UserError, match="is an input file"):
            check_outputs([tmp_path / name], [None, source])
    check_outputs([tmp_path / "b.png"], [source])


def test_what_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("a", "dangling"):
        with pytest.raises(UserError, match=rf"export: .*{name} already exists"):
            check_outputs([tmp_path / "new", tmp_path / name], key="export")
    with pytest.raises(UserError, match=r"and 1 more files"):
        check_outputs([tmp_path / "a", tmp_path / "dangling"])


def write_as(tool: str, *paths: Path, overwrite: bool = False, folder: Path | None = None) -> None:
    """Check and write files as a tool does."""
    check_outputs(paths, tool=tool, overwrite=overwrite)
    with record_outputs(paths, tool, overwrite, folder):
        for path in paths:
            path.write_text(f"by {tool}")


def test_earlier_outputs_are_replaced_if_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    write_as("predict", output)
    with pytest.raises(UserError, match="or overwrite=true replaces earlier outputs"):
        write_as("predict", output)
    write_as("predict", output, overwrite=True)
    write_as("predict", output, overwrite=True)
    with pytest.raises(UserError, match="is an input file"):
        check_outputs([output], [output], tool="predict", overwrite=True)


def test_only_unchanged_files_of_the_same_tool_are_replaced(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    output.write_text("mine")
    refused = pytest.raises(UserError, match="replaces only earlier, unchanged files of this tool")
    with refused:
        write_as("predict", output, overwrite=True)
    output.unlink()
    write_as("annotate", output)
    with refused:
        write_as("predict", output, overwrite=True)
    output.write_text("decisions of a review")
    with refused:
        write_as("annotate", output, overwrite=True)
    assert output.read_text() == "decisions of a review"
    other = tmp_path / "other.json"
    write_as("annotate", other)
    other.rename(tmp_path / "kept.json")
    other.symlink_to("kept.json")
    with refused:
        write_as("annotate", other, overwrite=True)


def test_the_files_of_a_killed_tool_are_its_own(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    record = record_outputs(paths, "predict")
    record.__enter__()
    paths[0].write_text("half")  # the process ends here
    check_outputs(paths, tool="predict", overwrite=True)
    os.utime(paths[0], (0, 0))  # a file from before
    with pytest.raises(UserError, match="unchanged files"):
        check_outputs(paths, tool="predict", overwrite=True)


def test_results_of_two_runs_never_mix(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first = [tmp_path / "a.png", tmp_path / "sub" / "b.png", tmp_path / "all.json"]
    write_as("predict", *first, folder=tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    write_as("evaluate", tmp_path / "metrics.json", folder=tmp_path)
    second = [tmp_path / "c.png", tmp_path / "all.json"]
    write_as("predict", *second, overwrite=True, folder=tmp_path)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"c.png", "all.json", "mine.png", "metrics.json", RECORD}


def test_a_tool_that_fails_leaves_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="early"), record_outputs([tmp_path / "a"], "predict"):
        raise ValueError("early")
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_allows_nothing(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    write_as("predict", output)
    for text in (
        "[",
        '["a.json"]',
        '["../a.json", "predict", -1, 0]',
        "\udcff" * 3,
        "1",
        "[" * 9999,
    ):
        (tmp_path / RECORD).write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match="already exists"):
            check_outputs([output], tool="predict", overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "last.pt", "best.pt", "best.safetensors", "step_0000010.pt"),
        "loggers.json",
    ],
)
def test_the_folder_of_a_run(tmp_path: Path, name: str) -> None:
    check_no_run(tmp_path)
    check_no_run(tmp_path / "missing")
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="already holds a run"):
        check_no_run(tmp_path)


def test_a_free_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    (tmp_path / "empty").mkdir()
    assert find_free_name(tmp_path / "x.png") == tmp_path / "x_2.png"
    (tmp_path / "x_2.png").touch()
    assert find_free_name(tmp_path / "x.png") == tmp_path / "x_3.png"
    assert find_free_name(tmp_path / "empty") == tmp_path / "empty"


def test_names_that_differ_with_every_suffix() -> None:
    suffixes = [".png", "_ids.png"]
    assert make_unique(["a", "b"], suffixes) == ["a", "b"]
    assert make_unique(["a", "A", "a_ids"], suffixes) == ["a", "A_2", "a_ids_2"]


def test_only_drawing_is_allowed_to_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with warn_if_not_drawn("a.png"):
        raise RuntimeError("no\nfont")
    assert capsys.readouterr().out == "warning: a.png could not be drawn (no font)\n"
    with pytest.raises(Interrupted), warn_if_not_drawn("a.png"):
        raise Interrupted(15)
    with pytest.raises(RuntimeError), warn_if_not_drawn("a.png"):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
