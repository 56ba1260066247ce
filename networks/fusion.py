"""How the features of both dates become one map, scale by scale: the table is `FUSIONS`.

    before, after    (B, C, h, w)     one scale of the encoder, each date
    fused            (B, D, h, w)     what the decoder gets

    concat             [A, B]                   FC-Siam-conc, doi:10.1109/ICIP.2018.8451652
    diff               |A - B|                  FC-Siam-diff, the same; blind to the order
    concat_diff        [A, B, |A - B|]
    cross_attention    [A', B'], each date having looked at the other; fine scales as concat

All end in a 1x1 convolution, BatchNorm and ReLU. A 3x3 there costs a third of the training speed,
and one of full width at 1/32 alone would hold 75 M weights; the decoder's 3x3s look at the
neighbourhood anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Side of the windows, in positions, within which dates look at each other, by stride. With crops of
# 256 x 256 both coarse scales are seen whole. At stride 4 and 2 it would cost ten times the rest.
WINDOWS = {8: 8, 16: 16, 32: 16}
HEAD_WIDTH = 32  # channels of an attention head


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size, BatchNorm and ReLU; of several maps, concatenated."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, *maps: Tensor) -> Tensor:
        """Turn maps (B, C_i, h, w) into one (B, D, h, w)."""
        if len(maps) == 1:
            return super().forward(maps[0])
        if self.training and maps[0].is_cpu:
            return self._forward_apart(*maps)
        return super().forward(torch.cat(maps, dim=1))

    def _forward_apart(self, *maps: Tensor) -> Tensor:
        """Add up a convolution of each map, which is that of their concatenation.

        The gradient of a concatenated map is a part of each pixel: on a CPU what follows would go
        through it pixel by pixel.
        """
        parts: Any = self
        conv, norm, activation = parts
        widths = [x.shape[1] for x in maps]
        weights = conv.weight.split(widths, dim=1)
        first, *rest = map(conv._conv_forward, maps, weights, [None] * len(maps))
        for other in rest:
            first = first.add_(other)
        return activation(norm(first))


class ConcatFusion(nn.Module):
    """Concatenate both dates and mix them.

    It starts as a difference, W (before - after), from where it learns to use both dates: from
    scratch, the first epochs then find changes instead of looking for a way to compare.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = ConvNormReLU(2 * in_channels, out_channels, kernel_size=1)
        _start_as_difference(self.mix, in_channels)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Fuse two (B, C, h, w) maps into (B, D, h, w)."""
        return self.mix(before, after)


class DiffFusion(nn.Module):
    """Mix the absolute difference: which date came first cannot be told."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = ConvNormReLU(in_channels, out_channels, kernel_size=1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Fuse two (B, C, h, w) maps into (B, D, h, w)."""
        return self.mix((before - after).abs())


class ConcatDiffFusion(nn.Module):
    """Mix both dates and their absolute difference; it starts as `ConcatFusion` does."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mix = ConvNormReLU(3 * in_channels, out_channels, kernel_size=1)
        _start_as_difference(self.mix, in_channels)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Fuse two (B, C, h, w) maps into (B, D, h, w)."""
        return self.mix(before, after, (before - after).abs())


