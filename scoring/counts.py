"""Counts of each image under one protocol, and everything that follows from them.

    Prediction     change (H, W) uint16, kinds and classes (D, H, W) uint8; D dates with classes: 1,
                   of semantic change 2
    ImageCounts    histogram (2, 256); at each operating point tables (T, C, C) and objects
    SplitCounts    of all images: scores, intervals, curves

The model is asked once; scores at any threshold, the choice of a threshold, the bootstrap, the
curves and the calibration all come from these counts. A probability is kept as one of 65536 steps,
so that `> threshold` is exact for every threshold i / 256.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics import (
    Confusion,
    ScoreHistogram,
    change_probability,
    check_logits,
    predict_classes,
)
from pairs.images import IGNORE
from scoring.objects import ObjectCounts, count_objects

NUM_BINS = 256  # of the change probability, and so of the thresholds to choose from
STEPS = 65536  # that a probability is kept in
CALIBRATION_BINS = 16

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]

PER_IMAGE_NAMES = {
    "dice_per_image_empty_1": "mean Dice of images, empty = 1",
    "dice_per_image_changed": "mean Dice of images with change",
    "dice_per_image_empty_0": "mean Dice of images, empty = 0",
}
OBJECT_NAMES = {
    "objects_real": "changed objects",
    "objects_found": "objects found",
    "objects_missed": "objects missed",
    "objects_claimed": "objects claimed",
    "objects_invented": "objects invented",
}


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        change: (H, W) uint16; the probability of change lies in (i, i + 1] / 65536.
        kinds: (D, H, W) uint8, the most probable class of change, wherever there is any.
        classes: (D, H, W) uint8, the classes by the model's own rule: above 0.5, or argmax.
    """

    change: NDArray[np.uint16]
    kinds: Bytes
    classes: Bytes

    @classmethod
    def of_logits(cls, logits: Tensor, task: str) -> "Prediction":
        """Sum up a batch of logits (B, C, H, W); every array has B in front.

        Raises:
            UserError: they are not finite.
        """
        check_logits(logits)
        probability = change_probability(logits, task=task)
        steps = (probability * STEPS).ceil().clamp(min=1) - 1
        if task == "change" and logits.shape[1] > 1:
            kinds = logits[:, 1:].argmax(1) + 1
        else:
            kinds = predict_classes(logits, -1.0, task=task)  # every probability is above -1
        classes = predict_classes(logits, task=task)
        if task == "change":
            kinds, classes = kinds.unsqueeze(1), classes.unsqueeze(1)
        return cls(
            steps.int().cpu().numpy().astype(np.uint16),
            kinds.to(torch.uint8).cpu().numpy(),
            classes.to(torch.uint8).cpu().numpy(),
        )

    def at(self, threshold: float | None) -> Bytes:
        """Return the classes (D, H, W) above a threshold i / 256, or by the model's own rule."""
        if threshold is None:
            return self.classes
        return self.kinds * (self.change >= round(threshold * STEPS))


@dataclass(frozen=True)
class ImageCounts:
    """One image under one protocol.

    Attributes:
        name: of the pair.
        size: (height, width).
        histogram: (2, 256), unchanged and changed pixels by predicted probability.
        probability: (256,) float64, the sum of the probabilities in each bin.
        tables: (T, C, C) at each operating point, as `counts` of a `Confusion`; the first one has
            rows = truth, columns = prediction.
        objects: at each operating point.
    """

    name: str
    size: tuple[int, int]
    histogram: Counts
    probability: NDArray[np.float64]
    tables: dict[str, Counts]
    objects: dict[str, ObjectCounts]

    def num_wrong(self, point: str) -> int:
        """Return how many pixels got a wrong class."""
        matrix = self.tables[point][0]
        return int(matrix.sum() - np.trace(matrix))


