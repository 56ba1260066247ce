"""One confusion matrix over a split and every score from it; one histogram and the PR curve.

    Confusion    (C, C) int64, rows = truth, columns = prediction, C = max(K, 2) classes
    SemanticConfusion    the same over labels 0 to K with both dates stacked, C = K + 1
    ScoreHistogram    (2, 256) int64, unchanged and changed pixels by predicted probability

    task        logits              target          classes predicted
    change      (B, K, H, W)        (B, H, W)       (B, H, W), 0 = no change
    semantic    (B, 1 + 2K, H, W)   (B, 2, H, W)    (B, 2, H, W), 0 = unchanged, 1 to K, per date

Both add up over batches and processes, stay on the device and leave it once, when read. Scores
are never means of per-batch scores: those depend on the batch size, and reward predicting nothing.
Dice and F1 of a class are the same number; IoU = Dice / (2 - Dice).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pairs.images import IGNORE
from runtime.errors import UserError


def split_semantic(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take (B, 1 + 2K, H, W) apart: change (B, 1, H, W), classes before and after (B, K, H, W)."""
    num_classes = (logits.shape[1] - 1) // 2
    change, before, after = logits.split([1, num_classes, num_classes], dim=1)
    return change, before, after


def predict_classes(logits: Tensor, threshold: float = 0.5, *, task: str = "change") -> Tensor:
    """Turn logits into class indices, as the module's table has it: sigmoid > threshold, or argmax.

    Of semantic change, the classes of both dates are given where the change is above the threshold.
    """
    if task == "semantic":
        change, before, after = split_semantic(logits)
        classes = torch.stack([before.argmax(1), after.argmax(1)], dim=1) + 1
        return classes * (change.float().sigmoid() > threshold)
    if logits.shape[1] == 1:
        return (logits.squeeze(1).float().sigmoid() > threshold).long()
    return logits.argmax(1)


def change_probability(logits: Tensor, *, task: str = "change") -> Tensor:
    """Turn logits into the probability of any change (B, H, W), float32."""
    if task == "semantic" or logits.shape[1] == 1:
        return logits[:, 0].float().sigmoid()
    return 1 - logits.float().softmax(1)[:, 0]


def check_logits(logits: Tensor) -> None:
    """Raise UserError if a model computes what is no number; the device is waited for."""
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite; its weights are broken, or --amp off may help"
        )


