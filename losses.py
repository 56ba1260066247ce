"""Losses over logits and class indices, 255 = ignore; each returns a scalar: the table is `LOSSES`.

    bce_iou    bce_weight * CE + iou_weight * (1 - soft IoU)       the default, `CombinedIoULoss`
    ce         CE                                                 binary (BCE) or softmax
    dice       1 - soft Dice                                      V-Net, arXiv:1606.04797
    focal      -(1 - p)^2 log p, p of the true class              arXiv:1708.02002
    a+b        their sum

    change      logits (B, K, H, W), target (B, H, W): K = 1 is binary, else class 0 is "no change"
    semantic    logits (B, 1 + 2K, H, W), target (B, 2, H, W): `SemanticLoss` around one of these

Every term is a mean over the images of the batch of a value of that image alone. So one batch of
8, two processes with 4 each and two accumulated batches of 4 have the same loss and gradient.
Overlaps are of the change class (K = 1), or a mean over the classes that are present in an image.
Sums run in float32 whatever autocast says: half precision overflows at 65,504, and a 256 x 256
patch has 65,536 pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import split_semantic
from pairs.images import IGNORE
from runtime.errors import UserError

SMOOTH = 64.0  # pixels, see `CombinedIoULoss`


def soft_iou(probability: Tensor, target: Tensor, valid: Tensor, smooth: float) -> Tensor:
    """Return the soft IoU of each image.

    (sum p t + s) / (sum (p + t - p t) + s), Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22.
    Without changed pixels it is s / (sum p + s): 1 when none is predicted, lower with every false
    alarm, and finite when every pixel is ignored.

    Args:
        probability: (B, ...) float32 in [0, 1].
        target: same shape, 0 or 1.
        valid: same shape, 0 where the pixel does not count.
        smooth: s, in pixels.

    Returns:
        (B,) float32 in (0, 1].
    """
    intersection, total = _overlap(probability, target, valid)
    return (intersection + smooth) / (total - intersection + smooth)


def soft_dice(probability: Tensor, target: Tensor, valid: Tensor, smooth: float) -> Tensor:
    """Return the soft Dice of each image, (2 sum p t + s) / (sum p + sum t + s); as `soft_iou`."""
    intersection, total = _overlap(probability, target, valid)
    return (2 * intersection + smooth) / (total + smooth)


def cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each image over its valid pixels.

    Args:
        logits: (B, K, H, W) float32; K = 1 is a sigmoid's, else a softmax's.
        target: (B, H, W) class indices, 255 = ignore.
        weights: (classes,) of each class's pixels; the mean is a weighted one.

    Returns:
        (B,) float32; 0 where every pixel is ignored.
    """
    valid = (target != IGNORE).float()
    entropy = _pixel_entropy(logits, target)
    if weights is not None:
        valid = valid * weights[target.clamp(max=len(weights) - 1).long()]
    return _mean_over(entropy, valid)


class CombinedIoULoss(nn.Module):
    """Cross-entropy plus soft IoU: the first places each pixel, IoU weighs the rare class.

    Args:
        bce_weight: factor of the cross-entropy, averaged over an image's valid pixels.
        iou_weight: factor of 1 - soft IoU.
        smooth: pixels added to both sides of the IoU's fraction. It sets how hard an image without
            change is on false alarms: half the loss at `smooth` predicted pixels. Far above an
            image's changed pixels, an error weighs the same in each, as in the IoU of a split.
        class_weights: of the cross-entropy, one per class.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        bce_weight: float = 1.0,
        iou_weight: float = 1.0,
        smooth: float = SMOOTH,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.bce_weight = bce_weight
        self.iou_weight = iou_weight
        self.smooth = smooth
        self.register_buffer("class_weights", _tensor(class_weights), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K, H, W) of any float type with target (B, H, W)."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = _precise(logits)
            entropy = cross_entropy(logits, target, self.class_weights)
            miss = _mean_miss(soft_iou, logits, target, self.smooth)
            return (self.bce_weight * entropy + self.iou_weight * miss).mean()


class CrossEntropyLoss(nn.Module):
    """Cross-entropy alone, over an image's valid pixels.

    Args:
        class_weights: one per class.
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weights", _tensor(class_weights), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K, H, W) of any float type with target (B, H, W)."""
        with torch.autocast(logits.device.type, enabled=False):
            return cross_entropy(_precise(logits), target, self.class_weights).mean()


class DiceLoss(nn.Module):
    """1 - soft Dice.

    Args:
        smooth: pixels added to both sides of the fraction, see `CombinedIoULoss`.
    """

    def __init__(self, smooth: float = SMOOTH) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K, H, W) of any float type with target (B, H, W)."""
        with torch.autocast(logits.device.type, enabled=False):
            return _mean_miss(soft_dice, _precise(logits), target, self.smooth).mean()


class FocalLoss(nn.Module):
    """Cross-entropy in which a pixel counts the less, the surer its true class is.

    Args:
        gamma: of (1 - p)^gamma; 0 is the plain cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K, H, W) of any float type with target (B, H, W)."""
        with torch.autocast(logits.device.type, enabled=False):
            entropy = _pixel_entropy(_precise(logits), target)  # -log p
            # -expm1(-x) is 1 - p without its rounding to 0 where p is almost 1
            focal = (-torch.expm1(-entropy)) ** self.gamma * entropy
            return _mean_over(focal, (target != IGNORE).float()).mean()


class SumLoss(nn.Module):
    """The sum of losses."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Add up what the parts say."""
        return torch.stack([part(logits, target) for part in self.parts]).sum()


