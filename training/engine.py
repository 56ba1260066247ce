"""What learns, an epoch of training, a pass of evaluation.

One path for float32, bfloat16 and float16, for one process and many. On a GPU no step waits for the
device, but for float16's scale: a step that is not finite is skipped there, and every `CHECK_EVERY`
updates looked for. AdamW, arXiv:1711.05101; cosine schedule, arXiv:1608.03983.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dataset import PairLoader
from metrics import Confusion, ScoreHistogram
from model import SiameseUNet, build_model
from runtime.checkpoint import read_checkpoint, restore, short
from runtime.devices import Precision
from runtime.distributed import all_reduce_, no_sync, rank, summand, world_size
from runtime.errors import DivergedError, UserError
from runtime.options import find_model
from runtime.progress import Bar, duration
from training.step import Batch, Step

CHECK_EVERY = 32


class Progress:
    """Where a run stands: enough, beside the weights, to go on in the middle of an epoch.

    Attributes:
        epoch: counted from 0.
        batch: batches done in this epoch.
        loss_sum: sum of their losses in this process, a scalar on the device; the mean over the
            processes is that of the whole batches.
        confusion: of the predictions in this process; its device is the run's.
        num_bad: updates skipped because they were not finite, a scalar on the device.
    """

    def __init__(self, confusion: Confusion) -> None:
        self.confusion = confusion
        self.device = confusion.counts.device
        self.start(0)

    def start(self, epoch: int) -> None:
        """Stand before the first batch of an epoch."""
        self.epoch = epoch
        self.batch = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.confusion.reset()
        self.num_bad = torch.zeros((), device=self.device)

    def mean_loss(self) -> float:
        """Leave the device for the mean loss, in this process, of the epoch so far."""
        return self.loss_sum.item() / max(self.batch, 1)

    def summary(self) -> dict[str, float]:
        """Leave the device once: the mean loss and every score of the epoch so far."""
        whole = self._of_all_processes()
        return {"loss": whole.mean_loss(), **whole.confusion.scores()}

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, as torch's own objects do; all processes have to call."""
        whole = self._of_all_processes()
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "loss_sum": whole.loss_sum,
            "confusion": whole.confusion.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken."""
        for name in ("epoch", "batch"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"{name} is {state[name]!r}")
        self.start(state["epoch"])
        self.batch = state["batch"]
        self.loss_sum.copy_(state["loss_sum"])
        self.confusion.counts.copy_(summand(state["confusion"]))

    def _of_all_processes(self) -> "Progress":
        whole = copy.deepcopy(self)
        all_reduce_(whole.loss_sum, whole.confusion.counts)
        whole.loss_sum /= world_size()
        return whole


def train_one_epoch(
    step: Step,
    loader: Iterable[Batch],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    progress: Progress,
    *,
    num_batches: int,
    batch_size: int | None = None,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    after_update: Callable[[Progress], None] = lambda _: None,
) -> dict[str, float]:
    """Train on what is left of the epoch that `progress` stands in.

    Args:
        step: what is computed of a batch, with the model, the criterion and the precision.
        loader: the batches from `progress.batch` on.
        optimizer: fused; steps once per `accumulate` batches, or fewer at the epoch's end.
        scheduler: steps with the optimizer, and not when float16's scaler skipped a step.
        progress: updated in place.
        num_batches: batches of the whole epoch.
        batch_size: pairs in a batch, of all processes together, for these may have unequal parts.
        accumulate: batches per update.
        clip_norm: largest norm of the gradient; 0: no limit.
        after_update: called where the state of the run is whole; may draw, save, or raise.

    Returns:
        The mean loss and the scores of the whole epoch, of the weights as they were at each step.

    Raises:
        DivergedError: the loss or its gradient is not finite; that step was not applied.
    """
    device = progress.device
    step.model.train()
    for batch in loader:
        before, after, target = _on(device, batch)
        group_start = progress.batch - progress.batch % accumulate
        group_size = min(accumulate, num_batches - group_start)
        is_update = progress.batch + 1 - group_start == group_size
        weight = len(target) * world_size() / batch_size if batch_size else 1.0
        with nullcontext() if is_update else no_sync(step.model):
            logits, loss = step((before, after, target), weight, group_size)
        progress.loss_sum += loss
        progress.confusion.update(logits, target)
        progress.batch += 1
        if is_update:
            _update(optimizer, scheduler, step.precision.scaler, clip_norm, progress)
            optimizer.zero_grad(set_to_none=not step.keeps_gradients)
            if device.type == "cpu" or -(-progress.batch // accumulate) % CHECK_EVERY == 0:
                check_finite(progress)
            after_update(progress)
    check_finite(progress)
    return progress.summary()


def _on(device: torch.device, batch: Batch) -> Iterator[Tensor]:
    return (tensor.to(device, non_blocking=True) for tensor in batch)


def _update(
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
    progress: Progress,
) -> None:
    """Clip, step, schedule; a step that is not finite leaves the weights as they are."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm or float("inf"))
    if scaler.is_enabled():
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        rescaled = scaler.get_scale()
        if rescaled >= scale:  # a lower scale means that an overflow was skipped
            scheduler.step()
        elif rescaled < 1:  # no scale helps: the gradients themselves are not finite
            progress.num_bad += 1
    else:
        # What GradScaler does for float16: a fused optimizer skips the step by itself, on its
        # device, where `found_inf` is 1.
        bad = (~torch.isfinite(norm)).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        progress.num_bad += bad
        scheduler.step()


