"""What a run leaves behind: checkpoints, pictures, lines and tables, and what the trackers get.

Of several processes one has a tracker and writes; all call the same methods.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from dataset import ChangeDataset
from metrics import SCORE_NAMES, Confusion, ScoreHistogram, SemanticConfusion
from model import load_model
from pairs.synthetic.sample_set import SAMPLE_LABEL
from runtime.checkpoint import save_checkpoint
from runtime.distributed import wait_for_all
from runtime.errors import UserError
from runtime.tracking import Tracker, without_secrets
from visualize import plot_confusion, plot_predictions, plot_transitions, save_figure

PICTURE = "validation_predictions.png"


class Recorder:
    """Writes into a run's folder and to its trackers.

    Args:
        run_dir: the run's folder.
        tracker: of the run, closed with this; None in a process that writes nothing.
        about: what every checkpoint says beside its states.
        val_set: is drawn from.
        picture: where a copy of the newest validation grid goes.
        is_sample: marks tables and pictures as synthetic.
    """

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker | None,
        *,
        about: Mapping[str, Any],
        val_set: ChangeDataset,
        picture: Path,
        is_sample: bool,
    ) -> None:
        self.run_dir = run_dir
        self.tracker = tracker
        self.about = about
        self.val_set = val_set
        self.picture = picture
        self.is_sample = is_sample
        self.not_drawn: set[Path] = set()  # of which it was said

    def __enter__(self) -> "Recorder":
        if self.tracker:
            self.tracker.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.tracker:
            self.tracker.__exit__(kind, error, traceback)

    def save(self, file: str, parts: Mapping[str, Any], best: Mapping[str, Any]) -> Path:
        """Write the states of `parts` as a checkpoint; with an optimizer, keep the one before.

        It is whole on the disk before any process goes on.
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        path = self.run_dir / file
        if self.tracker:
            mlflow_run_id = self.tracker.mlflow_run_id
            content = {**self.about, **states, "best": dict(best), "mlflow_run_id": mlflow_run_id}
            save_checkpoint(path, content, keep_previous="optimizer" in parts)
        wait_for_all()
        return path

    def log_datasets(
        self, name: str, *, digest: str, source: str, num_pairs: Mapping[str, int]
    ) -> None:
        """Name the data of the run, as `Tracker.log_datasets`."""
        if self.tracker:
            self.tracker.log_datasets(name, digest=digest, source=source, num_pairs=num_pairs)

    def draw(self, model: nn.Module, epoch: int, change_iou: float) -> None:
        """Draw predictions on the validation split."""
        if not self.tracker:
            return
        title = f"epoch {epoch}: change IoU {change_iou:.3f} on val"
        title = f"{SAMPLE_LABEL}, {title}" if self.is_sample else title
        device = next(model.parameters()).device
        figure = plot_predictions(model, self.val_set, device, path=None, title=title)
        self.tracker.log_figure(Path(PICTURE).stem, figure, epoch)
        for path in (self.run_dir / PICTURE, self.picture):
            self._save(figure, path)

    def draw_matrix(self, confusion: Confusion, epoch: int) -> None:
        """Draw who was taken for whom; of two classes, the scores say it all."""
        if not self.tracker or len(confusion.matrix) == 2:
            return
        figures = {"confusion_matrix": plot_confusion(confusion.matrix.cpu(), confusion.names)}
        if isinstance(confusion, SemanticConfusion):
            figures["transitions"] = plot_transitions(confusion.transitions.cpu(), confusion.names)
        for name, figure in figures.items():
            self.tracker.log_figure(name, figure, epoch)
            self._save(figure, self.run_dir / f"{name}.png")

    def log_epoch(
        self,
        epoch: int,
        on_train: Mapping[str, float],
        on_val: Mapping[str, float],
        histogram: ScoreHistogram,
        **more: float,
    ) -> None:
        """Give the trackers one epoch's losses and scores."""
        if not self.tracker:
            return
        scores = {f"train/{key}": value for key, value in on_train.items()}
        scores |= {f"val/{key}": value for key, value in on_val.items()}
        self.tracker.log({**scores, **more}, epoch)
        self.tracker.log_pr_curve("val/precision_recall", histogram.counts, epoch)

    def finish(self, device: torch.device, best: Mapping[str, Any], last_epoch: int) -> None:
        """Draw the best epoch, and hand it with its scores to the trackers."""
        if not self.tracker:
            return
        model = load_model(self.run_dir / "best.pt", device)
        self.draw(model, int(best["epoch"]), best["change_iou"])
        self.tracker.log_summary({k: v for k, v in best.items() if k != "epoch"}, last_epoch)
        self.tracker.log_artifact(self.run_dir / "best.pt")
        self.tracker.log_model(model)

    def _save(self, figure: Figure, path: Path) -> None:
        try:
            save_figure(figure, path)
        except OSError as error:  # a picture is no reason to lose a run
            if path not in self.not_drawn:
                print(f"warning: {path}: not drawn ({error.strerror})")
            self.not_drawn.add(path)

    def summary(self, best: Mapping[str, Any], store: Path) -> str:
        """Return the table at the end of a run; `store` is the folder of mlflow.db."""
        lines = [f"\nbest epoch {best['epoch']:.0f}, whole validation split, threshold 0.5"]
        lines += [
            f"  {name:38} {best[key]:.4f}" for key, name in SCORE_NAMES.items() if key in best
        ]
        lines += [
            f"  {'IoU of ' + key.removeprefix('iou/'):38} "
            + (f"{score:.4f}" if math.isfinite(score) else "no such pixels")
            for key, score in best.items()
            if key.startswith("iou/")
        ]
        if self.is_sample:
            lines.append(f"  {SAMPLE_LABEL}: these are not LEVIR-CD results")
        lines += [
            f"encoder     {self.about['weights']}",
            f"checkpoint  {self.run_dir / 'best.pt'}",
            f"picture     {self.picture}",
            f"curves      tensorboard --logdir {self.run_dir.parent}",
        ]
        if self.about["config"]["mlflow"] and (server := os.environ.get("MLFLOW_TRACKING_URI")):
            lines.append(f"MLflow      {without_secrets(server)}")
        elif self.about["config"]["mlflow"]:
            database = f"sqlite:///{store / 'mlflow.db'}"
            lines += [
                f"MLflow      mlflow ui --workers 1 --backend-store-uri {database}",
                "            http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning",
            ]
        return "\n".join(lines)


class SaveEvery:
    """When to save within an epoch: after so much time, or so many updates, since the last save.

    Args:
        text: "90s", "10m", "1h", or a number of updates: "500".

    Raises:
        UserError: it is neither.
    """

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\d+)([smh]?)", text)
        if not found or not int(found[1]):
            raise UserError(
                f"--save-every {text}: give a time, such as 90s, 10m or 1h, or a number of "
                "updates, such as 500"
            )
        unit = {"s": 1, "m": 60, "h": 3600}.get(found[2], 0)
        self.seconds = int(found[1]) * unit if unit else float("inf")
        self.updates = float("inf") if unit else int(found[1])
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.monotonic()
        self._updates = 0

    def after_update(self) -> bool:
        """Count an update and tell whether it is time to save."""
        self._updates += 1
        return self._updates >= self.updates or time.monotonic() - self._since >= self.seconds
