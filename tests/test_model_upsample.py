"""A network that sees the dates at twice their size is the same network on larger dates."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_predict import checkpoint_of
from tiny import TINY, install_tiny
from torch import Tensor

import export
from model import FUSIONS, SemanticUNet, build_model, load_model
from networks.fused import prediction_copy
from networks.sliding_window import predict_logits
from runtime.checkpoint import read_checkpoint, save_checkpoint
from runtime.errors import UserError
from visualize import attention_maps


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    install_tiny(monkeypatch)
    torch.manual_seed(0)


def pair(*size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randint(0, 256, (2, *size), dtype=torch.uint8, generator=generator)
    return before, after


@pytest.mark.parametrize(("backbone", "task", "num_classes", "num_logits", "fusion"), [
    *((TINY, *task, fusion) for fusion in FUSIONS
      for task in (("change", 1, 1), ("change", 4, 4), ("semantic", 6, 13))),
    ("efficientnet_lite0", "change", 1, 1, "concat"),
    ("swin_t", "change", 1, 1, "cross_attention"),
])  # fmt: skip
@torch.no_grad()
def test_logits_have_the_size_of_the_image(
    backbone: str, task: str, num_classes: int, num_logits: int, fusion: str
) -> None:
    model = build_model(
        task=task, backbone=backbone, fusion=fusion, num_classes=num_classes, upsample=2
    ).eval()
    for size in ((1, 1), (1, 40), (33, 70)):
        before, after = pair(2, 3, *size)
        logits = model(before, after)
        assert logits.shape == (2, num_logits, *size)
        assert logits.isfinite().all()
        shared = model.compare(model.encode(before), model.encode(after))
        torch.testing.assert_close(shared[..., : size[0], : size[1]], logits)


@pytest.mark.parametrize(("task", "num_classes"), [("change", 1), ("change", 3), ("semantic", 2)])
@torch.no_grad()
def test_it_is_the_network_on_larger_dates_with_four_logits_averaged(
    task: str, num_classes: int
) -> None:
    plain = build_model(task=task, backbone=TINY, num_classes=num_classes).eval()
    large = build_model(task=task, backbone=TINY, num_classes=num_classes, upsample=2).eval()
    state = plain.state_dict()
    for name in [name for name in state if "head" in name]:
        state[name] = state[name].unflatten(0, (-1, 4)).mean(1)  # an averaged head is one logit
    large.load_state_dict(state)
    before, after = pair(2, 3, 37, 50)
    twice = [F.interpolate(date / 255, scale_factor=2, mode="bilinear") for date in (before, after)]
    expected = F.avg_pool2d(plain(*twice), 2)
    torch.testing.assert_close(large(before, after), expected, rtol=1e-4, atol=1e-5)


def test_the_head_starts_at_few_changes() -> None:
    bias = build_model(backbone=TINY, upsample=2).head.bias
    assert bias is not None and bias.tolist() == pytest.approx([math.log(0.05 / 0.95)])
    four = build_model(backbone=TINY, num_classes=4, upsample=2).head.bias
    assert four is not None and len(four) == 4 and four.abs().max() <= 1
    semantic = build_model(task="semantic", backbone=TINY, num_classes=4, upsample=2)
    assert isinstance(semantic, SemanticUNet)
    assert semantic.head.bias is not None and len(semantic.head.bias) == 1
    assert len(semantic.semantic_head.weight) == 4


@pytest.mark.parametrize("task", ["change", "semantic"])
def test_its_decoder_learns(task: str) -> None:
    model = build_model(task=task, backbone=TINY, num_classes=1, upsample=2).train()
    model(*pair(2, 3, 32, 32)).sum().backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None and p.grad.isfinite().all() for p in learning)


def test_a_checkpoint_keeps_it_and_one_without_it_has_1(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path / "best.pt", backbone=TINY, upsample=2)
    assert load_model(path).upsample == 2
    old = checkpoint_of(tmp_path / "old.pt", backbone=TINY)
    assert "upsample" not in read_checkpoint(old)["model_kwargs"]
    assert load_model(old).upsample == 1
    for wrong, says in ((3, "upsample is 3; give 1 or 2"), ("2", r"upsample is '2'")):
        state = read_checkpoint(path)
        state["model_kwargs"]["upsample"] = wrong
        save_checkpoint(tmp_path / "wrong.pt", state)
        with pytest.raises(UserError, match=says):
            load_model(tmp_path / "wrong.pt")
    state["model_kwargs"]["upsample"] = 1
    save_checkpoint(tmp_path / "wrong.pt", state)
    with pytest.raises(UserError, match="head"):
        load_model(tmp_path / "wrong.pt")


@pytest.mark.parametrize("flips", [False, True])
@torch.no_grad()
def test_windows_are_predicted_as_alone(flips: bool) -> None:
    model = build_model(task="semantic", backbone=TINY, num_classes=2, upsample=2).eval()
    before, after = pair(3, 64, 96)
    found = predict_logits(model, before, after, window=32, overlap=0, flips=flips, amp="off")
    assert found.shape == (5, 64, 96)
    for top in (0, 32):
        for left in (0, 32, 64):
            place = (slice(None), slice(top, top + 32), slice(left, left + 32))
            views = [(), (-1,), (-2,), (-2, -1)] if flips else [()]
            alone = [
                model(before[place][None].flip(axes), after[place][None].flip(axes)).flip(axes)
                for axes in views
            ]
            expected = torch.stack(alone).mean(0)[0]
            torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-5)
    whole = predict_logits(model, before, after, window=96, overlap=0, amp="off")
    expected = model(before[None], after[None])[0]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_fast_copy_computes_the_same() -> None:
    model = build_model(backbone="resnet18", upsample=2).eval()
    before, after = pair(1, 3, 64, 96)
    twin = prediction_copy(model, torch.float32, before, after)
    assert twin is not model
    torch.testing.assert_close(twin(before, after), model(before, after), rtol=1e-3, atol=1e-4)


def test_where_it_looks_is_drawn_in_pixels_of_the_dates() -> None:
    model = build_model(backbone=TINY, fusion="cross_attention", upsample=2)
    maps = attention_maps(model, *pair(3, 50, 90), row=49, column=89)
    assert list(maps) == [4, 8, 16] and all(x.shape == (50, 90) for x in maps.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_is_exported(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    checkpoint = checkpoint_of(tmp_path / "best.pt", backbone=TINY, upsample=2)
    worst = export.export({"checkpoint": str(checkpoint)})
    assert max(worst.values()) < 1e-4
