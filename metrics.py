"""One confusion matrix over a split and every score from it; one histogram and the PR curve.

    Confusion            (C, C) int64, rows = truth, columns = prediction, C = max(K, 2) classes
    SemanticConfusion    the same over labels 0 to K with both dates stacked, C = K + 1
    ScoreHistogram       (2, N) int64, unchanged and changed pixels by predicted probability

    task        logits              target          classes predicted
    change      (B, K, H, W)        (B, H, W)       (B, H, W), 0 = no change
    semantic    (B, 1 + 2K, H, W)   (B, 2, H, W)    (B, 2, H, W), 0 = unchanged, 1 to K, per date

Both add up over batches and processes, stay on the device and leave it once, when read. Scores
are never means of per-batch scores: those depend on the batch size, and reward predicting nothing.
Dice and F1 of a class are the same number; IoU = Dice / (2 - Dice).

TP, FP and FN are pixels of change: changed and predicted, predicted alone, changed alone.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model import split_semantic
from pairs.images import IGNORE
from runtime.errors import UserError

LARGEST_PART = 2**22  # pixels of an image that are counted at once


def predict_classes(
    logits: Tensor, threshold: float | None = None, *, task: str = "change"
) -> Tensor:
    """Turn logits into class indices, as the module's table has them.

    Args:
        logits: of a batch.
        threshold: the probability above which a pixel changed; it gets the likeliest class of
            change. None is the model's own rule: 0.5, or with several classes the likeliest of all.
        task: "change" or "semantic".
    """
    if task == "semantic":
        change, before, after = split_semantic(logits)
        classes = torch.stack([_likeliest(before), _likeliest(after)], dim=1) + 1
        return classes * (change.float().sigmoid() > (0.5 if threshold is None else threshold))
    if logits.shape[1] == 1:
        return (change_probability(logits) > (0.5 if threshold is None else threshold)).long()
    if threshold is None:
        return _likeliest(logits)
    return (_likeliest(logits[:, 1:]) + 1) * (change_probability(logits) > threshold)


def _likeliest(logits: Tensor) -> Tensor:
    """Return the index of the largest of each pixel's C logits, the first if several are."""
    num_classes = logits.shape[1]
    if not logits.is_cpu or num_classes > 256:
        return logits.argmax(1)
    logits = logits.detach()
    best = logits[:, 0].clone()  # on a CPU class by class takes a thirtieth of argmax's time
    found = torch.zeros(best.shape, dtype=torch.uint8)
    for index in range(1, num_classes):
        is_more = (logits[:, index] > best).view(torch.uint8)
        torch.maximum(found, is_more.mul_(index), out=found)
        torch.maximum(best, logits[:, index], out=best)
    return found.long()


def change_probability(logits: Tensor, *, task: str = "change") -> Tensor:
    """Turn logits into the probability of any change (B, H, W), float32."""
    if task == "semantic" or logits.shape[1] == 1:
        return logits[:, 0].float().sigmoid()
    return 1 - logits.float().softmax(1)[:, 0]


def check_logits(logits: Tensor) -> None:
    """Raise UserError if a logit is not finite. The device is waited for."""
    # a sum of finite values is finite, unless they are huge; it takes a twentieth of the time
    if not torch.isfinite(logits.sum()) and not torch.isfinite(logits).all():
        raise UserError(
            "the model's output is not finite; its weights are broken, or --amp off may help"
        )


def count_on_cpu(rows: Tensor, columns: Tensor, classes: Tensor) -> Tensor:
    """Count pairs of classes, (C, C) int64, by `bincount`: a third of a product's time, or less."""
    side, truth, predicted = len(classes), rows.numpy(), columns.numpy()
    is_counted = (truth < side) & (predicted < side)
    slots = truth[is_counted].astype(np.int64) * side + predicted[is_counted]
    return torch.from_numpy(np.bincount(slots, minlength=side**2).reshape(side, side))


