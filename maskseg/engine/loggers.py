"""Where the numbers and images of a run go: TensorBoard, CSV and services by their own libraries.

The libraries of Weights & Biases, MLflow and trackio are imported when a run asks for them. Each of
these loggers continues the same run of its service after a resume: `loggers.json` of the run folder
has its identifier, and the last step by kind that it has logged.
"""

from __future__ import annotations

import csv
import importlib.util
import inspect
import os
import re
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskseg.errors import UserError, join_lines
from maskseg.files import parse_json, parse_yaml, replacing, write_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.writer import FileWriter

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow", "trackio"]
Scalar = bool | int | float | str
RGBImage = NDArray[np.uint8]  # [H, W, 3]

DEFAULT_LOGGERS: tuple[LoggerName, ...] = ("tensorboard", "csv")
STATE_FILE = "loggers.json"
RESULTS_FILE = "results.csv"
_PROJECT = "maskseg"  # of the services, unless their environment variables name another
_MAX_IMAGE_SIDE = 2000  # pixels of the longer side of a logged image
_MAX_TEXT = 200  # characters of a hyperparameter
_MAX_PARAMETERS = 100  # of one request to MLflow
_ID_LENGTH = 16  # hexadecimal digits of the identifier of a run
# Keys of a training step that describe the machine and not the model.
_SYSTEM_KEYS = ("images_per_second", "data_seconds", "step_seconds", "memory_gb")
# The modules of the loggers that need a library, and the extra that installs it.
_LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


class Logger(Protocol):
    """Receives the numbers and images of a run; only rank 0 has any."""

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log values of a step by name, such as `val/segm/AP`. kind: `train` or `val`."""

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of an evaluation by class, such as `classes/segm_AP/cat`."""

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """Log an image of an evaluation."""

    def log_pr_curve(self, step: int, name: str, precision: NDArray[np.float64]) -> None:
        """Log the precision [n] at n recalls evenly spaced from 0 to 1."""

    def close(self) -> None:
        """Write what is not written yet."""


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger logs.

    run_dir: its folder; config: as YAML; start_step: the step that it starts from; last_eval_step:
    the step of the last evaluation before it.
    """

    run_dir: Path
    config: str
    start_step: int
    last_eval_step: int

    @property
    def name(self) -> str:
        """The experiment and the folder."""
        experiment = self.values.get("name")
        prefix = f"{experiment}/" if isinstance(experiment, str) else ""
        return f"{prefix}{self.run_dir.resolve().name}"

    @property
    def values(self) -> dict[str, object]:
        """The config as nested plain values; {} for a text that is no config."""
        try:
            values = parse_yaml(self.config)
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError for a logger that does not exist or whose library is not installed."""
    for name in names:
        if name not in _LOGGERS:
            raise UserError(f"trainer.loggers: {name!r} is not one of {', '.join(_LOGGERS)}")
        library = _LIBRARIES.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            raise UserError(
                f"trainer.loggers: {name} needs the library {library}: pip install -e '.[{name}]'"
            )


def open_loggers(
    names: Sequence[str], run: LoggedRun, warn: Callable[[str], None]
) -> dict[str, Logger]:
    """Open the loggers of a run. warn: prints a message.

    Raises UserError where a service refuses the run, for example without a login.
    """
    loggers: dict[str, Logger] = {}
    try:
        for name in dict.fromkeys(names):
            is_service = name in _LIBRARIES
            loggers[name] = _open_service(name, run, warn) if is_service else _LOGGERS[name](run)
    except BaseException:
        for logger in loggers.values():
            with suppress(OSError):
                logger.close()
        raise
    return loggers


def _open_service(name: str, run: LoggedRun, warn: Callable[[str], None]) -> Logger:
    """Open a logger of a service. Raises UserError for any error of its library."""
    if run.start_step == 0:  # an earlier attempt, if any, has other values at these steps
        _ServiceState(run.run_dir, name).reset()
    try:
        logger = _LOGGERS[name](run)
    except Exception as error:
        raise UserError(
            f"trainer.loggers: {name} cannot log this run "
            f"({join_lines(error) or type(error).__name__})"
        ) from error
    return _ServiceLogger(name, logger, _ServiceState(run.run_dir, name), warn)


