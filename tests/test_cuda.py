"""What only a GPU can show: `python -m pytest -m cuda`; and what of it can be seen without one.

TEST_DEVICE=cpu runs them on a CPU, to try the tests themselves.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data_helpers import save_tree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import build_loss
from metrics import ScoreHistogram, build_confusion, predict_classes
from model import SiameseUNet, build_model, load_model
from networks.fused import Fused, fast_copy, prediction_copy
from networks.sliding_window import predict_logits
from runtime.checkpoint import read_checkpoint
from runtime.devices import Precision, explain_out_of_memory, pick_device
from runtime.errors import UserError
from training.engine import Progress, _update, build_optimizer, evaluate, train_one_epoch
from training.engine import warmup_cosine as schedule
from training.step import Step

ROOT = Path(__file__).resolve().parents[1]
TASKS = [("change", 1), ("change", 3), ("semantic", 4)]
Batch = tuple[Tensor, Tensor, Tensor]

# what libraries say of a GPU, such as "synchronization debug mode is a prototype", fails no test
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def device() -> torch.device:
    name = os.environ.get("TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return pick_device(name)


def batch_of(task: str, num_classes: int, side: int = 64) -> Batch:
    """Return two pairs; where the later date is brighter something changed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 2, 3, side, side), generator=generator, dtype=torch.uint8)
    top = max(num_classes + (task == "semantic"), 2)
    shape = (2, 2, side, side) if task == "semantic" else (2, side, side)
    mask = torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)
    mask[..., 0] = 255
    return images[0], images[1], mask


class Job:
    """A model with all that trains it, on a device; the same weights on each."""

    def __init__(
        self, device: torch.device, amp: str = "off", *, task: str = "change",
        num_classes: int = 1, freeze_backbone: bool = True, may_capture: bool = True,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device = device
        self.model: SiameseUNet = build_model(
            task=task, backbone="resnet18", num_classes=num_classes,
            freeze_backbone=freeze_backbone,
        ).to(device)  # fmt: skip
        weights = [1.0] * max(num_classes, 2 if task == "change" else 1)
        criterion = build_loss("bce_iou", task=task, class_weights=weights).to(device)
        self.optimizer = build_optimizer(self.model, lr=1e-3, weight_decay=1e-2)
        self.scheduler = schedule(self.optimizer, warmup_steps=1, total_steps=10)
        self.step = Step(
            self.model, criterion, Precision.named(amp, device), may_capture=may_capture
        )
        self.progress = Progress(build_confusion(task, num_classes, device))

    def train(self, batches: Any, number: int, accumulate: int = 1) -> dict[str, float]:
        return train_one_epoch(
            self.step, batches, self.optimizer, self.scheduler, self.progress,
            num_batches=number, clip_norm=1.0, accumulate=accumulate,
        )  # fmt: skip

    def logits(self, batch: Batch) -> Tensor:
        self.model.eval()
        with torch.no_grad(), self.step.precision.autocast(self.device):
            before, after = (x.to(self.device) for x in batch[:2])
            return self.model(before, after).float().cpu()


def gap(found: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the difference, as a share of the exact one's."""
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.cuda
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("task", "num_classes"), TASKS)
def test_a_gpu_computes_and_learns_as_the_cpu_does(
    device: torch.device, task: str, num_classes: int, frozen: bool
) -> None:
    batch = batch_of(task, num_classes)
    options: dict[str, Any] = {"task": task, "num_classes": num_classes, "freeze_backbone": frozen}
    here, there = Job(torch.device("cpu"), **options), Job(device, **options)
    assert gap(there.logits(batch), here.logits(batch)) < 0.01
    on_cpu, on_gpu = (job.train([batch] * 2, 2) for job in (here, there))
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], rel=0.02)
    assert on_gpu["accuracy"] == pytest.approx(on_cpu["accuracy"], abs=0.02)


