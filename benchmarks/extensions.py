"""What fusions and backbones are worth, and how a shift between the dates hurts each.

    python benchmarks/extensions.py                        all variants, three seeds, the sample set
    python benchmarks/extensions.py --epochs 20 --seeds 3  the defaults

Every variant trains by `python main.py` from scratch with the same options but its own; its best
epoch on val is then scored on val again with B shifted by 0 to 8 pixels to each of the four sides,
in one confusion matrix; pixels without a partner are cut off. Runs that are there are not repeated.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import measure
import torch
from measure import RESULTS
from torch import Tensor, nn

from dataset import ChangeDataset, open_dataset
from metrics import Confusion
from model import load_model
from runtime.checkpoint import read_checkpoint
from runtime.devices import Precision, pick_precision
from runtime.figures import Picture, save_figure

ROOT = measure.HERE.parent
VARIANTS = [
    ("resnet18", "concat"),
    ("resnet18", "diff"),
    ("resnet18", "concat_diff"),
    ("resnet18", "cross_attention"),
    ("convnext_tiny", "concat"),
    ("swin_t", "concat"),
]
SHIFTS = (0, 1, 2, 4, 8)  # pixels


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of every run (default: 20)")
    parser.add_argument("--seeds", type=int, default=3, help="of every variant (default: 3)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "extensions")
    arguments = parser.parse_args()
    options = ["--crop-size", "128", "--batch-size", "4", "--lr", "2e-3", "--no-mlflow"]
    options += ["--epochs", str(arguments.epochs), "--draw-every", str(arguments.epochs)]
    options += ["--weights", "none", "--no-freeze-backbone", "--output-dir", str(arguments.runs)]
    rows = []
    for backbone, fusion in VARIANTS:
        finals, curves = [], []
        for seed in range(arguments.seeds):
            run = arguments.runs / f"{backbone}-{fusion}-{seed}"
            own = ["--backbone", backbone, "--fusion", fusion, "--seed", str(seed)]
            if not is_done(run, arguments.epochs):
                command = [sys.executable, str(ROOT / "main.py"), *options, *own]
                subprocess.run([*command, "--name", run.name], check=True)
            finals.append(read_checkpoint(run / "best.pt")["best"])
            curves.append(shifted_scores(run / "best.pt", torch.device(arguments.device)))
        rows.append(
            {
                "backbone": backbone,
                "fusion": fusion,
                "change_iou": spread([best["change_iou"] for best in finals]),
                "mean_dice": spread([best["mean_dice"] for best in finals]),
                "best_epochs": [best["epoch"] for best in finals],
                "shifted_change_iou": {
                    str(shift): spread([curve[shift] for curve in curves]) for shift in SHIFTS
                },
            }
        )
        print(json.dumps(rows[-1]))
    settings = {"options": options[:-2], "seeds": arguments.seeds, "split": "val"}
    path = measure.save("extensions", {**settings, "variants": rows}, arguments)
    save_figure(plot(rows), RESULTS / path.with_suffix(".png").name)


def is_done(run: Path, epochs: int) -> bool:
    """Whether a run has reached its last epoch."""
    last = run / "last.pt"
    return last.is_file() and read_checkpoint(last)["progress"]["epoch"] == epochs


def spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": deviation, "n": len(values)}


@torch.no_grad()
def shifted_scores(checkpoint: Path, device: torch.device) -> dict[int, float]:
    """Return the change IoU on val by shift."""
    model = load_model(checkpoint, device)
    config = read_checkpoint(checkpoint)["config"]
    precision = Precision.named(pick_precision(config["amp"], device), device)
    dataset = open_dataset(ROOT / "data" / "sample", "val")
    scores = {}
    for shift in SHIFTS:
        confusion = Confusion(1, device)
        for side in range(4 if shift else 1):
            add_shifted(model, dataset, confusion, shift, side, precision)
        scores[shift] = confusion.scores()["change_iou"]
    return scores


def add_shifted(
    model: nn.Module,
    dataset: ChangeDataset,
    confusion: Confusion,
    shift: int,
    side: int,
    precision: Precision,
) -> None:
    device = confusion.counts.device
    for index in range(len(dataset)):
        before, after, mask = (t.to(device)[None] for t in dataset[index])
        before, after, mask = (torch.rot90(t, side, (-2, -1)) for t in (before, after, mask))
        with precision.autocast(device):
            logits = model(cut(before, shift, 0), cut(after, 0, shift))
        confusion.update(logits, cut(mask, shift, 0))


def cut(x: Tensor, start: int, end: int) -> Tensor:
    """Cut columns off on the left and on the right."""
    return x[..., start : x.shape[-1] - end]


def plot(rows: list[dict]) -> Picture:
    figure = Picture(figsize=(7, 4.5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for row in rows:
        curve = row["shifted_change_iou"]
        axis.errorbar(
            SHIFTS,
            [curve[str(shift)]["mean"] for shift in SHIFTS],
            [curve[str(shift)]["std"] for shift in SHIFTS],
            marker="o", markersize=4, capsize=3, label=f"{row['fusion']}, {row['backbone']}",
        )  # fmt: skip
    axis.set_xticks(SHIFTS)
    axis.set_xlabel("shift of the later date, pixels")
    axis.set_ylabel("change IoU on val")
    n = rows[0]["change_iou"]["n"]
    axis.set_title(f"synthetic sample set; mean and standard deviation of {n} seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