def count_image(
    name: str,
    prediction: Prediction,
    truth: Bytes,
    *,
    points: Mapping[str, float | None],
    num_labels: int,
    min_pixels: int = 1,
) -> ImageCounts:
    """Compare a prediction with the truth.

    Args:
        name: of the pair.
        prediction: of the whole image.
        truth: (D, H, W), 255 = ignore.
        points: the operating points: a threshold by name, None for the model's own rule.
        num_labels: C.
        min_pixels: of an object that counts.
    """
    valid, changed = truth[0] != IGNORE, (truth[0] > 0) & (truth[0] != IGNORE)
    steps = _steps(prediction, truth)
    middles = (np.arange(STEPS).reshape(NUM_BINS, -1) + 0.5) / STEPS
    claims = {point: prediction.at(threshold) for point, threshold in points.items()}
    return ImageCounts(
        name,
        (truth.shape[-2], truth.shape[-1]),
        histogram=steps.sum(-1),
        probability=(steps.sum(0) * middles).sum(-1),
        tables={point: _tables(truth, claim, num_labels) for point, claim in claims.items()},
        objects={
            point: count_objects(changed, valid & (claim[0] > 0), min_pixels)
            for point, claim in claims.items()
        },
    )


def histogram_of(prediction: Prediction, truth: Bytes) -> Counts:
    """Return unchanged and changed pixels by predicted probability (2, 256), of one image."""
    return _steps(prediction, truth).sum(-1)


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed change in equal bins of the probability; NaN where a bin is empty.

    Attributes:
        predicted: (16,) mean probability.
        observed: (16,) share of changed pixels.
        pixels: (16,).
        error: the expected calibration error of the change probability: mean over all pixels of
            |predicted - observed| of their bin. Guo et al., arXiv:1706.04599, who take it of the
            predicted class; here, where few pixels change, most of it is on those without change.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    pixels: Counts
    error: float


