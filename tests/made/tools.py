"""The tools, called in this process."""

from __future__ import annotations

import contextlib
import io

from maskseg.cli import run_tool


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def said(tool: str, *words: str) -> Said:
    """What a tool says and ends with, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_tool(tool, list(words))
    return Said(code, out.getvalue(), err.getvalue())


def done(tool: str, *words: str) -> str:
    """A run to a good end. -> what it printed."""
    found = said(tool, *words)
    assert found.code == 0, found
    return found.out


def assert_refused(found: Said, *parts: str) -> None:
    """Exit code 2 and one clear line."""
    assert found.code == 2, found
    told = found.err.strip().splitlines()
    assert told[-1].startswith("error: "), found
    assert "Traceback" not in found.err
    for part in parts:
        assert part in told[-1], found