class SemanticLoss(nn.Module):
    """Of from-to change: where it changed, what was there at each date, and that both agree.

        change(logits) + (CE(before) + CE(after)) / 2 + consistency

    CE looks at changed pixels alone, as labels name classes only there. The consistency looks at
    the angle between both dates' class probabilities: 1 - cos where nothing changed, cos where it
    did. Bi-SRNet, doi:10.1109/TGRS.2022.3154390.

    Args:
        change: loss of the change logits (B, 1, H, W).
        class_weights: of the cross-entropy, one per class of land cover.
    """

    class_weights: Tensor | None

    def __init__(self, change: nn.Module, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("class_weights", _tensor(class_weights), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, 1 + 2K, H, W) with target (B, 2, H, W): 0 unchanged, 1 to K, 255."""
        with torch.autocast(logits.device.type, enabled=False):
            change_logits, *dates = split_semantic(_precise(logits))
            changed = target[:, 0].clamp(max=1)
            changed = torch.where(target[:, 0] == IGNORE, target[:, 0], changed)
            entropy = torch.stack(
                [
                    cross_entropy(
                        classes,
                        torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1),
                        self.class_weights,
                    ).mean()
                    for classes, labels in zip(dates, target.int().unbind(1), strict=True)
                ]
            ).mean()
            before, after = (classes.softmax(1) for classes in dates)
            alike = F.cosine_similarity(before, after, dim=1)
            apart = torch.where(changed == 0, 1 - alike, alike)
            consistency = _mean_over(apart, (changed != IGNORE).float()).mean()
            return self.change(change_logits, changed) + entropy + consistency


# (bce_weight, iou_weight, smooth, class_weights) -> loss
LOSSES: dict[str, Callable[[float, float, float, Sequence[float] | None], nn.Module]] = {
    "bce_iou": CombinedIoULoss,
    "ce": lambda _bce, _iou, _smooth, weights: CrossEntropyLoss(weights),
    "dice": lambda *_: DiceLoss(),
    "focal": lambda *_: FocalLoss(),
}


def build_loss(
    name: str = "bce_iou",
    *,
    task: str = "change",
    bce_weight: float = 1.0,
    iou_weight: float = 1.0,
    iou_smooth: float = SMOOTH,
    class_weights: Sequence[float] | None = None,
) -> nn.Module:
    """Return the loss of a name, or the sum of several: "bce_iou+focal".

    Args:
        name: keys of `LOSSES`, joined by "+".
        task: "change", or "semantic": then it is the loss of the change, in a `SemanticLoss`.
        bce_weight: of bce_iou.
        iou_weight: of bce_iou.
        iou_smooth: of bce_iou, in pixels.
        class_weights: of cross-entropies, one per class; for "semantic" of the land cover.

    Raises:
        UserError: an unknown name.
    """
    if unknown := set(name.split("+")) - set(LOSSES):
        raise UserError(
            f"--loss {name}: {', '.join(map(repr, sorted(unknown)))} is none; "
            f"choose of {', '.join(LOSSES)}, or a sum such as bce_iou+focal"
        )
    own_weights = None if task == "semantic" else class_weights
    factors = (bce_weight, iou_weight, iou_smooth)
    parts = [LOSSES[part](*factors, own_weights) for part in name.split("+")]
    loss = parts[0] if len(parts) == 1 else SumLoss(parts)
    return SemanticLoss(loss, class_weights) if task == "semantic" else loss


def balanced_weights(class_pixels: Sequence[int]) -> list[float]:
    """Return a weight for each class, higher for rare ones: a median share over the class's own.

    The shares are of all pixels; of an even number of classes the median is the lower one of the
    middle two. Eigen and Fergus, arXiv:1411.4734, take shares of the images that hold the class.
    A class without pixels gets the largest weight of the others.
    """
    shares = torch.tensor(class_pixels, dtype=torch.float64)
    there = shares > 0
    if not there.any():
        return [1.0] * len(shares)
    weights = shares[there].median() / shares.clamp(min=1)
    weights[~there] = weights[there].max()
    return weights.tolist()


def _tensor(weights: Sequence[float] | None) -> Tensor | None:
    return None if weights is None else torch.tensor(weights, dtype=torch.float32)


def _precise(logits: Tensor) -> Tensor:
    """Return float32, or float64 if it is that."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _overlap(probability: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum p t, sum p + sum t) of each image, each (B,)."""
    probability, target = probability * valid, target * valid
    intersection = (probability * target).flatten(1).sum(1)
    return intersection, (probability + target).flatten(1).sum(1)


def _pixel_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return (B, H, W), anything finite where the pixel is ignored."""
    if logits.shape[1] == 1:
        change = (target == 1).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), change, reduction="none")
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")


def _mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean (B,) of (B, H, W), weighted; 0 where all weights are 0."""
    total = valid.flatten(1).sum(1)
    return (values * valid).flatten(1).sum(1) / torch.where(total > 0, total, 1)


def _mean_miss(
    overlap: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    logits: Tensor,
    target: Tensor,
    smooth: float,
) -> Tensor:
    """Return 1 - overlap of each image (B,): of change, or the mean over the classes present."""
    valid = (target != IGNORE).float()
    if logits.shape[1] == 1:
        change = (target == 1).float()
        return 1 - overlap(logits.squeeze(1).sigmoid(), change, valid, smooth)
    probability, num_classes = logits.softmax(1), logits.shape[1]
    classes = torch.arange(num_classes, device=target.device).view(1, -1, 1, 1)
    members = (target.unsqueeze(1) == classes).float()  # (B, K, H, W)
    of_class = [
        overlap(probability[:, k], members[:, k], valid, smooth) for k in range(num_classes)
    ]
    is_present = members.flatten(2).amax(2)  # (B, K)
    return ((1 - torch.stack(of_class, dim=1)) * is_present).sum(1) / is_present.sum(1).clamp(min=1)