class Confusion:
    """Counts of (truth, prediction) over all pixels that are not ignored.

    Args:
        num_classes: K of the logits; 1 counts two classes, no change and change.
        device: where the batches are; no step waits for it.
        names: of the classes, class 0 first; with more than two, each has scores under its name.

    Attributes:
        task: of the logits, see the module's table.
        headline: the score that a checkpoint is chosen by.
        counts: (tables, C, C) int64, all that was counted; `matrix` is its first table.
    """

    task = "change"
    num_tables = 1

    def __init__(
        self,
        num_classes: int,
        device: torch.device | str = "cpu",
        names: Sequence[str] | None = None,
    ) -> None:
        self.classes = torch.arange(self.count_classes(num_classes), device=device)
        self.names = tuple(names or map(str, range(len(self.classes))))
        self.headline = "change_iou" if len(self.classes) == 2 else "mean_iou_of_change"
        shape = (self.num_tables, len(self.classes), len(self.classes))
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

    @property
    def matrix(self) -> Tensor:
        """(C, C) int64, rows = truth, columns = prediction."""
        return self.counts[0]

    @staticmethod
    def count_classes(num_classes: int) -> int:
        """Return C for K of the logits."""
        return max(num_classes, 2)

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch of logits and its target, 255 = ignore."""
        self.add(predict_classes(logits, task=self.task), target)

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of class indices and its target, of the same shape, 255 = ignore."""
        self.matrix.add_(self._count(prediction, target))

    def _count(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Count pairs of classes, (C, C) int64; the ignore value matches no class.

        A product of one-hot maps counts without `bincount`, which would make CUDA wait; sums of
        fewer than 2^24 ones are exact in float32.
        """
        classes = self.classes.view(1, -1, 1)
        truth = (target.flatten(1).unsqueeze(1) == classes).float()  # (B, C, H * W)
        claim = (prediction.flatten(1).unsqueeze(1) == classes).float()
        with torch.autocast(target.device.type, enabled=False):
            return torch.bmm(truth, claim.mT).sum(0).long()

    def scores(self) -> dict[str, float]:
        """Return every score.

        Those of change come first: with K > 2, "change" is every class but 0. Where there is none
        and none is predicted, they are 1; a precision without claims is 0 if something was missed,
        a recall without change likewise. With more than two classes, those of each class follow,
        and the mean IoU without class 0. A class that is neither there nor predicted has NaN, and
        is left out of means (as in mmsegmentation).
        """
        matrix = self.matrix.cpu().double()
        binary = torch.stack(
            [
                torch.stack([matrix[0, 0], matrix[0, 1:].sum()]),
                torch.stack([matrix[1:, 0].sum(), matrix[1:, 1:].sum()]),
            ]
        )
        (_, false_alarm), (missed, hit) = binary.tolist()
        return {
            "change_iou": _ratio(hit, hit + false_alarm + missed),
            "change_dice": _ratio(2 * hit, 2 * hit + false_alarm + missed),
            "change_precision": _ratio(hit, hit + false_alarm, otherwise=float(not missed)),
            "change_recall": _ratio(hit, hit + missed, otherwise=float(not false_alarm)),
            "mean_dice": _mean(_dice(matrix)),
            "mean_iou": _mean(_iou(matrix)),
            "accuracy": _ratio(matrix.diag().sum().item(), matrix.sum().item()),
            **(self._of_each_class(matrix) if len(matrix) > 2 else {}),
        }

    def _of_each_class(self, matrix: Tensor) -> dict[str, float]:
        ious, dices = _iou(matrix), _dice(matrix)
        scores = {"mean_iou_of_change": _mean(ious[1:])}
        hits, truth, claims = matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
        for k, name in enumerate(self.names):
            scores |= {
                f"iou/{name}": ious[k],
                f"dice/{name}": dices[k],
                f"precision/{name}": _ratio(hits[k], claims[k], 0.0 if truth[k] else math.nan),
                f"recall/{name}": _ratio(hits[k], truth[k], 0.0 if claims[k] else math.nan),
            }
        return scores


class SemanticConfusion(Confusion):
    """Of from-to change: labels 0 (unchanged) to K over both dates, and the transitions.

    Args:
        num_classes: K, of land cover.
        device: where the batches are.
        names: "unchanged" and the K classes.

    """

    task = "semantic"
    num_tables = 4

    def __init__(
        self,
        num_classes: int,
        device: torch.device | str = "cpu",
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_classes, device, names)
        self.headline = "scd_score"

    @property
    def transitions(self) -> Tensor:
        """(3, C, C) int64, pixels by class before (rows) and after.

        In truth, predicted, and predicted rightly at both dates.
        """
        return self.counts[1:]

    @staticmethod
    def count_classes(num_classes: int) -> int:
        """Return K + 1."""
        return num_classes + 1

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of class indices (B, 2, H, W) and its target of the same shape."""
        super().add(prediction, target)
        valid = (target != IGNORE).all(1)
        claimed = torch.where(valid.unsqueeze(1), prediction, IGNORE)
        right = torch.where((prediction == target).all(1).unsqueeze(1), target, IGNORE)
        for table, dates in zip(self.transitions, (target, claimed, right), strict=True):
            table.add_(self._count(dates[:, 1], dates[:, 0]))

    def scores(self) -> dict[str, float]:
        """Return the scores of change and of each class, and those of semantic change.

        H is the matrix over labels 0 to K with both dates stacked (as SECOND's, arXiv:2010.05687):

            miou_change    mean IoU of its collapse to 2 x 2
            sek            kappa of H with H[0, 0] = 0, times exp(IoU of change - 1)
            scd_score      0.3 miou_change + 0.7 sek
            f_scd          F1 of changed pixels whose class is right
        """
        scores = super().scores()
        matrix = self.matrix.cpu().double()
        total, unchanged = matrix.sum().item(), matrix[0, 0].item()
        changed = matrix[1:, 1:]
        either = matrix[0].sum().item() + matrix[:, 0].sum().item() - unchanged
        miou = (_ratio(unchanged, either) + scores["change_iou"]) / 2
        without = matrix.clone()
        without[0, 0] = 0
        sek = _kappa(without) * math.exp(scores["change_iou"] - 1)
        hits = changed.diag().sum().item()
        claims, truth = total - matrix[:, 0].sum().item(), total - matrix[0].sum().item()
        return {
            "scd_score": 0.3 * miou + 0.7 * sek,
            "sek": sek,
            "f_scd": _ratio(2 * hits, claims + truth),
            "miou_change": miou,
            **scores,
        }


def build_confusion(
    task: str,
    num_classes: int,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
) -> Confusion:
    """Return an empty confusion matrix for a task."""
    kind = SemanticConfusion if task == "semantic" else Confusion
    return kind(num_classes, device, names)


# What each score is, in words that nobody can mix up; the order of the table at a run's end.
SCORE_NAMES = {
    "change_iou": "IoU of the change class",
    "change_dice": "Dice (= F1) of the change class",
    "change_precision": "precision of the change class",
    "change_recall": "recall of the change class",
    "mean_dice": "Dice, mean over all classes",
    "mean_iou": "IoU, mean over all classes",
    "accuracy": "overall accuracy (share of pixels)",
    "mean_iou_of_change": "IoU, mean over the classes of change",
    "scd_score": "semantic change: 0.3 mIoU + 0.7 SeK",
    "sek": "semantic change: separated kappa, SeK",
    "f_scd": "semantic change: F1 of place and class",
    "miou_change": "semantic change: mIoU of changed or not",
}


class ScoreHistogram:
    """Unchanged (row 0) and changed (row 1) pixels per bin of predicted change probability."""

    def __init__(self, device: torch.device | str = "cpu", num_bins: int = 256) -> None:
        self.num_bins = num_bins
        self.counts = torch.zeros(2, num_bins, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, *, task: str = "change") -> None:
        """Add a batch of logits and its target, 255 = ignore."""
        if task == "semantic":
            target = target[:, 0]
        probability = change_probability(logits, task=task)
        # what is not a number counts as unchanged, as it is not above a threshold
        bins = (probability.nan_to_num() * self.num_bins).long().clamp(max=self.num_bins - 1)
        valid = target != IGNORE
        slot = (target[valid] > 0) * self.num_bins + bins[valid]
        self.counts += torch.bincount(slot, minlength=2 * self.num_bins).view(2, -1)

    def precision_recall(self) -> tuple[Tensor, Tensor]:
        """Return precision and recall, each (num_bins,), at the thresholds i / num_bins."""
        claimed = self.counts.cpu().double().flip(1).cumsum(1).flip(1)  # at or above each threshold
        precision = claimed[1] / claimed.sum(0).clamp(min=1)
        return precision, claimed[1] / claimed[1, :1].clamp(min=1)


def _ratio(part: float, whole: float, otherwise: float = 1.0) -> float:
    return part / whole if whole else otherwise


def _dice(matrix: Tensor) -> list[float]:
    sizes = matrix.sum(0) + matrix.sum(1)
    return [2 * h / s if s else math.nan for h, s in _pairs(matrix.diag(), sizes)]


def _iou(matrix: Tensor) -> list[float]:
    unions = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return [h / u if u else math.nan for h, u in _pairs(matrix.diag(), unions)]


def _pairs(first: Tensor, second: Tensor) -> Iterator[tuple[float, float]]:
    return zip(first.tolist(), second.tolist(), strict=True)


def _kappa(matrix: Tensor) -> float:
    """Return Cohen's kappa; 0 where chance alone explains everything, or nothing was counted."""
    total = matrix.sum().item()
    if not total:
        return 0.0
    by_chance = (matrix.sum(0) * matrix.sum(1)).sum().item() / total**2
    return _ratio(matrix.diag().sum().item() / total - by_chance, 1 - by_chance, otherwise=0.0)


def _mean(values: list[float]) -> float:
    """Return the mean over the classes that there are, 1 if there are none."""
    there = [value for value in values if not math.isnan(value)]
    return _ratio(sum(there), len(there))