@pytest.mark.cuda
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("task", "num_classes"), TASKS)
def test_a_step_as_one_graph_learns_the_same(
    device: torch.device, task: str, num_classes: int, frozen: bool, accumulate: int
) -> None:
    """Two batches in turns, and a short one now and then: the graph reads each anew, lets it be."""
    batch = batch_of(task, num_classes)
    other, short = [x.flip(0) for x in batch], [x[:1] for x in batch]
    batches = ([batch, other] * 2 + [short]) * 2
    options: dict[str, Any] = {"task": task, "num_classes": num_classes, "freeze_backbone": frozen}
    jobs = [Job(device, **options, may_capture=may) for may in (False, True)]
    scores = [job.train(batches, len(batches), accumulate) for job in jobs]
    if device.type == "cuda":
        graph, encoder = jobs[1].step._graph, jobs[1].model.encoder
        assert graph and jobs[1].step.keeps_gradients
        assert not frozen or any(copied is encoder._fast for copied in graph.copies)
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=2e-3)
    plain, graphed = (job.model.state_dict() for job in jobs)
    for name, tensor in plain.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(graphed[name], tensor)
    # steps of AdamW make of a millionth's difference, as of another order of sums, up to 0.03
    variances = [name for name in plain if name.endswith("running_var")]
    found, exact = (torch.cat([x[n].flatten() for n in variances]) for x in (graphed, plain))
    assert gap(found, exact) < 0.1


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_stays_near_and_learns(device: torch.device, amp: str) -> None:
    batch = batch_of("change", 1)
    low, exact = Job(device, amp, freeze_backbone=False), Job(device)
    assert gap(low.logits(batch), exact.logits(batch)) < 0.05
    first = low.train([batch] * 4, 4)["loss"]
    low.progress.start(1)
    assert low.train([batch] * 4, 4)["loss"] < first


@pytest.mark.cuda
def test_the_frozen_encoder_has_a_folded_copy(device: torch.device) -> None:
    job = Job(device, "bf16")
    backbone = job.model.encoder.backbone
    image = torch.rand(2, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), job.step.precision.autocast(device):
        copied = fast_copy(backbone, torch.bfloat16, image[:1])
    assert copied is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())
    assert sum(isinstance(module, Fused) for module in copied.modules()) >= 16
    before, after = (x.to(device) for x in batch_of("change", 1)[:2])
    job.model.eval()
    with torch.no_grad(), job.step.precision.autocast(device):
        twin = prediction_copy(job.model, torch.bfloat16, before, after)
        assert twin is not job.model
        assert gap(twin(before, after).float(), job.model(before, after).float()) < 0.05


