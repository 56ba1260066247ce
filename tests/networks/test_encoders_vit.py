from pathlib import Path

import pytest
import torch

from model import build_model
from networks.encoders import build_encoder
from networks.weights import load_weights

timm = pytest.importorskip("timm")
NAME = "vit_tiny_patch16_224"


@pytest.mark.parametrize("name", [NAME, "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_a_plain_vit_gives_four_scales_of_timms_own_features(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(f"timm:{name}").eval()
    image = torch.rand(2, 3, 33, 70)  # padded to 64 x 96
    found = encoder(image)
    assert encoder.strides == (4, 8, 16, 32)
    assert [m.shape[2:] for m in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    whole = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    state = encoder.backbone.state_dict()
    own = {k.removeprefix("network.model."): v for k, v in state.items()}
    missing, surplus = whole.load_state_dict(own, strict=False)
    assert not surplus and all("norm" in key for key in missing)
    image = torch.rand(1, 3, 64, 96)
    (tokens,) = whole.forward_intermediates(
        (image - encoder.mean) / encoder.std, indices=[-4], intermediates_only=True
    )
    expected = torch.nn.functional.layer_norm(tokens.permute(0, 2, 3, 1), tokens.shape[1:2])
    torch.testing.assert_close(encoder(image)[2], expected.permute(0, 3, 1, 2))


def test_a_frozen_vit_stays_and_the_rest_learns() -> None:
    model = build_model(backbone=f"timm:{NAME}", freeze_backbone=True).train()
    before, after = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
    logits = model(before, after)
    assert logits.shape == (2, 1, 64, 64)
    logits.square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.head.weight.grad is not None


def test_a_vit_takes_a_file_in_timms_names(tmp_path: Path) -> None:
    whole = timm.create_model(NAME)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder(f"timm:{NAME}")
    load_weights(encoder, f"timm:{NAME}", str(tmp_path / "w.pth"))
    found = encoder.backbone.get_parameter("network.model.blocks.3.mlp.fc1.weight")
    assert torch.equal(found, whole.get_parameter("blocks.3.mlp.fc1.weight"))
