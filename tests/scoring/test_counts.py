import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import Confusion, ScoreHistogram, build_confusion, predict_classes
from pairs.images import IGNORE
from runtime.errors import UserError
from scoring.counts import (
    STEPS,
    ImageCounts,
    Prediction,
    SplitCounts,
    add_to_histogram,
    compare,
    count_image,
    dice_per_image,
)
from scoring.objects import ObjectCounts

POINTS: dict[str, float | None] = {"default": None, "low": 64 / 256, "high": 200 / 256}


def example(
    num_classes: int, task: str = "change", num: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, C, 24, 18) and their target, with some of it to ignore."""
    draw = torch.Generator().manual_seed(seed)
    channels = 1 + 2 * num_classes if task == "semantic" else num_classes
    logits = 3 * torch.randn(num, channels, 24, 18, generator=draw)
    num_labels = num_classes + 1 if task == "semantic" else max(num_classes, 2)
    dates = 2 if task == "semantic" else 1
    target = torch.randint(0, num_labels, (num, dates, 24, 18), generator=draw)
    if task == "semantic":  # both dates agree on whether anything changed
        target[:, 1] = torch.where(target[:, 0] > 0, target[:, 1].clamp(min=1), 0)
    target[:, :, :3] = IGNORE
    return logits, target.to(torch.uint8)


def count(logits: Tensor, target: Tensor, num_classes: int, task: str = "change") -> SplitCounts:
    batch = Prediction.of_logits(logits, task)
    empty = functools.partial(build_confusion, task, num_classes)
    histogram, images = ScoreHistogram(num_bins=STEPS), []
    for i, truth in enumerate(target.numpy()):
        one = Prediction(batch.change[i], batch.change_classes[i], batch.classes[i])
        add_to_histogram(histogram, one, truth)
        images.append(count_image(str(i), one, truth, points=POINTS, empty=empty))
    return SplitCounts(images, histogram, empty)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        Prediction.of_logits(torch.full((1, 1, 4, 4), float("nan")), "change")


def as_batch(target: Tensor, task: str) -> Tensor:
    return target if task == "semantic" else target[:, 0]


@pytest.mark.parametrize(
    ("num_classes", "task"), [(1, "change"), (3, "change"), (2, "change"), (4, "semantic")]
)
def test_scores_are_those_of_one_confusion_over_all(num_classes: int, task: str) -> None:
    logits, target = example(num_classes, task)
    counts = count(logits, target, num_classes, task)
    confusion = build_confusion(task, num_classes)
    confusion.update(logits, as_batch(target, task))
    assert torch.equal(counts.confusion("default").counts, confusion.counts)
    assert counts.scores("default").items() >= confusion.scores().items()
    histogram = ScoreHistogram(num_bins=STEPS)
    histogram.update(logits, as_batch(target, task), task=task)
    assert torch.equal(counts.histogram.counts, histogram.counts)


@pytest.mark.parametrize(("num_classes", "task"), [(1, "change"), (4, "semantic")])
@pytest.mark.parametrize("point", ["low", "high"])
def test_a_threshold_is_that_of_predict_classes(num_classes: int, task: str, point: str) -> None:
    logits, target = example(num_classes, task)
    confusion = build_confusion(task, num_classes)
    threshold = POINTS[point]
    assert threshold is not None
    confusion.add(predict_classes(logits, threshold, task=task), as_batch(target, task))
    counts = count(logits, target, num_classes, task)
    assert torch.equal(counts.confusion(point).counts, confusion.counts)


def test_several_classes_above_a_threshold() -> None:
    """Where no change is the likeliest class but change as a whole is likelier than 0.25."""
    probability = torch.tensor([0.6, 0.1, 0.3])
    one = Prediction.of_logits(probability.log().view(1, 3, 1, 1), "change")
    assert one.classes.item() == 0
    assert one.at(64 / 256).item() == 2
    assert one.at(128 / 256).item() == 0


def test_a_probability_on_the_threshold_is_not_above_it() -> None:
    logits = torch.tensor([0.0, 1e-3, -1e-3, -200.0, 200.0]).view(1, 1, 1, 5)
    prediction = Prediction.of_logits(logits, "change")
    expected = [0, 1, 0, 0, 1]
    assert prediction.classes.ravel().tolist() == expected
    assert prediction.at(0.5).ravel().tolist() == expected


def test_every_threshold_of_the_histogram_is_exact() -> None:
    logits, target = example(1)
    iou = count(logits, target, 1).histogram.change_iou()
    for i in (1, 50, 20_000, 32_768, 65_535):
        confusion = Confusion(1)
        confusion.add(predict_classes(logits, i / STEPS), target[:, 0])
        assert iou[i].item() == confusion.scores()["change_iou"]


def test_a_model_that_predicts_nothing_gets_the_known_values() -> None:
    """Of 20 images 11 are empty: 0.55, LEVIR-CD's share of empty patches."""
    target = torch.zeros(20, 1, 4, 4, dtype=torch.uint8)
    target[:9, :, :2] = 1
    scores = count(torch.full((20, 1, 4, 4), -9.0), target, 1).scores("default")
    assert scores["dice_per_image_empty_1"] == pytest.approx(0.55)
    assert scores["dice_per_image_changed"] == 0
    assert scores["dice_per_image_empty_0"] == 0
    assert scores["change_iou"] == scores["change_recall"] == scores["change_precision"] == 0
    assert scores["accuracy"] == pytest.approx(1 - 9 * 8 / 320)
    assert (scores["objects_in_truth"], scores["objects_missed"]) == (9, 9)
    assert scores["objects_predicted"] == 0


