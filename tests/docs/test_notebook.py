"""The notebook of the documentation runs from its first to its last cell."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskseg.inference.prediction import Prediction
from maskseg.training import TrainedRun

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorials" / "python.ipynb"


def code_cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell. Raises ValueError for a cell with stored outputs."""
    cells = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        if cell["outputs"] or cell["execution_count"] is not None:
            raise ValueError(f"a cell has outputs: {cell['source']}")
        cells.append("".join(cell["source"]))
    return cells


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a cell as Jupyter does: its last line, if it is an expression, is the result.

    names: the variables of the notebook, which the cell reads and changes.
    """
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def test_a_cell_gives_the_value_of_its_last_line() -> None:
    names: dict[str, Any] = {}
    assert run_cell("a = 1\na + 1", names) == 2
    assert run_cell("for i in range(3):\n    a += i", names) is None
    assert names["a"] == 4
    with pytest.raises(NameError):
        run_cell("b", names)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    results = [run_cell(code, names) for code in code_cells(NOTEBOOK)]
    shown = [result for result in results if result is not None]
    assert any(isinstance(result, Image.Image) for result in shown)
    assert any(isinstance(result, Prediction) for result in shown)
    assert isinstance(names["run"], TrainedRun)
    assert len(names["prediction"]) > 0
    assert len(names["predictions"]) == 4
    assert set(names["metrics"]) == set(names["run"].metrics)
    assert (names["objects_run"].run_dir / "last.pt").is_file()
