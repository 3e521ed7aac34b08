"""Measures the style of the package: python tests/measure_style.py [FILE or FOLDER ...]

Prints, over all files: statements per code line, the 90th percentile and the maximum of the line
length and of the functions' cyclomatic complexity, and how often `cast`, `Any` and private members
of other objects are used.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC_DESPITE_NAME = ("os._exit", "sys._getframe")  # documented by Python
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.match_case,
    ast.comprehension,
)


@dataclass
class Style:
    """What is counted, summed over files."""

    statements: int = 0
    lengths: list[int] = field(default_factory=list)
    complexities: dict[str, int] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)  # of functions
    constructor_parameters: list[int] = field(default_factory=list)
    casts: int = 0
    anys: int = 0
    reach_ins: list[str] = field(default_factory=list)

    def add(self, source: str, file: str) -> None:
        """Count one file."""
        tree = ast.parse(source)
        self.lengths += code_lines(source, tree)
        for node in ast.walk(tree):
            self.statements += isinstance(node, ast.stmt) and not is_docstring(node)
            self.casts += isinstance(node, ast.Call) and ast.unparse(node.func) == "cast"
            self.anys += isinstance(node, ast.Name) and node.id == "Any"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.complexities[f"{file}:{node.lineno} {node.name}"] = complexity(node)
                is_constructor = node.name == "__init__"
                counts = self.constructor_parameters if is_constructor else self.parameters
                counts.append(count_parameters(node))
            if isinstance(node, ast.Attribute) and is_reach_in(node):
                self.reach_ins.append(f"{file}:{node.lineno} {ast.unparse(node)}")

    def summary(self) -> dict[str, float]:
        """The figures that have limits."""
        return {
            "statements per code line": self.statements / max(len(self.lengths), 1),
            "line length p90": percentile(self.lengths, 0.9),
            "line length max": max(self.lengths, default=0),
            "complexity p90": percentile(list(self.complexities.values()), 0.9),
            "complexity max": max(self.complexities.values(), default=0),
            "parameters of a function": max(self.parameters, default=0),
            "parameters of a constructor": max(self.constructor_parameters, default=0),
            "cast": self.casts,
            "Any": self.anys,
            "reach-ins": len(self.reach_ins),
        }


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a string alone."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def code_lines(source: str, tree: ast.AST) -> list[int]:
    """The lengths of the lines that hold code: no blank lines, comments or docstrings."""
    text_lines: set[int] = set()
    for node in ast.walk(tree):
        if is_docstring(node):
            text_lines.update(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]
    lines = enumerate(source.splitlines(), start=1)
    return [
        len(line)
        for number, line in lines
        if number not in text_lines and line.strip() and not line.lstrip().startswith("#")
    ]


def complexity(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """McCabe's cyclomatic complexity: 1 and one more for each branch, loop, comprehension, handler
    and case.
    """
    return 1 + sum(isinstance(node, BRANCHES) for node in ast.walk(function))


def is_reach_in(node: ast.Attribute) -> bool:
    """Whether a private member of another object is used: `other._member`, where `other` is not
    self, cls or super().
    """
    if not node.attr.startswith("_") or node.attr.startswith("__"):
        return False
    owner = ast.unparse(node.value)
    if f"{owner}.{node.attr}" in PUBLIC_DESPITE_NAME:
        return False
    return owner not in ("self", "cls", "super()")


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of parameters, without self and cls."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[int(share * (len(values) - 1))] if values else 0


def measure(paths: list[Path]) -> Style:
    """The style of all Python files below the paths."""
    style = Style()
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            style.add(file.read_text(encoding="utf-8"), str(file.relative_to(ROOT)))
    return style


def main() -> None:
    """Print the figures, the most complex functions and the reach-ins."""
    style = measure([Path(argument).resolve() for argument in sys.argv[1:]] or [ROOT / "maskseg"])
    for name, value in style.summary().items():
        print(f"{name:28} {value:.2f}" if isinstance(value, float) else f"{name:28} {value}")
    worst = sorted(style.complexities, key=lambda name: -style.complexities[name])
    for name in worst[:15]:
        if style.complexities[name] > 10:
            print(f"complexity {style.complexities[name]}: {name}")
    print("\n".join(style.reach_ins[:40]))


if __name__ == "__main__":
    main()
