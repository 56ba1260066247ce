import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics import (
    Confusion,
    ScoreHistogram,
    SemanticConfusion,
    build_confusion,
    change_probability,
    change_scores,
    count_by_product,
    count_change,
    count_on_cpu,
    predict_classes,
)


def logits_of(prediction: Tensor, num_classes: int = 1) -> Tensor:
    if num_classes == 1:
        return prediction.unsqueeze(1) * 8.0 - 4
    return torch.nn.functional.one_hot(prediction.long(), num_classes).movedim(-1, 1) * 8.0


def test_by_hand_on_a_4_by_4_mask() -> None:
    target = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 255, 255]]])
    predicted = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]])
    confusion = Confusion(1)
    confusion.update(logits_of(predicted), target)
    assert confusion.matrix.tolist() == [[9, 1], [1, 3]]
    scores = confusion.scores()
    assert scores["change_iou"] == pytest.approx(3 / 5)
    assert scores["change_dice"] == pytest.approx(6 / 8)
    assert scores["change_precision"] == pytest.approx(3 / 4)
    assert scores["change_recall"] == pytest.approx(3 / 4)
    assert scores["mean_dice"] == pytest.approx((6 / 8 + 18 / 20) / 2)
    assert scores["mean_iou"] == pytest.approx((3 / 5 + 9 / 11) / 2)
    assert scores["accuracy"] == pytest.approx(12 / 14)


def test_dice_and_iou_say_the_same_and_the_headline_holds() -> None:
    confusion = Confusion(1)
    # 4.7 % changed pixels and a change IoU of 0.70: the two-class mean Dice is 0.9075
    hit, wrong = 0.7, 0.15
    scale = 0.047 / (hit + wrong) * 1e6
    confusion.matrix[:] = torch.tensor(
        [[1e6 - scale, wrong * scale], [wrong * scale, hit * scale]], dtype=torch.int64
    )
    scores = confusion.scores()
    assert scores["change_iou"] == pytest.approx(0.70, abs=1e-3)
    assert scores["change_dice"] == pytest.approx(2 * 0.7 / 1.7, abs=1e-3)
    assert scores["mean_dice"] == pytest.approx(0.9075, abs=1e-3)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5])
def test_matrix_agrees_with_numpy_whatever_the_batches(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    classes = max(num_classes, 2)
    target = rng.integers(0, classes, (6, 9, 11))
    target[rng.random(target.shape) < 0.1] = 255
    predicted = rng.integers(0, classes, (6, 9, 11))
    valid = target != 255
    expected = np.zeros((classes, classes), dtype=int)
    np.add.at(expected, (target[valid], predicted[valid]), 1)
    for batch in (1, 4, 6):
        confusion = Confusion(num_classes)
        for i in range(0, 6, batch):
            part = slice(i, i + batch)
            logits = logits_of(torch.from_numpy(predicted[part]), num_classes)
            with torch.autocast("cpu", torch.bfloat16):
                confusion.update(logits, torch.from_numpy(target[part]).to(torch.uint8))
        assert confusion.matrix.tolist() == expected.tolist()


def test_counts_are_exact_for_a_full_patch() -> None:
    confusion = Confusion(1)
    ones = torch.ones(2, 1024, 1024, dtype=torch.uint8)
    confusion.add(ones, ones)
    assert confusion.matrix[1, 1] == 2 * 1024 * 1024


@pytest.mark.parametrize("count", [count_on_cpu, count_by_product])
def test_counts_are_exact_beyond_what_float32_adds(
    count: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    ones = torch.ones(1, dtype=torch.uint8).expand(1, 4097, 4097)
    assert count(ones, ones, torch.arange(2)).tolist() == [[0, 0], [0, 4097 * 4097]]


def test_both_ways_to_count_agree() -> None:
    rows, columns = torch.randint(0, 6, (2, 3, 40, 30), dtype=torch.uint8)
    rows[rows == 5] = 255
    by_product = count_by_product(rows, columns.long(), torch.arange(4))
    assert torch.equal(count_on_cpu(rows, columns.long(), torch.arange(4)), by_product)
    assert by_product.sum() == ((rows < 4) & (columns < 4)).sum()


def test_change_scores_of_one_image_and_of_many_are_the_same() -> None:
    matrices = torch.tensor(
        [[[5, 0], [0, 0]], [[5, 2], [0, 0]], [[3, 0], [2, 0]], [[3, 1], [2, 4]]]
    )
    many = change_scores(*count_change(matrices))
    for k, matrix in enumerate(matrices):
        confusion = Confusion(1)
        confusion.matrix.copy_(matrix)
        one = confusion.scores()
        assert {name: values[k].item() for name, values in many.items()}.items() <= one.items()
    assert many["change_iou"].tolist() == pytest.approx([1, 0, 0, 4 / 7])


def test_a_split_without_change_says_so() -> None:
    confusion = Confusion(3)
    confusion.add(torch.tensor([[[0, 1, 2]]]), torch.tensor([[[0, 0, 255]]]))
    assert not confusion.has_change()
    confusion.add(torch.tensor([[[0]]]), torch.tensor([[[2]]]))
    assert confusion.has_change()


@pytest.mark.fault("D14")
def test_no_change_anywhere_is_defined() -> None:
    zeros = torch.zeros(1, 4, 4, dtype=torch.long)
    silent, alarmed = Confusion(1), Confusion(1)
    silent.add(zeros, zeros)
    alarmed.add(zeros + 1, zeros)
    assert all(score == 1 for score in silent.scores().values())
    assert alarmed.scores()["change_iou"] == 0
    assert alarmed.scores()["change_precision"] == 0
    assert alarmed.scores()["change_recall"] == 0
    mute = Confusion(1)
    mute.add(zeros, zeros + 1)
    assert mute.scores()["change_precision"] == 0
    assert mute.scores()["change_recall"] == 0
    assert Confusion(1).scores()["change_iou"] == 1  # nothing seen


def test_multi_class_collapses_to_change() -> None:
    target = torch.tensor([[[0, 1, 2, 2]]])
    predicted = torch.tensor([[[0, 2, 2, 0]]])
    confusion = Confusion(3)
    confusion.add(predicted, target)
    scores = confusion.scores()
    assert scores["change_recall"] == pytest.approx(2 / 3)
    assert scores["change_precision"] == 1
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 5, 254])
def test_the_likeliest_class_is_argmax_where_several_are_alike_too(
    num_classes: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (2, num_classes, 9, 8), generator=draw).to(dtype)
    assert torch.equal(predict_classes(logits.requires_grad_()), logits.argmax(1))


