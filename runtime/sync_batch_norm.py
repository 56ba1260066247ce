"""BatchNorm over the whole batch where several processes each hold a part of it.

    x        (N, C, H, W)        of this process
    mean, variance    (C,)       of all processes: as if there was one, with the batch in one piece

torch.nn.SyncBatchNorm wants GPUs; this runs anywhere, with parts of different size. It is a
`BatchNorm2d`: its state dict is the same, and in eval mode it is nothing else.
BatchNorm, arXiv:1502.03167; means and variances of parts, Chan et al., doi:10.2307/2683386.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from runtime.distributed import all_reduce_, rank, world_size


class SyncBatchNorm(nn.BatchNorm2d):
    """A `BatchNorm2d` whose training statistics are those of all processes together."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W); every process has to call this, as often as the others."""
        if not self.training:
            return super().forward(x)
        mean, variance, count = whole_statistics(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, count, self.eps)


def synchronize(model: nn.Module) -> None:
    """Turn every BatchNorm that learns into a `SyncBatchNorm`, in place; its tensors stay."""
    if world_size() == 1:
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and any(p.requires_grad for p in module.parameters()):
            module.__class__ = SyncBatchNorm


@torch.no_grad()
def whole_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance (C,) and the number () of values, over all processes."""
    variance, mean = torch.var_mean(
        x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0
    )
    count = mean.new_tensor([x.numel() // len(mean)])
    parts = mean.new_zeros(world_size(), 2 * len(mean) + 1)  # a row of each process
    parts[rank()] = torch.cat([mean, variance, count])
    all_reduce_(parts)
    means, variances, counts = parts.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    whole = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - whole).square())).sum(0) / total
    return whole, spread, total


class _Normalize(torch.autograd.Function):
    """The gradient that torch's own BatchNorm has, with its two sums taken over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # sums over (N, H, W) of gradient * (x - mean) / std and of gradient, each (C,)
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([of_weight, of_bias])
        all_reduce_(sums)
        slope, shift = sums / count
        inverse_std = (variance + ctx.eps).rsqrt()
        scale = weight * inverse_std
        # scale * (gradient - shift - slope * (x - mean) / std), a sum in x and gradient
        by_x = -scale * slope * inverse_std
        constant = -scale * shift - by_x * mean
        columns = (t.to(x.dtype).view(1, -1, 1, 1) for t in (constant, by_x, scale))
        constant, by_x, scale = columns
        of_x = torch.addcmul(constant, by_x, x).addcmul_(scale, gradient)
        return of_x, of_weight, of_bias, None, None, None, None
