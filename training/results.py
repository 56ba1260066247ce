"""What a person looks at: pictures every few epochs, at the end the best one and its scores."""

import math
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from metrics import SCORE_NAMES, Confusion, ScoreHistogram, SemanticConfusion
from model import count_parameters, load_model
from pairs.synthetic.sample_set import SAMPLE_LABEL
from runtime.devices import describe
from runtime.distributed import rank, world_size
from runtime.errors import counted, without_secrets
from runtime.figures import save_figure
from runtime.files import whole_file
from runtime.progress import duration
from runtime.tracking import Tracker
from training.engine import Learner
from training.run import Run
from training.splits import Data
from visualize import (
    pick_samples,
    plot_confusion,
    plot_transitions,
    predict_samples,
    prediction_grid,
)

PICTURE = "validation_predictions.png"
SAMPLES = 10
FEW_UPDATES = 200  # the sample set needs some 1,000 (EXPERIMENTS.md)
STRIP = 3  # samples in the picture of the trackers, which they show a few hundred pixels wide


def describe_run(run: Run, learner: Learner, data: Data) -> str:
    """Return the lines that stand before the first epoch."""
    learning, total = count_parameters(learner.model)
    dtype = learner.step.precision.dtype or torch.float32
    processes = f", each of {world_size()} processes" if world_size() > 1 else ""
    updates = -(-len(data.train) // run.config.accumulate) * run.config.epochs
    size = f", images at {run.config.upsample} times their size" if run.config.upsample > 1 else ""
    few = (
        f"\nwarning: {counted(updates, 'update')} in all, which are few; smaller crops and batches "
        "or more --epochs make more, --init RUN starts from a trained model"
        if updates < FEW_UPDATES
        else ""
    )
    return (
        f"model   {run.config.backbone}, {run.config.fusion}{size}: {learning / 1e6:.1f} M of "
        f"{total / 1e6:.1f} M parameters learn; weights: {learner.weights}\n"
        f"device  {describe(learner.progress.device)}, {str(dtype).removeprefix('torch.')}, "
        f"{counted(data.train.num_workers, 'worker')}{processes}\n"
        f"run     {run.folder}{few}"
    )


class Results:
    """Draws and prints what a run has reached; does nothing but on rank 0.

    Args:
        run: whose folder the pictures go to.
        tracker: of the run.
        data: whose validation split is drawn.
        images: folder for a copy of the newest validation picture.
    """

    def __init__(self, run: Run, tracker: Tracker, data: Data, images: Path) -> None:
        self.run = run
        self.tracker = tracker
        self.data = data
        self.copy = images / PICTURE
        self.not_written: set[Path] = set()  # of which it was said

    def print_epoch(
        self,
        epoch: int,
        on_train: Mapping[str, float],
        on_val: Mapping[str, float],
        *,
        pairs_per_second: float,
        data_wait_share: float,
        seconds_left: float,
    ) -> None:
        """Print one epoch's line, and how long the run will go on."""
        headline, last = self.run.headline, self.run.config.epochs
        name = headline.replace("_", " ").replace("iou", "IoU")
        score = f"{name} {on_val[headline]:.3f}  " if headline != "change_iou" else ""
        print(
            f"epoch {epoch:3}/{last}  loss {on_train['loss']:.3f}  "
            f"val: loss {on_val['loss']:.3f}  change IoU {on_val['change_iou']:.3f}  "
            f"change Dice {on_val['change_dice']:.3f}  mean Dice {on_val['mean_dice']:.3f}  "
            f"{score}{pairs_per_second:.1f} pairs/s, {data_wait_share:.0%} waiting for data"
            f"{f', {duration(seconds_left)} left' if epoch < last else ''}"
            f"{'  best' if self.run.is_best(on_val) else ''}",
            flush=True,
        )

    def log_epoch(
        self,
        epoch: int,
        on_train: Mapping[str, float],
        on_val: Mapping[str, float],
        histogram: ScoreHistogram,
        **more: float,
    ) -> None:
        """Give the trackers one epoch's losses and scores."""
        scores = {f"train/{key}": value for key, value in on_train.items()}
        scores |= {f"val/{key}": value for key, value in on_val.items()}
        self.tracker.log({**scores, **more}, epoch)
        self.tracker.log_pr_curve("val/precision_recall", histogram.counts, epoch)

    def draw(self, model: nn.Module, epoch: int, change_iou: float) -> None:
        """Draw predictions on the validation split."""
        if rank() > 0:
            return
        title = f"epoch {epoch}: change IoU {change_iou:.3f} on val"
        title = f"{SAMPLE_LABEL}, {title}" if self.data.is_sample else title
        val_set = self.data.val.dataset
        samples = [val_set[i] for i in pick_samples(val_set, SAMPLES)]
        predicted = predict_samples(model, samples, next(model.parameters()).device)
        encoding = val_set.source.encoding
        strip = prediction_grid(samples[:STRIP], predicted[:STRIP], encoding, title=title)
        self.tracker.log_figure(Path(PICTURE).stem, strip, epoch)
        figure = prediction_grid(samples, predicted, encoding, title=title)
        picture = self.run.folder / PICTURE
        if self._save(figure, picture):
            self._copy(picture, self.copy)

    def draw_matrix(self, confusion: Confusion, epoch: int) -> None:
        """Draw who was taken for whom; of two classes, the scores say it all."""
        if rank() > 0 or len(confusion.matrix) == 2:
            return
        figures = {"confusion_matrix": plot_confusion(confusion.matrix.cpu(), confusion.names)}
        if isinstance(confusion, SemanticConfusion):
            figures["transitions"] = plot_transitions(confusion.transitions.cpu(), confusion.names)
        for name, figure in figures.items():
            self.tracker.log_figure(name, figure, epoch)
            self._save(figure, self.run.folder / f"{name}.png")

    def finish(self, learner: Learner) -> None:
        """Draw the best epoch, and hand it with its scores to the trackers."""
        if rank() > 0:
            return
        best, best_file = self.run.best, self.run.folder / "best.pt"
        model = load_model(best_file, learner.progress.device)
        self.draw(model, int(best["epoch"]), best["change_iou"])
        scores = {name: value for name, value in best.items() if name != "epoch"}
        self.tracker.log_summary(scores, learner.progress.epoch)
        self.tracker.log_artifact(best_file)
        if self.run.config.keep == "all":
            self.tracker.log_model(model)

    def summary(self, store: Path) -> str:
        """Return the table at the end of a run; `store` is the folder of mlflow.db."""
        best, run = self.run.best, self.run
        lines = [f"\nbest epoch {best['epoch']:.0f}, whole validation split, threshold 0.5"]
        if not run.val_has_change:
            lines.append(
                "  val holds no change: this epoch has the lowest loss, and no score counts"
            )
        lines += [
            f"  {name:38} {best[key]:.4f}" for key, name in SCORE_NAMES.items() if key in best
        ]
        lines += [
            f"  {'IoU of ' + key.removeprefix('iou/'):38} "
            + (f"{score:.4f}" if math.isfinite(score) else "no such pixels")
            for key, score in best.items()
            if key.startswith("iou/")
        ]
        if self.data.is_sample:
            lines.append(f"  {SAMPLE_LABEL}: these are not LEVIR-CD results")
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        lines += [
            f"encoder     {run.weights}",
            f"checkpoint  {run.folder / 'best.pt'}",
            f"picture     {self.copy}",
            f"disk        {sum(p.stat().st_size for p in files) / 1e6:.0f} MB in {run.folder}",
            f"curves      tensorboard --logdir {shlex.quote(str(run.folder.parent))}",
        ]
        if run.config.mlflow:
            lines += _mlflow_lines(store)
        return "\n".join(lines)

    def _save(self, figure: Figure, path: Path) -> bool:
        try:
            save_figure(figure, path)
        except OSError as error:  # a picture is no reason to lose a run
            self._warn(path, error)
            return False
        return True

    def _copy(self, picture: Path, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as beside:
                shutil.copyfile(picture, beside)
        except OSError as error:
            self._warn(path, error)

    def _warn(self, path: Path, error: OSError) -> None:
        if path not in self.not_written:
            print(f"warning: {path}: not drawn ({error.strerror})")
        self.not_written.add(path)


def _mlflow_lines(store: Path) -> list[str]:
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return [f"MLflow      {without_secrets(server)}"]
    # from within the folder, for an address cannot hold every path
    return [
        f"MLflow      cd {shlex.quote(str(store))} && "
        "mlflow ui --workers 1 --backend-store-uri sqlite:///mlflow.db",
        "            http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=best",
    ]
