"""Shared entry point of the command-line tools: help texts, one-line errors and exit codes.

Each tool is a module of `maskseg.commands` with a function `main`.
"""

from __future__ import annotations

import ast
import ctypes
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

from maskseg.errors import Interrupted, Shown, UserError
from maskseg.files.configs import experiments

# These variables are read when torch is imported, so the tools import this module first. By
# default, OpenMP threads spin while they wait for each other. As soon as one core is busy with
# something else, such as a loader process, a step takes up to ten times longer. Spinning briefly
# and then sleeping costs nothing if all cores are free. See docs/decisions/0003-threads.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# NumPy's matrix products start one thread per core, in each loader process again.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_memory() -> bool:
    """Make glibc's malloc keep freed memory for the next step, which needs the same amount.

    It keeps at most 1 GiB at the end of the heap, and no block of 256 MiB or more (32 MiB in old
    versions of glibc). See docs/decisions/0014-memory-is-kept.md.

    Returns whether the setting took effect. It does not with another C library, or if malloc is
    configured by environment variables.
    """
    if "GLIBC_TUNABLES" in os.environ or any(key.startswith("MALLOC_") for key in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function, or Windows
        return False
    has_mmap_threshold = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in (2**28, 2**25))
    return has_mmap_threshold and mallopt(M_TRIM_THRESHOLD, 2**30) == 1


keep_memory()
_OPTIONS_HELP = (
    "--cfg job prints the composed config, --info the groups and their choices; nothing is run."
)
_WITHOUT_CONFIG = ("compare",)  # tools without a config
_SCRIPT_PREFIX = "maskseg-"  # of the console scripts
# A tool in a text: `python tools/train.py` or `tools/train.py`.
_TOOL = re.compile(r"(?<![\w/=])(?:python )?tools/(\w+)\.py\b")
_INSTALL_EXTRA = re.compile(r"pip install -e '\.\[([a-z,]+)\]'")
_BROKEN_PIPE = 141  # 128 + SIGPIPE
_RANK_ZERO_FIRST = 3.0  # seconds that other ranks wait before they report an error


