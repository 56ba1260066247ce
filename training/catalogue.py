"""What the options of `main.py` may name, and what models cost; known without torch.

The names are read from the source of the tables that hold them, for importing these takes seconds.
The costs are kept here; `python -m training.catalogue` measures them anew.
"""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from pairs.layouts import find_pairs, read_folders
from runtime.config import as_flags
from runtime.errors import UserError
from runtime.options import find_model, newest_runs

ROOT = Path(__file__).resolve().parents[1]
SIDE = 256  # pixels of an image that is counted for
TIMM = "timm:"

# Millions of parameters and GFLOP of a pair; the others are those of `model.build_model`'s default
COSTS = {
    "--backbone": {
        "resnet18": (14.0, 12.6),
        "resnet34": (24.1, 22.3),
        "resnet50": (27.7, 25.1),
        "resnet101": (46.6, 44.5),
        "efficientnet_lite0": (5.6, 4.9),
        "swin_t": (30.6, 32.5),
        "swin_s": (51.9, 60.3),
        "swin_b": (90.0, 103.9),
        "swin_v2_t": (30.7, 26.8),
        "swin_v2_s": (52.0, 49.2),
        "swin_v2_b": (90.2, 84.4),
        "convnext_tiny": (30.9, 26.4),
        "convnext_small": (52.5, 48.5),
        "convnext_base": (90.8, 83.4),
        "vit_b_16": (89.3, 96.6),
    },
    "--fusion": {
        "concat": (27.7, 25.1),
        "diff": (26.8, 24.7),
        "concat_diff": (28.5, 25.5),
        "cross_attention": (29.8, 27.1),
    },
}


def catalogue() -> str:
    """Return the tables of `python main.py --list`."""
    lines = []
    for flag, names, fixed in (
        ("--backbone", backbones(), "--fusion concat"),
        ("--fusion", fusions(), "--backbone resnet50"),
    ):
        title = f"{flag}, with {fixed}"
        lines.append(f"{title:34}{'M parameters':>16}{'GFLOP a pair':>15}")
        for name in names:
            parameters, operations = COSTS[flag].get(name, ("?", "?"))
            lines.append(f"  {name:32}{parameters:>16}{operations:>15}")
        if flag == "--backbone":
            lines.append(f"  {TIMM}NAME, if timm is installed (requirements-zoo.txt)")
        lines.append("")
    lines.append(f"--loss\n  {', '.join(losses())}, or a sum such as bce_iou+focal\n")
    lines.append(
        f"Forward passes, {SIDE} x {SIDE}, two operations for a multiplication with an addition."
    )
    return "\n".join(lines)


def check_options(config: Any, is_new: bool = True) -> None:
    """Raise UserError for a name that there is not and, of a new run, for a path.

    Args:
        config: the options of `main.py`.
        is_new: tells that no run is gone on with, so that the paths are not the saved ones.
    """
    check_words(config.backbone, config.fusion, config.loss, config.class_weights, config.task)
    if not is_new:
        return
    if "bce_iou" not in config.loss.split("+"):
        usual = type(config)()
        for name in ("bce_weight", "iou_weight", "iou_smooth"):
            if (value := getattr(config, name)) != getattr(usual, name):
                raise UserError(
                    f"{as_flags({name: value})}: only bce_iou has it, and --loss is {config.loss}"
                )
    if config.resume:
        check_resume(config.resume, Path(config.output_dir or ROOT / "runs"))
    if config.weights not in ("imagenet", "none") and not Path(config.weights).is_file():
        raise UserError(
            f"--weights {config.weights}: no such file; give imagenet, none, or the file of a "
            "state dict of this backbone"
        )
    if config.init:
        try:
            find_model(config.init)
        except UserError as error:
            raise UserError(f"--init {error}") from None
        if config.weights not in ("imagenet", "none"):
            raise UserError(f"--init and --weights {config.weights}: give one of them")
    if config.folders:
        read_folders(config.folders, config.task)
    if config.pairs and not Path(config.pairs).is_file():
        raise UserError(f"--pairs {config.pairs}: no such file")
    if config.data_dir and not config.download and not Path(config.data_dir).is_dir():
        find_pairs(config.data_dir, config.task)  # says what it expects there


def check_resume(resume: str, runs: Path) -> None:
    """Raise UserError for a run that there is not, with those that there are."""
    if resume == "auto" or Path(resume).exists() or (runs / resume).exists():
        return
    raise UserError(f"--resume {resume}: no such run or checkpoint{newest_runs(runs)}")


def check_words(backbone: str, fusion: str, loss: str, class_weights: str, task: str) -> None:
    """Raise UserError for a backbone, fusion or loss that there is not, with those that there are.

    Raises it as well for weights of classes that the loss does not use.
    """
    if backbone not in backbones() and not re.fullmatch(rf"{TIMM}[\w.-]+", backbone):
        known = ", ".join(backbones())
        raise UserError(f"--backbone {backbone}: choose one of {known}, or {TIMM}NAME")
    if fusion not in fusions():
        raise UserError(f"--fusion {fusion}: choose one of {', '.join(fusions())}")
    if unknown := set(loss.split("+")) - set(losses()):
        raise UserError(
            f"--loss {loss}: {', '.join(map(repr, sorted(unknown)))} is none; "
            f"choose of {', '.join(losses())}, or a sum such as bce_iou+focal"
        )
    has_entropy = task == "semantic" or not {"bce_iou", "ce"}.isdisjoint(loss.split("+"))
    if class_weights != "none" and not has_entropy:
        raise UserError(
            f"--class-weights {class_weights}: weighs cross-entropies, and --loss {loss} has none; "
            f"try ce+{loss}"
        )


def backbones() -> tuple[str, ...]:
    """Return the names in `networks.encoders.ENCODERS`."""
    return _names("networks/encoders.py", "ENCODERS")


def fusions() -> tuple[str, ...]:
    """Return the names in `networks.fusion.FUSIONS`."""
    return _names("networks/fusion.py", "FUSIONS")


def losses() -> tuple[str, ...]:
    """Return the names in `losses.LOSSES`."""
    return _names("losses.py", "LOSSES")


@cache
def _names(file: str, table: str) -> tuple[str, ...]:
    """Return the texts in a table of a module, in order; none but its names are texts."""
    module = ast.parse((ROOT / file).read_text("utf-8"))
    (value,) = (
        node.value
        for node in module.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == table
        and node.value is not None
    )
    texts = [
        (node.lineno, node.col_offset, node.value)
        for node in ast.walk(value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return tuple(text for _, _, text in sorted(texts))


def measure(backbone: str = "resnet50", fusion: str = "concat") -> tuple[float, float]:
    """Return the parameters in millions and the GFLOP of one pair, without computing anything."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model import build_model, count_parameters

    with torch.device("meta"):
        model = build_model(backbone=backbone, fusion=fusion, freeze_backbone=False).eval()
        image = torch.empty(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image, image)
    return count_parameters(model)[1] / 1e6, counter.get_total_flops() / 1e9


if __name__ == "__main__":
    for name in backbones():
        print("{!r}: ({:.1f}, {:.1f}),".format(name, *measure(name)))
    for name in fusions():
        print("{!r}: ({:.1f}, {:.1f}),".format(name, *measure(fusion=name)))