def check_finite(progress: Progress) -> None:
    """Raise DivergedError if a step of this epoch was not finite."""
    if progress.num_bad > 0 or not torch.isfinite(progress.loss_sum):
        raise DivergedError(
            f"epoch {progress.epoch + 1}, about batch {progress.batch}: the loss or its gradient "
            f"is not finite (sum of losses {progress.loss_sum.item()}); the bad step was not "
            "applied. Try a lower --lr, a smaller --clip-grad, or --amp off"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable[Batch],
    *,
    confusion: Confusion,
    precision: Precision,
) -> tuple[dict[str, float], ScoreHistogram]:
    """Score a split: the mean loss and the scores over all its pixels, and the histogram.

    Of several processes each passes its share of the split, and gets the scores of the whole.

    The loss is the mean over patches, so that a short last batch weighs no more than it should.

    Args:
        model: `(before, after) -> logits`.
        criterion: `(logits, target) -> scalar`.
        loader: yields batches.
        confusion: is emptied, then filled; its device is the model's.
        precision: precision of the forward pass.

    Raises:
        DivergedError: the loss is not finite.
    """
    model.eval()
    confusion.reset()
    device = confusion.counts.device
    histogram = ScoreHistogram(device)
    loss_sum = torch.zeros((), device=device)
    num_patches = torch.zeros((), dtype=torch.int64, device=device)
    for batch in loader:
        before, after, target = _on(device, batch)
        with precision.autocast(device):
            logits = model(before, after)
            loss = criterion(logits, target)
        loss_sum += loss * len(target)
        num_patches += len(target)
        confusion.update(logits, target)
        histogram.update(logits, target, task=confusion.task)
    all_reduce_(loss_sum, num_patches, confusion.counts, histogram.counts)
    mean_loss = loss_sum.item() / max(int(num_patches), 1)
    if not math.isfinite(mean_loss):
        raise DivergedError(
            f"the mean loss over the validation split is {mean_loss}, though that of training was "
            "finite; the last checkpoint is kept. Try a lower --lr, or --amp off"
        )
    return {"loss": mean_loss, **confusion.scores()}, histogram


