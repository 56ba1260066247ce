"""Per-image confusion of a split under one protocol, and everything that follows from it.

    Prediction     change (H, W) uint16, change_classes and classes (D, H, W) uint8; D = 1 map of
                   classes, or of semantic change 2, one for each date
    ImageCounts    at each operating point tables (T, C, C) and objects
    SplitCounts    all images: scores, intervals, curves; histogram (2, 65536)

The model is asked once. Scores at any threshold, the choice of a threshold, the bootstrap, the
curves and the calibration all come from these counts. A probability is kept as one of 65,536 steps,
so that `> threshold` is exact for every threshold i / 65536.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metrics import (
    Confusion,
    ScoreHistogram,
    bins_of,
    change_probability,
    change_scores,
    check_logits,
    count_change,
    predict_classes,
)
from pairs.images import IGNORE
from scoring.objects import ObjectCounts, count_objects

STEPS = 65536  # of a probability, and so of the thresholds to choose from
CALIBRATION_BINS = 16
NUM_RESAMPLES = 1000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]

PER_IMAGE_NAMES = {
    "dice_per_image_empty_1": "mean Dice of images, empty = 1",
    "dice_per_image_changed": "mean Dice of images with change",
    "dice_per_image_empty_0": "mean Dice of images, empty = 0",
}
OBJECT_NAMES = {
    "objects_in_truth": "changed objects",
    "objects_found": "objects found",
    "objects_missed": "objects missed",
    "objects_predicted": "objects predicted",
    "objects_false": "objects predicted falsely",
}


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        change: (H, W) uint16; the probability of change lies in (i, i + 1] / 65536.
        change_classes: (D, H, W) uint8, the most probable class of change, wherever there is any.
        classes: (D, H, W) uint8, the classes by the model's own rule: above 0.5, or argmax.
    """

    change: NDArray[np.uint16]
    change_classes: Bytes
    classes: Bytes

    @classmethod
    def of_logits(cls, logits: Tensor, task: str) -> "Prediction":
        """Sum up a batch of logits (B, C, H, W); every array has B in front.

        Raises:
            UserError: a logit is not finite.
        """
        check_logits(logits)
        steps = bins_of(change_probability(logits, task=task), STEPS)
        # every probability is above -1
        maps = [predict_classes(logits, threshold, task=task) for threshold in (-1.0, None)]
        if task == "change":
            maps = [classes.unsqueeze(1) for classes in maps]
        return cls(
            steps.int().cpu().numpy().astype(np.uint16),
            *(classes.to(torch.uint8).cpu().numpy() for classes in maps),
        )

    def at(self, threshold: float | None) -> Bytes:
        """Return the classes (D, H, W) above a threshold i / 65536, or by the model's own rule."""
        if threshold is None:
            return self.classes
        return self.change_classes * (self.change >= round(threshold * STEPS))