def watched(batch: Batch, number: int) -> Iterator[Batch]:
    """Yield a batch; after two, what makes the host wait for the GPU raises, until the end."""
    for turn in range(number):
        if turn == 2:
            torch.cuda.set_sync_debug_mode("error")
        yield batch
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("task", "num_classes"), TASKS)
def test_no_step_waits_for_the_gpu(
    device: torch.device, task: str, num_classes: int, frozen: bool
) -> None:
    if device.type != "cuda":
        pytest.skip("nothing to wait for")
    job = Job(device, "bf16", task=task, num_classes=num_classes, freeze_backbone=frozen)
    batch: Any = tuple(x.pin_memory() for x in batch_of(task, num_classes))
    try:
        job.train(watched(batch, 6), 6)
        confusion = build_confusion(task, num_classes, device)
        evaluate(
            job.model, job.step.criterion, watched(batch, 6), confusion=confusion,
            precision=job.step.precision,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_one_process_under_ddp_learns_as_one_without(device: torch.device, tmp_path: Path) -> None:
    batch = batch_of("change", 1)
    alone, wrapped = Job(device, freeze_backbone=False), Job(device, freeze_backbone=False)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        ids = [device.index or 0] if device.type == "cuda" else None
        ddp_model = nn.parallel.DistributedDataParallel(
            wrapped.model, device_ids=ids, gradient_as_bucket_view=True
        )
        wrapped.step = Step(ddp_model, wrapped.step.criterion, wrapped.step.precision)
        losses = [job.train([batch] * 2, 2)["loss"] for job in (alone, wrapped)]
        counts = torch.ones(3, dtype=torch.int64, device=device)
        dist.all_reduce(counts)
        assert counts.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.cuda
def test_a_full_gpu_is_one_line(device: torch.device) -> None:
    with (
        pytest.raises(UserError, match="out of memory with --batch-size 8; try 4"),
        explain_out_of_memory("--batch-size 8", "4"),
    ):
        torch.empty(2**50, dtype=torch.uint8, device=device)


@pytest.mark.cuda
def test_a_scene_is_mapped_as_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    dates = torch.randint(0, 256, (2, 3, 150, 170), generator=generator, dtype=torch.uint8)
    maps = []
    for place in (torch.device("cpu"), device):
        model = Job(place).model
        maps.append(predict_logits(model, *dates, window=96, overlap=32, batch_size=2, amp="off"))
    assert gap(maps[1], maps[0]) < 0.01
    classes = [predict_classes(logits[None]) for logits in maps]
    assert (classes[0] != classes[1]).float().mean() < 0.01


@pytest.mark.cuda
def test_a_run_on_a_gpu_goes_on_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    data = save_tree(tmp_path / "data", size=(64, 64), train=4, val=2)

    def main(*more: str) -> str:
        command = [
            sys.executable, str(ROOT / "main.py"), "--output-dir", str(tmp_path / "runs"),
            "--no-mlflow", "--workers", "0", *more,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    text = main(
        "--data-dir", str(data), "--name", "small", "--backbone", "resnet18", "--weights", "none",
        "--crop-size", "64", "--epochs", "1", "--batch-size", "2", "--cache", "ram",
        "--device", str(device),
    )  # fmt: skip
    assert device.type in text
    state = read_checkpoint(tmp_path / "runs" / "small" / "last.pt")
    assert {x.device.type for x in tree_leaves(state) if isinstance(x, Tensor)} == {"cpu"}
    load_model(tmp_path / "runs" / "small")
    main("--resume", str(tmp_path / "runs" / "small"), "--epochs", "2", "--device", "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_it_computes_the_same(device: torch.device, frozen: bool) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU needs a compiler for it")
    batch = batch_of("change", 1)
    plain, compiled = (Job(device, freeze_backbone=frozen) for _ in range(2))
    compiled.model.compile()
    assert gap(compiled.logits(batch), plain.logits(batch)) < 0.01
    losses = [job.train([batch] * 2, 2)["loss"] for job in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---- without a GPU


class Waits(TorchDispatchMode):
    """Notes operators whose result the host has to wait for, or that fetch data by itself."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique2")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moves = name == "_to_copy" and kwargs.get("device") not in (None, tensors[0].device)
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if name in self.ASKING or by_mask or (moves and not kwargs.get("non_blocking")):
            self.found.append(name)
        self.number += 1
        return func(*args, **kwargs)


def as_if_on(device: torch.device, module: nn.Module) -> None:
    """Give a module tensors without content, that say they are on a device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
                    empty = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    tensors[name] = empty  # type: ignore[assignment]


@pytest.mark.parametrize(("task", "num_classes"), TASKS)
def test_no_operator_of_a_step_makes_the_host_wait(task: str, num_classes: int) -> None:
    """The backward pass is left out: PyTorch does not follow it without a real GPU."""
    device, real = torch.device("cuda"), Job(torch.device("cpu"), task=task,
                                             num_classes=num_classes)  # fmt: skip
    model, criterion = copy.deepcopy(real.model), copy.deepcopy(real.step.criterion)
    model.encoder.requires_grad_(True).frozen = False  # a frozen one is compared with its copy
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        as_if_on(device, model)
        as_if_on(device, criterion)
        optimizer = build_optimizer(model, lr=1e-3, weight_decay=1e-2)
        scheduler = schedule(optimizer, warmup_steps=1, total_steps=10)
        progress = Progress(build_confusion(task, num_classes, device))
        histogram = ScoreHistogram(device)
        batch = batch_of(task, num_classes)
        with Waits() as waits:
            before, after, target = (x.to(device, non_blocking=True) for x in batch)
            logits = model(before, after)
            progress.loss_sum += criterion(logits, target)
            progress.confusion.update(logits, target)
            histogram.update(logits, target, task=task)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            _update(optimizer, scheduler, real.step.precision.scaler, 1.0, progress)
        assert waits.number > 200 and not waits.found
        with Waits() as waits, suppress(Exception):  # there are no numbers to answer with
            logits.max().item()
        assert waits.found
