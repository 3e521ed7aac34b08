"""Logging of a run: metrics.jsonl, per_class.csv, loggers, and a progress bar or plain lines."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from maskseg.engine.loggers import (
    DEFAULT_LOGGERS,
    RESULTS_FILE,
    LoggedRun,
    Logger,
    open_loggers,
    select_class_scalars,
    select_scalars,
)
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

METRICS_FILE = "metrics.jsonl"
PER_CLASS_FILE = "per_class.csv"
_LOGGER_FILES = {"tensorboard": "tensorboard", "csv": RESULTS_FILE}


def log_files(loggers: Sequence[str]) -> list[str]:
    """The names of the files and folders that a log has in a run folder."""
    return [METRICS_FILE, *(_LOGGER_FILES[name] for name in loggers if name in _LOGGER_FILES)]


class RunLog:
    """Logs the metrics of a run by step.

    Each line of `metrics.jsonl` is {"step": ..., "kind": "train", "val" or "skipped", ...}; each
    row of `per_class.csv` is a class of an evaluation. Scalars and images also go to the loggers. A
    resumed run drops the lines after the step that it starts from, so that every step occurs once.
    As a context manager, the log is closed at the end.

    Raises UserError if a file cannot be written, for example because the disk is full.

    Args:
        run_dir: folder of the run; None on ranks other than 0, which write and print nothing.
        start_step: step that the run starts from.
        max_steps: last step.
        config: the config as YAML, shown by the loggers.
        last_eval_step: step of the last evaluation that the checkpoint contains; None if that is
            `start_step`.
        loggers: names of loggers, see `maskseg.engine.loggers`.
    """

    def __init__(
        self,
        run_dir: Path | None,
        start_step: int,
        max_steps: int,
        config: str,
        last_eval_step: int | None = None,
        loggers: Sequence[str] = DEFAULT_LOGGERS,
    ) -> None:
        self.max_steps = max_steps
        self.start_step = start_step
        self.started = time.perf_counter()
        self.path: Path | None = None
        self.loggers: dict[str, Logger] = {}
        quiet = run_dir is None or not sys.stderr.isatty()
        self.bar: tqdm[NoReturn] = tqdm(
            total=max_steps, initial=start_step, unit="step", disable=quiet, dynamic_ncols=True
        )
        if run_dir is None:
            return
        self.path = run_dir / METRICS_FILE
        is_continued = self.path.exists()
        with self._writing():
            self.path.touch()
        last_eval = start_step if last_eval_step is None else last_eval_step
        if _has_content(self.path):
            _drop_later_lines(self.path, start_step, last_eval)
        if is_continued:  # else a file of that name is not of this run
            _drop_later_rows(run_dir / PER_CLASS_FILE, last_eval)
        run = LoggedRun(run_dir, config, start_step, last_eval)
        with self._writing():
            self.loggers = open_loggers(loggers, run, self.print)
            self._repeat_purged_step(start_step, last_eval)

    def _repeat_purged_step(self, step: int, last_eval_step: int) -> None:
        """Log the training values of `step` to TensorBoard again.

        An evaluation of that step that the checkpoint does not contain is dropped there, and the
        training values with it.
        """
        board = self.loggers.get("tensorboard")
        if board is None or self.path is None or last_eval_step == step:
            return
        for line in self.path.read_bytes().splitlines():
            entry = _parse_entry(line)
            if entry is not None and (entry.step, entry.kind) == (step, "train"):
                board.log_scalars(step, "train", select_scalars("train", entry.numbers))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log. Its own failure does not replace an earlier error."""
        try:
            self.close()
        except UserError:
            if error is None:
                raise

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl, and log the values that are defined."""
        self.log_event(step, kind, values)
        with self._writing():
            for logger in self.loggers.values():
                logger.log_scalars(step, kind, select_scalars(kind, values))

    def log_classes(
        self, step: int, per_class: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
    ) -> None:
        """Write one row of per_class.csv for each class of an evaluation, and log AP by class.

        per_class: as `CocoEvaluator.per_class`; counts: number of objects by class name, {} if it
        is not known.
        """
        if self.path is None or not per_class:
            return
        path = self.path.with_name(PER_CLASS_FILE)
        with self._writing():
            table = _format_classes(step, per_class, counts, header=not _has_content(path))
            with path.open("a", encoding="utf-8", newline="") as file:
                file.write(table)
            for logger in self.loggers.values():
                logger.log_classes(step, select_class_scalars(per_class))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise UserError if the disk rejects a write."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written to ({error.strerror}); "
                "the checkpoints there are intact"
            ) from error

    def log_event(self, step: int, kind: str, values: Mapping[str, object]) -> None:
        """Write one line of metrics.jsonl only. Raises UserError if it cannot be written."""
        if self.path is None:
            return
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=True) + "\n")

    def progress(self, step: int, values: Mapping[str, float], show: bool) -> None:
        """Advance the progress bar.

        show: display `values` beside the bar, or print them as a line if there is no terminal.
        """
        self.bar.update(step - self.bar.n)
        if not show:
            return
        if not self.bar.disable:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        elif self.path is not None:
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {step}/{self.max_steps}  {text}  eta {self.eta(step)}", flush=True)

    def eta(self, step: int) -> str:
        """Estimate the remaining time from the mean duration of a step so far, as h:mm:ss."""
        seconds_per_step = (time.perf_counter() - self.started) / max(step - self.start_step, 1)
        return str(tqdm.format_interval(round(seconds_per_step * (self.max_steps - step))))

    def print(self, text: str, any_rank: bool = False) -> None:
        """Print a message without breaking the progress bar.

        any_rank: also print it on ranks other than 0, for events that only one rank knows of.
        """
        if not self.bar.disable:
            tqdm.write(text)
        elif self.path is not None or any_rank:
            print(text, flush=True)

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log a uint8 [H, W, 3] image, reduced to at most 2000 pixels a side."""
        with self._writing():
            for logger in self.loggers.values():
                logger.log_image(step, name, image)

    def log_pr_curve(self, name: str, precision: ArrayLike, step: int) -> None:
        """Log a precision-recall curve. precision: [n], at n recalls evenly spaced from 0 to 1."""
        values = np.asarray(precision, dtype=np.float64)
        with self._writing():
            for logger in self.loggers.values():
                logger.log_pr_curve(step, name, values)

    def close(self) -> None:
        """Close the progress bar and the loggers."""
        self.bar.close()
        loggers = list(self.loggers.values())
        self.loggers = {}
        errors: list[UserError] = []
        for logger in loggers:
            try:
                with self._writing():
                    logger.close()
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]


