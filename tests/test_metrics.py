import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import Confusion, ScoreHistogram, change_probability, predict_classes


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
