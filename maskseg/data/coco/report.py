"""What a check found, grouped by kind: one page for a person to read."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 10  # problems that are told one by one


@dataclass
class Finding:
    """One kind of problem: how often it was met and the first few places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Problems of one file by kind. With errors nothing may be trained on it; what a warning names was mended or left out."""

    path: str
    errors: dict[str, Finding] = field(default_factory=dict)
    warnings: dict[str, Finding] = field(default_factory=dict)

    def error(self, kind: str, *examples: str, count: int | None = None) -> None:
        """Adds `count` problems of a kind, or one for each example; the places of the first few are enough."""
        _add(self.errors, kind, examples, count)

    def warn(self, kind: str, *examples: str, count: int | None = None) -> None:
        """The same for what was mended."""
        _add(self.warnings, kind, examples, count)

    def text(self) -> str:
        """The page: the file, each kind with its count, and the first problems."""
        lines = []
        for word, findings in (("error", self.errors), ("warning", self.warnings)):
            if findings:
                total = sum(f.count for f in findings.values())
                lines += [
                    f"{self.path}: {total} {word}{'s' if total > 1 else ''}",
                    *_listed(findings),
                ]
        return "\n".join(lines) or f"{self.path}: no problems found"


def _add(
    findings: dict[str, Finding], kind: str, examples: tuple[str, ...], count: int | None
) -> None:
    finding = findings.setdefault(kind, Finding())
    finding.count += len(examples) if count is None else count
    finding.examples += examples[: SHOWN - len(finding.examples)]


def _listed(findings: dict[str, Finding]) -> list[str]:
    """Every kind with its count; the examples that are shown are shared out, so that the first kind doesn't take them all."""
    shown = dict.fromkeys(findings, 0)
    left = SHOWN
    while left and (open_kinds := [k for k, f in findings.items() if shown[k] < len(f.examples)]):
        for kind in open_kinds[:left]:
            shown[kind] += 1
            left -= 1
    lines = []
    for kind, finding in findings.items():
        lines.append(f"  {finding.count} x {kind}")
        lines += [f"      {example}" for example in finding.examples[: shown[kind]] if example]
        if 0 < shown[kind] < finding.count:
            lines.append(f"      ... and {finding.count - shown[kind]} more")
    return lines