@dataclass(frozen=True)
class SplitCounts:
    """All images of a split under one protocol.

    Attributes:
        images: in the split's order.
        empty: makes the confusion matrix that turns counts into scores.
    """

    images: Sequence[ImageCounts]
    empty: Callable[[], Confusion]

    @property
    def histogram(self) -> Counts:
        """(2, 256), unchanged and changed pixels by predicted probability."""
        return sum((image.histogram for image in self.images), np.zeros((2, NUM_BINS), np.int64))

    def matrices(self, point: str) -> Counts:
        """Return (N, C, C), one matrix an image."""
        return np.stack([image.tables[point][0] for image in self.images])

    def confusion(self, point: str) -> Confusion:
        """Return the confusion matrix over all images."""
        confusion = self.empty()
        tables = sum(image.tables[point] for image in self.images)
        confusion.counts.copy_(torch.from_numpy(tables))
        return confusion

    def scores(self, point: str) -> dict[str, float]:
        """Return the scores over all pixels, the means over images, the objects."""
        matrices = self.matrices(point)
        objects = sum((image.objects[point] for image in self.images), ObjectCounts())
        return {
            **self._score(matrices.sum(0)),
            **dice_per_image(matrices),
            "objects_real": objects.real,
            "objects_found": objects.found,
            "objects_missed": objects.missed,
            "objects_claimed": objects.claimed,
            "objects_invented": objects.invented,
        }

    def intervals(
        self, point: str, *, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval of each score over all pixels: bootstrap over images.

        Images are drawn with replacement, as the pixels of one are no independent witnesses; the
        interval says how much the score would move with other images of the same kind, not with
        another seed of the training. Efron and Tibshirani, doi:10.1201/9780429246593.
        """
        matrices = self.matrices(point)
        num = len(matrices)
        rng = np.random.default_rng(seed)
        times = rng.multinomial(num, np.full(num, 1 / num), size=num_resamples)
        values = [self._score(np.tensordot(of_image, matrices, 1)) for of_image in times]
        intervals = {}
        for name in values[0]:
            known = [v[name] for v in values if not math.isnan(v[name])]  # of classes drawn
            low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
            intervals[name] = float(low), float(high)
        return intervals

    def precision_recall(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return precision and recall at the thresholds i / 256, each (256,)."""
        curve = ScoreHistogram()
        curve.counts += torch.from_numpy(self.histogram)
        precision, recall = curve.precision_recall()
        return precision.numpy(), recall.numpy()

    def average_precision(self) -> float:
        """Return the area under the steps of precision over recall, at 256 thresholds."""
        precision, recall = self.precision_recall()
        return float((precision * -np.diff(recall, append=0.0)).sum())

    def calibration(self) -> Calibration:
        """Compare predicted probabilities with what came true."""
        pixels = self.histogram.reshape(2, CALIBRATION_BINS, -1).sum(-1)
        probability = np.sum([image.probability for image in self.images], axis=0)
        total = pixels.sum(0)
        with np.errstate(invalid="ignore"):
            predicted = probability.reshape(CALIBRATION_BINS, -1).sum(-1) / total
            observed = pixels[1] / total
        gaps = np.nan_to_num(np.abs(predicted - observed))
        return Calibration(
            predicted, observed, total, float((gaps * total).sum() / max(total.sum(), 1))
        )

    def _score(self, matrix: Counts) -> dict[str, float]:
        confusion = self.empty()
        confusion.matrix.copy_(torch.from_numpy(matrix))
        return confusion.scores()


def change_iou(histogram: Counts) -> NDArray[np.float64]:
    """Return the change IoU (256,) at the thresholds i / 256 from a histogram (2, 256)."""
    false_alarms, hits = histogram[:, ::-1].cumsum(1)[:, ::-1]
    return hits / np.maximum(histogram[1].sum() + false_alarms, 1)


def best_threshold(histograms: Iterable[Counts]) -> float:
    """Return the threshold of the highest change IoU over all images; 0.5 without any change.

    Of equal ones the nearest to 0.5. 0 is not among them: it claims everything.
    """
    total = np.sum(list(histograms), axis=0)
    if not total[1].any():
        return 0.5
    iou = change_iou(total)
    candidates = np.arange(1, NUM_BINS)
    best = candidates[iou[1:] == iou[1:].max()]
    return float(best[np.abs(best - NUM_BINS / 2).argmin()] / NUM_BINS)


def dice_per_image(matrices: Counts) -> dict[str, float]:
    """Return the three means over images that papers call Dice; NaN without images of a kind.

    They differ in the images without change. The first gives a model that predicts nothing their
    share as its score: 0.55 on LEVIR-CD's patches.

    Args:
        matrices: (N, C, C), all classes but 0 being change; images without a counted pixel are left
            out.
    """
    matrices = matrices[matrices.sum((1, 2)) > 0]
    hits = matrices[:, 1:, 1:].sum((1, 2))
    wrong = matrices[:, 0, 1:].sum(1) + matrices[:, 1:, 0].sum(1)
    has_change = matrices[:, 1:].sum((1, 2)) > 0
    sizes = 2 * hits + wrong
    dice = np.where(sizes > 0, 2 * hits / np.maximum(sizes, 1), 1.0)
    return {
        "dice_per_image_empty_1": _mean(dice),
        "dice_per_image_changed": _mean(dice[has_change]),
        "dice_per_image_empty_0": _mean(np.where(has_change, dice, 0.0)),
    }


def _steps(prediction: Prediction, truth: Bytes) -> Counts:
    """Return (2, 256, 256): unchanged and changed pixels by bin, and by step in the bin."""
    valid = truth[0] != IGNORE
    slots = (truth[0] > 0)[valid] * STEPS + prediction.change[valid].astype(np.int64)
    return np.bincount(slots, minlength=2 * STEPS).reshape(2, NUM_BINS, STEPS // NUM_BINS)


def _tables(truth: Bytes, claim: Bytes, num_labels: int) -> Counts:
    """Return the tables of a `Confusion`, (1, C, C), or of a `SemanticConfusion`, (4, C, C).

    Counted in whole numbers, so that images of any size are exact.
    """
    tables = [_pairs_of_classes(truth, claim, truth != IGNORE, num_labels)]
    if len(truth) == 2:  # the dates: transitions in truth, as predicted, and predicted rightly
        valid = (truth != IGNORE).all(0)
        is_right = valid & (truth == claim).all(0)
        tables += [
            _pairs_of_classes(dates[0], dates[1], mask, num_labels)
            for dates, mask in ((truth, valid), (claim, valid), (truth, is_right))
        ]
    return np.stack(tables)


def _pairs_of_classes(
    rows: Bytes, columns: Bytes, mask: NDArray[np.bool_], num_labels: int
) -> Counts:
    slots = rows[mask].astype(np.int64) * num_labels + columns[mask]
    return np.bincount(slots, minlength=num_labels**2).reshape(num_labels, num_labels)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
