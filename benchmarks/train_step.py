"""How fast one training step is, against the naive version of the same job.

    python benchmarks/train_step.py                           everything on the CPU, some 20 minutes
    python benchmarks/train_step.py --device cuda --compile   the same on a GPU
    python benchmarks/train_step.py --part variants           only the table of variants

variants    naive, ours, ours with one choice undone, other people's models; batch 8, 256 x 256
growth      ours over the batch size and over the image size
profile     where the time goes, naive and ours: results/train_step-DEVICE.png

Inputs lie ready on the CPU (pinned for a GPU); decoding is `loader.py`'s.
"""

from collections.abc import Callable
from typing import Any

import measure
import torch
from measure import RESULTS, Work
from naive import NaiveTrainer
from peers import PEERS
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from losses import CombinedIoULoss
from metrics import Confusion
from model import Encoder, build_model
from runtime.devices import Precision
from runtime.distributed import parallel
from runtime.figures import Picture, save_figure
from runtime.memory import keep_freed_memory
from training.engine import Progress, build_optimizer, train_one_epoch, warmup_cosine
from training.step import Step

Batch = tuple[Tensor, Tensor, Tensor]


def batch_of(num_pairs: int, size: int, device: torch.device) -> Batch:
    """Return noise as a loader yields it: uint8 images and a mask."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (2, num_pairs, 3, size, size), dtype=torch.uint8, generator=generator
    )
    mask = (torch.rand(num_pairs, size, size, generator=generator) < 0.05).byte()
    batch = (images[0], images[1], mask)
    return (*(t.pin_memory() for t in batch),) if device.type == "cuda" else batch  # type: ignore[return-value]


def naive(device: torch.device, batch: Batch, steps: int) -> Work:
    trainer = NaiveTrainer(device)
    before, after, mask = batch
    inputs = (
        (before.float() / 255 - 0.45) / 0.22,
        (after.float() / 255 - 0.45) / 0.22,
        mask[:, None].float(),
    )

    def work() -> float:
        for _ in range(steps):
            trainer.step(*inputs)
        return float(steps * len(mask))

    return work


def train(
    model: nn.Module, device: torch.device, batch: Batch, steps: int, amp: str = "bf16", *,
    may_capture: bool = True,
) -> Work:  # fmt: skip
    """Train a model with the engine's own loop; `batch` is this process's part."""
    model.to(device)
    if hasattr(model, "encoder") and isinstance(model.encoder, Encoder):
        optimizer = build_optimizer(model, lr=1e-4, weight_decay=1e-4)  # type: ignore[arg-type]
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = warmup_cosine(optimizer, warmup_steps=1, total_steps=10**6)
    criterion, precision = CombinedIoULoss(), Precision.named(amp, device)
    ddp_model = parallel(model, device, has_idle_weights=False)
    step = Step(ddp_model, criterion, precision, may_capture=may_capture)

    def work() -> float:
        train_one_epoch(
            step,
            [batch] * steps,
            optimizer,
            scheduler,
            Progress(Confusion(1, device)),
            num_batches=steps,
        )
        return float(steps * len(batch[2]))

    return work


class TwoPasses(Encoder):
    """One date after the other through the encoder."""

    def forward(self, image: Tensor) -> list[Tensor]:
        """See Encoder."""
        passes = zip(*(super(TwoPasses, self).forward(x) for x in image.chunk(2)), strict=True)
        return [torch.cat(maps) for maps in passes]


class Unfolded(Encoder):
    """The frozen encoder as it is, in autocast's hands."""

    def _fast_copy(self, _image: Tensor, _dtype: torch.dtype) -> None:
        return None


def ours(kind: type[Encoder] | None = None, **options: Any) -> nn.Module:
    model = build_model(**options)
    if kind is not None:
        model.encoder.__class__ = kind
    return model


def variants(arguments: Any, device: torch.device, steps: int) -> dict[str, Callable[[], Work]]:
    """Return what builds each variant."""
    batch = batch_of(arguments.batch, arguments.size, device)

    def compiled() -> Work:
        model = build_model()
        model.to(device).compile()
        return train(model, device, batch, steps)

    found: dict[str, Callable[[], Work]] = {
        "naive": lambda: naive(device, batch, steps),
        "ours, float32": lambda: train(ours(), device, batch, steps, "off"),
        "ours": lambda: train(ours(), device, batch, steps),
        "ours, BatchNorm not folded": lambda: train(ours(Unfolded), device, batch, steps),
        "ours, one date after the other": lambda: train(ours(TwoPasses), device, batch, steps),
        "ours, the encoder learns": lambda: train(
            ours(freeze_backbone=False), device, batch, steps
        ),
    }
    if device.type == "cuda":
        found["ours, no CUDA graph"] = lambda: train(
            ours(), device, batch, steps, may_capture=False
        )
    if arguments.compile:
        found["ours, compiled"] = compiled
    for name, build in PEERS.items():
        found[name] = lambda build=build: train(  # type: ignore[misc]
            build().to(memory_format=torch.channels_last), device, batch, steps
        )
    return found


def flops_per_pair(num_pairs: int, size: int, device: torch.device, **options: Any) -> float:
    """Count one step of ours: encoder, fusion, decoder and what flows back.

    By the encoder as it is: the counter does not know the operators of the fused one.
    """
    work = train(ours(Unfolded, **options), device, batch_of(num_pairs, size, device), 1)
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / num_pairs


