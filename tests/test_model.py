import copy
from collections.abc import Iterable

import pytest
import torch
from tiny import TINY, install_tiny
from torch import Tensor, nn

from losses import CombinedIoULoss
from model import ENCODERS, FUSIONS, WIDTHS, Encoder, SiameseUNet, build_model
from networks.encoders import LITE
from runtime.errors import UserError


def pair(*size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, after = torch.randint(0, 256, (2, *size), dtype=torch.uint8, generator=generator)
    return before, after


# one of each family always, the rest where there is time
BACKBONES = [
    name
    if name in ("resnet18", "resnet50", LITE, "swin_t", "swin_v2_t", "convnext_tiny")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in ENCODERS
]  # fmt: skip


@pytest.fixture(scope="module")
def small() -> SiameseUNet:
    torch.manual_seed(0)
    return build_model(backbone="resnet18", freeze_backbone=True).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_encoder_keeps_its_word_on_channels_and_strides(name: str) -> None:
    encoder = ENCODERS[name](name).eval()
    for size in ((64, 64), (33, 70)):
        with torch.no_grad():
            features = encoder(torch.rand(2, 3, *size))
        height, width = (-(-side // encoder.multiple) * encoder.multiple for side in size)
        promised = zip(encoder.channels, encoder.strides, strict=True)
        for feature, (channels, stride) in zip(features, promised, strict=True):
            assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_encoder_changes_neither_weights_nor_statistics(name: str) -> None:
    model = build_model(backbone=name, freeze_backbone=True).train()
    before = copy.deepcopy(model.encoder.state_dict())
    rest = copy.deepcopy(model.decoder.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    target = torch.randint(0, 2, (2, 32, 32))
    CombinedIoULoss()(model(*pair(2, 3, 32, 32)), target).backward()
    optimizer.step()
    assert not model.encoder.training
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any(not torch.equal(v, rest[k]) for k, v in model.decoder.state_dict().items())


def test_unfrozen_encoder_learns_and_counts() -> None:
    model = build_model(backbone="resnet18", freeze_backbone=False).train()
    model(*pair(2, 3, 32, 32)).sum().backward()
    grad = model.encoder.backbone.get_parameter("conv1.weight").grad
    assert grad is not None and grad.abs().sum() > 0
    assert model.encoder.backbone.get_buffer("bn1.num_batches_tracked") == 1


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("backbone", "task", "num_classes", "num_logits"), [
    (TINY, "change", 1, 1), (TINY, "change", 3, 3), (TINY, "semantic", 6, 13),
    ("resnet18", "change", 1, 1), ("swin_t", "change", 1, 1),
])  # fmt: skip
def test_logits_have_the_size_of_the_image(
    backbone: str,
    task: str,
    num_classes: int,
    num_logits: int,
    fusion: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_tiny(monkeypatch)  # narrow decoders, and a network in which tasks differ as in any
    model = build_model(task=task, backbone=backbone, fusion=fusion, num_classes=num_classes).eval()
    for size in ((1, 1), (33, 70)):
        with torch.no_grad():
            logits = model(*pair(2, 3, *size))
        assert logits.shape == (2, num_logits, *size)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


def test_bytes_and_floats_are_the_same_image(small: SiameseUNet) -> None:
    before, after = pair(1, 3, 64, 64)
    with torch.no_grad():
        from_bytes = small(before, after)
        from_floats = small(before.float() / 255, after.float() / 255)
    torch.testing.assert_close(from_bytes, from_floats)


def test_normalisation_is_that_of_torchvision(small: SiameseUNet) -> None:
    from torchvision.transforms.v2.functional import normalize

    before, _ = pair(1, 3, 32, 32)
    image = before.float() / 255
    expected = normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert_same_maps(small.encoder(image), small.encoder.backbone(expected).values(), 1e-5)


def assert_same_maps(ours: Iterable[Tensor], plain: Iterable[Tensor], tolerance: float) -> None:
    """Compare by the error's root mean square, as a share of the map's."""
    for our, reference in zip(ours, plain, strict=True):
        error = (our.float() - reference).square().mean().sqrt()
        assert error <= tolerance * reference.square().mean().sqrt()


def trained_like_encoder(name: str = "resnet50") -> Encoder:
    """A frozen encoder whose BatchNorms do something, as trained ones do."""
    torch.manual_seed(0)
    encoder = ENCODERS[name](name)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    encoder.freeze()
    return encoder


def plain_features(encoder: Encoder, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(encoder.backbone((image - encoder.mean) / encoder.std).values())


def test_folded_channels_last_and_half_precision_agree_with_the_plain_encoder() -> None:
    encoder, image = trained_like_encoder(), torch.rand(2, 3, 64, 64)
    plain = plain_features(encoder, image)
    encoder.to(memory_format=torch.channels_last)
    assert_same_maps(encoder(image.to(memory_format=torch.channels_last)), plain, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoder(image)
    assert {m.dtype for m in maps} == {torch.bfloat16}
    assert_same_maps(maps, plain, 0.03)  # bfloat16 has 8 bits: 0.4 % a rounding, 53 layers


def test_the_folded_encoder_is_never_stale_and_never_saved() -> None:
    encoder, image = trained_like_encoder("resnet18"), torch.rand(1, 3, 32, 32)
    names = list(encoder.state_dict())
    encoder(image)
    assert list(encoder.state_dict()) == names
    assert_same_maps(copy.deepcopy(encoder)(image), plain_features(encoder, image), 1e-5)
    with torch.no_grad():
        encoder.backbone.get_parameter("conv1.weight").mul_(2)
    assert_same_maps(encoder(image), plain_features(encoder, image), 1e-5)
    encoder.backbone.load_state_dict({k: v / 2 for k, v in encoder.backbone.state_dict().items()})
    assert_same_maps(encoder(image), plain_features(encoder, image), 1e-5)
    encoder.double()
    assert encoder(image.double())[0].dtype == torch.float64
    with torch.inference_mode():
        fresh = trained_like_encoder("resnet18")
        assert_same_maps(fresh(image), plain_features(fresh, image), 1e-5)


def test_both_dates_share_the_encoder_and_one_pass_is_two(small: SiameseUNet) -> None:
    before, after = (x.float() / 255 for x in pair(2, 3, 64, 64))
    with torch.no_grad():
        at_once = small(before, after)
        features = [small.encoder(before), small.encoder(after)]
        fused = [f(a, b) for f, a, b in zip(small.fusions, *features, strict=True)]
        x = fused.pop()
        for block in small.decoder:
            x = block(x, fused.pop())
        apart = nn.functional.pixel_shuffle(small.head(x), 2)
    torch.testing.assert_close(at_once, apart, rtol=1e-4, atol=1e-5)


def test_a_pair_is_predicted_the_same_alone_and_in_a_batch(small: SiameseUNet) -> None:
    before, after = pair(3, 3, 64, 64)
    with torch.no_grad():
        together = small(before, after)
        alone = torch.cat([small(before[i : i + 1], after[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_lean_widths_hold_the_size_down() -> None:
    model = build_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert 23_508_032 + trained == total  # torchvision's ResNet50 without its classifier
    assert trained < 5e6
    assert list(WIDTHS) == list(model.encoder.strides)


@pytest.mark.parametrize("wrong", [{"backbone": "resnet51"}, {"fusion": "sum"}])
def test_unknown_name_lists_the_known(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match="choose one of (resnet18|concat)"):
        build_model(**wrong)  # type: ignore[arg-type]
