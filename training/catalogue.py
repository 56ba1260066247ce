"""What `--backbone`, `--fusion` and `--loss` can be, and what each costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from losses import LOSSES
from model import build_model, count_parameters
from networks.encoders import ENCODERS, TIMM
from networks.fusion import FUSIONS

SIDE = 256  # pixels


def catalogue() -> str:
    """Return the tables of `python main.py --list`."""
    lines = [f"--backbone, with --fusion concat{'M parameters':>22}{'GFLOP a pair':>15}"]
    lines += [_row(name, *cost(name)) for name in ENCODERS]
    lines.append(f"  {TIMM}NAME, if timm is installed (requirements-zoo.txt)")
    lines.append(f"\n--fusion, with --backbone resnet50{'M parameters':>16}{'GFLOP a pair':>15}")
    lines += [_row(name, *cost(fusion=name)) for name in FUSIONS]
    lines.append(f"\n--loss\n  {', '.join(LOSSES)}, or a sum such as bce_iou+focal")
    lines.append(
        f"\nForward passes, {SIDE} x {SIDE}, two operations for a multiplication with an addition."
    )
    return "\n".join(lines)


def cost(backbone: str = "resnet50", fusion: str = "concat") -> tuple[float, float]:
    """Return the parameters in millions and the GFLOP of one pair, without computing anything."""
    with torch.device("meta"):
        model = build_model(backbone=backbone, fusion=fusion, freeze_backbone=False).eval()
        image = torch.empty(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image, image)
    return count_parameters(model)[1] / 1e6, counter.get_total_flops() / 1e9


def _row(name: str, parameters: float, operations: float) -> str:
    return f"  {name:32}{parameters:16.1f}{operations:15.1f}"
