import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.fusion import (
    FUSIONS,
    WINDOWS,
    ConcatFusion,
    ConvNormReLU,
    CrossAttention,
    CrossAttentionFusion,
)

STRIDES = (2, 4, 8, 16, 32)
SYMMETRIC = {"diff"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def dates(*shape: int) -> tuple[Tensor, Tensor]:
    before, after = torch.randn(2, *shape)
    return before.requires_grad_(), after.requires_grad_()


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("stride", STRIDES)
def test_shape_and_a_gradient_for_both_dates(name: str, stride: int) -> None:
    fusion = FUSIONS[name](6, 4, stride)
    before, after = dates(2, 6, 5, 7)
    fused = fusion(before, after)
    assert fused.shape == (2, 4, 5, 7)
    fused.square().sum().backward()
    for date in (before, after):
        assert date.grad is not None and date.grad.abs().sum() > 0
    for parameter in fusion.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("name", FUSIONS)
def test_exchanging_the_dates_matters_unless_symmetric(name: str) -> None:
    fusion = FUSIONS[name](6, 4, 16).eval()
    before, after = dates(1, 6, 5, 7)
    is_equal = torch.allclose(fusion(before, after), fusion(after, before))
    assert is_equal == (name in SYMMETRIC)


@pytest.mark.parametrize("name", ["concat", "concat_diff", "cross_attention"])
def test_starts_as_a_difference_that_sees_nothing_where_nothing_changed(name: str) -> None:
    fusion = FUSIONS[name](6, 4, 16).eval()
    same = torch.randn(1, 6, 5, 7)
    assert fusion(same, same).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 20), (1, 1)])
def test_attention_treats_both_dates_alike(size: tuple[int, int]) -> None:
    attention = CrossAttention(6, 32, window=8)
    nn.init.ones_(attention.gamma)
    before, after = dates(2, 6, *size)
    first, second = attention(before, after)
    other_second, other_first = attention(after, before)
    torch.testing.assert_close(first, other_first)
    torch.testing.assert_close(second, other_second)


@pytest.mark.parametrize("stride", WINDOWS)
def test_without_attention_it_is_the_concatenation(stride: int) -> None:
    fusion = FUSIONS["cross_attention"](6, 4, stride).eval()
    assert isinstance(fusion, CrossAttentionFusion)
    before, after = dates(1, 6, 9, 20)
    concat = ConcatFusion(6, 4).eval()
    concat.load_state_dict(fusion.concat.state_dict())
    with torch.no_grad():
        assert 0 < (fusion(before, after) - concat(before, after)).abs().max() < 0.05
        nn.init.zeros_(fusion.attention.gamma)
        assert torch.equal(fusion(before, after), concat(before, after))


def naive_attention(attention: CrossAttention, a: Tensor, b: Tensor) -> Tensor:
    """Return gamma * output of one date (C, h, w) looking at the other, position by position."""

    def tokens(x: Tensor) -> Tensor:
        x = attention.project(x[None])
        x = (x + attention.position(x))[0].flatten(1).T
        return attention.norm(x)

    width = attention.query_key_value.in_features
    own, other = (attention.query_key_value(tokens(x)).split(width, dim=1) for x in (a, b))
    high, wide = a.shape[1:]
    rows, columns = math.ceil(high / attention.window), math.ceil(wide / attention.window)
    side, breadth = math.ceil(high / rows), math.ceil(wide / columns)
    seen = torch.zeros(high * wide, width)
    for position in range(high * wide):
        y, x = divmod(position, wide)
        within = [
            v * wide + u
            for v in range(y // side * side, min(high, (y // side + 1) * side))
            for u in range(x // breadth * breadth, min(wide, (x // breadth + 1) * breadth))
        ]
        for head in torch.arange(width).split(32):
            scores = other[1][within][:, head] @ own[0][position, head] / 32**0.5
            seen[position, head] = F.softmax(scores, dim=0) @ other[2][within][:, head]
    return attention.gamma * attention.output(seen).T.unflatten(1, (high, wide))


@pytest.mark.parametrize("size", [(4, 4), (5, 11)])
@torch.no_grad()
def test_fast_attention_is_the_naive_one(size: tuple[int, int]) -> None:
    attention = CrossAttention(6, 64, window=4)
    nn.init.ones_(attention.gamma)
    before, after = (x.detach() for x in dates(1, 6, *size))
    first, second = attention(before, after)
    torch.testing.assert_close(
        first[0], before[0] + naive_attention(attention, before[0], after[0])
    )
    torch.testing.assert_close(
        second[0], after[0] + naive_attention(attention, after[0], before[0])
    )


def test_a_look_is_a_distribution_within_the_window() -> None:
    attention = CrossAttention(6, 64, window=4)
    before, after = (x.detach() for x in dates(2, 6, 5, 11))
    seen = attention.look(before, after, row=4, column=10)
    assert seen.shape == (2, 5, 11)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(2))
    # windows of 3 x 4 positions; the last one holds rows 3 and 4, columns 8 to 10
    assert (seen[:, 3:, 8:] > 0).all()
    assert seen[:, :3].sum() == 0 and seen[:, :, :8].sum() == 0
    after[:, :, 3, 9] += 10
    assert not torch.allclose(attention.look(before, after, row=4, column=10), seen)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_several_maps_are_trained_as_their_concatenation(kernel_size: int) -> None:
    block = ConvNormReLU(9, 4, kernel_size)
    whole = copy.deepcopy(block)
    maps = [torch.randn(2, channels, 5, 7, requires_grad=True) for channels in (4, 3, 2)]
    copies = [x.detach().clone().requires_grad_() for x in maps]
    apart, together = block(*maps), whole(torch.cat(copies, dim=1))
    torch.testing.assert_close(apart, together)
    for result in (apart, together):
        result.square().sum().backward()
    for ours, theirs in zip(
        (*maps, *block.parameters()), (*copies, *whole.parameters()), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.state_dict(), whole.state_dict())