@dataclass(frozen=True)
class Learner:
    """The model and all that changes it; in training `step` calls it, in DDP's hands if need be."""

    model: SiameseUNet
    step: Step
    model_kwargs: dict[str, Any]
    weights: str  # that the encoder began with, in words
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    batch_size: int  # pairs in a batch, of all processes together
    accumulate: int  # batches per update
    clip_norm: float  # largest norm of the gradient; 0: no limit

    def parts(self) -> dict[str, Any]:
        """Return what a run needs to go on, by the names in a checkpoint."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.step.precision.scaler,
            "progress": self.progress,
        }


def learn_epoch(
    learner: Learner,
    loader: PairLoader,
    *,
    last_epoch: int,
    after_update: Callable[[], None],
) -> tuple[dict[str, float], dict[str, float]]:
    """Train on what is left of an epoch, under a progress bar; see `train_one_epoch`.

    Args:
        learner: stands somewhere in the epoch.
        loader: the loader of the training split.
        last_epoch: number of the run's last epoch, for the time that is left.
        after_update: may save, or raise to end the run.

    Returns:
        Loss and scores; pairs per second, and the share of the time that went waiting for data.
    """
    progress, num_batches, first = learner.progress, len(loader), learner.progress.batch
    start, waited = time.perf_counter(), loader.waited
    in_batch = min(learner.batch_size, len(loader.dataset))
    sampler: Any = loader.batch_sampler
    sampler.set_epoch(progress.epoch, first_batch=first)
    title = f"epoch {progress.epoch + 1}/{last_epoch}"
    with Bar(
        total=num_batches, initial=first, desc=title, unit="batches", disable=rank() > 0
    ) as bar:

        def look(progress: Progress) -> None:
            if bar.update(progress.batch - bar.n):  # when it was drawn anew, not each step
                seconds = (time.perf_counter() - start) / (progress.batch - first)
                batches_left = num_batches * (last_epoch - progress.epoch) - progress.batch
                run = f"run {duration(seconds * batches_left)} left"
                bar.set_postfix_str(f"loss {progress.mean_loss():.3f}, {run}", refresh=False)
            after_update()

        scores = train_one_epoch(
            learner.step,
            loader,
            learner.optimizer,
            learner.scheduler,
            progress,
            num_batches=num_batches,
            batch_size=in_batch,
            accumulate=learner.accumulate,
            clip_norm=learner.clip_norm,
            after_update=look,
        )
    seconds = time.perf_counter() - start
    return scores, {
        "pairs_per_second": (num_batches - first) * in_batch / seconds,
        "data_wait_share": (loader.waited - waited) / seconds,
    }


def load_init(model: SiameseUNet, architecture: dict[str, Any], word: str) -> str:
    """Fill a model with that of another run, and return a phrase that says so.

    Args:
        model: is changed in place.
        architecture: what it was built from, as of `build_model`.
        word: names the run or checkpoint, as `find_model` has it.

    Raises:
        UserError: there is no such run, or its model is another one.
    """
    path = find_model(word)
    state = read_checkpoint(path)
    usual = build_model.__kwdefaults__ or {}  # of what an older checkpoint does not name
    for name, wanted in architecture.items():
        if (found := {**usual, **state["model_kwargs"]}.get(name)) != wanted:
            flag = name.replace("_", "-")
            raise UserError(
                f"--init {word}: its {name} is {short(found)}, this run's {wanted}; change "
                f"--{flag}, or take the encoder alone: --weights {path}"
            )
    restore({"model": model}, state, path)
    return f"the whole model of {path}"


def build_optimizer(
    model: SiameseUNet, *, lr: float, weight_decay: float, encoder_factor: float = 0.1
) -> AdamW:
    """Optimize everything that requires gradients, the encoder at `encoder_factor` of the rate.

    Fused: one kernel for all parameters, and it skips a step whose gradient is not finite.
    """
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    ours = {id(p) for p in model.encoder.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups = [{"params": rest, "lr": lr}]
    if encoder:
        groups.append({"params": encoder, "lr": lr * encoder_factor})
    return AdamW(groups, weight_decay=weight_decay, fused=True)


def warmup_cosine(optimizer: AdamW, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return the schedule, stepped once per update."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)
