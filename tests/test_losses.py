import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import (
    LOSSES,
    CombinedIoULoss,
    DiceLoss,
    FocalLoss,
    balanced_weights,
    build_loss,
    soft_iou,
)
from runtime.errors import UserError


def confident(target: Tensor, sign: float = 1.0) -> Tensor:
    return sign * (target.clamp(max=1).float().unsqueeze(1) * 40 - 20)


@pytest.fixture
def target() -> Tensor:
    return (torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.uint8)


def test_by_hand_on_four_pixels() -> None:
    logits = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])  # every probability is 1/2
    target = torch.tensor([[[1, 0], [0, 255]]])
    # BCE: log 2. IoU over three pixels, s = 1: (0.5 + 1) / (1 + 1.5 - 0.5 + 1) = 1/2
    loss = CombinedIoULoss(bce_weight=2.0, iou_weight=3.0, smooth=1.0)(logits, target)
    assert loss.item() == pytest.approx(2 * math.log(2) + 3 * 0.5)


def test_bce_term_is_torch_own(target: Tensor) -> None:
    logits = torch.randn(4, 1, 16, 16)
    ours = CombinedIoULoss(1.0, 0.0)(logits, target)
    theirs = F.binary_cross_entropy_with_logits(logits.squeeze(1), target.float())
    torch.testing.assert_close(ours, theirs)


def test_perfect_is_better_than_wrong(target: Tensor) -> None:
    loss = CombinedIoULoss()
    assert loss(confident(target), target).item() == pytest.approx(0, abs=1e-6)
    assert loss(confident(target, -1), target).item() > 10


@pytest.mark.fault("D14")
def test_empty_mask_is_finite_and_punishes_false_alarms() -> None:
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    claims = torch.full((1, 1, 16, 16), -20.0)
    losses = []
    for claimed in (0, 1, 4):
        claims[..., :claimed] = 20.0
        losses.append(CombinedIoULoss(0.0, 1.0, smooth=64)(claims, target).item())
    # claiming 16 and 64 pixels: 1 - 64 / (64 + n)
    assert losses == pytest.approx([0, 0.2, 0.5], abs=1e-5)


@pytest.mark.parametrize("smooth", [1.0, 1000.0])
def test_with_many_pixels_of_smoothing_a_miss_weighs_the_same_in_each_image(smooth: float) -> None:
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[0, 0, :2] = target[1, 0, :8] = 1
    logits = confident(target)
    logits[:, :, 0, 0] = -20.0  # one pixel of 2 and one of 8 is missed
    loss = build_loss("bce_iou", bce_weight=0, iou_smooth=smooth)
    few, many = (loss(logits[i : i + 1], target[i : i + 1]).item() for i in range(2))
    assert few / many == pytest.approx((8 + smooth) / (2 + smooth), rel=1e-3)  # 3, and 1.006