@dataclass(frozen=True)
class PixelCounts:
    """Pixels of an image at an operating point; those of semantic change count once, not per date.

    Attributes:
        tp: changed and predicted.
        fp: predicted alone.
        fn: changed alone.
        tn: neither.
        wrong_class: of `tp` those whose class is wrong, at either date.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    wrong_class: int

    @property
    def wrong(self) -> int:
        """How many pixels are not as the truth has them."""
        return self.fp + self.fn + self.wrong_class


@dataclass(frozen=True)
class ImageCounts:
    """One image under one protocol.

    Attributes:
        name: of the pair.
        size: (height, width).
        tables: (T, C, C) at each operating point, as `counts` of a `Confusion`; the first one has
            rows = truth, columns = prediction.
        objects: at each operating point.
    """

    name: str
    size: tuple[int, int]
    tables: dict[str, Counts]
    objects: dict[str, ObjectCounts]

    def pixels(self, point: str) -> PixelCounts:
        """Count pixels; both dates of semantic change agree on where anything changed."""
        matrix, *transitions = self.tables[point]
        num_dates = 2 if transitions else 1
        tp, fp, fn = (int(n) // num_dates for n in count_change(torch.from_numpy(matrix)))
        right = transitions[-1][1:, 1:].sum() if transitions else np.trace(matrix[1:, 1:])
        return PixelCounts(tp, fp, fn, int(matrix[0, 0]) // num_dates, tp - int(right))


def count_image(
    name: str,
    prediction: Prediction,
    truth: Bytes,
    *,
    points: Mapping[str, float | None],
    empty: Callable[[], Confusion],
    min_pixels: int = 1,
) -> ImageCounts:
    """Compare a prediction with the truth.

    Args:
        name: of the pair.
        prediction: of the whole image.
        truth: (D, H, W), 255 = ignore.
        points: the operating points: a threshold by name, None for the model's own rule.
        empty: makes a confusion matrix.
        min_pixels: of an object that counts.
    """
    valid, changed = truth[0] != IGNORE, (truth[0] > 0) & (truth[0] != IGNORE)
    tables, objects = {}, {}
    for point, threshold in points.items():
        classes, confusion = prediction.at(threshold), empty()
        maps = torch.from_numpy(classes), torch.from_numpy(truth)
        confusion.add(*(x[None] if len(truth) == 2 else x for x in maps))
        tables[point] = confusion.counts.numpy()
        objects[point] = count_objects(changed, valid & (classes[0] > 0), min_pixels)
    return ImageCounts(name, (truth.shape[-2], truth.shape[-1]), tables, objects)


def add_to_histogram(histogram: ScoreHistogram, prediction: Prediction, truth: Bytes) -> None:
    """Add the pixels of an image by their predicted probability."""
    change = torch.from_numpy(prediction.change.astype(np.int64))
    histogram.add(change, torch.from_numpy(truth[0]))


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
        histogram: of all pixels, `STEPS` bins.
        empty: makes the confusion matrix that turns counts into scores.
    """

    images: Sequence[ImageCounts]
    histogram: ScoreHistogram
    empty: Callable[[], Confusion]

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
            **objects.as_dict(),
        }

    def intervals(self, point: str, *, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval of each score over all pixels: bootstrap over images.

        Images are drawn with replacement, as the pixels of one are no independent witnesses; the
        interval says how much the score would move with other images of the same kind, not with
        another seed of the training. Efron and Tibshirani, doi:10.1201/9780429246593.
        """
        matrices = self.matrices(point)
        times = _draw_images(len(matrices), seed)
        values = [self._score(np.tensordot(of_image, matrices, 1)) for of_image in times]
        intervals = {}
        for name in values[0]:
            known = [v[name] for v in values if not math.isnan(v[name])]  # of classes drawn
            low, high = np.percentile(known, INTERVAL) if known else (math.nan, math.nan)
            intervals[name] = float(low), float(high)
        return intervals

    def change_iou_interval(self, point: str, *, seed: int = 0) -> tuple[float, float]:
        """Return the interval of the change IoU alone, which is much cheaper."""
        matrices = self.matrices(point)
        drawn = _change_iou(_draw_images(len(matrices), seed) @ matrices.reshape(len(matrices), -1))
        low, high = np.percentile(drawn, INTERVAL)
        return float(low), float(high)

    def calibration(self) -> Calibration:
        """Compare predicted probabilities with what came true."""
        steps = self.histogram.counts.numpy()
        pixels = steps.reshape(2, CALIBRATION_BINS, -1).sum(-1)
        probability = steps.sum(0) * (np.arange(STEPS) + 0.5) / STEPS
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


@dataclass(frozen=True)
class Difference:
    """How much higher the change IoU of a second model is on the same images.

    Attributes:
        value: over all pixels.
        interval: 95 %, paired bootstrap over images: each draw takes the same ones for both.
        share_higher: the share of draws in which the second is higher.
    """

    value: float
    interval: tuple[float, float]
    share_higher: float


def compare(
    first: SplitCounts,
    second: SplitCounts,
    point: str,
    *,
    seed: int = 0,
) -> Difference:
    """Compare two models on the same images at an operating point."""
    matrices = [counts.matrices(point).reshape(len(first.images), -1) for counts in (first, second)]
    times = _draw_images(len(first.images), seed)
    once = np.ones((1, len(first.images)), np.int64)

    def differences(times: Counts) -> NDArray[np.float64]:
        before, after = (_change_iou(times @ of_images) for of_images in matrices)
        return after - before

    drawn = differences(times)
    low, high = np.percentile(drawn, INTERVAL)
    return Difference(
        float(differences(once)[0]), (float(low), float(high)), float((drawn > 0).mean())
    )


def dice_per_image(matrices: Counts) -> dict[str, float]:
    """Return the three means over images that papers call Dice; NaN without images of a kind.

    They differ in the images without change. The first gives a model that predicts nothing their
    share as its score: 0.55 on LEVIR-CD's patches.

    Args:
        matrices: (N, C, C), all classes but 0 being change; images without a counted pixel are left
            out.
    """
    matrices = matrices[matrices.sum((1, 2)) > 0]
    dice = change_scores(*count_change(torch.from_numpy(matrices)))["change_dice"].numpy()
    has_change = matrices[:, 1:].sum((1, 2)) > 0
    kept = {
        "dice_per_image_empty_1": dice,
        "dice_per_image_changed": dice[has_change],
        "dice_per_image_empty_0": np.where(has_change, dice, 0.0),
    }
    return {name: float(x.mean()) if len(x) else math.nan for name, x in kept.items()}


def _draw_images(num_images: int, seed: int) -> Counts:
    """Return how often each image is drawn, (NUM_RESAMPLES, num_images)."""
    share = np.full(num_images, 1 / num_images)
    return np.random.default_rng(seed).multinomial(num_images, share, size=NUM_RESAMPLES)


def _change_iou(matrices: Counts) -> NDArray[np.float64]:
    """Return the change IoU (N,) of flattened confusion matrices (N, C * C)."""
    side = math.isqrt(matrices.shape[1])
    of_change = count_change(torch.from_numpy(matrices.reshape(-1, side, side)))
    return change_scores(*of_change)["change_iou"].numpy()
