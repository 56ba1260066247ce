"""The attention picture: the right scales, whole distributions, nothing left behind."""

import pytest
import torch

from model import build_model
from networks.fusion import CrossAttention
from visualize import attention_maps, plot_attention


def dates(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny"])
def test_every_coarse_scale_is_drawn(size: tuple[int, int], backbone: str) -> None:
    model = build_model(backbone=backbone, fusion="cross_attention").train()
    before, after = dates(*size)
    maps = attention_maps(model, before, after, row=size[0] - 1, column=size[1] - 1)
    assert list(maps) == [8, 16, 32]
    for weights in maps.values():
        assert weights.shape == size
        assert weights.min() >= 0 and weights.max() <= 1
    figure = plot_attention(model, before, after, row=10, column=20)
    assert len(figure.axes) == 4
    assert model.training
    attending = [module for module in model.modules() if isinstance(module, CrossAttention)]
    assert len(attending) == 3
    assert not any(module._forward_pre_hooks for module in attending)


def test_a_model_that_does_not_attend_is_named() -> None:
    before, after = dates(32, 32)
    with pytest.raises(ValueError, match="--fusion cross_attention"):
        plot_attention(build_model(backbone="resnet18"), before, after, row=0, column=0)