def matrix(tp: int, fp: int, fn: int, tn: int) -> list[list[int]]:
    return [[tn, fp], [fn, tp]]


def test_dice_per_image_by_hand() -> None:
    images = [
        matrix(3, 1, 1, 5),  # 6 / 8
        matrix(0, 0, 4, 6),  # all missed
        matrix(0, 2, 0, 8),  # empty, with false positives
        matrix(0, 0, 0, 10),  # empty, rightly
        matrix(0, 0, 0, 0),  # ignored whole
    ]
    assert dice_per_image(np.array(images)) == {
        "dice_per_image_empty_1": (0.75 + 0 + 0 + 1) / 4,
        "dice_per_image_changed": (0.75 + 0) / 2,
        "dice_per_image_empty_0": 0.75 / 4,
    }
    nothing = dice_per_image(np.array([matrix(0, 0, 0, 10)]))
    assert np.isnan(nothing["dice_per_image_changed"])
    several = np.array([[[5, 1, 0], [0, 2, 1], [1, 0, 3]]])  # a wrong class of change is change
    assert dice_per_image(several)["dice_per_image_changed"] == 12 / 14


def fixed(probabilities: Sequence[float], truth: Sequence[int], times: int = 1) -> SplitCounts:
    """Count one image of a row of pixels, `times` each."""
    probability = torch.tensor(probabilities, dtype=torch.float64).repeat_interleave(times)
    logits = torch.logit(probability).float().view(1, 1, 1, -1)
    target = torch.tensor(truth, dtype=torch.uint8).repeat_interleave(times).view(1, 1, 1, -1)
    return count(logits, target, 1)


def test_calibration_by_hand() -> None:
    found = fixed([0.1, 0.1, 0.9, 0.9], [0, 1, 1, 1]).calibration()
    assert found.pixels[1] == 2 and found.pixels[14] == 2
    assert found.predicted[1] == pytest.approx(0.1, abs=1e-4)
    assert found.observed[1] == 0.5 and found.observed[14] == 1
    assert np.isnan(found.observed[7])
    assert found.error == pytest.approx((2 * 0.4 + 2 * 0.1) / 4, abs=1e-4)


def test_calibrated_predictions_have_no_error() -> None:
    probabilities = [i / 8 for i in range(1, 8) for _ in range(8)]
    truth = [int(j < i) for i in range(1, 8) for j in range(8)]
    assert fixed(probabilities, truth, times=10).calibration().error < 1e-5


def test_average_precision_of_perfect_and_of_constant_predictions() -> None:
    assert fixed([0.9, 0.8, 0.2], [1, 1, 0]).histogram.average_precision() == pytest.approx(1)
    assert fixed([0.3] * 4, [1, 0, 0, 0]).histogram.average_precision() == pytest.approx(0.25)


def test_the_interval_holds_the_estimate_and_the_seed_decides() -> None:
    counts = count(*example(1, num=12), 1)
    scores, intervals = counts.scores("default"), counts.intervals("default", seed=3)
    for name, (low, high) in intervals.items():
        assert low <= scores[name] <= high and low < high
    assert intervals == counts.intervals("default", seed=3)
    assert counts.change_iou_interval("default", seed=3) == pytest.approx(intervals["change_iou"])
    assert intervals != counts.intervals("default", seed=4)


