"""Losses over logits (B, K, H, W) and class indices (B, H, W), 255 = ignore; each returns a scalar.

    CombinedIoULoss       bce_weight * BCE + iou_weight * (1 - soft IoU)      K = 1
    MultiClassIoULoss     ce_weight * CE + iou_weight * (1 - mean soft IoU)   K > 1

Every term is a mean over the images of the batch of a value of that image alone. So one batch of
8, two processes with 4 each and two accumulated batches of 4 have the same loss and gradient.
Sums run in float32 whatever autocast says: half precision overflows at 65,504, and a 256 x 256
patch has 65,536 pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_io import IGNORE


def soft_iou(probability: Tensor, target: Tensor, valid: Tensor, smooth: float) -> Tensor:
    """Return the soft IoU of each image.

    (sum p t + s) / (sum (p + t - p t) + s), Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22.
    Without changed pixels it is s / (sum p + s): 1 when nothing is claimed, lower with every false
    alarm, and finite when every pixel is ignored.

    Args:
        probability: (B, ...) float32 in [0, 1].
        target: same shape, 0 or 1.
        valid: same shape, 0 where the pixel does not count.
        smooth: s, in pixels.

    Returns:
        (B,) float32 in (0, 1].
    """
    probability, target = probability * valid, target * valid
    intersection = (probability * target).flatten(1).sum(1)
    union = (probability + target).flatten(1).sum(1) - intersection
    return (intersection + smooth) / (union + smooth)


class CombinedIoULoss(nn.Module):
    """Binary cross-entropy plus soft IoU: BCE places each pixel, IoU weighs the rare class.

    Args:
        bce_weight: factor of the cross-entropy, averaged over an image's valid pixels.
        iou_weight: factor of 1 - soft IoU of the change class.
        smooth: pixels added to both sides of the IoU's fraction. It sets how hard an image without
            change is on false alarms: half the loss at `smooth` claimed pixels.
    """

    def __init__(
        self, bce_weight: float = 1.0, iou_weight: float = 1.0, smooth: float = 64.0
    ) -> None:
        super().__init__()
        self.bce_weight = bce_weight
        self.iou_weight = iou_weight
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, 1, H, W) of any float type with target (B, H, W), 0, 1 or 255."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.squeeze(1).float()
            valid = (target != IGNORE).float()
            change = (target == 1).float()
            bce = F.binary_cross_entropy_with_logits(logits, change, reduction="none") * valid
            bce = bce.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
            iou = soft_iou(logits.sigmoid(), change, valid, self.smooth)
            return (self.bce_weight * bce + self.iou_weight * (1 - iou)).mean()


class MultiClassIoULoss(nn.Module):
    """Cross-entropy plus soft IoU, averaged over the classes that are present in an image.

    Args:
        ce_weight: factor of the cross-entropy, averaged over an image's valid pixels.
        iou_weight: factor of 1 - soft IoU.
        smooth: pixels added to both sides of the IoU's fraction.
    """

    def __init__(
        self, ce_weight: float = 1.0, iou_weight: float = 1.0, smooth: float = 64.0
    ) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        self.iou_weight = iou_weight
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K, H, W) of any float type with target (B, H, W), below K or 255."""
        with torch.autocast(logits.device.type, enabled=False):
            logits, num_classes = logits.float(), logits.shape[1]
            valid = (target != IGNORE).float()
            ce = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")
            ce = ce.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)
            probability = logits.softmax(1)
            classes = torch.arange(num_classes, device=target.device).view(1, -1, 1, 1)
            members = (target.unsqueeze(1) == classes).float()  # (B, K, H, W)
            iou = torch.stack(
                [
                    soft_iou(probability[:, k], members[:, k], valid, self.smooth)
                    for k in range(num_classes)
                ],
                dim=1,
            )
            is_present = members.flatten(2).amax(2)  # (B, K)
            miss = ((1 - iou) * is_present).sum(1) / is_present.sum(1).clamp(min=1)
            return (self.ce_weight * ce + self.iou_weight * miss).mean()


def build_loss(num_classes: int, pixel_weight: float, iou_weight: float) -> nn.Module:
    """Return the loss for a model of `num_classes` (1 is binary)."""
    kind = CombinedIoULoss if num_classes == 1 else MultiClassIoULoss
    return kind(pixel_weight, iou_weight)