def scalar_name(kind: str, key: str) -> str:
    """The name of a value of metrics.jsonl in the loggers, in one of their groups.

    The groups are `train/`, `val/`, `lr/` and `sys/`.
    """
    if kind == "train" and key == "lr":
        return "lr/learning_rate"
    if kind == "train" and key in _SYSTEM_KEYS:
        return f"sys/{key}"
    return f"{kind}/{key}"


def select_scalars(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Select the values that a logger shows, by name: without metrics that are undefined (-1)."""
    named = {}
    for key, value in values.items():
        is_undefined = kind == "val" and value == -1 and not key.startswith("loss")
        if not is_undefined:
            named[scalar_name(kind, key)] = float(value)
    return named


def select_class_scalars(per_class: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name the AP of each class, `classes/segm_AP/cat`; classes without objects are dropped.

    per_class: as `CocoEvaluator.per_class`.
    """
    values = {}
    for kind, classes in per_class.items():
        for name, value in classes.items():
            if value >= 0:
                values[f"classes/{kind}_AP/{name.replace('/', '_')}"] = float(value)
    return values


def flatten_hyperparameters(values: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Flatten a config to dotted keys. Lists become texts; nulls and references are dropped.

    values: nested plain values.
    """
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_hyperparameters(value, f"{name}.")
        elif isinstance(value, list):
            flat[name] = str(value)[:_MAX_TEXT]
        elif isinstance(value, bool | int | float):
            flat[name] = value
        elif isinstance(value, str) and "${" not in value:
            flat[name] = value[:_MAX_TEXT]
    return {key: value for key, value in flat.items() if not key.endswith("_")}


def make_thumbnail(image: RGBImage) -> RGBImage:
    """Reduce an image to at most 2000 pixels a side."""
    reduced = Image.fromarray(image)
    reduced.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
    return np.array(reduced)


class TensorBoardLogger:
    """Writes event files for TensorBoard into `tensorboard/` of the run folder.

    The first evaluation also writes the hyperparameters, so that the tab HParams compares runs by
    the last values of their metrics.
    """

    def __init__(self, run: LoggedRun) -> None:
        # Imported here because it takes half a second.
        from torch.utils.tensorboard import SummaryWriter

        self._hyperparameters = flatten_hyperparameters(run.values)
        self._has_hyperparameters = False
        self._previous_hook = threading.excepthook
        threading.excepthook = _silence_board_errors(self._previous_hook)
        # Readers drop the events of an earlier process from this step on.
        purge_step = run.start_step + int(run.last_eval_step == run.start_step)
        try:
            folder = str(run.run_dir / "tensorboard")
            self.writer: SummaryWriter = SummaryWriter(folder, purge_step=max(purge_step, 1))
            self.writer.add_text("config", f"```yaml\n{run.config}\n```", run.start_step)
        except OSError:
            threading.excepthook = self._previous_hook
            raise

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if kind == "val" and not self._has_hyperparameters:
            self._has_hyperparameters = True
            self._log_hyperparameters(values)

    def _log_hyperparameters(self, metrics: Mapping[str, float]) -> None:
        """Describe the run to the tab HParams. metrics: whose last values it shows."""
        from torch.utils.tensorboard.summary import hparams

        build: Callable[..., Sequence[object]] = hparams
        file_writer: FileWriter | None = self.writer.file_writer
        assert file_writer is not None
        for summary in build(self._hyperparameters, dict(metrics)):
            file_writer.add_summary(summary)

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """See `Logger`."""
        self.writer.add_image(name, make_thumbnail(image), step, dataformats="HWC")

    def log_pr_curve(self, step: int, name: str, precision: NDArray[np.float64]) -> None:
        """See `Logger`. The counts of the plot are 0: a detector has no true negatives."""
        recall = np.linspace(0, 1, len(precision))
        counts = np.zeros(len(precision))
        # TensorBoard draws the points from last to first, so the recall must fall.
        curves = (counts, counts, counts, counts, precision[::-1], recall[::-1])
        self.writer.add_pr_curve_raw(name, *curves, global_step=step, num_thresholds=len(precision))

    def close(self) -> None:
        """Flush the event files."""
        try:
            self.writer.close()
        finally:
            threading.excepthook = self._previous_hook


def _silence_board_errors(
    hook: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], None]:
    """Return a hook for errors in threads that ignores those of TensorBoard's writer.

    The writer keeps such an error and raises it again in the thread that logs.
    """

    def handle(arguments: threading.ExceptHookArgs) -> None:
        module = type(arguments.thread).__module__
        is_board = module.partition(".")[0] == "tensorboard"
        if not (is_board and issubclass(arguments.exc_type, OSError)):
            hook(arguments)

    return handle


class CsvLogger:
    """Writes `results.csv`: one row per logged step, one column per name.

    Values of the same step share a row. A value that is new in the middle of a run adds a column.
    """

    def __init__(self, run: LoggedRun) -> None:
        self.path = run.run_dir / RESULTS_FILE
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, str]] = []
        self._last_start = 0  # bytes before the last row
        self._read(run)
        self._write_all()

    def _read(self, run: LoggedRun) -> None:
        """Read the rows of an earlier process up to the step that the run starts from."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            columns = [name for name in reader.fieldnames or [] if name]
            for row in reader:
                step = row.get("step") or ""
                is_complete = None not in row and None not in row.values()
                if not (is_complete and step.isdecimal()) or int(step) > run.start_step:
                    continue
                if int(step) > run.last_eval_step:
                    row = {k: "" if k.startswith("val/") else v for k, v in row.items()}
                self._rows.append(row)
        if "step" in columns:
            self._columns = columns

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        del kind  # it is part of the names
        shares_row = bool(self._rows) and self._rows[-1].get("step") == str(step)
        if not shares_row:
            self._rows.append({"step": str(step)})
        self._rows[-1] |= {name: f"{value:.6g}" for name, value in values.items()}
        new = [name for name in values if name not in self._columns]
        self._columns += new
        if new:
            self._write_all()
        else:
            self._write_last(replace=shares_row)

    def _write_all(self) -> None:
        with replacing(self.path, "the table of results") as file:
            file.write(self._format(dict(zip(self._columns, self._columns, strict=True))))
            for row in self._rows:
                self._last_start = file.tell()
                file.write(self._format(row))

    def _write_last(self, replace: bool) -> None:
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if replace:  # by a row with more values; the old one is complete until then
                file.seek(self._last_start)
            else:
                self._last_start = end
            file.write(self._format(self._rows[-1]))
            file.truncate()

    def _format(self, row: Mapping[str, str]) -> bytes:
        """One line of the file."""
        cells = [_quote(row.get(name, "")) for name in self._columns]
        return (",".join(cells) + "\n").encode()

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """Log nothing: `per_class.csv` of the run has these values in rows."""

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """Log nothing: a table has no images."""

    def log_pr_curve(self, step: int, name: str, precision: NDArray[np.float64]) -> None:
        """Log nothing: a table has no curves."""

    def close(self) -> None:
        """Close nothing: every row is written at once."""


def _quote(text: str) -> str:
    """A cell of a CSV file."""
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\r\n]', text) else text


class _ServiceState:
    """What `loggers.json` of a run folder has about one service.

    identifier: of the run there; None where it has none yet. last_steps: by kind, such as `train`.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.path = run_dir / STATE_FILE
        self.name = name
        states = self._read()
        state = states.get(name)
        values = state if isinstance(state, dict) else {}
        identifier = values.get("run")
        self.identifier: str | None = identifier if isinstance(identifier, str) else None
        self.last_steps: dict[str, int] = {}
        steps = values.get("last_steps")
        if self.identifier is not None and isinstance(steps, dict):
            self.last_steps = {kind: step for kind, step in steps.items() if type(step) is int}

    def reset(self) -> None:
        """Forget the run of an earlier attempt."""
        if self.identifier is not None:
            self.identifier = None
            self.last_steps = {}
            self._write()

    def set_identifier(self, identifier: str) -> None:
        """Store the identifier of a new run."""
        self.identifier = identifier
        self.last_steps = {}
        self._write()

    def advance(self, kind: str, step: int) -> bool:
        """Store that a step is logged. -> False for one that has been logged before."""
        if step <= self.last_steps.get(kind, -1):
            return False
        self.last_steps[kind] = step
        self._write()
        return True

    def _read(self) -> dict[str, object]:
        """The states of all services; {} for a new run."""
        with suppress(OSError, ValueError):
            states = parse_json(self.path.read_bytes())
            if isinstance(states, dict):
                return states
        return {}

    def _write(self) -> None:
        state = {"run": self.identifier, "last_steps": self.last_steps}
        write_json(self.path, {**self._read(), self.name: state})


class _ServiceLogger:
    """A logger of a service, whose failures do not end a training.

    A service keeps every point that it gets. A step that an earlier process of the run has logged
    is therefore not logged again. It is stored as logged before it is sent, so that no kill in
    between makes it occur twice.
    """

    def __init__(
        self, name: str, logger: Logger, state: _ServiceState, warn: Callable[[str], None]
    ) -> None:
        self.name = name
        self.logger = logger
        self.state = state
        self.warn = warn
        self.has_failed = False

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._log(step, kind, lambda: self.logger.log_scalars(step, kind, values))

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._log(step, "classes", lambda: self.logger.log_classes(step, values))

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """See `Logger`."""
        self._log(step, f"images/{name}", lambda: self.logger.log_image(step, name, image))

    def log_pr_curve(self, step: int, name: str, precision: NDArray[np.float64]) -> None:
        """See `Logger`."""
        self._log(step, f"curves/{name}", lambda: self.logger.log_pr_curve(step, name, precision))

    def close(self) -> None:
        """See `Logger`."""
        self._try(self.logger.close)

    def _log(self, step: int, kind: str, log: Callable[[], None]) -> None:
        """Log a step that has not been logged before."""
        if not self.has_failed and self.state.advance(kind, step):
            self._try(log)

    def _try(self, log: Callable[[], None]) -> None:
        """Log, unless the service has failed before."""
        if self.has_failed:
            return
        try:
            log()
        except Exception as error:  # of the library or the network
            self.has_failed = True
            reason = join_lines(error) or type(error).__name__
            self.warn(f"warning: {self.name} no longer logs this run ({reason})")


class _ServiceRun(Protocol):
    """A run of Weights & Biases or of trackio. step: by default, one of the service's own."""

    def log(self, values: dict[str, object], /, *, step: int | None = None) -> None: ...
    def finish(self) -> None: ...


class _RunLogger(ABC):
    """A logger of a service whose runs have a method `log` and a class for images."""

    def __init__(self, run: _ServiceRun, image: Callable[[RGBImage], object]) -> None:
        self.run = run
        self._image = image

    @abstractmethod
    def _log(self, step: int, values: Mapping[str, object]) -> None:
        """Log values of a step by name."""

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        del kind  # it is part of the names
        self._log(step, values)

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._log(step, values)

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """See `Logger`."""
        self._log(step, {f"images/{name}": self._image(make_thumbnail(image))})

    def log_pr_curve(  # noqa: B027 - it is not abstract
        self, step: int, name: str, precision: NDArray[np.float64]
    ) -> None:
        """Log nothing: `pr_curves` is one of the images."""

    def close(self) -> None:
        """End the run of the service."""
        self.run.finish()


class WandbLogger(_RunLogger):
    """Logs to Weights & Biases. Its environment variables, such as WANDB_MODE, apply.

    The step is a value of its own: the library drops values of a step before its last one, such as
    those of an evaluation that is repeated after a crash.
    """

    def __init__(self, run: LoggedRun) -> None:
        wandb = import_module("wandb")
        started = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=_identify(run, "wandb"),
            resume="allow",
            dir=str(run.run_dir),
            config=run.values,
        )
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
        super().__init__(started, wandb.Image)

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        self.run.log({"step": step, **values})


