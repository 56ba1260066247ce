"""Losses over logits (B, K, H, W) and class indices (B, H, W), 255 = ignore; each returns a scalar.

    CombinedIoULoss    bce_weight * BCE + iou_weight * (1 - soft IoU)        K = 1

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
