import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losses import CombinedIoULoss
from metrics import Confusion
from runtime.devices import Precision
from runtime.errors import DivergedError
from training.engine import Progress, evaluate, train_one_epoch, warmup_cosine
from training.step import Step

CPU = torch.device("cpu")
Batches = list[tuple[Tensor, Tensor, Tensor]]


class Tiny(nn.Module):
    """Two convolutions without BatchNorm, so that a batch is the sum of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        x = torch.cat([before, after], dim=1).float() / 255
        return self.last(self.first(x).relu())


def batches(num: int, size: int = 2, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        before, after = torch.randint(
            0, 256, (2, size, 3, 16, 16), generator=generator, dtype=torch.uint8
        )
        mask = (after.float().mean(1) > before.float().mean(1)).to(torch.uint8)
        made.append((before, after, mask))
    return made


class Run:
    def __init__(self, *, precision: str = "off", total: int = 40, lr: float = 1e-2) -> None:
        torch.manual_seed(0)
        self.model = Tiny()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=True)
        self.scheduler = warmup_cosine(self.optimizer, warmup_steps=2, total_steps=total)
        self.precision = Precision.named(precision, CPU)
        self.progress = Progress(Confusion(1))

    def epoch(self, loader: Batches, num_batches: int | None = None, **options: Any) -> dict:
        return train_one_epoch(
            Step(self.model, CombinedIoULoss(), self.precision), iter(loader), self.optimizer,
            self.scheduler, self.progress, num_batches=num_batches or len(loader), **options,
        )  # fmt: skip

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_training_lowers_the_loss(precision: str) -> None:
    run, loader, losses = Run(precision=precision, lr=5e-2), batches(4), []
    for epoch in range(10):
        run.progress.start(epoch)
        losses.append(run.epoch(loader)["loss"])
    assert losses[-1] < 0.8 * losses[0]


def test_summary_is_of_the_whole_epoch() -> None:
    run, loader = Run(lr=1e-12), batches(3)
    summary = run.epoch(loader)
    confusion, losses = Confusion(1), []
    with torch.no_grad():
        for before, after, target in loader:
            logits = run.model(before, after)
            confusion.update(logits, target)
            losses.append(CombinedIoULoss()(logits, target).item())
    assert summary["loss"] == pytest.approx(sum(losses) / 3)
    assert summary["change_iou"] == pytest.approx(confusion.scores()["change_iou"])


def test_accumulating_two_batches_is_one_batch_of_twice_the_size() -> None:
    halves = batches(4, size=2)
    wholes = [
        tuple(torch.cat(parts) for parts in zip(*halves[i : i + 2], strict=True)) for i in (0, 2)
    ]
    in_halves, in_wholes = Run(), Run()
    in_halves.epoch(halves, accumulate=2)
    in_wholes.epoch(wholes)  # type: ignore[arg-type]
    torch.testing.assert_close(in_halves.weights(), in_wholes.weights())
    assert in_halves.scheduler.last_epoch == in_wholes.scheduler.last_epoch == 2


def test_a_short_last_group_still_updates_with_its_own_mean() -> None:
    run, alone = Run(), Run()
    updates: list[int] = []
    loader = batches(3)
    run.epoch(loader, accumulate=2, after_update=lambda p: updates.append(p.batch))
    assert updates == [2, 3]
    alone.epoch(loader[:2], accumulate=2)
    alone.progress.start(1)
    alone.epoch(loader[2:])
    torch.testing.assert_close(run.weights(), alone.weights())


def test_an_epoch_left_in_its_middle_goes_on_as_if_nothing_happened() -> None:
    loader = batches(5)
    straight, stopped = Run(), Run()
    expected = straight.epoch(loader)

    class Stop(Exception):
        pass

    def stop_after_two(progress: Progress) -> None:
        if progress.batch == 2:
            raise Stop

    with pytest.raises(Stop):
        stopped.epoch(loader, after_update=stop_after_two)
    resumed = Run()
    for name in ("model", "optimizer", "scheduler", "progress"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(stopped, name).state_dict()))
    summary = resumed.epoch(loader[2:], num_batches=5)
    assert torch.equal(resumed.weights(), straight.weights())
    assert summary == expected


@pytest.mark.fault("R5")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_not_applied(value: float) -> None:
    run, loader = Run(), batches(4)
    run.epoch(loader[:2])
    kept = run.weights()
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])

    class Poison(CombinedIoULoss):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return super().forward(logits, target) * value

    run.progress.start(1)
    with pytest.raises(DivergedError, match="epoch 2.*--lr"):
        train_one_epoch(
            Step(run.model, Poison(), run.precision), loader[2:], run.optimizer, run.scheduler,
            run.progress, num_batches=2,
        )  # fmt: skip
    assert torch.equal(run.weights(), kept)
    for number, state in run.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], moments[number]["exp_avg"])


class Overflowing(torch.amp.GradScaler):
    """A float16 scaler that skips its first step, as on an overflow."""

    def __init__(self) -> None:
        super().__init__("cpu", enabled=True)
        self.scales: Iterator[float] = iter([8.0, 4.0, 4.0, 4.0])
        self.steps = 0

    def get_scale(self) -> float:
        return next(self.scales)

    def scale(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        return outputs

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1

    def update(self, new_scale: object = None) -> None:
        pass


@pytest.mark.fault("R18")
def test_the_schedule_waits_for_a_skipped_step() -> None:
    run = Run()
    scaler = Overflowing()
    run.precision = Precision(None, scaler)
    run.optimizer.step()
    run.epoch(batches(2))
    assert scaler.steps == 2
    assert run.scheduler.last_epoch == 1


def test_clipping_bounds_the_step() -> None:
    loader = batches(1)
    norms = {}
    for clip in (0.0, 1e-3):
        run = Run()
        gradients: list[Tensor] = []
        run.optimizer.register_step_pre_hook(
            lambda o, *_, seen=gradients: seen.extend(
                p.grad.clone().flatten() for g in o.param_groups for p in g["params"]
            )
        )
        run.epoch(loader, clip_norm=clip)
        norms[clip] = torch.cat(gradients).norm().item()
    assert norms[0.0] > 1e-2
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_does_not_depend_on_the_batch_size_and_learns_nothing() -> None:
    run, loader = Run(), batches(3, size=4)
    singles: Any = [
        tuple(t[i : i + 1] for t in batch) for batch in loader for i in range(len(batch[0]))
    ]
    kept = run.weights()
    options: dict[str, Any] = {"confusion": Confusion(1), "precision": run.precision}
    at_once, _ = evaluate(run.model, CombinedIoULoss(), loader, **options)
    one_by_one, histogram = evaluate(run.model, CombinedIoULoss(), singles, **options)
    assert at_once.pop("loss") == pytest.approx(one_by_one.pop("loss"), rel=1e-5)
    assert at_once == one_by_one
    assert histogram.counts.sum() == 12 * 16 * 16
    assert torch.equal(run.weights(), kept)
    assert not run.model.training


def test_a_model_that_diverged_in_validation_is_said() -> None:
    run, loader = Run(), batches(1, size=2)
    for parameter in run.model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="validation split is nan"):
        evaluate(
            run.model, CombinedIoULoss(), loader, confusion=Confusion(1), precision=run.precision
        )
