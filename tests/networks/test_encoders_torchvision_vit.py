from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from model import FUSIONS, SiameseUNet
from networks.encoders import Encoder, build_encoder
from networks.weights import load_weights


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder("vit_b_16").eval()


@pytest.fixture(scope="module")
def whole() -> Any:
    return torchvision.models.vit_b_16().eval()


@torch.no_grad()
def test_the_maps_are_torchvisions_own_features(encoder: Encoder, whole: Any) -> None:
    own = whole.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert own.missing_keys == ["heads.head.weight", "heads.head.bias"] and not own.unexpected_keys
    tokens: list[Tensor] = []
    for module in (whole.encoder.layers[8], whole.encoder.ln):
        module.register_forward_hook(lambda _m, _i, output: tokens.append(output))
    image = torch.rand(1, 3, 224, 224)
    whole((image - encoder.mean) / encoder.std)
    deep, last = (F.layer_norm(x[:, 1:], x.shape[-1:]).mT.unflatten(2, (14, 14)) for x in tokens)
    found = encoder(image)
    torch.testing.assert_close(found[2], deep, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[3], F.max_pool2d(last, 2), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_any_size_gives_four_scales(encoder: Encoder) -> None:
    found = encoder(torch.rand(2, 3, 33, 70))  # padded to 64 x 96
    assert [m.shape[1:] for m in found] == [(768, 16, 24), (768, 8, 12), (768, 4, 6), (768, 2, 3)]


def test_every_weight_learns_where_it_may(encoder: Encoder) -> None:
    maps = encoder(torch.rand(1, 3, 32, 32))
    torch.autograd.backward([m.square().sum() + m.sum() for m in maps])
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


def test_it_takes_torchvisions_file(encoder: Encoder, whole: Any, tmp_path: Path) -> None:
    torch.nn.init.ones_(whole.encoder.layers[3].mlp[0].weight)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    load_weights(encoder, "vit_b_16", str(tmp_path / "w.pth"))
    name = "encoder.layers.encoder_layer_3.mlp.0.weight"
    assert torch.equal(encoder.backbone.get_parameter(name), whole.get_parameter(name))


def test_the_frozen_one_stays_and_the_rest_learns(encoder: Encoder) -> None:
    model = SiameseUNet(encoder, FUSIONS["concat"], 1)
    encoder.freeze()
    before, after = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    model.train()(before, after).square().mean().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert model.head.weight.grad is not None
