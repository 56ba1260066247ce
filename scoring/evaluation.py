"""Evaluate a model on a split: the threshold from val, the counts by protocol, the robustness.

    default    the model's own rule: probability of change above 0.5, or with several classes argmax
    val        change where its probability is above the threshold that scores highest on val

The threshold is chosen for each protocol on the validation split and then used on the split that
was asked for, which has no say in it. On val itself its score is optimistic, and marked so.
Of several processes each predicts its share of the images, and all get the counts of every one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from metrics import Confusion, ScoreHistogram, build_confusion
from pairs.sources import Source, Subset
from runtime.distributed import gather, rank, share
from runtime.progress import Bar
from scoring.corruptions import CORRUPTIONS, CorruptedSource
from scoring.counts import (
    STEPS,
    ImageCounts,
    Prediction,
    SplitCounts,
    add_to_histogram,
    count_image,
)
from scoring.protocols import Predicted, Predictor

DEFAULT, BY_VAL = "default", "val"  # operating points
ROBUSTNESS_PROTOCOL = "patches"  # the cheapest: no overlap, no blending
NUM_WORST = 10

T = TypeVar("T")


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol gave on a split.

    Attributes:
        description: of the protocol, in words.
        points: the operating points: a threshold by name, None for the model's own rule.
        counts: of every image.
        val_has_change: whether a threshold could be chosen.
        worst: the pairs with the most wrong pixels at `default`, by number, and their predictions.
    """

    description: str
    points: dict[str, float | None]
    counts: SplitCounts
    val_has_change: bool
    worst: list[tuple[int, Prediction]]


def evaluate_protocol(
    predictor: Predictor,
    protocol: str,
    source: Source,
    val: Source | None,
    *,
    names: Sequence[str] | None = None,
    min_pixels: int = 1,
) -> ProtocolResult:
    """Choose a threshold on val and count on the split; each image is predicted once.

    Args:
        predictor: the model.
        protocol: one of `protocols.PROTOCOLS`.
        source: the split.
        val: the validation split; the same object where that is the split; None chooses nothing.
        names: of the classes.
        min_pixels: of an object that counts.
    """
    empty = _confusion_of(predictor, names)

    def predict(pairs: Source, on: str) -> Iterable[tuple[int, Predicted]]:
        bar = f"{protocol} on {on}"
        predictions = _predict_share(predictor, pairs, protocol)
        own = len(share(pairs.pairs))
        return Bar(predictions, bar, total=own, disable=rank() > 0, unit="pairs")

    points: dict[str, float | None] = {DEFAULT: None}
    on_val = predict(val, "val") if val is not None else []
    if source is val:
        on_val = list(on_val)  # five bytes a pixel, instead of predicting twice
    of_val = _histogram()
    for _, predicted in on_val:
        add_to_histogram(of_val, *predicted)
    of_val = _sum(of_val)
    if val is not None:
        points[BY_VAL] = of_val.best_threshold()
    histogram = _histogram()
    images: dict[int, ImageCounts] = {}
    kept: list[tuple[int, int, Prediction]] = []  # number, wrong pixels
    for number, predicted in on_val if source is val else predict(source, "the split"):
        name = source.pairs[number].name
        images[number] = count_image(
            name, *predicted, points=points, empty=empty, min_pixels=min_pixels
        )
        add_to_histogram(histogram, *predicted)
        kept = _worst([*kept, (number, images[number].pixels(DEFAULT).wrong, predicted[0])])
    kept = _worst([one for part in gather(kept) for one in part])
    return ProtocolResult(
        predictor.describe(protocol),
        points,
        SplitCounts(list(_merged(images).values()), _sum(histogram), empty),
        of_val.has_change(),
        [(number, prediction) for number, _, prediction in kept],
    )


def measure_robustness(
    predictor: Predictor,
    source: Source,
    *,
    max_pairs: int,
    names: Sequence[str] | None = None,
    min_pixels: int = 1,
) -> list[dict[str, Any]]:
    """Score at the default operating point with the later date corrupted, by patches.

    Args:
        predictor: the model.
        source: the split.
        max_pairs: to use, spread evenly over the split; 0 is all.
        names: of the classes.
        min_pixels: of an object that counts.

    Returns:
        A row for each corruption and level: both, the number of pairs and of counted pixels, and
        the scores, with the 95 % interval of the change IoU. Every curve holds the same row of
        uncorrupted pairs.
    """
    num_dates = 2 if predictor.model.task == "semantic" else 1
    num_pairs = min(len(source), max_pairs or len(source))
    some = Subset(source, [i * len(source) // num_pairs for i in range(num_pairs)])
    steps = [
        (name, level)
        for name, corruption in CORRUPTIONS.items()
        for level in corruption.levels
        if level != corruption.neutral
    ]

    def score(name: str, level: float) -> dict[str, Any]:
        corrupted = CorruptedSource(some, CORRUPTIONS[name], level)
        counts = _count_by_patches(predictor, corrupted, names, min_pixels)
        low, high = counts.change_iou_interval(DEFAULT)
        return {
            "corruption": name,
            "level": level,
            "pairs": num_pairs,
            "pixels": int(counts.matrices(DEFAULT).sum()) // num_dates,
            "change_iou_low": low,
            "change_iou_high": high,
            **counts.scores(DEFAULT),
        }

    first = next(iter(CORRUPTIONS))
    clean = score(first, CORRUPTIONS[first].neutral)
    rows = {
        step: score(*step) for step in Bar(steps, "robustness", disable=rank() > 0, unit="levels")
    }
    return [
        rows.get((name, level), {**clean, "corruption": name, "level": level})
        for name, corruption in CORRUPTIONS.items()
        for level in corruption.levels
    ]


def _count_by_patches(
    predictor: Predictor, source: Source, names: Sequence[str] | None, min_pixels: int
) -> SplitCounts:
    """Count all images at the default operating point."""
    empty = _confusion_of(predictor, names)
    images = {
        number: count_image(
            source.pairs[number].name,
            *predicted,
            points={DEFAULT: None},
            empty=empty,
            min_pixels=min_pixels,
        )
        for number, predicted in _predict_share(predictor, source, ROBUSTNESS_PROTOCOL)
    }
    return SplitCounts(list(_merged(images).values()), _histogram(), empty)


def _predict_share(
    predictor: Predictor, source: Source, protocol: str
) -> Iterator[tuple[int, Predicted]]:
    """Predict this process's share of the images; yield the number of each, too."""
    numbers = share(range(len(source)))
    predictions = predictor.predict(Subset(source, numbers), protocol)
    return zip(numbers, predictions, strict=True)


def _worst(found: list[tuple[int, int, Prediction]]) -> list[tuple[int, int, Prediction]]:
    return sorted(found, key=lambda one: (-one[1], one[0]))[:NUM_WORST]


def _histogram() -> ScoreHistogram:
    return ScoreHistogram(num_bins=STEPS)


def _sum(own: ScoreHistogram) -> ScoreHistogram:
    """Add up the histograms of the processes."""
    total = _histogram()
    for counts in gather(own.counts):
        total.counts += counts
    return total


def _merged(of_images: dict[int, T]) -> dict[int, T]:
    """Put what the processes have of their images together, in the split's order."""
    return {number: value for part in gather(of_images) for number, value in sorted(part.items())}


def _confusion_of(predictor: Predictor, names: Sequence[str] | None) -> Callable[[], Confusion]:
    model = predictor.model

    def empty() -> Confusion:
        return build_confusion(model.task, model.num_classes, names=names)

    return empty
