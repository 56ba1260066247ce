"""The mean over mirror images of a pair, which is what `--flips` is in every script."""

from collections.abc import Callable, Sequence

from torch import Tensor

VIEWS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))  # the axes that are mirrored

Pairs = Sequence[Sequence[Tensor]]  # before and after (B, 3, H, W) of each


def mean_over_views(ask: Callable[[Pairs], list[Tensor]], pairs: Pairs) -> list[Tensor]:
    """Return the mean logits (B, C, H, W) float32 of each pair over it and its mirror images.

    Logits are averaged, not probabilities, so every function of `metrics` takes the result.

    Args:
        ask: gives the logits of each pair; it is called once for each of the four views.
        pairs: before and after (B, 3, H, W) of each.
    """
    totals: list[Tensor] = []
    for axes in VIEWS:
        seen = [x.float().flip(axes) for x in ask([[d.flip(axes) for d in pair] for pair in pairs])]
        totals = [a + b for a, b in zip(totals, seen, strict=True)] if totals else seen
    return [total / len(VIEWS) for total in totals]
