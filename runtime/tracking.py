"""The record of a run behind one `Tracker`: metrics.csv, TensorBoard, MLflow.

    metrics.csv     one row per epoch, the source of truth; a resumed run drops what it repeats
    TensorBoard     scalars, pictures, precision-recall curves, options; event files beside it
    MLflow          the same, plus datasets, artifacts and the model; mlflow.db and mlruns/ in
                    the store, or the server that MLFLOW_TRACKING_URI names

The last two are optional: whatever is missing, full, locked, deleted or unreachable costs one
warning, and after three failures nobody asks again. No user, password, token or query of a URI is
written or printed. MLflow's usage statistics stay off unless MLFLOW_DISABLE_TELEMETRY says
otherwise. An MLflow store holds absolute paths: it does not move with the repository.
"""

import copy
import csv
import io
import json
import logging
import math
import os
import posixpath
import re
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import torch
from torch import Tensor, nn

from runtime.errors import Interrupted
from runtime.files import locked, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGGER = logging.getLogger("tracking")

# An unreachable server costs 4 s at the start; by default MLflow tries for minutes. What could not
# be sent goes with the next epoch, so nothing is lost by not trying again at once.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}
MAX_BATCH = 1000  # metrics that MLflow takes at once
HEADLINES = [  # of TensorBoard's table of options
    f"best/{name}" for name in ("change_iou", "change_dice", "mean_iou_of_change", "scd_score")
]


