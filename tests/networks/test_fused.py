import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import build_model
from networks import fused
from networks.encoders import Encoder, build_encoder
from networks.fused import Fused, Snapshot, fast_copy, prediction_copy

NAMES = ["resnet18", "resnet50", "efficientnet_lite0", "convnext_tiny", "swin_t"]
TIMM = ["tf_efficientnet_lite0", "mobilenetv3_small_100", "regnety_002", "resnet10t"]
NUM_FUSED = {"resnet18": 20, "resnet50": 53, "efficientnet_lite0": 48, "tf_efficientnet_lite0": 48}


def frozen(name: str) -> Encoder:
    """A frozen encoder whose BatchNorms do something, as trained ones do."""
    torch.manual_seed(0)
    encoder = build_encoder(name)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    encoder.freeze()
    return encoder.to(memory_format=torch.channels_last)


def maps(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, dict) else list(result)


def error(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference, as a share of the map's."""
    gap = (found.float() - exact).square().mean().sqrt()
    return float(gap / exact.square().mean().sqrt())


@pytest.mark.parametrize("name", [*NAMES, *(f"timm:{name}" for name in TIMM)])
@torch.no_grad()
def test_the_copy_computes_the_same(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    network = frozen(name).backbone
    image = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    exact = maps(network(image))
    fast = fast_copy(network, torch.float32, image[:1])
    assert fast is not None
    num_fused = sum(isinstance(module, Fused) for module in fast.modules())
    assert num_fused >= NUM_FUSED.get(name.removeprefix("timm:"), 10)
    for size in ((64, 96), (32, 32), (64, 96)):  # a weight is packed anew for each size
        part = image[..., : size[0], : size[1]]
        for own, other in zip(maps(fast(part)), maps(network(part)), strict=True):
            assert error(own, other) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = fast_copy(network, torch.bfloat16, image[:1])
        assert low is not None
        for own, plain, sharp in zip(maps(low(image)), maps(network(image)), exact, strict=True):
            assert error(own, sharp) <= 1.2 * error(plain, sharp)


@torch.no_grad()
def test_nothing_is_left_after_the_convolutions_of_a_resnet() -> None:
    network = frozen("resnet50").backbone
    fast = fast_copy(network, torch.float32, torch.rand(1, 3, 64, 64))
    assert fast is not None
    kinds = [type(module) for module in fast.modules() if not list(module.children())]
    assert sorted(kind.__name__ for kind in set(kinds)) == ["Fused", "MaxPool2d"]
    assert sum(isinstance(m, Fused) and m.in_place for m in fast.modules()) == 16  # all sums


@torch.no_grad()
def test_a_sum_is_not_written_over_what_is_read_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            a = self.first(x)
            b = self.second(x) + a
            return [a, b, self.second(a) + x]

    network, image = Twice().eval(), torch.rand(1, 3, 8, 8)
    before = image.clone()
    fast = fast_copy(network, torch.float32, image)
    assert fast is not None
    for own, other in zip(fast(image), network(image), strict=True):
        torch.testing.assert_close(own, other)
    assert torch.equal(image, before)
    assert not any(isinstance(m, Fused) and m.in_place for m in fast.modules())


@pytest.mark.parametrize("fault", ["raises", "lies"])
@torch.no_grad()
def test_an_operator_that_changed_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Fused, x: Tensor, other: Tensor | None = None) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no such operator")
        padding, stride, *_ = self.conv
        return nn.functional.conv2d(x, self.weight, self.bias, stride, padding)

    monkeypatch.setattr(Fused, "forward", changed)
    encoder, image = frozen("resnet18"), torch.rand(1, 3, 64, 64)
    fast = fast_copy(encoder.backbone, torch.float32, image)
    assert fast is not None and not any(isinstance(m, Fused) for m in fast.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())  # folded all the same
    for own, other in zip(maps(fast(image)), maps(encoder.backbone(image)), strict=True):
        assert error(own, other) < 1e-5


@torch.no_grad()
def test_a_network_that_cannot_be_followed_computes_by_itself() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x) if x.mean() > 0 else x]

    encoder = Encoder(Odd(), [4], [1])
    encoder.freeze()
    image = torch.rand(1, 3, 8, 8)
    assert fast_copy(encoder.backbone, torch.float32, image) is None
    assert encoder(image + 1)[0].shape == (1, 4, 8, 8)


@torch.no_grad()
def test_a_module_that_cannot_be_followed_stays_whole() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.shape[-1] > 4 else -x

    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Odd(), nn.Conv2d(4, 4, 1)).eval()
    image = torch.rand(1, 3, 8, 8)
    fast = fast_copy(network, torch.float32, image)
    assert fast is not None and sum(isinstance(m, Fused) for m in fast.modules()) == 2
    for side in (8, 4):
        torch.testing.assert_close(fast(image[..., :side]), network(image[..., :side]))


