"""One confusion matrix over a split and every score from it; one histogram and the PR curve.

    Confusion    (C, C) int64, rows = truth, columns = prediction, C = max(K, 2) classes
    ScoreHistogram    (2, 256) int64, unchanged and changed pixels by predicted probability

Both add up over batches and processes, stay on the device and leave it once, when read. Scores
are never means of per-batch scores: those depend on the batch size, and reward predicting nothing.
Dice and F1 of a class are the same number; IoU = Dice / (2 - Dice).
"""

import torch
from torch import Tensor

from image_io import IGNORE


def predict_classes(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Turn logits (B, K, H, W) into class indices (B, H, W): sigmoid > threshold, or argmax."""
    if logits.shape[1] == 1:
        return (logits.squeeze(1).float().sigmoid() > threshold).long()
    return logits.argmax(1)


def change_probability(logits: Tensor) -> Tensor:
    """Turn logits (B, K, H, W) into the probability of any change (B, H, W), float32."""
    if logits.shape[1] == 1:
        return logits.squeeze(1).float().sigmoid()
    return 1 - logits.float().softmax(1)[:, 0]


class Confusion:
    """Counts of (truth, prediction) over all pixels that are not ignored.

    Args:
        num_classes: K of the logits; 1 counts two classes, no change and change.
        device: where the batches are; no step waits for it.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = torch.arange(max(num_classes, 2), device=device)
        self.matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        self.matrix = self.matrix.to(device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K, H, W), target (B, H, W) with 255 = ignore."""
        self.add(predict_classes(logits), target)

    @torch.no_grad()
    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch: class indices (B, H, W), target (B, H, W) with 255 = ignore.

        A product of one-hot maps counts without `bincount`, which would make CUDA wait; sums of
        fewer than 2^24 ones are exact in float32. The ignore value matches no class.
        """
        classes = self.classes.view(1, -1, 1)
        truth = (target.flatten(1).unsqueeze(1) == classes).float()  # (B, C, H * W)
        claim = (prediction.flatten(1).unsqueeze(1) == classes).float()
        with torch.autocast(target.device.type, enabled=False):
            self.matrix += torch.bmm(truth, claim.mT).sum(0).long()

    def scores(self) -> dict[str, float]:
        """Return every score; 0 / 0 counts as 1 where a class is neither there nor predicted.

        A precision without claims is 0 if something was missed, a recall without change likewise.

        Change-class scores first. With K > 2, "change" is every class but 0.
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
        }


# What each score is, in words that nobody can mix up; the order of the table at a run's end.
SCORE_NAMES = {
    "change_iou": "IoU of the change class",
    "change_dice": "Dice (= F1) of the change class",
    "change_precision": "precision of the change class",
    "change_recall": "recall of the change class",
    "mean_dice": "Dice, mean over all classes",
    "mean_iou": "IoU, mean over all classes",
    "accuracy": "overall accuracy (share of pixels)",
}


class ScoreHistogram:
    """Unchanged (row 0) and changed (row 1) pixels per bin of predicted change probability."""

    def __init__(self, device: torch.device | str = "cpu", num_bins: int = 256) -> None:
        self.num_bins = num_bins
        self.counts = torch.zeros(2, num_bins, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits (B, K, H, W), target (B, H, W) with 255 = ignore."""
        bins = (change_probability(logits) * self.num_bins).long().clamp(max=self.num_bins - 1)
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
    return [_ratio(2 * h, s) for h, s in zip(matrix.diag().tolist(), sizes.tolist(), strict=True)]


def _iou(matrix: Tensor) -> list[float]:
    unions = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return [_ratio(h, u) for h, u in zip(matrix.diag().tolist(), unions.tolist(), strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