class Tracker:
    """Records one run, from one process; an exception that leaves the `with` becomes its status.

    Args:
        run_dir: the run's folder, for metrics.csv and TensorBoard.
        config: the options, for TensorBoard's text and MLflow's params.
        tags: what else to find the run by.
        store: folder of mlflow.db and mlruns/, where no server is named.
        use_mlflow: False leaves MLflow out; it is not even imported.
        first_step: the first step that this process will log; what an earlier one has logged from
            there on is dropped. 0 for a new run.
        mlflow_run_id: the MLflow run to go on with, from a checkpoint. One that the store does not
            know becomes a new run, with the history of metrics.csv and a tag naming the old one.
        experiment: of MLflow.
        guest: adds to a run that is another process's (an evaluation): its status and options in
            MLflow stay as they are. Where the store does not know the run, a new one says in a
            tag what it is an `evaluation_of`.

    Attributes:
        mlflow_run_id: for the checkpoint; what was given, where MLflow cannot be had this time.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, object],
        tags: Mapping[str, str],
        store: Path,
        use_mlflow: bool = True,
        first_step: int = 0,
        mlflow_run_id: str | None = None,
        experiment: str = "change-detection",
        guest: bool = False,
    ) -> None:
        self.mlflow_run_id = mlflow_run_id
        self._is_guest = guest
        self._owns_run = True
        self._run_dir = run_dir
        self._options = _flatten(config)
        self._first_step = first_step
        self._rows: dict[int, dict[str, str]] = {}
        self._unsent: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._non_finite = 0
        self._writer: Any = None
        self._has_charts = False
        self._client: Any = None
        self._sqlite: Path | None = None
        self._thread_hook = threading.excepthook
        self._csv = _Optional("metrics.csv", max_failures=None)
        self._tensorboard = _Optional("TensorBoard")
        self._mlflow = _Optional("MLflow")
        self._csv(self._read_rows)
        if not self._tensorboard(self._open_tensorboard):
            self._tensorboard.is_on = False
        if not (
            use_mlflow
            and self._mlflow(_import_mlflow)  # sets up its logging, so apart from the rest
            and self._mlflow(self._open_mlflow, store.resolve(), experiment, tags)
        ):
            self._mlflow.is_on = False

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_stop = isinstance(error, Interrupted | KeyboardInterrupt)
        self.close("FINISHED" if error is None else "KILLED" if is_stop else "FAILED")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the numbers of an epoch: a row, a point on each curve, one call to MLflow.

        Args:
            metrics: "train/loss", "val/change_iou", "lr"; train/x and val/x share a chart.
            step: the epoch.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._rows.setdefault(step, {}).update({k: repr(v) for k, v in values.items()})
        self._csv(self._write_rows)
        self._tensorboard(self._add_scalars, values, step)
        self._queue(values, step)
        self._to_mlflow(self._send)

    def log_summary(self, scores: Mapping[str, float], step: int) -> None:
        """Record a run's best scores as best/x: what the tables of runs compare.

        In TensorBoard, where each is a chart of one point before all the curves, `HEADLINES` alone.
        """
        values = {f"best/{name}": float(value) for name, value in scores.items()}
        headlines = {name: values[name] for name in HEADLINES if name in values}
        self._tensorboard(self._add_hparams, headlines, step)
        self._queue(values, step)
        self._to_mlflow(self._send)

    def log_scores(self, scores: Mapping[str, float], step: int) -> None:
        """Record numbers that are no row of metrics.csv, such as those of a finished run's test."""
        values = {name: float(value) for name, value in scores.items()}
        self._tensorboard(self._add_scalars, values, step)
        self._queue(values, step)
        self._to_mlflow(self._send)

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        """Record a picture of an epoch. The figure stays open."""
        path = f"figures/{name}_{step:04}.png"
        self._tensorboard(self._add_figure, name, figure, step)
        self._to_mlflow(lambda client: client.log_figure(self.mlflow_run_id, figure, path))

    def log_pr_curve(self, name: str, counts: Tensor, step: int) -> None:
        """Record a precision-recall curve in TensorBoard.

        Args:
            name: of the curve.
            counts: (2, num_bins) pixels per bin of predicted probability, unchanged and changed.
            step: the epoch.
        """
        self._tensorboard(self._add_pr_curve, name, counts, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the MLflow run, into a folder of its artifacts."""
        self._to_mlflow(lambda client: client.log_artifact(self.mlflow_run_id, str(path), folder))

    def log_datasets(
        self, name: str, *, digest: str, source: str, num_pairs: Mapping[str, int]
    ) -> None:
        """Name the data of the run in MLflow; nothing is copied.

        Args:
            name: of the dataset.
            digest: that changes with its content; MLflow keeps 36 characters.
            source: folder or address.
            num_pairs: of each split: {"train": 445, "val": 64}.
        """

        def send(client: Any) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            uri = json.dumps({"uri": without_secrets(source)})
            inputs = []
            for split, num in num_pairs.items():
                # named by split, because the same name and digest twice would be one entry
                dataset = Dataset(f"{name} {split}", digest[:36], "local", uri,
                                  profile=json.dumps({"num_pairs": num}))  # fmt: skip
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
            client.log_inputs(self.mlflow_run_id, inputs)

        self._to_mlflow(send)

    def log_model(self, model: nn.Module) -> None:
        """Record a model that runs without this repository.

        `mlflow.pytorch.load_model(f"runs:/{id}/model")` gives a module from images (B, 6, H, W),
        before and after stacked, float32 in [0, 1], to the logits (B, K, H, W), on the CPU until
        moved. The sizes that it takes are those of torch.export: a U-Net of stride 32 that crops
        to an even size gets a program for even H and W above 32, which refuses others.

        Args:
            model: called as model(before, after); it is copied and stays as it is.
        """
        if not self._mlflow.is_on:
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary, "model")
            if _Optional("the MLflow model")(_export, model, folder):
                self._to_mlflow(lambda client: self._send_model(client, folder))

    def close(self, status: str = "FINISHED") -> None:
        """End the record: FINISHED, FAILED or KILLED. Closing twice does no harm."""
        if self._tensorboard.is_on:
            self._tensorboard(self._writer.close)
        if self._unsent:
            self._to_mlflow(self._send)
        if self._owns_run:
            self._to_mlflow(lambda client: client.set_terminated(self.mlflow_run_id, status))
        self._tensorboard.is_on = self._mlflow.is_on = False
        threading.excepthook = self._thread_hook

    # ---- metrics.csv

    def _read_rows(self) -> None:
        path = self._run_dir / "metrics.csv"
        if not path.exists():
            return
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
        for row in rows:
            try:
                step = int(row.pop("step", ""))
                values = {name: repr(float(value)) for name, value in row.items() if value}
            except (TypeError, ValueError):
                continue  # a damaged row must not stop a run
            if step < self._first_step:
                self._rows[step] = values
        if len(self._rows) < len(rows):
            self._write_rows()

    def _write_rows(self) -> None:
        """Write the whole table anew: it is small, never half a file, and may get new columns.

        Rows that a full disk has refused come along with the next one.
        """
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, ["step", *columns], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({"step": str(step), **row} for step, row in self._rows.items())
        path = self._run_dir / "metrics.csv"
        with whole_file(path) as beside:
            beside.write_text(text.getvalue(), encoding="utf-8", newline="")

    # ---- TensorBoard; flushed at each call, so that a fault shows there and pages are up to date

    def _open_tensorboard(self) -> bool:
        from torch.utils.tensorboard import SummaryWriter

        # its thread prints a traceback where the disk is full; the next call raises the same
        def report(thrown: threading.ExceptHookArgs) -> None:
            if not type(thrown.thread).__module__.startswith("tensorboard"):
                self._thread_hook(thrown)

        threading.excepthook = report
        self._writer = SummaryWriter(str(self._run_dir), purge_step=self._first_step or None)
        table = "\n".join(f"| {name} | {value} |" for name, value in self._options.items())
        text = f"| option | value |\n| --- | --- |\n{table}"
        self._writer.add_text("config", text, self._first_step)
        self._writer.flush()
        return True

    def _add_scalars(self, values: Mapping[str, float], step: int) -> None:
        if not self._has_charts:
            names = [name.removeprefix("train/") for name in values if name.startswith("train/")]
            charts = {n: ["Multiline", [f"train/{n}", f"val/{n}"]] for n in names}
            if charts:
                self._writer.add_custom_scalars({"train and val": charts})
            self._has_charts = True
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _add_hparams(self, values: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        # into the run's own file: SummaryWriter.add_hparams would open another run
        for summary in hparams(self._options, values):
            self._writer.file_writer.add_summary(summary)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _add_figure(self, name: str, figure: "Figure", step: int) -> None:
        canvas = figure.canvas
        try:
            self._writer.add_figure(name, figure, step, close=False)
        finally:
            figure.set_canvas(canvas)  # torch puts another one in
        self._writer.flush()

    def _add_pr_curve(self, name: str, counts: Tensor, step: int) -> None:
        # Column i counts the pixels at or above i / num_bins, which are the thresholds that
        # TensorBoard writes beside num_bins + 1 columns; the last one claims nothing.
        claimed = counts.detach().cpu().double().flip(1).cumsum(1).flip(1)
        claimed = torch.cat([claimed, claimed.new_zeros(2, 1)], dim=1)
        (fp, tp), (negatives, positives) = claimed, claimed[:, :1]
        precision, recall = tp / (tp + fp).clamp(min=1), tp / positives.clamp(min=1)
        columns = (tp, fp, negatives - fp, positives - tp, precision, recall)
        self._writer.add_pr_curve_raw(
            name, *(c.numpy() for c in columns), step, num_thresholds=len(tp)
        )
        self._writer.flush()

    # ---- MLflow: a client with explicit ids; its global run would leak into whatever comes next

    def _to_mlflow(self, call: Callable[[Any], object]) -> None:
        def checked() -> None:
            if self._sqlite:
                _check_sqlite(self._sqlite)
            call(self._client)

        self._mlflow(checked)

    def _open_mlflow(self, store: Path, experiment: str, tags: Mapping[str, str]) -> bool:
        from mlflow import MlflowClient

        # named outright: an old mlruns/ in the working folder changes what MLflow would choose
        named = os.environ.get("MLFLOW_TRACKING_URI")
        uri = named or f"sqlite:///{store.as_posix()}/mlflow.db"
        if uri.startswith("sqlite:///") and "?" not in uri:
            self._sqlite = Path(uri.removeprefix("sqlite:///"))
        lock = self._sqlite and self._sqlite.with_name(f"{self._sqlite.name}.lock")
        try:
            # several runs that create a database or an experiment at once trip over each other
            with locked(lock) if lock else nullcontext():
                if self._sqlite and self._sqlite.exists():
                    _check_sqlite(self._sqlite)
                client = MlflowClient(uri)
                root = None if named else (store / "mlruns" / experiment).as_uri()
                found = client.get_experiment_by_name(experiment)
                group = found.experiment_id if found else client.create_experiment(experiment, root)
                if not self._continue_run(client):
                    self._start_run(client, group, tags)
        except Exception as error:
            raise RuntimeError(f"{uri}: {error}") from error
        self._client = client
        return True

    def _start_run(self, client: Any, experiment_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        tags = {**tags, "run_dir": str(self._run_dir), "mlflow.source.name": Path(sys.argv[0]).name}
        if self.mlflow_run_id:
            tags["evaluation_of" if self._is_guest else "resumed_from"] = self.mlflow_run_id
            for step, row in self._rows.items():
                self._queue({name: float(value) for name, value in row.items()}, step)
        tags = {name: without_secrets(value)[:5000] for name, value in tags.items()}
        run = client.create_run(experiment_id, tags=tags, run_name=self._run_dir.name)
        self.mlflow_run_id = run.info.run_id
        params = [Param(name, value) for name, value in self._params().items()]
        client.log_batch(self.mlflow_run_id, params=params)

    def _continue_run(self, client: Any) -> bool:
        from mlflow.exceptions import MlflowException

        if not self.mlflow_run_id:
            return False
        try:
            run = client.get_run(self.mlflow_run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise
        if run.info.lifecycle_stage != "active":
            return False
        self._non_finite = int(run.data.tags.get("non_finite_metrics", 0))
        if self._is_guest:
            self._owns_run = False
            return True
        client.update_run(self.mlflow_run_id, "RUNNING")
        # params cannot be changed once they are logged, so a tag says what is new
        before, now = run.data.params, self._params()
        news = [f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
        number = 1 + sum(tag.startswith("resume.") for tag in run.data.tags)
        text = "; ".join([f"from step {self._first_step}", *news])
        client.set_tag(self.mlflow_run_id, f"resume.{number}", text[:5000])
        return True

    def _params(self) -> dict[str, str]:
        return {mlflow_name(name): str(value)[:500] for name, value in self._options.items()}

    def _queue(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers until MLflow has taken them; it would store an infinite one as 1.8e308."""
        if not self._mlflow.is_on:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._non_finite += len(values) - len(finite)
        now = int(time.time() * 1000)
        self._unsent += [(mlflow_name(name), value, now, step) for name, value in finite.items()]

    def _send(self, client: Any) -> None:
        from mlflow.entities import Metric, RunTag

        tags = [RunTag("non_finite_metrics", str(self._non_finite))] if self._non_finite else []
        while self._unsent or tags:
            metrics = [Metric(*metric) for metric in self._unsent[:MAX_BATCH]]
            client.log_batch(self.mlflow_run_id, metrics=metrics, tags=tags)
            del self._unsent[:MAX_BATCH]
            tags = []

    def _send_model(self, client: Any, folder: Path) -> None:
        from mlflow.entities import LoggedModelOutput

        group = client.get_run(self.mlflow_run_id).info.experiment_id
        entry = client.create_logged_model(group, "model", self.mlflow_run_id)
        client.log_model_artifacts(entry.model_id, str(folder))
        client.finalize_logged_model(entry.model_id, "READY")
        output = LoggedModelOutput(entry.model_id, max(self._rows, default=0))
        client.log_outputs(self.mlflow_run_id, [output])


class StackedPair(nn.Module):
    """One tensor in, as MLflow wants it: images (B, 6, H, W), before and after, become logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, 6, H, W) into the model's logits (B, K, H, W)."""
        before, after = images.split(3, dim=1)
        return self.model(before, after)


class _Optional:
    """Calls that may fail without harm: one warning, and not tried again after a few failures."""

    def __init__(self, name: str, max_failures: int | None = 3) -> None:
        self.name = name
        self.is_on = True
        self.failures = 0
        self.max_failures = max_failures

    def __call__(self, call: Callable[..., Any], *args: object) -> Any:
        """Return what the call returns, None if it fails."""
        if not self.is_on:
            return None
        try:
            with _quiet():
                return call(*args)
        except Exception as error:
            if not self.failures:
                line = without_secrets(" ".join(str(error).split()) or type(error).__name__)
                LOGGER.warning("%s: %.300s (the run goes on without)", self.name, line)
            self.failures += 1
            self.is_on = self.failures != self.max_failures
            return None


def without_secrets(text: str) -> str:
    """Drop user:password@, query and fragment from every URI in a text."""
    text = re.sub(r"(\w[\w+.-]*://)[^/\s]*@", r"\1", text)
    for secret in _secrets_of_environment():  # libraries take an address apart in their messages
        text = text.replace(secret, "***")
    return re.sub(r"(\w[\w+.-]*://[^\s?#]*)[?#]\S*", r"\1", text)


def _secrets_of_environment() -> list[str]:
    """Return what must not be repeated of how to reach MLflow, the longest first."""
    environment = os.environ
    address = urlsplit(environment.get("MLFLOW_TRACKING_URI", ""))
    found = [address.username, address.password, address.query, address.fragment]
    found += [value for _, value in parse_qsl(address.query)]
    found += [environment.get(f"MLFLOW_TRACKING_{name}") for name in ("TOKEN", "PASSWORD")]
    # shorter ones would cut words apart, and protect nothing
    return sorted({text for text in found if text and len(text) > 3}, key=len, reverse=True)


def mlflow_name(name: str) -> str:
    """Turn any name into one that MLflow takes for a metric or a param."""
    name = posixpath.normpath(re.sub(r"[^\w\-. /]", "_", name)).lstrip("./")
    return name[:250] or "_"


def _check_sqlite(path: Path) -> None:
    """Raise within a second where MLflow would wait 20 for a lock; a deleted file stays deleted."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=1, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


def _import_mlflow() -> bool:
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # 2 to 3 s

    return bool(mlflow)


def _export(model: nn.Module, folder: Path) -> bool:
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype("float32"), (-1, 6, -1, -1), "images")
    logits = TensorSpec(np.dtype("float32"), (-1, -1, -1, -1), "logits")
    stacked = StackedPair(copy.deepcopy(model)).cpu().float().eval().requires_grad_(False)
    mlflow.pytorch.save_model(
        stacked,
        str(folder),
        serialization_format="pt2",  # the only one that needs none of our files to load
        signature=ModelSignature(Schema([images]), Schema([logits])),
        # sizes that differ and are not 1, or the exported program keeps them
        input_example=np.zeros((2, 6, 64, 96), np.float32),
        # looking for them would load the model in another process, for seconds
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what MLflow and its dependencies report beside raising.

    Importing mlflow.pytorch calls `logging.basicConfig(level=ERROR)`, which would hide every later
    warning of the run; so the root logger is put back as it was.
    """
    root = logging.getLogger()
    handlers, root_level = root.handlers[:], root.level
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3", "torch")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        root.handlers[:] = handlers
        root.setLevel(root_level)


def _flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Turn nested options into {"a.b": value}; what is not a number becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float):
            flat[f"{prefix}{name}"] = value
        else:
            flat[f"{prefix}{name}"] = without_secrets(str(value))
    return flat