class CrossAttention(nn.Module):
    """Let every position of one date look at the other date, within a window; both ways alike.

        x  = LayerNorm(a + DWConv3x3(a)),  a = 1x1(A)          (B, h w, d), positions by DWConv
        A' = A + gamma * 1x1(softmax(q(x_a) k(x_b)^T / sqrt) v(x_b)),  B' with a and b exchanged

    Maps larger than a window are cut into windows of equal size, padded at the end where need be;
    padding is never looked at. So the cost grows with the area, as a convolution's.
    LayerScale's gamma (arXiv:2103.17239) starts at 1e-3: at first the dates hardly look.

    Args:
        channels: C of the maps.
        width: d, a multiple of `HEAD_WIDTH`.
        window: side of a window in positions.
    """

    def __init__(self, channels: int, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.num_heads = width // HEAD_WIDTH
        self.project = nn.Conv2d(channels, width, kernel_size=1)
        self.position = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-3))

    def forward(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (B, C, h, w) of each date into the same, having seen the other."""
        both = torch.cat([before, after])
        query, key, value, mask, grid = self._attention_inputs(both)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        seen = seen.transpose(1, 2).flatten(2)  # (2B windows, T, d)
        seen = _from_windows(self.output(seen), both.shape[0], grid, both.shape[-2:])
        both = (both + self.gamma * seen).to(both.dtype)
        before, after = both.split([before.shape[0], after.shape[0]])
        return before, after

    @torch.no_grad()
    def look(self, before: Tensor, after: Tensor, row: int, column: int) -> Tensor:
        """Return where position (row, column) of `before` looks in `after`, for pictures.

        Args:
            before: (B, C, h, w).
            after: the same shape.
            row: below h.
            column: below w.

        Returns:
            (B, h, w) float32, mean over the heads, which sums to 1.
        """
        both = torch.cat([before, after])
        query, key, _, mask, grid = self._attention_inputs(both)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.float().softmax(-1).mean(1)  # (2B windows, T, T)
        rows, columns, high, wide = grid
        window = row // high * columns + column // wide
        position = row % high * wide + column % wide
        weights = weights.view(len(both), rows * columns, *weights.shape[1:])
        seen = torch.zeros(len(both), rows * columns, high * wide, 1, device=both.device)
        seen[:, window, :, 0] = weights[:, window, position]
        seen = _from_windows(seen.flatten(0, 1), len(both), grid, both.shape[-2:])
        return seen[: len(before), 0]

    def _attention_inputs(
        self, both: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, int, int, int]]:
        """Return query, key, value (2B windows, heads, T, d / heads), the mask and the grid."""
        x = self.project(both)
        x = (x + self.position(x)).permute(0, 2, 3, 1)
        x = self.norm(x)
        height, width = x.shape[1:3]
        rows, columns = _divide_up(height, self.window), _divide_up(width, self.window)
        high, wide = _divide_up(height, rows), _divide_up(width, columns)
        grid = (rows, columns, high, wide)
        windows = _to_windows(x, grid)
        heads = self.query_key_value(windows).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # each date asks the other: exchange the halves of the batch
        half = key.shape[0] // 2
        key, value = (torch.cat([t[half:], t[:half]]) for t in (key, value))
        if (rows * high, columns * wide) == (height, width):
            return query, key, value, None, grid
        inside = _to_windows(x.new_ones(1, height, width, 1), grid).squeeze(-1).bool()
        return query, key, value, inside[:, None, None].repeat(both.shape[0], 1, 1, 1), grid


class CrossAttentionFusion(nn.Module):
    """`ConcatFusion` of dates that have looked at each other; with gamma = 0 it is that fusion."""

    def __init__(self, in_channels: int, out_channels: int, window: int) -> None:
        super().__init__()
        self.concat = ConcatFusion(in_channels, out_channels)
        width = max(HEAD_WIDTH, out_channels // HEAD_WIDTH * HEAD_WIDTH)
        self.attention = CrossAttention(in_channels, width, window)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Fuse two (B, C, h, w) maps into (B, D, h, w)."""
        return self.concat(*self.attention(before, after))


def _cross_attention(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride not in WINDOWS:
        return ConcatFusion(in_channels, out_channels)
    return CrossAttentionFusion(in_channels, out_channels, WINDOWS[stride])


# (in_channels, out_channels, stride) -> a module (before, after) -> fused
FUSIONS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "concat": lambda c, d, _: ConcatFusion(c, d),
    "diff": lambda c, d, _: DiffFusion(c, d),
    "concat_diff": lambda c, d, _: ConcatDiffFusion(c, d),
    "cross_attention": _cross_attention,
}


def _start_as_difference(mix: nn.Sequential, in_channels: int) -> None:
    """Set the weights of the first 2C input channels to W and -W."""
    with torch.no_grad():
        weight = next(mix.parameters())
        first, second = weight[:, : 2 * in_channels].chunk(2, dim=1)
        nn.init.kaiming_normal_(first, mode="fan_out", nonlinearity="relu")
        second.copy_(-first)


def _divide_up(number: int, by: int) -> int:
    """Round a quotient up; ONNX would round that of a negative number towards zero."""
    return (number + by - 1) // by


def _to_windows(x: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """Cut (N, h, w, d), padded with zeros, into (N windows, T, d)."""
    rows, columns, high, wide = grid
    height, width, depth = x.shape[1:]
    x = F.pad(x, (0, 0, 0, columns * wide - width, 0, rows * high - height))
    x = x.view(-1, rows, high, columns, wide, depth).transpose(2, 3)
    return x.reshape(-1, high * wide, depth)


def _from_windows(
    windows: Tensor, num: int, grid: tuple[int, int, int, int], size: tuple[int, ...]
) -> Tensor:
    """Put (N windows, T, d) together again as (N, d, h, w)."""
    rows, columns, high, wide = grid
    x = windows.view(num, rows, columns, high, wide, -1).transpose(2, 3)
    x = x.reshape(num, rows * high, columns * wide, -1)
    return x[:, : size[0], : size[1]].permute(0, 3, 1, 2)
