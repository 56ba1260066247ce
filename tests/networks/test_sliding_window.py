import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY
from torch import Tensor, nn

from metrics import change_probability
from model import build_model
from networks.sliding_window import blending_weights, predict_bands, predict_logits, starts
from predict import predict_scene

pytestmark = pytest.mark.usefixtures("tiny_network")


class Pointwise(nn.Module):
    """Two logits of each pixel alone, so windows and the whole must agree."""

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        before, after = before.float() / 255, after.float() / 255
        return torch.stack([before.mean(1) - after.mean(1), after[:, 0] * before[:, 2]], dim=1)


class MeanOfWindow(nn.Module):
    """The same logit all over a window, so that every seam is a step."""

    def forward(self, before: Tensor, _after: Tensor) -> Tensor:
        return before.float().mean((1, 2, 3), keepdim=True).expand_as(before[:, :1]) / 255


def scene(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    before, after = torch.randint(0, 256, (2, 3, height, width), generator=draw, dtype=torch.uint8)
    return before, after


sizes = st.integers(1, 70)


@pytest.mark.fault("U5")
@settings(deadline=None, max_examples=30)
@given(sizes, sizes, st.integers(1, 40), st.integers(0, 39), st.integers(1, 5), st.booleans())
def test_windows_and_whole_agree_at_any_size(
    height: int, width: int, window: int, overlap: int, batch_size: int, flips: bool
) -> None:
    before, after = scene(height, width)
    expected = Pointwise()(before[None], after[None])[0]
    logits = predict_logits(
        Pointwise(), before, after, window=window, overlap=min(overlap, window - 1),
        batch_size=batch_size, flips=flips, amp="off",
    )  # fmt: skip
    assert logits.shape == (2, height, width) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)


@pytest.mark.fault("U5")
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 79))
def test_every_pixel_is_covered_and_weights_add_up_to_1(
    length: int, window: int, overlap: int
) -> None:
    found = starts(length, window, min(overlap, window - 1))
    size = min(window, length)
    weights = blending_weights(length, found, size)
    total = torch.zeros(length)
    for start, of_window in zip(found, weights, strict=True):
        total[start : start + size] += of_window
    assert found == sorted(set(found)) and found[-1] + size == length
    assert (weights > 0).all()
    torch.testing.assert_close(total, torch.ones(length), rtol=0, atol=1e-6)


@pytest.mark.fault("U5")
@settings(deadline=None, max_examples=25)
@given(sizes, sizes, st.integers(1, 40), st.integers(0, 39))
def test_bands_hold_every_row_once_and_strips_are_no_taller_than_a_window(
    height: int, width: int, window: int, overlap: int
) -> None:
    before, after = scene(height, width)
    shares: list[float] = []

    def read(top: int, bottom: int) -> tuple[Tensor, Tensor]:
        assert 0 <= top < bottom <= height and bottom - top <= window
        return before[:, top:bottom], after[:, top:bottom]

    bands = list(
        predict_bands(
            Pointwise(), read, height, width, window=window, overlap=min(overlap, window - 1),
            after_batch=shares.append,
        )
    )  # fmt: skip
    rows = [top + i for top, logits in bands for i in range(logits.shape[1])]
    assert rows == list(range(height))
    assert sum(shares) == pytest.approx(1)


def test_one_window_is_the_model_itself() -> None:
    torch.manual_seed(0)
    model = build_model(backbone=TINY, freeze_backbone=False).eval()
    before, after = scene(50, 70)
    with torch.no_grad():
        expected = change_probability(model(before[None], after[None]))[0]
    found = predict_scene(model, before, after, window=70, overlap=0, amp="off")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1


def test_no_seam_where_windows_meet() -> None:
    before = torch.zeros(3, 64, 256, dtype=torch.uint8)
    before[..., 96:] = 255

    def largest_step(overlap: int) -> float:
        how = {"window": 64, "overlap": overlap, "amp": "off"}
        return predict_logits(MeanOfWindow(), before, before, **how).diff().abs().max().item()

    assert largest_step(0) == pytest.approx(0.5)
    assert largest_step(32) < 0.05


def test_flips_make_the_prediction_follow_the_mirrored_scene() -> None:
    torch.manual_seed(0)
    model = build_model(backbone=TINY, freeze_backbone=False)
    before, after = scene(64, 64)

    def mirrored(flips: bool) -> tuple[Tensor, Tensor]:
        plain = predict_scene(model, before, after, flips=flips, amp="off")
        turned = predict_scene(model, before.flip(-1), after.flip(-1), flips=flips, amp="off")
        return plain, turned.flip(-1)

    torch.testing.assert_close(*mirrored(True), rtol=0, atol=1e-5)
    assert not torch.allclose(*mirrored(False), atol=1e-3)


@pytest.mark.parametrize("was_training", [True, False])
def test_model_is_left_as_it_was(was_training: bool) -> None:
    model = build_model(backbone=TINY, freeze_backbone=False).train(was_training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bands = predict_bands(
        model, lambda a, b: scene(64, 64), 64, 64, window=64, overlap=0, amp="off"
    )
    next(bands)
    assert not model.training
    bands.close()  # type: ignore[attr-defined]
    assert model.training == was_training and torch.is_grad_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_layouts_and_dtypes_of_an_image_agree() -> None:
    before, after = scene(40, 50)
    expected = predict_scene(Pointwise(), before, after)
    as_arrays = predict_scene(
        Pointwise(),
        np.ascontiguousarray(before.permute(1, 2, 0).numpy()),
        np.ascontiguousarray(after.permute(1, 2, 0).numpy()),
    )
    assert torch.equal(expected, as_arrays)
    model = build_model(backbone=TINY, freeze_backbone=False)
    floats = predict_scene(model, before.float() / 255, after.float() / 255, amp="off")
    torch.testing.assert_close(floats, predict_scene(model, before, after, amp="off"))


@pytest.mark.fault("U2")
@pytest.mark.parametrize(
    ("before", "options", "says"),
    [
        (torch.zeros(3, 8, 9, dtype=torch.uint8), {}, r"before is \(3, 8, 9\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), {}, r"\(8, 8\); give \(H, W, 3\)"),
        (torch.zeros(3, 8, 8, dtype=torch.float64), {}, "float64; give uint8"),
        (torch.zeros(3, 8, 8), {}, "give both alike"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), {"window": 8, "overlap": 8}, "give 0 to 7"),
    ],
)
def test_scenes_that_do_not_fit_are_refused(before: Tensor, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        predict_scene(Pointwise(), before, torch.zeros(3, 8, 8, dtype=torch.uint8), **options)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_semantic_model_gives_its_change(num_classes: int) -> None:
    model = build_model(
        task="semantic", backbone=TINY, num_classes=num_classes, freeze_backbone=False
    )
    before, after = scene(40, 50)
    logits = predict_logits(model, before, after, window=32, overlap=8, amp="off")
    found = predict_scene(model, before, after, window=32, overlap=8, amp="off")
    assert logits.shape == (1 + 2 * num_classes, 40, 50)
    torch.testing.assert_close(found, logits[0].sigmoid())