@dataclass(frozen=True)
class _Entry:
    """A line of a metrics.jsonl."""

    step: int
    kind: str
    numbers: dict[str, float]


def _parse_entry(line: bytes) -> _Entry | None:
    """One line of a metrics.jsonl; None for a truncated or damaged one."""
    try:
        values = parse_json(line)
    except ValueError:  # includes bytes that are not UTF-8
        return None
    if not isinstance(values, dict):
        return None
    step = values.get("step")
    kind = values.get("kind")
    if type(step) is not int or not isinstance(kind, str):
        return None
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    del numbers["step"]
    return _Entry(step, kind, numbers)


def _drop_later_lines(path: Path, step: int, last_eval_step: int) -> None:
    """Drop lines after `step`, evaluations after `last_eval_step`, and truncated lines."""
    lines = []
    for line in path.read_bytes().splitlines():
        entry = _parse_entry(line)
        if entry is not None:
            limit = last_eval_step if entry.kind == "val" else step
            if entry.step <= limit:
                lines.append(line)
    with replacing(path, "the metrics") as file:
        file.write(b"".join(line + b"\n" for line in lines))


def _drop_later_rows(path: Path, last_eval_step: int) -> None:
    """Drop the rows of a per_class.csv after `last_eval_step`, and a truncated row."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    kept = rows[:1]
    for row in rows[1:]:
        if row and row[0].isdecimal() and int(row[0]) <= last_eval_step:
            kept.append(row)
    with replacing(path, "the table of classes") as file:
        file.write(_format_rows(kept).encode())


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _format_classes(
    step: int,
    per_class: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, int],
    header: bool,
) -> str:
    """The rows of an evaluation in per_class.csv; an undefined value is empty."""
    kinds = list(per_class)
    rows: list[list[str]] = []
    if header:
        rows.append(["step", "class", "objects", *(f"{kind}/AP" for kind in kinds)])
    for name in per_class[kinds[0]]:
        values = [per_class[kind].get(name, -1.0) for kind in kinds]
        cells = ["" if value < 0 else f"{value:.6g}" for value in values]
        rows.append([str(step), name, str(counts.get(name, "")), *cells])
    return _format_rows(rows)


def _format_rows(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print all warnings of the block, also repeated ones, when it ends without an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"warning: {warning.message}", flush=True)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of this process in GB: GPU memory on a GPU, else resident memory.

    None on Windows, whose Python has no module `resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * unit / 1e9
