"""Fuzzing of all readers, `make fuzz`.

FUZZ_MINUTES is the time in all, FUZZ_SEED the seed, FUZZ_READERS a comma-separated list of readers
and FUZZ_FOLDER the folder for failing inputs. Half of the time of a reader is for files whose
content is mutated (by hypothesis), half for mutated bytes. Each reader runs in a child process. A
child that crashes, or that hangs in compiled code, is a fault of the input that it has written
last. Exit code 1 if there are faults.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRACE = 10.0  # seconds beyond the limit of an input until its process is killed
START = 120.0  # seconds for a child to start
MAX_CRASHES = 3  # per reader
SAVED_PER_KIND = 2  # failing inputs of a fault that are kept
EXAMPLES = 200  # of hypothesis between two looks at the clock


def main() -> int:
    """Run every reader in turn, print a table, and return the exit code."""
    seconds = 60 * float(os.environ.get("FUZZ_MINUTES", "5"))
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    folder = Path(os.environ.get("FUZZ_FOLDER", "fuzz_failures")).resolve()
    names = _names()
    print(f"{len(names)} readers, {seconds / len(names):.0f} s each, seed {seed}", flush=True)
    total = Counter[str]()
    for name in names:
        total += _run_reader(name, seconds / len(names), seed, folder)
    print(f"{total['inputs']} inputs, {total['faults']} faults in all")
    if total["faults"]:
        print(f"failing inputs: {folder}")
    return 1 if total["faults"] else 0


def _names() -> list[str]:
    chosen = os.environ.get("FUZZ_READERS", "")
    names = subprocess.run(
        [sys.executable, "-m", "fuzz", "names"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = set(wanted) - set(names)
    if unknown:
        sys.exit(f"FUZZ_READERS: unknown {sorted(unknown)}; the readers are {', '.join(names)}")
    return wanted or names


def _run_reader(name: str, seconds: float, seed: int, folder: Path) -> Counter[str]:
    """Run a reader in a child until the time is over. Returns the numbers of inputs and faults."""
    end = time.monotonic() + seconds
    kinds: set[str] = set()
    inputs = 0
    crashes = 0
    rejected = 0
    with tempfile.TemporaryDirectory(prefix="maskseg_fuzz_", dir=_memory_folder()) as scratch:
        while (left := end - time.monotonic()) > 0.05 * seconds and crashes < MAX_CRASHES:
            child = _Child(name, left, seed + 1000 * crashes, Path(scratch), folder)
            problem = child.wait()
            inputs += child.inputs
            rejected += child.rejected
            kinds |= child.kinds
            if problem:
                crashes += 1
                kinds.add(problem)
                _save(folder, name, problem, child.input(), child.output())
    print(f"{name:20} {inputs:8} inputs {rejected:8} refused {len(kinds):4} faults", flush=True)
    for kind in sorted(kinds):
        print(f"    {kind}", flush=True)
    return Counter(inputs=inputs, faults=len(kinds))


def _memory_folder() -> str | None:
    """Return a folder in memory if there is one: files of a disk take most of the time."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Child:
    """A process that reads inputs one after the other.

    It writes each input to a file first, so that the input of a crash is known, and its progress
    to another one.
    """

    def __init__(self, name: str, seconds: float, seed: int, scratch: Path, folder: Path) -> None:
        self.scratch = scratch
        self.progress = scratch / "progress.txt"
        self.progress.unlink(missing_ok=True)
        words = [name, str(seconds), str(seed), str(scratch), str(folder)]
        with (scratch / "said.txt").open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fuzz", "child", *words], stdout=said, stderr=said
            )

    def wait(self) -> str:
        """Wait for the end. Returns what went wrong, or an empty string."""
        from fuzz.limits import MAX_SECONDS

        started = time.monotonic()
        while self.process.poll() is None:
            time.sleep(0.1)
            if self.progress.exists():
                idle = time.time() - self.progress.stat().st_mtime
                limit = MAX_SECONDS + GRACE
            else:
                idle = time.monotonic() - started
                limit = START
            if idle > limit:
                self.process.kill()
                self.process.wait()
                return f"no answer within {MAX_SECONDS + GRACE:g} s"
        code = self.process.returncode
        return f"the process ended with code {code}" if code else ""

    def _numbers(self) -> list[int]:
        text = self.progress.read_text() if self.progress.exists() else ""
        first = text.partition("\n")[0].split()
        return [int(number) for number in first] if len(first) == 2 else [0, 0]

    @property
    def inputs(self) -> int:
        return self._numbers()[0]

    @property
    def rejected(self) -> int:
        return self._numbers()[1]

    @property
    def kinds(self) -> set[str]:
        kinds = self.scratch / "kinds.txt"
        return set(kinds.read_text().splitlines()) if kinds.exists() else set()

    def input(self) -> bytes:
        """Return the input that was read last."""
        path = self.scratch / "current.bin"
        return path.read_bytes() if path.exists() else b""

    def output(self) -> str:
        return (self.scratch / "said.txt").read_text(errors="replace")[-4000:]


def _save(folder: Path, name: str, kind: str, data: bytes, detail: str) -> None:
    """Write a failing input and what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9]+", "_", f"{name}_{kind}")[:80]
    number = len(list(folder.glob(f"{stem}.*.bin")))
    if number < SAVED_PER_KIND:
        (folder / f"{stem}.{number}.bin").write_bytes(data)
        (folder / f"{stem}.{number}.txt").write_text(f"{name}: {kind}\n\n{detail}\n")


def _child(name: str, seconds: float, seed: int, scratch: Path, folder: Path) -> None:
    """Read inputs until the time is over."""
    from fuzz.inputs import mutate
    from fuzz.readers import READERS

    reader = next(reader for reader in READERS if reader.name == name)
    loop = _Loop(reader, scratch, folder)
    seeds = reader.seeds()
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    if reader.structured is not None:
        middle = time.monotonic() + seconds / 2
        round_number = 0
        while time.monotonic() < middle:
            _run_hypothesis(reader, loop.read, middle, seed + round_number)
            round_number += 1
    while time.monotonic() < end:
        loop.read(mutate(rng, seeds))
    loop.report()


def _run_hypothesis(reader: Any, read: Callable[[bytes], None], end: float, seed: int) -> None:
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(reader.structured())
    def run(data: bytes) -> None:
        if time.monotonic() < end:
            read(data)

    run()


class _Loop:
    """Reads inputs, counts them, and saves those with a fault."""

    def __init__(self, reader: Any, scratch: Path, folder: Path) -> None:
        self.reader = reader
        self.scratch = scratch
        self.folder = folder
        self.place = scratch / "files"
        self.inputs = 0
        self.rejected = 0
        self.kinds: set[str] = set()

    def read(self, data: bytes) -> None:
        from fuzz.limits import find_fault

        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        (self.scratch / "current.bin").write_bytes(data)
        self.report()
        fault, was_refused = find_fault(self.reader, data, self.place)
        self.inputs += 1
        self.rejected += was_refused
        if fault is not None:
            self.kinds.add(fault.kind)
            (self.scratch / "kinds.txt").write_text("\n".join(sorted(self.kinds)))
            _save(self.folder, self.reader.name, fault.kind, data, fault.detail)

    def report(self) -> None:
        """Write the progress."""
        (self.scratch / "progress.txt").write_text(f"{self.inputs} {self.rejected}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _child(
            sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6])
        )
    elif sys.argv[1:2] == ["names"]:
        from fuzz.readers import READERS

        print("\n".join(reader.name for reader in READERS))
    else:
        sys.exit(main())
