"""A step as a CUDA graph, by stand-ins for CUDA's parts; `test_cuda.py` asks a GPU."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losses import CombinedIoULoss
from runtime.devices import Precision
from training.step import Step, _Graph

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor, Tensor]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.conv(torch.cat([before, after], 1)))
        return logits


def batch_of(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 2, 3, 8, 8, generator=draw)
    return images[0], images[1], torch.randint(0, 2, (2, 8, 8), generator=draw).byte()


def a_step() -> Step:
    torch.manual_seed(0)
    return Step(Tiny().train(), CombinedIoULoss(), Precision.named("off", CPU))


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Let a graph, when it is replayed, do again what was captured; and other faults at wish."""
    told = SimpleNamespace(factor=1.0, error=None, free=8, taken=2, device=None, used=[])
    run, last = Step.run, SimpleNamespace(captures=False, reserved=1)

    def recorded(self: Step, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        results = run(self, *arguments, **options)
        if last.captures:
            last.call, last.results = (self, arguments, options), results
        return results

    class Graph:
        def replay(self) -> None:
            step, arguments, options = last.call
            for place, value in zip(last.results, run(step, *arguments, **options), strict=True):
                place.copy_(told.factor * value)

    @contextmanager
    def capture(_: Graph, **__: Any) -> Iterator[None]:
        if told.error:
            raise told.error
        told.used.append(told.device)
        last.captures = True
        yield
        last.captures = False
        last.reserved += told.taken
        last.call[0].model.zero_grad(set_to_none=False)  # what is captured is not done

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        told.device = device
        yield
        told.device = None

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in {
        "Stream": lambda _: stream, "current_stream": lambda _: stream,
        "set_stream": lambda _: None, "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph, "graph": capture,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "device": on, "empty_cache": lambda: None, "memory_reserved": lambda _: last.reserved,
        "mem_get_info": lambda _: (told.free, 80),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Step, "run", recorded)
    yield told


def test_capturing_teaches_nothing(fault: SimpleNamespace) -> None:
    step = a_step()
    before = copy.deepcopy(step.model.state_dict())
    random = torch.get_rng_state()
    graph = _Graph.captured(step, batch_of(0))
    assert graph is not None
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is not None and not p.grad.any() for p in step.model.parameters())


def test_a_graph_reads_each_batch_and_its_weight_anew(fault: SimpleNamespace) -> None:
    graphed, plain = a_step(), a_step()
    graph = _Graph.captured(graphed, batch_of(0))
    assert graph is not None
    for seed, weight, parts in ((1, 1.0, 1), (2, 0.5, 2), (3, 1.0, 1)):
        found = [x.clone() for x in graph(batch_of(seed), weight, parts)]
        exact = plain.run(batch_of(seed), weight, parts)
        torch.testing.assert_close(found, list(exact))
    for own, other in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(graphed.model.state_dict(), plain.model.state_dict())
    assert graph.fits(batch_of(4)) and not graph.fits([x[:1] for x in batch_of(4)])


@pytest.mark.parametrize("kind", ["other results", "not a number", "no capture", "no room"])
def test_a_step_that_makes_no_right_graph_goes_on_without(
    fault: SimpleNamespace, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    step = a_step()
    before = copy.deepcopy(step.model.state_dict())
    fault.factor = {"other results": 1.1, "not a number": float("nan")}.get(kind, 1.0)
    fault.error = RuntimeError("it waits\nfor the host") if kind == "no capture" else None
    fault.free = 1 if kind == "no room" else 8
    assert _Graph.captured(step, batch_of(0)) is None
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in step.model.parameters())
    text = capsys.readouterr().out
    reasons = {"no capture": "it waits", "no room": "it would hold 0.0 GB and leave 0.0 GB"}
    assert text.count("\n") == 1
    assert reasons.get(kind, "as a graph it computes otherwise") in text


def test_it_is_captured_on_the_device_of_the_batch(fault: SimpleNamespace) -> None:
    """Another one's stream, the first GPU's say, would record nothing."""
    assert _Graph.captured(a_step(), batch_of(0)) is not None
    assert fault.used == [CPU] and fault.device is None
