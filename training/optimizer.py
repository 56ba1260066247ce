"""AdamW over what learns, and its learning rate: linear warm-up, then cosine to zero.

AdamW, arXiv:1711.05101; cosine, arXiv:1608.03983.
"""

import math

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from model import SiameseUNet


def build_optimizer(
    model: SiameseUNet, *, lr: float, weight_decay: float, encoder_factor: float = 0.1
) -> AdamW:
    """Optimize everything that requires gradients, the encoder at `encoder_factor` of the rate.

    Fused: one kernel for all parameters, and it skips a step whose gradient is not finite.
    """
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    ours = {id(p) for p in model.encoder.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups = [{"params": rest, "lr": lr}]
    if encoder:
        groups.append({"params": encoder, "lr": lr * encoder_factor})
    return AdamW(groups, weight_decay=weight_decay, fused=True)


def warmup_cosine(optimizer: AdamW, *, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return the schedule, stepped once per update."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, factor)
