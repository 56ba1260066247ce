"""Evaluate a model on a split: the threshold from val, the counts by protocol, the robustness.

    default    the model's own rule: probability of change above 0.5, or with several classes argmax
    val        change where its probability is above the threshold that scores highest on val

The threshold is chosen for each protocol on the validation split and then used on the split that
was asked for, which has no say in it. On val itself its score is optimistic, and marked so.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from corruptions import CORRUPTIONS, CorruptedSource
from counts import ImageCounts, Prediction, SplitCounts, best_threshold, count_image, histogram_of
from metrics import Confusion, build_confusion
from protocols import Predicted, Predictor
from sources import Source

DEFAULT, BY_VAL = "default", "val"  # operating points
ROBUSTNESS_PROTOCOL = "patches"  # the cheapest: no overlap, no blending
NUM_WORST = 10


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol gave on a split.

    Attributes:
        description: of the protocol, in words.
        points: the operating points: a threshold by name, None for the model's own rule.
        counts: of every image.
        worst: the pairs with the most wrong pixels at `default`, by number, and their predictions.
    """

    description: str
    points: dict[str, float | None]
    counts: SplitCounts
    worst: list[tuple[int, Prediction]]


def evaluate_protocol(
    predictor: Predictor,
    protocol: str,
    source: Source,
    val: Source,
    *,
    names: Sequence[str] | None = None,
    min_pixels: int = 1,
) -> ProtocolResult:
    """Choose a threshold on val and count on the split; each image is predicted once.

    Args:
        predictor: the model.
        protocol: one of `protocols.PROTOCOLS`.
        source: the split.
        val: the validation split; the same object where that is the split.
        names: of the classes.
        min_pixels: of an object that counts.
    """
    empty = _confusion_of(predictor, names)
    num_labels = len(empty().classes)

    def predict(pairs: Source, on: str) -> Iterable[Predicted]:
        predictions = predictor.predict(pairs, protocol)
        bar = f"{protocol} on {on}"
        return tqdm(predictions, bar, len(pairs), disable=None, leave=False, unit="pair")

    def count(number: int, predicted: Predicted, **points: float | None) -> ImageCounts:
        name = source.pairs[number].name
        return count_image(
            name, *predicted, points=points, num_labels=num_labels, min_pixels=min_pixels
        )

    on_val = predict(val, "val")
    if source is val:
        on_val = list(on_val)  # five bytes a pixel, instead of predicting twice
    threshold = best_threshold(histogram_of(*predicted) for predicted in on_val)
    points = {DEFAULT: None, BY_VAL: threshold}
    images: list[ImageCounts] = []
    worst: list[tuple[int, Prediction]] = []
    on_split = on_val if source is val else predict(source, "the split")
    for number, predicted in enumerate(on_split):
        images.append(count(number, predicted, **points))
        worst.append((number, predicted[0]))
        worst.sort(key=lambda entry: -images[entry[0]].num_wrong(DEFAULT))
        del worst[NUM_WORST:]
    return ProtocolResult(predictor.describe(protocol), points, SplitCounts(images, empty), worst)


def measure_robustness(
    predictor: Predictor,
    source: Source,
    *,
    max_pairs: int,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Score at the default operating point with the later date corrupted, by patches.

    Args:
        predictor: the model.
        source: the split.
        max_pairs: to use, spread evenly over the split; 0 is all.
        names: of the classes.

    Returns:
        A row for each corruption and level: both, the number of pairs and of counted pixels, and
        the scores, with the 95 % interval of the change IoU. Every curve holds the same row of
        uncorrupted pairs.
    """
    empty = _confusion_of(predictor, names)
    num_pairs = min(len(source), max_pairs or len(source))
    numbers = [i * len(source) // num_pairs for i in range(num_pairs)]
    steps = [
        (name, level)
        for name, corruption in CORRUPTIONS.items()
        for level in corruption.levels
        if level != corruption.neutral
    ]

    def score(name: str, level: float) -> dict[str, Any]:
        corrupted = CorruptedSource(source, CORRUPTIONS[name], level, numbers)
        images = [
            count_image(
                corrupted.pairs[i].name,
                *predicted,
                points={DEFAULT: None},
                num_labels=len(empty().classes),
            )
            for i, predicted in enumerate(predictor.predict(corrupted, ROBUSTNESS_PROTOCOL))
        ]
        counts = SplitCounts(images, empty)
        low, high = counts.intervals(DEFAULT)["change_iou"]
        return {
            "corruption": name,
            "level": level,
            "pairs": num_pairs,
            "pixels": int(counts.histogram.sum()),
            "change_iou_low": low,
            "change_iou_high": high,
            **counts.scores(DEFAULT),
        }

    first = next(iter(CORRUPTIONS))
    clean = score(first, CORRUPTIONS[first].neutral)
    rows = {
        step: score(*step)
        for step in tqdm(steps, "robustness", disable=None, leave=False, unit="level")
    }
    return [
        rows.get((name, level), {**clean, "corruption": name, "level": level})
        for name, corruption in CORRUPTIONS.items()
        for level in corruption.levels
    ]


def _confusion_of(predictor: Predictor, names: Sequence[str] | None) -> Callable[[], Confusion]:
    model = predictor.model

    def empty() -> Confusion:
        return build_confusion(model.task, model.num_classes, names=names)

    return empty