def test_a_snapshot_notices_writes_and_other_tensors() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    changes: list[Any] = [
        lambda: network[0].get_parameter("weight").detach().add_(1),
        lambda: network[1].get_buffer("running_mean").zero_(),
        lambda: setattr(network[0], "weight", nn.Parameter(torch.zeros(4, 3, 1, 1))),
        lambda: setattr(network[0], "bias", None),
        lambda: network.set_submodule("1", nn.BatchNorm2d(4)),
        lambda: network.load_state_dict(copy.deepcopy(network.state_dict())),
    ]
    for change in changes:
        snapshot = Snapshot(network)
        assert snapshot.is_current()
        change()
        assert not snapshot.is_current()


def test_padding_is_that_of_tensorflow() -> None:
    x = torch.ones(1, 1, 4, 5)
    assert fused.pad_same(x, (3, 3), (2, 2)).shape == (1, 1, 5, 7)  # 0 + 1 rows, 1 + 1 columns
    assert fused.pad_same(x, (3, 3), (2, 2))[0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
@torch.no_grad()
def test_a_model_predicts_with_all_of_it_fused(fusion: str, freeze: bool) -> None:
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", fusion=fusion, freeze_backbone=freeze).eval()
    names = list(model.state_dict())
    before, after = torch.randint(0, 256, (2, 2, 3, 64, 96), dtype=torch.uint8)
    twin = prediction_copy(model, torch.float32, before, after)
    assert twin is not model and prediction_copy(model, torch.float32, before, after) is twin
    decoder = twin.get_submodule("decoder")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in decoder.modules())
    assert error(twin(before, after), model(before, after)) < 1e-5
    # the encoder's weights are shared, and the model is as it was
    assert twin.get_submodule("encoder.backbone") is model.encoder.backbone
    assert list(model.state_dict()) == names and model.encoder.frozen is freeze
    model.head.weight.mul_(2)
    again = prediction_copy(model, torch.float32, before, after)
    assert again is not twin and error(again(before, after), model(before, after)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = prediction_copy(model, torch.bfloat16, before, after)
        exact = again(before, after)
        assert error(low(before, after), exact) <= 1.2 * error(model(before, after), exact)


@pytest.mark.parametrize(
    ("name", "number"), [("resnet18", 16), pytest.param("resnet50", 48, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_gpu_is_asked_for_every_relu_after_aligned_channels(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stand-ins for cuDNN's operators; some shortcuts and the first layer are left."""
    asked = []

    def relu(x: Tensor, weight: Tensor, bias: Tensor, *where: Any) -> Tensor:
        stride, padding, dilation, groups = where
        asked.append(x.shape[1])
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(
        x: Tensor, weight: Tensor, other: Tensor, alpha: float, bias: Tensor, *where: Any
    ) -> Tensor:
        stride, padding, dilation, groups = where
        asked.append(x.shape[1])
        return F.relu(alpha * other + F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    monkeypatch.setattr(fused, "_on_gpu", lambda _: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    model = build_model(backbone=name).eval()
    model.encoder.load_state_dict(frozen(name).state_dict())
    before, after = torch.randint(0, 256, (2, 2, 3, 64, 96), dtype=torch.uint8)
    image = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    fast = fast_copy(model.encoder.backbone, torch.float32, image[:1])
    assert fast is not None
    assert sum(isinstance(module, Fused) for module in fast.modules()) == number
    for own, other in zip(maps(fast(image)), maps(model.encoder.backbone(image)), strict=True):
        assert error(own, other) < 1e-5
    asked.clear()
    twin = prediction_copy(model, torch.float32, before, after)
    found = twin(before, after)
    assert error(found, model(before, after)) < 1e-5
    assert twin is not model and len(asked) > number


@torch.no_grad()
def test_a_model_whose_copy_fails_predicts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(backbone="resnet18").eval()
    before, after = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)

    def changed(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(Fused, "forward", changed)
    assert prediction_copy(model, torch.float32, before, after) is model


def test_depthwise_convolutions_learn_in_float32_on_a_cpu() -> None:
    model = build_model(backbone="efficientnet_lite0", freeze_backbone=False).train()
    conv = model.encoder.get_submodule("backbone.blocks.1.0.conv_dw")
    image = torch.rand(2, 96, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(image).dtype == torch.float32
        assert conv.eval()(image).dtype == torch.bfloat16
    loss = conv.train()(image).square().mean()
    loss.backward()
    gradient = conv.get_parameter("weight").grad
    assert gradient is not None and torch.isfinite(gradient).all()