def count_by_product(rows: Tensor, columns: Tensor, classes: Tensor) -> Tensor:
    """Count pairs of classes, (C, C) int64, by a product of one-hot maps.

    `bincount` would make CUDA wait. Float32 adds fewer than 2^24 ones exactly, so larger images
    are counted in parts.
    """
    total = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=classes.device)
    parts = (x.flatten(1).split(LARGEST_PART, dim=1) for x in (rows, columns))
    with torch.autocast(rows.device.type, enabled=False):
        for part in zip(*parts, strict=True):  # two of (B, pixels)
            truth, predicted = ((x.unsqueeze(1) == classes.view(1, -1, 1)).float() for x in part)
            total += torch.bmm(truth, predicted.mT).long().sum(0)
    return total


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
        """Count pairs of classes, (C, C) int64; the ignore value matches no class."""
        count = count_on_cpu if target.device.type == "cpu" else count_by_product
        return count(target, prediction, self.classes)

    def has_change(self) -> bool:
        """Tell whether the truth holds change; where it holds none, no score chooses a model."""
        return bool(self.matrix[1:].any())

    def scores(self) -> dict[str, float]:
        """Return every score.

        Those of change come first, see `change_scores`. With more than two classes, those of each
        class follow, and the mean IoU without class 0. A class that is neither there nor predicted
        has NaN, and is left out of means (as in mmsegmentation).
        """
        matrix = self.matrix.cpu().double()
        of_change = change_scores(*count_change(matrix))
        return {
            **{name: value.item() for name, value in of_change.items()},
            "mean_dice": _mean(_dice(matrix)),
            "mean_iou": _mean(_iou(matrix)),
            "accuracy": _ratio(matrix.diag().sum().item(), matrix.sum().item()),
            **(self._of_each_class(matrix) if len(matrix) > 2 else {}),
        }

    def _of_each_class(self, matrix: Tensor) -> dict[str, float]:
        ious, dices = _iou(matrix), _dice(matrix)
        scores = {"mean_iou_of_change": _mean(ious[1:])}
        right, truth, predicted = (
            x.tolist() for x in (matrix.diag(), matrix.sum(1), matrix.sum(0))
        )
        for k, name in enumerate(self.names):
            scores |= {
                f"iou/{name}": ious[k],
                f"dice/{name}": dices[k],
                f"precision/{name}": _ratio(right[k], predicted[k], 0.0 if truth[k] else math.nan),
                f"recall/{name}": _ratio(right[k], truth[k], 0.0 if predicted[k] else math.nan),
            }
        return scores


