"""What a training step computes of one batch; on a GPU as one CUDA graph.

A step launches some hundred kernels. A small batch is done sooner than they are launched, so the
GPU waits for Python: on an H100 a step with 8 pairs is 4.7 times as fast as one graph. It is
captured from the very code that runs without it, and compared with that on its first batch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.devices import Precision

Batch = tuple[Tensor, Tensor, Tensor]
WARM_UPS = 3  # of a capture, for all that is done at first use: copies, the choice of algorithms
SLACK = 0.05  # how far a graph's results may be from the step's own; some sums differ in order


class Step:
    """Forward and backward pass.

    Args:
        model: `(before, after) -> logits`.
        criterion: `(logits, target) -> scalar`.
        precision: of the forward pass.
        may_capture: whether batches of one shape may become a CUDA graph. Never done with several
            processes, nor in float16, whose scale changes as it goes.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, precision: Precision, *,
        may_capture: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.criterion, self.precision = model, criterion, precision
        self._may_capture = may_capture and not (
            isinstance(model, DistributedDataParallel) or precision.scaler.is_enabled()
        )
        self._shape: torch.Size | None = None  # of the last batch
        self._graph: _Graph | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients have to stay where they are: zero them, never drop them."""
        return self._graph is not None

    def __call__(
        self, batch: Sequence[Tensor], weight: float = 1.0, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `weight * loss / parts` to that of the parameters.

        Args:
            batch: before and after (B, 3, H, W), and the target, all on one device.
            weight: of this batch among those of other processes.
            parts: batches whose gradients are added up for an update.

        Returns:
            The logits and `weight * loss`; both are valid until the next call.
        """
        before = batch[0]
        is_repeated, self._shape = before.shape == self._shape, before.shape
        if is_repeated and before.is_cuda and self._may_capture and self._is_between_updates():
            self._may_capture = False  # one graph, of the first shape that comes twice in a row
            self._graph = _Graph.captured(self, batch)
        if self._graph and self._graph.fits(batch):
            return self._graph(batch, weight, parts)
        return self.run(batch, weight, parts)

    def _is_between_updates(self) -> bool:
        return all(parameter.grad is None for parameter in self.model.parameters())

    def run(
        self, batch: Sequence[Tensor], weight: float | Tensor, parts: int | Tensor, *,
        casts_once: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Do it, kernel by kernel; `casts_once` has autocast keep what it has cast."""
        before, after, target = batch
        with self.precision.autocast(before.device, cache=casts_once):
            logits = self.model(before, after)
            loss = self.criterion(logits, target) * weight
        self.precision.scaler.scale(loss / parts).backward()
        return logits.detach(), loss.detach()


class _Graph:
    """A captured step: it reads its batch from `inputs` and `factors`, and writes `results`."""

    def __init__(self, step: Step, batch: Sequence[Tensor], random: Tensor) -> None:
        device = batch[0].device
        self.inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in batch]
        self.factors = [torch.ones((), device=device), torch.ones((), device=device)]
        self.values = (1.0, 1)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step.model.zero_grad(set_to_none=False)
                torch.cuda.set_rng_state(random, device)
                usual = step.run(self.inputs, *self.factors, casts_once=False)
        torch.cuda.current_stream(device).wait_stream(side)
        exact = [*usual, _gradient(step.model)]
        del usual
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(device)
        self.graph = torch.cuda.CUDAGraph()
        # a loader that pins memory in its thread may go on, as it would not with "global"
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.results = step.run(self.inputs, *self.factors, casts_once=False)
        # its memory is its own: as much has to be left for what runs without it, such as validation
        taken, free = torch.cuda.memory_reserved(device) - held, torch.cuda.mem_get_info(device)[0]
        if free < taken:
            raise RuntimeError(f"it would hold {taken / 1e9:.1f} GB and leave {free / 1e9:.1f} GB")
        step.model.zero_grad(set_to_none=False)
        torch.cuda.set_rng_state(random, device)
        self.graph.replay()
        found = [*self.results, _gradient(step.model)]
        if (gap := max(map(_gap, found, exact))) > SLACK:
            raise RuntimeError(f"as a graph it computes otherwise, by {gap:.1%}")
        step.model.zero_grad(set_to_none=False)
        # the graph goes on reading the weights of an encoder's fast copy, also when a newer one
        # has taken its place
        self.copies = [getattr(module, "_fast", None) for module in step.model.modules()]

    @classmethod
    def captured(cls, step: Step, batch: Sequence[Tensor]) -> "_Graph | None":
        """Return a graph, or None where the model cannot be captured; nothing has been learnt."""
        device = batch[0].device
        buffers = list(step.model.buffers())
        kept, random = [b.clone() for b in buffers], torch.cuda.get_rng_state(device)
        stream, graph = torch.cuda.current_stream(device), None
        try:
            with torch.cuda.device(device):  # CUDA's own streams are of the device in use
                graph = cls(step, batch, random)
        except RuntimeError as error:  # it waits for the host, or has no memory left for a graph
            reason = str(error).partition("\n")[0]
            print(f"note: a step takes no CUDA graph, and so more time ({reason})", flush=True)
            step.model.zero_grad(set_to_none=True)
            torch.cuda.set_stream(stream)  # a capture that failed may have left its own
        for buffer, before in zip(buffers, kept, strict=True):
            if not torch.equal(buffer, before):  # a write would make a frozen encoder copy itself
                buffer.copy_(before)
        torch.cuda.set_rng_state(random, device)
        return graph

    def fits(self, batch: Sequence[Tensor]) -> bool:
        return all(
            x.shape == y.shape and x.dtype == y.dtype
            for x, y in zip(batch, self.inputs, strict=True)
        )

    def __call__(self, batch: Sequence[Tensor], weight: float, parts: int) -> tuple[Tensor, Tensor]:
        for place, tensor in zip(self.inputs, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        if (weight, parts) != self.values:
            self.values = (weight, parts)
            for place, value in zip(self.factors, self.values, strict=True):
                place.fill_(value)
        self.graph.replay()
        return self.results


def _gradient(model: nn.Module) -> Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts)


def _gap(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, as a share of the exact one's; infinite for NaN."""
    found, exact = found.float(), exact.float()
    gap = float((found - exact).norm() / exact.norm().clamp(min=1e-12))
    return gap if math.isfinite(gap) else math.inf