def test_threshold_and_argmax() -> None:
    binary = torch.tensor([[[[-1.0, 0.0, 1.0]]]])
    assert predict_classes(binary).tolist() == [[[0, 0, 1]]]
    assert predict_classes(binary, 0.2).tolist() == [[[1, 1, 1]]]
    assert predict_classes(torch.tensor([[[[0.0]], [[1.0]], [[2.0]]]])).tolist() == [[[2]]]


def test_change_probability_of_softmax_is_that_of_sigmoid() -> None:
    logit = torch.randn(1, 1, 4, 4)
    two = torch.cat([torch.zeros_like(logit), logit], dim=1)
    torch.testing.assert_close(change_probability(two), change_probability(logit))


def test_curve_passes_through_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(3, 32, 32, generator=generator) < 0.2).to(torch.uint8)
    logits = torch.randn(3, 1, 32, 32, generator=generator) + 2 * target.unsqueeze(1)
    target[0, :5] = 255
    histogram, confusion = ScoreHistogram(), Confusion(1)
    for x, t in zip(logits.split(1), target.split(1), strict=True):
        histogram.update(x, t)
        confusion.update(x, t)
    assert histogram.counts.sum() == (target != 255).sum()
    precision, recall = histogram.precision_recall()
    scores = confusion.scores()
    assert precision[128].item() == pytest.approx(scores["change_precision"])
    assert recall[128].item() == pytest.approx(scores["change_recall"])
    assert recall[0] == 1
    assert (recall.diff() <= 0).all()


