"""Problems found in a dataset file, grouped by kind and formatted as one text report."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_EXAMPLES = 10  # problems that are listed individually, per kind and per text


@dataclass
class Finding:
    """One kind of problem: the number of occurrences and the first few examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Problems of one file by kind.

    A file with errors cannot be trained on. Annotations named by a warning were repaired or
    dropped.
    """

    path: str
    errors: dict[str, Finding] = field(default_factory=dict)
    warnings: dict[str, Finding] = field(default_factory=dict)

    def error(self, kind: str, *examples: str, count: int | None = None) -> None:
        """Add `count` errors of a kind, or one per example if `count` is None.

        Passing the first `MAX_EXAMPLES` examples is enough.
        """
        _add(self.errors, kind, examples, count)

    def warn(self, kind: str, *examples: str, count: int | None = None) -> None:
        """Add warnings; the arguments are those of `error`."""
        _add(self.warnings, kind, examples, count)

    def text(self, warning: str = "warning") -> str:
        """Format the report: the file, each kind with its count, and the first examples.

        warning: the noun for a warning.
        """
        lines = []
        for severity, findings in (("error", self.errors), (warning, self.warnings)):
            if not findings:
                continue
            total = sum(finding.count for finding in findings.values())
            plural = "s" if total > 1 else ""
            lines.append(f"{self.path}: {total} {severity}{plural}")
            lines += _format_findings(findings)
        return escape_surrogates("\n".join(lines) or f"{self.path}: no problems found")

    def extend(self, other: Report) -> None:
        """Add the problems of another file; its examples are prefixed with the file's name."""
        for mine, theirs in ((self.errors, other.errors), (self.warnings, other.warnings)):
            for kind, finding in theirs.items():
                examples = [f"{other.path}: {example}" for example in finding.examples]
                _add(mine, kind, tuple(examples), finding.count)


def escape_surrogates(text: str) -> str:
    """Return text that can be printed: JSON can hold half a surrogate pair, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _add(
    findings: dict[str, Finding], kind: str, examples: tuple[str, ...], count: int | None
) -> None:
    finding = findings.setdefault(kind, Finding())
    finding.count += len(examples) if count is None else count
    finding.examples += examples[: MAX_EXAMPLES - len(finding.examples)]


def _count_shown(findings: dict[str, Finding]) -> dict[str, int]:
    """Distribute `MAX_EXAMPLES` over the kinds, so that the first kind does not take them all."""
    shown = dict.fromkeys(findings, 0)
    left = MAX_EXAMPLES
    while left:
        open_kinds = [
            kind for kind, finding in findings.items() if shown[kind] < len(finding.examples)
        ]
        if not open_kinds:
            break
        for kind in open_kinds[:left]:
            shown[kind] += 1
            left -= 1
    return shown


def _format_findings(findings: dict[str, Finding]) -> list[str]:
    """Lines with every kind, its count and its share of the examples."""
    shown = _count_shown(findings)
    lines = []
    for kind, finding in findings.items():
        lines.append(f"  {finding.count} x {kind}")
        lines += [f"      {example}" for example in finding.examples[: shown[kind]] if example]
        if 0 < shown[kind] < finding.count:
            lines.append(f"      ... and {finding.count - shown[kind]} more")
    return lines