class MlflowLogger:
    """Logs to MLflow. Its environment variables, such as MLFLOW_TRACKING_URI, apply.

    The library sends the values in the background, if it can: a server that is slow or does not
    answer must not keep the other processes of a training waiting.
    """

    def __init__(self, run: LoggedRun) -> None:
        self.mlflow: ModuleType = import_module("mlflow")
        state = _ServiceState(run.run_dir, "mlflow")
        if state.identifier is not None:
            self.mlflow.start_run(run_id=state.identifier)
            return
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            self.mlflow.set_experiment(experiment_name=_PROJECT)
        active = self.mlflow.start_run(run_name=run.name)
        state.set_identifier(str(active.info.run_id))
        # A parameter of MLflow cannot be changed, so that a resumed run keeps the first ones.
        parameters = list(flatten_hyperparameters(run.values).items())
        for start in range(0, len(parameters), _MAX_PARAMETERS):
            self._send(self.mlflow.log_params, dict(parameters[start : start + _MAX_PARAMETERS]))

    def _send(self, log: Callable[..., object], *values: object, **options: object) -> None:
        """Call a function of the library that logs, without waiting for the server if it can."""
        if "synchronous" in inspect.signature(log).parameters:
            options["synchronous"] = False
        log(*values, **options)

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        del kind  # it is part of the names
        self._send(self.mlflow.log_metrics, _mlflow_names(values), step=step)

    def log_classes(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._send(self.mlflow.log_metrics, _mlflow_names(values), step=step)

    def log_image(self, step: int, name: str, image: RGBImage) -> None:
        """See `Logger`."""
        self._send(self.mlflow.log_image, make_thumbnail(image), key=name, step=step)

    def log_pr_curve(self, step: int, name: str, precision: NDArray[np.float64]) -> None:
        """Log nothing: `pr_curves` is one of the images."""

    def close(self) -> None:
        """Send what is still queued, and end the run of the service."""
        if hasattr(self.mlflow, "flush_async_logging"):
            self.mlflow.flush_async_logging()
        self.mlflow.end_run()


def _mlflow_names(values: Mapping[str, float]) -> dict[str, float]:
    """Values by names that MLflow accepts: `train/loss.mask`.

    Its store of files cannot hold both `train/loss` and `train/loss/mask`.
    """
    named = {}
    for name, value in values.items():
        group, _, rest = name.partition("/")
        cleaned = re.sub(r"[^\w.\- ]", "_", rest.replace("/", "."))
        named[f"{group}/{cleaned}"] = value
    return named


class TrackioLogger(_RunLogger):
    """Logs to trackio. Its environment variables, such as TRACKIO_SPACE_ID, apply."""

    def __init__(self, run: LoggedRun) -> None:
        trackio = import_module("trackio")
        started = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=_identify(run, "trackio", f"{run.name.replace('/', '_')}_"),
            config=flatten_hyperparameters(run.values),
            resume="allow",
        )
        super().__init__(started, trackio.Image)

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        self.run.log(dict(values), step=step)


_LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CsvLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


def _identify(run: LoggedRun, service: str, prefix: str = "") -> str:
    """The identifier of a run in a service; a new one is stored before the service gets it.

    A new one is random: another run may have been in the same folder.
    """
    state = _ServiceState(run.run_dir, service)
    if state.identifier is not None:
        return state.identifier
    identifier = f"{prefix}{uuid.uuid4().hex[:_ID_LENGTH]}"
    state.set_identifier(identifier)
    return identifier
