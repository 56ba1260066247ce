import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from losses import CombinedIoULoss, build_loss, soft_iou


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


def test_multi_class_contract() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (4, 16, 16), generator=generator).to(torch.uint8)
    target[0] = 0
    target[1, 5:] = 255
    right = F.one_hot(target.long().clamp(max=2), 3).movedim(-1, 1) * 40.0
    loss = build_loss()
    assert loss(right, target).item() == pytest.approx(0, abs=1e-6)
    assert loss(-right, target).item() > 10
    logits = torch.randn(4, 3, 16, 16, generator=generator)
    parts = [loss(x, t) for x, t in zip(logits.split(1), target.split(1), strict=True)]
    torch.testing.assert_close(loss(logits, target), torch.stack(parts).mean())
    assert loss(logits.half(), target).isfinite()
    everything = torch.full((1, 16, 16), 255)
    assert loss(logits[:1], everything).item() == 0