class SemanticConfusion(Confusion):
    """The confusion of from-to change: labels 0 (unchanged) to K over both dates, and transitions.

    Args:
        num_classes: K, the classes of land cover.
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
        """(3, C, C) int64, pixels by class before (rows) and after (columns).

        The first is the truth, the second the prediction, the third the pixels that are predicted
        rightly at both dates.
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
        predicted = torch.where(valid.unsqueeze(1), prediction, IGNORE)
        right = torch.where((prediction == target).all(1).unsqueeze(1), target, IGNORE)
        for table, dates in zip(self.transitions, (target, predicted, right), strict=True):
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
        right = changed.diag().sum().item()
        predicted, truth = total - matrix[:, 0].sum().item(), total - matrix[0].sum().item()
        return {
            "scd_score": 0.3 * miou + 0.7 * sek,
            "sek": sek,
            "f_scd": _ratio(2 * right, predicted + truth),
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


def count_change(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return TP, FP and FN, each (...), of confusion matrices (..., C, C); class 0 is no change."""
    tp = matrices[..., 1:, 1:].sum((-2, -1))
    return tp, matrices[..., 0, 1:].sum(-1), matrices[..., 1:, 0].sum(-1)


def change_scores(tp: Tensor, fp: Tensor, fn: Tensor) -> dict[str, Tensor]:
    """Return IoU, Dice, precision and recall of the change class, float64 of the counts' shape.

    All are 1 where nothing changed and nothing is predicted. A precision without a prediction is 0
    if something changed, a recall without change is 0 if something is predicted.
    """
    tp, fp, fn = tp.double(), fp.double(), fn.double()
    one, zero = torch.ones_like(tp), torch.zeros_like(tp)

    def ratio(part: Tensor, whole: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where(whole > 0, part / whole.clamp(min=1), otherwise)

    return {
        "change_iou": ratio(tp, tp + fp + fn, one),
        "change_dice": ratio(2 * tp, 2 * tp + fp + fn, one),
        "change_precision": ratio(tp, tp + fp, torch.where(fn > 0, zero, one)),
        "change_recall": ratio(tp, tp + fn, torch.where(fp > 0, zero, one)),
    }


class ScoreHistogram:
    """Unchanged (row 0) and changed (row 1) pixels by predicted probability of change.

    Bin i of N holds the probabilities in (i / N, (i + 1) / N], so the bins from i on hold what is
    above the threshold i / N: each score at such a threshold is exact.

    Args:
        device: where the batches are.
        num_bins: N.
    """

    def __init__(self, device: torch.device | str = "cpu", num_bins: int = 256) -> None:
        self.num_bins = num_bins
        self.counts = torch.zeros(2, num_bins, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, *, task: str = "change") -> None:
        """Add a batch of logits and its target, 255 = ignore."""
        if task == "semantic":
            target = target[:, 0]
        self.add(bins_of(change_probability(logits, task=task), self.num_bins), target)

    def add(self, bins: Tensor, target: Tensor) -> None:
        """Add a bin of each pixel and its target of the same shape, 255 = ignore."""
        # by addition into slots, the last one for ignored pixels: neither a mask as an index nor
        # `bincount` knows the size of its result without waiting for a GPU
        num_slots = 2 * self.num_bins
        slot = ((target > 0) * self.num_bins + bins).where(target != IGNORE, num_slots).flatten()
        counts = self.counts.new_zeros(num_slots + 1)
        counts.scatter_add_(0, slot, torch.ones_like(slot))
        self.counts += counts[:-1].view(2, -1)

    def has_change(self) -> bool:
        """Tell whether a pixel of the truth changed."""
        return bool(self.counts[1].any())

    def at_thresholds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return TP, FP and FN at the thresholds i / N, each (N,) int64 on the CPU."""
        fp, tp = self.counts.cpu().flip(1).cumsum(1).flip(1)
        return tp, fp, tp[0] - tp

    def precision_recall(self) -> tuple[Tensor, Tensor]:
        """Return precision and recall at the thresholds i / N, each (N,) float64."""
        scores = change_scores(*self.at_thresholds())
        return scores["change_precision"], scores["change_recall"]

    def change_iou(self) -> Tensor:
        """Return the IoU of the change class at the thresholds i / N, (N,) float64."""
        return change_scores(*self.at_thresholds())["change_iou"]

    def average_precision(self) -> float:
        """Return the area under the steps of precision over recall; NaN where nothing changed."""
        if not self.has_change():
            return math.nan
        precision, recall = self.precision_recall()
        return float((precision * -recall.diff(append=recall.new_zeros(1))).sum())

    def best_threshold(self) -> float:
        """Return the threshold i / N of the highest change IoU; 0.5 where nothing changed.

        Of equal ones it is the nearest to 0.5. Threshold 0 is not among them.
        """
        if not self.has_change():
            return 0.5
        iou = self.change_iou()[1:]
        best = torch.nonzero(iou == iou.max()).flatten() + 1
        return float(best[(best - self.num_bins / 2).abs().argmin()] / self.num_bins)


def bins_of(probability: Tensor, num_bins: int) -> Tensor:
    """Return the bin of each probability, int64; what is no number counts as 0."""
    return (probability.nan_to_num() * num_bins).ceil().long().clamp(1, num_bins) - 1


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
