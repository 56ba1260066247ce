"""How fast a trained model predicts, against the naive version.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --device cuda --batches 1 8 32 128

Variants at batch 8, 256 x 256; then ours over batch and image size.
"""

from collections.abc import Callable
from typing import Any

import measure
import torch
from measure import Work
from naive import NaiveUNet
from peers import PEERS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import Unfolded, batch_of
from train_step import ours as ours_of

from model import SiameseUNet, build_model
from networks.fused import prediction_copy
from runtime.devices import Precision


def predicting(
    model: nn.Module, before: Tensor, after: Tensor, device: torch.device, steps: int, amp: str
) -> Work:
    model.to(device).eval()
    before, after = before.to(device), after.to(device)
    precision = Precision.named(amp, device)
    dtype = precision.dtype or torch.float32

    def work() -> float:
        with torch.inference_mode(), precision.autocast(device):
            for _ in range(steps):
                called = model
                if isinstance(model, SiameseUNet):  # as `predict_bands` does
                    called = prediction_copy(model, dtype, before, after)
                called(before, after)
        return float(steps * len(before))

    return work


def flops_per_pair(size: int, device: torch.device) -> float:
    """Count what a pair takes, by the encoder as it is: the counter does not know the fused one."""
    before, after, _ = batch_of(1, size, device)
    model = ours_of(Unfolded).to(device).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(before.to(device), after.to(device))
    return counter.get_total_flops()


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    steps = 20 if device.type == "cuda" else 1
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    before, after, _ = batch_of(arguments.batch, arguments.size, device)
    floats = (before.float() / 255, after.float() / 255)

    def ours(amp: str, before: Tensor = before, after: Tensor = after) -> Work:
        return predicting(build_model(), before, after, device, steps, amp)

    builders: dict[str, Callable[[], Work]] = {
        "naive": lambda: predicting(NaiveUNet(), *floats, device, steps, "off"),
        "ours, float32": lambda: ours("off"),
        "ours": lambda: ours("bf16"),
    }
    for name, build in PEERS.items():
        builders[name] = lambda build=build: predicting(  # type: ignore[misc]
            build().to(memory_format=torch.channels_last), before, after, device, steps, "bf16"
        )
    if arguments.only:
        work = builders[arguments.only]()
        for _ in range(3):
            work()
        print(measure.peak_memory(device))
        return
    table: dict[str, dict[str, Any]] = measure.alternate(
        {name: build() for name, build in builders.items()}, device, arguments.rounds
    )
    for name, row in table.items():
        row["peak_bytes"] = measure.peak_memory_of(name)
    measure.show(table, "pairs/s")
    growth: dict[str, list[dict[str, Any]]] = {"batch": [], "size": []}
    cases = [("batch", n, arguments.size) for n in arguments.batches]
    cases += [("size", 1, size) for size in arguments.sizes]
    for axis, num_pairs, size in cases:
        work = ours("bf16", *batch_of(num_pairs, size, device)[:2])
        (row,) = measure.alternate({"ours": work}, device, max(3, arguments.rounds // 2)).values()
        growth[axis].append({**row, "batch": num_pairs, "size": size})
        print(
            f"batch {num_pairs:4}  {size:5} x {size:<5} {row['rate']:9.2f} pairs/s"
            f"  {row['rate'] * size**2 / 1e6:8.2f} Mpixel/s"
        )
    limits, flops = measure.ceilings(device), flops_per_pair(arguments.size, device)
    share = {
        name: table[key]["rate"] * flops / limits[name]
        for name, key in (("fp32", "ours, float32"), ("bf16", "ours"))
    }
    about = {"ceiling_flops": limits, "flops_per_pair": flops, "share_of_ceiling": share}
    measure.save("predict", {"variants": table, **about, "growth": growth}, arguments)


if __name__ == "__main__":
    main()