def test_one_image_or_equal_images_leave_no_doubt() -> None:
    logits, target = example(1, num=1)
    for num in (1, 6):
        counts = count(logits.expand(num, -1, -1, -1), target.expand(num, -1, -1, -1), 1)
        assert all(low == high for low, high in counts.intervals("default").values())


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    """Of a mean over images, whose spread is known: the share of right pixels."""
    rng = np.random.default_rng(0)
    right = rng.integers(60, 100, 200)
    images = [
        ImageCounts("", (10, 10), {"default": np.array([[[r, 100 - r], [0, 0]]])}, {})
        for r in right
    ]
    counts = SplitCounts(images, ScoreHistogram(), functools.partial(Confusion, 1))
    low, high = counts.intervals("default")["accuracy"]
    reach = 1.96 * (right / 100).std() / np.sqrt(200)
    assert (low, high) == pytest.approx(
        (right.mean() / 100 - reach, right.mean() / 100 + reach), abs=0.15 * reach
    )


def test_ignored_pixels_are_no_objects_and_no_counts() -> None:
    target = torch.full((1, 1, 6, 6), IGNORE, dtype=torch.uint8)
    target[..., 0, 0] = 1
    counts = count(torch.full((1, 1, 6, 6), 9.0), target, 1)
    scores = counts.scores("default")
    assert counts.histogram.counts.sum() == 1
    assert scores["objects_predicted"] == scores["objects_found"] == 1


def test_pixels_of_semantic_change_count_once() -> None:
    logits, target = example(4, "semantic")
    counts = count(logits, target, 4, "semantic")
    predicted, truth = predict_classes(logits, task="semantic"), target.long()
    valid = truth[:, 0] != IGNORE
    is_true, is_predicted = (truth[:, 0] > 0) & valid, (predicted[:, 0] > 0) & valid
    for i, image in enumerate(counts.images):
        pixels = image.pixels("default")
        assert pixels.tp == (is_true & is_predicted)[i].sum()
        assert pixels.fp == (~is_true & is_predicted)[i].sum()
        assert pixels.fn == (is_true & ~is_predicted)[i].sum()
        assert pixels.tp + pixels.fp + pixels.fn + pixels.tn == valid[i].sum() == 21 * 18
        is_wrong = (predicted != truth).any(1) & valid
        assert pixels.wrong == is_wrong[i].sum()


def test_pixels_of_several_classes_by_hand() -> None:
    table = np.array([[[5, 1, 0], [0, 2, 1], [1, 0, 3]]])
    pixels = ImageCounts("", (1, 13), {"default": table}, {}).pixels("default")
    assert (pixels.tp, pixels.fp, pixels.fn, pixels.tn, pixels.wrong_class) == (6, 1, 1, 5, 1)
    assert pixels.wrong == 3


def test_a_model_is_no_better_than_itself_and_better_than_a_worse_one() -> None:
    logits, target = example(1, num=12)
    good = logits + 3 * (2.0 * target - 1)
    first, second = count(logits, target, 1), count(good, target, 1)
    same = compare(first, first, "default")
    assert (same.value, same.interval, same.share_higher) == (0, (0, 0), 0)
    better = compare(first, second, "default", seed=1)
    scores = [counts.scores("default")["change_iou"] for counts in (first, second)]
    assert better.value == pytest.approx(scores[1] - scores[0]) and better.share_higher == 1
    assert 0 < better.interval[0] < better.value < better.interval[1]
    assert compare(first, second, "default", seed=1) == better
    worse = compare(second, first, "default", seed=1)
    assert worse.interval == pytest.approx((-better.interval[1], -better.interval[0]))


def test_the_interval_of_a_difference_is_narrower_than_both() -> None:
    """Models that fail on the same images are told apart though their own intervals overlap."""
    rng = np.random.default_rng(0)
    tp = rng.integers(10, 90, 60)

    def counts_of(tp: np.ndarray) -> SplitCounts:
        images = [
            ImageCounts("", (10, 10), {"default": np.array([[[0, 0], [100 - n, n]]])},
                        {"default": ObjectCounts()})
            for n in tp
        ]  # fmt: skip
        return SplitCounts(images, ScoreHistogram(), functools.partial(Confusion, 1))

    first, second = counts_of(tp), counts_of(tp + 2)
    low, high = first.intervals("default")["change_iou"]
    assert low < second.scores("default")["change_iou"] < high
    found = compare(first, second, "default")
    assert found.interval == pytest.approx((0.02, 0.02)) and found.value == pytest.approx(0.02)
