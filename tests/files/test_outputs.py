"""The guard of the user's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskseg.errors import Interrupted, UserError, warn_if_not_drawn
from maskseg.files.outputs import check_no_run, check_outputs, find_free_name, make_unique


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


@pytest.mark.parametrize("name", ["metrics.jsonl", "last.pt", "best.pt", "step_0000010.pt"])
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