def growth(arguments: Any, device: torch.device, steps: int) -> dict[str, Any]:
    """Time ours over batch sizes and image sizes; each is timed alone, there is no baseline."""
    found: dict[str, Any] = {"batch": [], "size": []}
    cases = [("batch", n, arguments.size) for n in arguments.batches]
    cases += [("size", arguments.batch, size) for size in arguments.sizes]
    for axis, num_pairs, size in cases:
        work = train(ours(), device, batch_of(num_pairs, size, device), steps)
        (row,) = measure.alternate({"ours": work}, device, max(3, arguments.rounds // 2)).values()
        row |= {"batch": num_pairs, "size": size}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            work()
            row["peak_bytes"] = measure.peak_memory(device)
        found[axis].append(row)
        megapixels = row["rate"] * size**2 / 1e6
        print(
            f"batch {num_pairs:4}  {size:5} x {size:<5} {row['rate']:9.2f} pairs/s"
            f"  {megapixels:8.2f} Mpixel/s"
        )
    return found


def profile_of(work: Work, device: torch.device) -> tuple[dict[str, float], int]:
    """Return milliseconds per operator of one call, and how often the host waited for the GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    work()
    with profile(activities=activities) as profiler:
        work()
        measure.synchronize(device)
    # an operator has the time of its kernels, which are listed themselves, too
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, time_of) / 1000 for event in events}
    waits = sum(
        e.count for e in events if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
    )
    return {key: ms for key, ms in times.items() if ms > 0}, waits


def draw_profile(profiles: dict[str, dict[str, float]], title: str) -> Picture:
    """Draw one bar per variant, split by operator."""
    totals: dict[str, float] = {}
    for times in profiles.values():
        for name, milliseconds in times.items():
            totals[name] = totals.get(name, 0) + milliseconds
    shown = sorted(totals, key=lambda name: -totals[name])[:9]
    figure = Picture(figsize=(10, 4.2), dpi=110)
    axis = figure.subplots()
    colors = [
        "#0072b2",
        "#e69f00",
        "#56b4e9",
        "#009e73",
        "#f0e442",
        "#d55e00",
        "#cc79a7",
        "#7f7f7f",
        "#a6761d",
        "#d9d9d9",
    ]
    left = dict.fromkeys(profiles, 0.0)
    for name, color in zip([*shown, "everything else"], colors, strict=False):
        widths = [
            sum(times.values()) - sum(times.get(other, 0) for other in shown)
            if name == "everything else"
            else times.get(name, 0.0)
            for times in profiles.values()
        ]
        axis.barh(list(profiles), widths, left=list(left.values()), color=color, label=name[:44])
        left = {key: left[key] + width for key, width in zip(left, widths, strict=True)}
    for row, total in enumerate(left.values()):
        axis.text(total, row, f" {total:.0f} ms", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(left.values()))
    axis.set_xlabel("milliseconds per step")
    axis.set_title(title, fontsize=11)
    axis.legend(
        fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.16), frameon=False
    )
    figure.subplots_adjust(left=0.13, right=0.97, top=0.92, bottom=0.42)
    return figure


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--part", choices=("all", "variants", "growth", "profile"), default="all")
    parser.add_argument("--batch", type=int, default=8, help="pairs per step (default: 8)")
    parser.add_argument("--size", type=int, default=256, help="side of a patch (default: 256)")
    parser.add_argument("--batches", type=int, nargs="*", help="for growth")
    parser.add_argument("--sizes", type=int, nargs="*", help="for growth")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, too")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="as main.py does, let the allocator keep freed memory: helps the naive version most",
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    arguments.batches = arguments.batches or (
        [16, 32, 64, 128, 256] if on_gpu else [1, 2, 4, 8, 16]
    )
    arguments.sizes = arguments.sizes or ([128, 256, 512, 1024] if on_gpu else [128, 256, 512])
    steps = 20 if on_gpu else 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_freed_memory()
    builders = variants(arguments, device, steps)
    if arguments.only:
        work = builders[arguments.only]()
        for _ in range(3):
            work()
        print(measure.peak_memory(device))
        return

    results: dict[str, Any] = {"batch": arguments.batch, "size": arguments.size}
    if arguments.part in ("all", "variants"):
        limits = measure.ceilings(device)
        flops = flops_per_pair(arguments.batch, arguments.size, device)
        works = {name: build() for name, build in builders.items()}
        table = measure.alternate(works, device, arguments.rounds)
        works.clear()
        for name, row in table.items():
            row["peak_bytes"] = measure.peak_memory_of(name)
            row["peak_ratio"] = row["peak_bytes"] / table["naive"]["peak_bytes"]
        measure.show(table, "pairs/s")
        results |= {
            "variants": table,
            "ceiling_flops": limits,
            "flops_per_pair": flops,
            "share_of_ceiling": {
                name: table[key]["rate"] * flops / limits[name]
                for name, key in (("fp32", "ours, float32"), ("bf16", "ours"))
            },
        }
    if arguments.part in ("all", "growth"):
        results["growth"] = growth(arguments, device, steps)
    if arguments.part in ("all", "profile"):
        profiles = {}
        for name in ("naive", "ours, float32", "ours"):
            work = variants(arguments, device, 1)[name]()
            profiles[name], waits = profile_of(work, device)
            results.setdefault("waits_for_device_per_step", {})[name] = waits
        results["profile_ms"] = profiles
        title = f"Where a training step spends its time, batch {arguments.batch}, {device.type}"
        save_figure(draw_profile(profiles, title), RESULTS / f"train_step-{device.type}.png")
    measure.save("train_step", results, arguments)


if __name__ == "__main__":
    main()
