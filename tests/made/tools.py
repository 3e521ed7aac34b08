"""The command-line tools, called in this process."""

from __future__ import annotations

import contextlib
import io

from maskseg.cli import run_tool


class Said:
    """Exit code and output of a tool."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def said(tool: str, *words: str) -> Said:
    """Run a tool in this process."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_tool(tool, list(words))
    return Said(code, out.getvalue(), err.getvalue())


def done(tool: str, *words: str) -> str:
    """Run a tool, which must succeed. Returns its output."""
    result = said(tool, *words)
    assert result.code == 0, result
    return result.out


def assert_refused(result: Said, *parts: str) -> None:
    """Assert exit code 2 and a one-line error that contains `parts`."""
    assert result.code == 2, result
    lines = result.err.strip().splitlines()
    assert lines[-1].startswith("error: "), result
    assert "Traceback" not in result.err
    for part in parts:
        assert part in lines[-1], result
