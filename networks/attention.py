"""A picture of cross-attention: where a place at one date looks at the other."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from model import SiameseUNet
from networks.fusion import CrossAttention
from visualize import Picture


def plot_attention(
    model: SiameseUNet, before: Tensor, after: Tensor, row: int, column: int
) -> Picture:
    """Draw where a pixel of `before` looks in `after`, at each scale that attends.

    Args:
        model: with `cross_attention` as its fusion; its mode is as before afterwards.
        before: (3, H, W) uint8.
        after: the same.
        row: of the pixel, below H.
        column: of the pixel, below W.

    Raises:
        ValueError: the model does not attend.
    """
    seen = attention_maps(model, before, after, row, column)
    if not seen:
        raise ValueError("no scale of this model attends; train with --fusion cross_attention")
    figure = Picture(figsize=(3 * (1 + len(seen)), 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, 1 + len(seen))
    first.imshow(before.cpu().permute(1, 2, 0).numpy())
    first.set_title("before, and a place in it", fontsize=10)
    for axis, (stride, weights) in zip(others, seen.items(), strict=True):
        axis.imshow(after.cpu().permute(1, 2, 0).numpy())
        axis.imshow(weights.numpy(), cmap="inferno", alpha=0.6)
        axis.set_title(f"where it looks after, 1/{stride}", fontsize=10)
    for axis in (first, *others):
        axis.plot(column, row, "+", color="cyan", markersize=12, markeredgewidth=2)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


@torch.no_grad()
def attention_maps(
    model: SiameseUNet, before: Tensor, after: Tensor, row: int, column: int
) -> dict[int, Tensor]:
    """Return, by stride, the weights (H, W) float32 of what `plot_attention` draws.

    Every map is the mean over its heads, and its largest value is 1.
    """
    maps: dict[int, Tensor] = {}
    size = before.shape[-2:]

    def watch(stride: int) -> Any:
        def look(attention: CrossAttention, dates: tuple[Tensor, Tensor]) -> None:
            weights = attention.look(*dates, row // stride, column // stride)
            # a map may be a little larger than the image, whose sides were rounded up
            large = F.interpolate(weights[None], scale_factor=stride, mode="nearest")[0, 0]
            maps[stride] = (large / large.max())[: size[0], : size[1]].cpu()

        return look

    hooks = [
        module.register_forward_pre_hook(watch(stride))
        for fusion, stride in zip(model.fusions, model.encoder.strides, strict=True)
        for module in fusion.modules()
        if isinstance(module, CrossAttention)
    ]
    was_training, device = model.training, next(model.parameters()).device
    try:
        model.eval()(before[None].to(device), after[None].to(device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return maps