def test_all_ignored_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    loss = CombinedIoULoss()(logits, torch.full((2, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_ignored_pixels_do_not_count(target: Tensor) -> None:
    loss, logits = CombinedIoULoss(), torch.randn(4, 1, 16, 16)
    ignored = target.clone()
    ignored[:, 4:] = 255
    changed = logits.clone()
    changed[:, :, 4:] = 99.0
    assert torch.equal(loss(logits, ignored), loss(changed, ignored))
    torch.testing.assert_close(
        loss(logits, ignored), loss(logits[:, :, :4], target[:, :4]), rtol=1e-6, atol=1e-6
    )


def test_a_batch_is_the_mean_of_its_parts(target: Tensor) -> None:
    logits = torch.randn(4, 1, 16, 16)
    target[0] = 0
    target[1, 3:] = 255
    loss = CombinedIoULoss()
    parts = [loss(x, t) for x, t in zip(logits.split(2), target.split(2), strict=True)]
    torch.testing.assert_close(loss(logits, target), torch.stack(parts).mean())


def test_gradient_is_right() -> None:
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[[0, 1, 1], [0, 255, 0], [1, 0, 0]]] * 2)
    probability = torch.sigmoid
    valid, change = (target != 255).double(), (target == 1).double()
    assert torch.autograd.gradcheck(
        lambda x: soft_iou(probability(x.squeeze(1)), change, valid, 2.0), logits
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    target = torch.ones(1, 512, 512, dtype=torch.uint8)  # 262,144 pixels; float16 ends at 65,504
    logits = torch.full((1, 1, 512, 512), 5.0, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = CombinedIoULoss()(logits, target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, CombinedIoULoss()(logits.float(), target))


def test_multi_class_by_hand_on_four_pixels() -> None:
    logits = torch.zeros(1, 3, 2, 2)  # every probability is 1/3
    target = torch.tensor([[[2, 0], [0, 255]]])
    # CE: log 3. IoU over three pixels, s = 1: class 0 (2/3 + 1) / (2 + 1 - 2/3 + 1) = 1/2,
    # class 2 (1/3 + 1) / (1 + 1 - 1/3 + 1) = 1/2; class 1 is absent and does not count
    loss = CombinedIoULoss(bce_weight=2.0, iou_weight=3.0, smooth=1.0)(logits, target)
    assert loss.item() == pytest.approx(2 * math.log(3) + 3 * 0.5)


# ---- the contract of every loss, alone and in a sum, of two classes and of more

NAMES = [*LOSSES, "bce_iou+focal"]
KINDS = [("change", 1), ("change", 3), ("semantic", 3)]


def random_target(task: str, num_classes: int, generator: torch.Generator) -> Tensor:
    """Labels (4, 16, 16) or (4, 2, 16, 16): one image without change, one half ignored."""
    labels = max(num_classes, 2) if task == "change" else num_classes + 1
    shape = (4, 2, 16, 16) if task == "semantic" else (4, 1, 16, 16)
    target = torch.randint(0, labels, shape, generator=generator).to(torch.uint8)
    if task == "semantic":
        target[:, 1] = torch.where(target[:, 0] == 0, 0, target[:, 1].clamp(min=1))
    target[0] = 0
    target[1, :, 5:] = 255
    return target if task == "semantic" else target.squeeze(1)


def right_logits(target: Tensor, task: str, num_classes: int) -> Tensor:
    """Logits that are sure of the truth."""
    if task == "change" and num_classes == 1:
        return confident(target)
    if task == "change":
        return (
            F.one_hot(target.long().clamp(max=num_classes - 1), num_classes).movedim(-1, 1) * 40.0
        )
    change = confident(target[:, 0])
    # where nothing changed the labels name no class: say the same at both dates
    classes = torch.where(target == 255, 0, target.long() - 1).clamp(min=0)
    dates = F.one_hot(classes, num_classes).movedim(-1, 2) * 40.0
    return torch.cat([change, *dates.unbind(1)], dim=1)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def kind(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


def test_perfect_is_better_than_wrong_by_every_loss(name: str, kind: tuple[str, int]) -> None:
    task, num_classes = kind
    target = random_target(task, num_classes, torch.Generator().manual_seed(0))
    if task == "semantic":  # both dates alike where it changed is not consistent
        before, after = target.unbind(1)
        target[:, 1] = torch.where((before == after) & (before % 255 > 0), before % 3 + 1, after)
    right = right_logits(target, task, num_classes)
    loss = build_loss(name, task=task)
    assert loss(right, target).item() == pytest.approx(0, abs=1e-5)
    assert loss(-right, target).item() > 0.3
    assert loss(torch.zeros_like(right), target).item() > loss(right, target).item() + 0.05


def test_every_loss_of_a_batch_is_the_mean_of_its_parts(name: str, kind: tuple[str, int]) -> None:
    task, num_classes = kind
    generator = torch.Generator().manual_seed(0)
    target = random_target(task, num_classes, generator)
    logits = torch.randn(right_logits(target, task, num_classes).shape, generator=generator)
    loss = build_loss(name, task=task)
    parts = [loss(x, t) for x, t in zip(logits.split(1), target.split(1), strict=True)]
    torch.testing.assert_close(loss(logits, target), torch.stack(parts).mean())


def test_every_loss_is_finite_where_there_is_nothing(name: str, kind: tuple[str, int]) -> None:
    task, num_classes = kind
    shape = (2, 2, 8, 8) if task == "semantic" else (2, 8, 8)
    channels = right_logits(torch.zeros(shape, dtype=torch.uint8), task, num_classes).shape[1]
    for value in (0, 255):
        target = torch.full(shape, value, dtype=torch.uint8)
        logits = torch.randn(2, channels, 8, 8, requires_grad=True)
        loss = build_loss(name, task=task)(logits, target)
        loss.backward()
        assert logits.grad is not None and logits.grad.isfinite().all()
        assert loss.isfinite()
        if value == 255 and name not in ("dice",):
            assert loss.item() == pytest.approx(0, abs=1e-6)
            assert logits.grad.abs().sum() == 0


def test_no_ignored_pixel_moves_a_loss(name: str, kind: tuple[str, int]) -> None:
    task, num_classes = kind
    generator = torch.Generator().manual_seed(0)
    target = random_target(task, num_classes, generator)
    logits = torch.randn(right_logits(target, task, num_classes).shape, generator=generator)
    other = logits.clone()
    other[1, :, 5:] = 99.0
    loss = build_loss(name, task=task)
    assert torch.equal(loss(logits, target), loss(other, target))


def test_the_gradient_of_every_loss_is_right(name: str, kind: tuple[str, int]) -> None:
    task, num_classes = kind
    generator = torch.Generator().manual_seed(0)
    target = random_target(task, num_classes, generator)[..., 3:7, 3:7]
    shape = right_logits(target, task, num_classes).shape
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = build_loss(name, task=task)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_loss_overflows_in_half_precision(
    name: str, kind: tuple[str, int], dtype: torch.dtype
) -> None:
    task, num_classes = kind
    target = torch.ones(
        (1, 2, 512, 512) if task == "semantic" else (1, 512, 512), dtype=torch.uint8
    )
    logits = (right_logits(target, task, num_classes) / 20).to(dtype)
    loss = build_loss(name, task=task)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(logits, target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(logits.float(), target))


def test_a_sum_is_the_sum_of_its_parts(target: Tensor) -> None:
    logits = torch.randn(4, 1, 16, 16)
    parts = [build_loss(name, bce_weight=0.5)(logits, target) for name in ("bce_iou", "focal")]
    both = build_loss("bce_iou+focal", bce_weight=0.5)(logits, target)
    torch.testing.assert_close(both, torch.stack(parts).sum())


def test_dice_and_focal_by_hand_on_four_pixels() -> None:
    logits = torch.zeros(1, 1, 2, 2)  # every probability is 1/2
    target = torch.tensor([[[1, 0], [0, 255]]])
    # Dice over three pixels, s = 1: (2 * 0.5 + 1) / (1.5 + 1 + 1) = 4/7; focal: (1/2)^2 log 2
    assert DiceLoss(smooth=1.0)(logits, target).item() == pytest.approx(3 / 7)
    assert FocalLoss()(logits, target).item() == pytest.approx(math.log(2) / 4)


def test_focal_is_torchvision_s(target: Tensor) -> None:
    from torchvision.ops import sigmoid_focal_loss

    logits = 5 * torch.randn(4, 1, 16, 16)
    theirs = sigmoid_focal_loss(logits.squeeze(1), target.float(), alpha=-1, reduction="mean")
    torch.testing.assert_close(FocalLoss()(logits, target), theirs)


def test_class_weights_weigh_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (1, 16, 16), generator=generator)
    target[0, 2:4] = 255
    logits = torch.randn(1, 3, 16, 16, generator=generator)
    weights = [0.2, 1.0, 3.0]
    theirs = F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(build_loss("ce", class_weights=weights)(logits, target), theirs)


def test_balanced_weights_by_hand() -> None:
    assert balanced_weights([900, 90, 10]) == pytest.approx([0.1, 1, 9])
    assert balanced_weights([900, 90, 10, 0]) == pytest.approx([0.1, 1, 9, 9])
    assert balanced_weights([0, 0]) == [1, 1]


def test_semantic_by_hand() -> None:
    # two pixels: one changed from class 1 to class 2, one did not; all logits 0
    target = torch.tensor([[[[1, 0]], [[2, 0]]]])
    logits = torch.zeros(1, 1 + 2 * 2, 1, 2)
    # BCE log 2; CE log 2 of each date; both dates alike everywhere: cos 1 where it changed, else 0
    expected = math.log(2) + math.log(2) + 0.5
    assert build_loss("ce", task="semantic")(logits, target).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["", "bce", "bce_iou+", "dice,focal"])
def test_unknown_losses_are_named(name: str) -> None:
    with pytest.raises(UserError, match=r"--loss .* choose of bce_iou, ce, dice, focal"):
        build_loss(name)