def run(main: Callable[[list[str]], None], usage: str, argv: Sequence[str] | None = None) -> int:
    """Call `main` with the command line's key=value arguments.

    Args:
        main: the tool.
        usage: help text, printed for -h and --help.
        argv: arguments; by default those of the process.

    `--cfg job` prints the config of the tool and `--info` the groups, and nothing is run.

    Returns the exit code: 0; 2 after a UserError, which is printed as one message; 143 after
    SIGTERM, 130 after Ctrl-C, and 141 where the reader of the output has gone.
    """
    _replace_unprintable()
    try:
        code = _run(main, usage, list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone, as with `| head`
        _discard_output()
        return _BROKEN_PIPE
    return code


def _replace_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Let the interpreter flush the rest of the output to nowhere when it exits."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not the output of a process
        return


def _run(main: Callable[[list[str]], None], usage: str, arguments: list[str]) -> int:
    """Run a tool or print its help. -> the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(fit_to_installation(usage.strip()))
        return 0
    if "--version" in arguments:
        print(f"maskseg {sys.modules['maskseg'].__version__}")
        return 0
    try:
        _record_errors(main)(_join_option(arguments))
    except Shown as shown:
        if os.environ.get("RANK", "0") == "0":
            print(shown.text.strip())
    except UserError as error:
        _report(error)
        return 2
    except UnicodeEncodeError as error:
        _report(
            UserError(
                f"{error.object!a}: a name that the encoding {error.encoding} of this terminal "
                "lacks; set PYTHONUTF8=1"
            )
        )
        return 2
    except Interrupted as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    return 0


def _join_option(arguments: list[str]) -> list[str]:
    """Write `--cfg job` as one argument. Raises UserError for another value of `--cfg`."""
    if "--cfg" in arguments:
        index = arguments.index("--cfg")
        arguments = [
            *arguments[:index],
            "=".join(arguments[index : index + 2]),
            *arguments[index + 2 :],
        ]
    for argument in arguments:
        if argument.partition("=")[0] == "--cfg" and argument != "--cfg=job":
            raise UserError(f"{argument}: --cfg job prints the config of the tool")
    return arguments


def _report(error: UserError) -> None:
    """Print an error to stderr.

    Rank 0 reports an error common to all ranks, and its exit ends this process. Only an error that
    rank 0 does not have is reported by another rank.
    """
    rank = os.environ.get("RANK", "0")
    text = fit_to_installation(str(error).strip()) or type(error).__name__
    message = f"error: {text}"
    if rank != "0":
        message = f"error in process {rank}: {text}"
        time.sleep(_RANK_ZERO_FIRST)
    print(message, file=sys.stderr, flush=True)


def _record_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Under torchrun, include the error of a process in torchrun's summary."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def fit_to_installation(text: str, root: Path = Path(__file__).parents[1]) -> str:
    """Write the commands in a text as they work in this installation.

    root: the folder that contains the package. Unless it is a clone, the packages of an extra are
    installed by their names instead of `pip install -e '.[EXTRA]'`.
    """
    if not (root / "pyproject.toml").is_file():
        text = _INSTALL_EXTRA.sub(_install_packages, text)
    return name_as_called(text)


def _install_packages(match: re.Match[str]) -> str:
    """The command that installs the packages of the extras that `_INSTALL_EXTRA` has found."""
    try:
        requirements = metadata.requires("maskseg") or []
    except metadata.PackageNotFoundError:
        return match[0]
    packages = []
    for requirement in requirements:
        package, _, condition = requirement.partition(";")
        if any(f'extra == "{name}"' in condition for name in match[1].split(",")):
            packages.append(f"'{package.strip()}'")
    return f"pip install {' '.join(packages)}" if packages else match[0]


def name_as_called(text: str) -> str:
    """Name the tools in a text in the form in which this process was started.

    `tools/train.py` becomes `maskseg-train` after a start by a console script, and
    `../tools/train.py` after one from another folder.
    """
    script = Path(sys.argv[0])
    if script.stem.startswith(_SCRIPT_PREFIX):
        return _TOOL.sub(lambda match: _SCRIPT_PREFIX + match[1].replace("_", "-"), text)
    if script.suffix == ".py" and script.parent.name == "tools":
        return _TOOL.sub(
            lambda match: _keep_python(match[0], script.parent / f"{match[1]}.py"), text
        )
    return text


def _keep_python(command: str, path: Path) -> str:
    return f"python {path}" if command.startswith("python") else str(path)


def help_text(tool: str) -> str:
    """Return the help of a tool: the docstring of its module.

    It is read from the source, because importing the module would import torch.
    """
    source = Path(__file__).parent / "commands" / f"{tool}.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    text = text.replace("{experiments}", ", ".join(experiments()))
    return text if tool in _WITHOUT_CONFIG else f"{text}\n\n{_OPTIONS_HELP}"


def run_tool(tool: str, argv: Sequence[str] | None = None) -> int:
    """Run `maskseg.commands.<tool>` with the command line's arguments. Returns its exit code."""

    def main(arguments: list[str]) -> None:
        import_module("maskseg.config.arguments").check_form(tool, arguments)
        import_module(f"maskseg.commands.{tool}").main(arguments)

    try:
        usage = help_text(tool)
    except UserError as error:  # of a plug-in, whose experiments are listed
        _report(error)
        return 2
    return run(main, usage, argv)


# The console scripts of pyproject.toml.
annotate = partial(run_tool, "annotate")
benchmark = partial(run_tool, "benchmark")
check_data = partial(run_tool, "check_data")
compare = partial(run_tool, "compare")
convert = partial(run_tool, "convert")
evaluate = partial(run_tool, "evaluate")
fit_hash = partial(run_tool, "fit_hash")
fit_svm = partial(run_tool, "fit_svm")
predict = partial(run_tool, "predict")
propose = partial(run_tool, "propose")
review = partial(run_tool, "review")
sweep = partial(run_tool, "sweep")
train = partial(run_tool, "train")