def exact_average_precision(probability: np.ndarray, changed: np.ndarray) -> float:
    """Sum precision over each step of recall, one threshold for each distinct probability."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(probability.tolist()), reverse=True):
        predicted = probability >= threshold
        now = (predicted & changed).sum() / changed.sum()
        total += (now - recall) * (predicted & changed).sum() / predicted.sum()
        recall = now
    return total


def test_average_precision_is_right_where_probabilities_pile_up_at_the_ends() -> None:
    rng = np.random.default_rng(0)
    changed = rng.random(600) < 0.3
    logits = np.where(changed, 1.0, -1.0) * rng.exponential(2, 600) + rng.normal(0, 3, 600)
    logits = logits.clip(-7, 7).astype(np.float32)
    probability = torch.from_numpy(logits).sigmoid().numpy()
    exact = exact_average_precision(probability, changed)
    found = {}
    for num_bins in (256, 65536):
        histogram = ScoreHistogram(num_bins=num_bins)
        histogram.update(
            torch.from_numpy(logits).view(1, 1, 20, 30), torch.from_numpy(changed).view(1, 20, 30)
        )
        found[num_bins] = histogram.average_precision()
    assert found[65536] == pytest.approx(exact, abs=2e-4)
    assert found[256] < exact - 2e-3  # too few steps: what was wrong


def test_the_best_threshold_by_hand() -> None:
    histogram = ScoreHistogram()
    histogram.counts[0, 10], histogram.counts[1, 200] = 90, 10
    assert histogram.best_threshold() == 0.5  # every one from 11 to 200 is perfect
    histogram.counts[0, 150] = 5
    assert histogram.best_threshold() == 151 / 256
    histogram.counts[1, 20] = 1000
    assert histogram.best_threshold() == 20 / 256
    histogram.counts[1] = 0  # no change at all
    assert histogram.best_threshold() == 0.5
    assert math.isnan(histogram.average_precision())


def test_a_threshold_for_several_classes() -> None:
    probability = torch.tensor([[0.6, 0.1, 0.3], [0.9, 0.06, 0.04], [0.1, 0.5, 0.4]])
    logits = probability.log().T.reshape(1, 3, 1, 3)
    assert predict_classes(logits).tolist() == [[[0, 0, 1]]]
    assert predict_classes(logits, 0.3).tolist() == [[[2, 0, 1]]]
    assert predict_classes(logits, 0.05).tolist() == [[[2, 1, 1]]]


def test_each_class_has_scores_under_its_name() -> None:
    target = torch.tensor([[[0, 1, 2, 2, 2, 255]]])
    predicted = torch.tensor([[[0, 2, 2, 0, 2, 1]]])
    confusion = Confusion(4, names=("none", "road", "building", "ruin"))
    confusion.add(predicted, target)
    scores = confusion.scores()
    assert scores["iou/building"] == pytest.approx(2 / 4)
    assert scores["dice/building"] == pytest.approx(4 / 6)
    assert scores["precision/building"] == pytest.approx(2 / 3)
    assert scores["recall/building"] == pytest.approx(2 / 3)
    assert scores["iou/road"] == scores["precision/road"] == scores["recall/road"] == 0
    of_nothing = [f"{score}/ruin" for score in ("iou", "dice", "precision", "recall")]
    assert all(math.isnan(scores[name]) for name in of_nothing)
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert scores["mean_iou_of_change"] == pytest.approx((0 + 1 / 2) / 2)
    assert confusion.headline == "mean_iou_of_change"


# ---- semantic change


def semantic_logits(change: Tensor, before: Tensor, after: Tensor, num_classes: int) -> Tensor:
    dates = [F.one_hot(x.long() - 1, num_classes).movedim(-1, 1) * 8.0 for x in (before, after)]
    return torch.cat([change.unsqueeze(1) * 8.0 - 4, *dates], dim=1)


def test_semantic_by_hand() -> None:
    """Four pixels of two dates, two classes: the matrix, kappa and all else by hand."""
    target = torch.tensor([[[[0, 0, 1, 1]], [[0, 0, 2, 2]]]])
    change = torch.tensor([[[0, 1, 1, 1]]])
    before = torch.tensor([[[1, 1, 1, 2]]])
    after = torch.tensor([[[1, 2, 2, 2]]])
    confusion = SemanticConfusion(2, names=("unchanged", "ground", "building"))
    confusion.update(semantic_logits(change, before, after, 2), target)
    # both dates: truth 0 0 1 1 0 0 2 2, predicted 0 1 1 2 0 2 2 2
    assert confusion.matrix.tolist() == [[2, 1, 1], [0, 1, 1], [0, 0, 2]]
    scores = confusion.scores()
    assert scores["change_iou"] == pytest.approx(4 / 6)
    assert scores["miou_change"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    # kappa without [0, 0]: n = 6, agreement 3/6, rows 2 2 2, columns 0 2 4
    by_chance = (2 * 0 + 2 * 2 + 2 * 4) / 36
    kappa = (3 / 6 - by_chance) / (1 - by_chance)
    sek = kappa * math.exp(4 / 6 - 1)
    assert scores["sek"] == pytest.approx(sek)
    assert scores["scd_score"] == pytest.approx(0.3 * (4 / 6 + 1 / 2) / 2 + 0.7 * sek)
    # 3 of 6 predicted pixels are right, 3 of 4 true ones are found
    assert scores["f_scd"] == pytest.approx(2 * (3 / 6) * (3 / 4) / (3 / 6 + 3 / 4))
    assert scores["iou/building"] == pytest.approx(2 / 4)
    truth, predicted, right = confusion.transitions.tolist()
    assert truth == [[2, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert predicted == [[1, 0, 0], [0, 0, 2], [0, 0, 1]]
    assert right == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def reference_sek(matrix: np.ndarray) -> tuple[float, float, float]:
    """Score, mIoU and SeK as the evaluation code of SECOND computes them, step by step."""
    hist = matrix.astype(float)
    changed = hist[1:, 1:].sum()
    binary = np.array([[hist[0, 0], hist[0, 1:].sum()], [hist[1:, 0].sum(), changed]])
    iou = np.diag(binary) / (binary.sum(0) + binary.sum(1) - np.diag(binary))
    without = hist.copy()
    without[0, 0] = 0
    total = without.sum()
    agreement = np.trace(without) / total
    chance = (without.sum(1) * without.sum(0)).sum() / total**2
    kappa = (agreement - chance) / (1 - chance)
    sek = kappa * np.exp(iou[1]) / np.e
    return 0.3 * iou.mean() + 0.7 * sek, iou.mean(), sek


def test_semantic_agrees_with_the_reference_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 9, 11)
    changed = torch.rand(shape, generator=generator) < 0.4
    labels = torch.randint(1, 7, (6, 2, 9, 11), generator=generator) * changed.unsqueeze(1)
    labels[0, :, 2:4] = 255
    logits = torch.randn(6, 13, 9, 11, generator=generator)
    for batch in (1, 4, 6):
        confusion = build_confusion("semantic", 6)
        for x, t in zip(logits.split(batch), labels.split(batch), strict=True):
            confusion.update(x, t.to(torch.uint8))
        matrix = np.zeros((7, 7), int)
        predicted = predict_classes(logits, task="semantic")
        valid = labels != 255
        np.add.at(matrix, (labels[valid].numpy(), predicted[valid].numpy()), 1)
        assert confusion.matrix.tolist() == matrix.tolist()
        scores = confusion.scores()
        names = ("scd_score", "miou_change", "sek")
        assert [scores[name] for name in names] == pytest.approx(reference_sek(matrix))
        assert confusion.counts[1].sum() == valid[:, 0].sum()


def test_semantic_scores_are_defined_where_there_is_nothing() -> None:
    empty = SemanticConfusion(3)
    assert all(math.isfinite(v) for name, v in empty.scores().items() if "/" not in name)
    zeros = torch.zeros(1, 2, 4, 4, dtype=torch.long)
    empty.add(zeros, zeros)
    scores = empty.scores()
    assert scores["miou_change"] == scores["change_iou"] == scores["f_scd"] == 1
    assert all(math.isfinite(v) for name, v in scores.items() if "/" not in name)
    perfect = SemanticConfusion(2)
    target = torch.tensor([[[[0, 1, 2]], [[0, 2, 1]]]])
    perfect.add(target, target)
    assert perfect.scores()["sek"] == perfect.scores()["scd_score"] == pytest.approx(1)
    perfect.reset()
    assert perfect.counts.sum() == 0


def test_semantic_change_is_where_its_probability_says() -> None:
    logits = torch.randn(2, 13, 5, 5)
    classes = predict_classes(logits, 0.7, task="semantic")
    probability = change_probability(logits, task="semantic")
    assert torch.equal((classes > 0).all(1), probability > 0.7)
    assert torch.equal((classes > 0).any(1), probability > 0.7)
    histogram = ScoreHistogram()
    histogram.update(logits, torch.zeros(2, 2, 5, 5, dtype=torch.uint8), task="semantic")
    assert histogram.counts.sum() == 50


def test_the_histogram_waits_for_no_device() -> None:
    """On "meta" there are no numbers, so whatever has to look at one fails."""
    histogram = ScoreHistogram("meta")
    histogram.update(torch.zeros(2, 1, 4, 4, device="meta"), torch.zeros(2, 4, 4, device="meta"))
    histogram.update(torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, 4, 4, device="meta"))
    assert histogram.counts.device.type == "meta"
