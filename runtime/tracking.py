"""The record of a run behind one `Tracker`: metrics.csv, TensorBoard, MLflow.

    metrics.csv     one row per epoch, the source of truth           tracking_csv
    TensorBoard     curves, pictures, options, table of runs         tracking_tensorboard
    MLflow          the same, plus datasets, artifacts and a model   tracking_mlflow

The last two are optional: whatever is missing, full, locked, deleted or unreachable costs one
warning, and after three failures nobody asks again.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from runtime.distributed import rank
from runtime.errors import Interrupted, visible, without_secrets
from runtime.tracking_csv import MetricsTable
from runtime.tracking_mlflow import (
    About,
    Mlflow,
    ServerIsSlowError,
    import_mlflow,
)
from runtime.tracking_tensorboard import TensorBoard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGGER = logging.getLogger("tracking")

BackEnd = TypeVar("BackEnd")


class Tracker:
    """Records one run, from one process; an exception that leaves the `with` becomes its status.

    Every method does nothing in the other processes of a run.

    Args:
        run_dir: the run's folder, for metrics.csv and TensorBoard.
        config: the options, for TensorBoard's tables and MLflow's params.
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
        options = flatten(config)
        self._csv: _Optional[MetricsTable] = _Optional("metrics.csv", max_failures=None)
        self._tensorboard: _Optional[TensorBoard] = _Optional("TensorBoard")
        self._mlflow: _Optional[Mlflow] = _Optional("MLflow")
        if rank() > 0:
            return
        self._csv.open(lambda: MetricsTable(run_dir, first_step))
        self._csv(lambda table: table.tidy())
        self._tensorboard.open(lambda: TensorBoard(run_dir, options, first_step))
        if not use_mlflow:
            return
        history = self._csv.back_end.rows if self._csv.back_end else {}
        about = About(run_dir, tags, options, first_step, mlflow_run_id, guest, history)

        def open_mlflow() -> Mlflow:
            return Mlflow(about, store=store.resolve(), experiment=experiment)

        if self._mlflow.attempt(import_mlflow):  # sets up its logging, so apart from the rest
            self._mlflow.open(open_mlflow)
        if self._mlflow.back_end:
            self.mlflow_run_id = self._mlflow.back_end.run_id

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
        self._csv(lambda table: table.log(values, step))
        self._tensorboard(lambda board: board.log(values, step))
        self._mlflow(lambda run: run.log(values, step))

    def log_summary(self, scores: Mapping[str, float], step: int) -> None:
        """Record a run's best scores: what the tables of runs compare."""
        values = {name: float(value) for name, value in scores.items()}
        self._tensorboard(lambda board: board.log_summary(values, step))
        self._mlflow(lambda run: run.log_summary(values, step))

    def log_scores(self, scores: Mapping[str, float], step: int) -> None:
        """Record numbers that are no row of metrics.csv, such as those of a finished run's test."""
        values = {name: float(value) for name, value in scores.items()}
        self._tensorboard(lambda board: board.log(values, step))
        self._mlflow(lambda run: run.log(values, step))

    def log_figure(self, name: str, figure: "Figure", step: int) -> None:
        """Record a picture of an epoch. The figure stays open."""
        self._tensorboard(lambda board: board.log_figure(name, figure, step))
        self._mlflow(lambda run: run.log_figure(name, figure, step))

    def log_pr_curve(self, name: str, counts: Tensor, step: int) -> None:
        """Record a precision-recall curve in TensorBoard.

        Args:
            name: of the curve.
            counts: (2, num_bins) pixels per bin of predicted probability, unchanged and changed.
            step: the epoch.
        """
        self._tensorboard(lambda board: board.log_pr_curve(name, counts, step))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Add a file to the MLflow run, into a folder of its artifacts."""
        self._mlflow(lambda run: run.log_artifact(path, folder))

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
        self._mlflow(
            lambda run: run.log_datasets(name, digest=digest, source=source, num_pairs=num_pairs)
        )

    def log_model(self, model: nn.Module) -> None:
        """Record a model in MLflow that runs without this repository; it costs seconds.

        `mlflow.pytorch.load_model(f"runs:/{id}/model")` gives a module from images (B, 6, H, W),
        before and after stacked, float32 in [0, 1], to the logits (B, K, H, W), on the CPU until
        moved. The sizes that it takes are those of torch.export: a U-Net of stride 32 that crops
        to an even size gets a program for even H and W above 32, which refuses others.

        Args:
            model: called as model(before, after); it is copied and stays as it is.
        """
        if not self._mlflow.back_end:
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary, "model")
            export: _Optional[object] = _Optional("the MLflow model")
            if export.attempt(lambda: export_model(model, folder)):
                self._mlflow(lambda run: run.log_model(folder))

    def close(self, status: str = "FINISHED") -> None:
        """End the record: FINISHED, FAILED or KILLED. Closing twice does no harm."""
        self._mlflow(lambda run: run.close(status))
        self._csv.back_end = self._tensorboard.back_end = self._mlflow.back_end = None


class _Optional(Generic[BackEnd]):
    """A back end that may fail without harm: one warning, and not tried again after a few failures.

    Attributes:
        back_end: None unless it is open; one that fails too often is let go.
    """

    def __init__(self, name: str, max_failures: int | None = 3) -> None:
        self.name = name
        self.back_end: BackEnd | None = None
        self.failures = 0
        self.max_failures = max_failures

    def open(self, make: Callable[[], BackEnd]) -> None:
        """Open the back end, if it can be."""

        def opened() -> None:
            self.back_end = make()

        self.attempt(opened)

    def __call__(self, call: Callable[[BackEnd], object]) -> None:
        """Let the back end do something, if there is one."""
        back_end = self.back_end
        if back_end is not None:
            self.attempt(lambda: call(back_end))

    def attempt(self, call: Callable[[], object]) -> bool:
        """Return whether a call went well."""
        try:
            with quiet():
                call()
        except Exception as error:
            if not self.failures:
                line = without_secrets(" ".join(str(error).split()) or type(error).__name__)
                LOGGER.warning("%s: %.300s (the run goes on without)", self.name, visible(line))
            self.failures += 1
            if isinstance(error, ServerIsSlowError):
                # its thread still listens, and what it hears interests nobody
                logging.getLogger("urllib3").setLevel(logging.CRITICAL)
                self.back_end = None
            if self.failures == self.max_failures:
                self.back_end = None
            return False
        return True


def export_model(model: nn.Module, folder: Path) -> None:
    """Write a model that runs without this repository, see `Tracker.log_model`."""
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


class StackedPair(nn.Module):
    """One tensor in, as MLflow wants it: images (B, 6, H, W), before and after, become logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Turn (B, 6, H, W) into the model's logits (B, K, H, W)."""
        before, after = images.split(3, dim=1)
        return self.model(before, after)


@contextmanager
def quiet() -> Iterator[None]:
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


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Turn nested options into {"a.b": value}; what is not a number becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float):
            flat[f"{prefix}{name}"] = value
        else:
            flat[f"{prefix}{name}"] = without_secrets(str(value))
    return flat
