"""The model with all that changes it, and an epoch of its training under a progress bar."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from dataset import PairLoader
from model import SiameseUNet
from runtime.devices import Precision
from runtime.distributed import rank
from training.engine import Progress, train_one_epoch


@dataclass(frozen=True)
class Learner:
    """The model and all that changes it; `in_training` is what to call then."""

    model: SiameseUNet
    in_training: nn.Module
    model_kwargs: dict[str, Any]
    weights: str  # that the encoder began with, in words
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    precision: Precision
    progress: Progress

    def parts(self) -> dict[str, Any]:
        """Return what a run needs to go on, by the names in a checkpoint."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.precision.scaler,
            "progress": self.progress,
        }


def learn_epoch(
    learner: Learner,
    loader: PairLoader,
    *,
    title: str,
    batch_size: int,
    accumulate: int,
    clip_norm: float,
    after_update: Callable[[], None],
) -> tuple[dict[str, float], float, float]:
    """Train on what is left of an epoch, under a progress bar.

    Args:
        learner: stands somewhere in the epoch.
        loader: of the training split.
        title: of the bar.
        batch_size: pairs in a batch, of all processes together.
        accumulate: batches per update.
        clip_norm: limit of the gradient's norm; 0 is none.
        after_update: see `engine.train_one_epoch`.

    Returns:
        Loss and scores, pairs per second, and the share of the time that went waiting for data.
    """
    progress, num_batches = learner.progress, len(loader)
    start, waited = time.perf_counter(), loader.waited
    in_batch = min(batch_size, len(loader.dataset))
    num_pairs = (num_batches - progress.batch) * in_batch
    sampler: Any = loader.batch_sampler
    sampler.set_epoch(progress.epoch, first_batch=progress.batch)
    with tqdm(
        total=num_batches,
        initial=progress.batch,
        desc=title,
        unit="batch",
        leave=False,
        disable=True if rank() else None,  # where nobody watches
    ) as bar:

        def look(progress: Progress) -> None:
            if bar.update(progress.batch - bar.n):  # when it was drawn anew, not each step
                bar.set_postfix(loss=f"{progress.mean_loss():.3f}", refresh=False)
            after_update()

        scores = train_one_epoch(
            learner.in_training,
            learner.criterion,
            loader,
            learner.optimizer,
            learner.scheduler,
            progress,
            precision=learner.precision,
            num_batches=num_batches,
            batch_size=in_batch,
            accumulate=accumulate,
            clip_norm=clip_norm,
            after_update=look,
        )
    seconds = time.perf_counter() - start
    return scores, num_pairs / seconds, (loader.waited - waited) / seconds
