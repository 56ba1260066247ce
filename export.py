"""Export a model to run elsewhere: `python export.py runs/x/best.pt [before.png after.png ...]`.

    best.onnx       for onnxruntime and the like          before, after -> logits
    best.pt2        for PyTorch, without these files      the same, `torch.export.load`
    best_onnx.py    twenty lines that run the first with onnxruntime, numpy and Pillow

Both take (B, 3, H, W) of any batch and size, normalise inside and give logits (B, K, H, W), as
`model.py` does. Before anything is kept, both are compared with the model itself at several sizes,
odd ones too, and on the pairs of images that are given; sizes too small for a program are found
out, said, and noted in the ONNX file. PyTorch's is loaded with
`torch.export.load("best.pt2").module(check_guards=False)`: with its guards it would take sizes
like the traced one alone.
"""

if __name__ == "__main__":  # Ctrl-C ends it in silence from here on, while modules are imported
    import _signal  # type: ignore[import-not-found] # of `signal`: no file has to be read

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import REQUIRED, VERSION, option
from runtime.options import find_model
from runtime.start import start


@dataclass(frozen=True)
class Config:
    """The options of an export."""

    checkpoint: str = option(REQUIRED, "best.pt of a run", positional=True)
    pairs: tuple[str, ...] = option(
        (), "images to compare on as well: before, after, before, ...", positional=True
    )
    output_dir: str | None = option(
        None,
        "folder of the files; else the checkpoint's",
        short="-o",
        aliases=["--output"],
    )
    overwrite: bool = option(False, "replace what is there")
    input: str = option(
        "uint8",
        "what both dates are: uint8, or float32 in [0, 1]",
        choices=("uint8", "float32"),
    )
    tolerance: float = option(
        1e-3, "largest difference of a logit, relative to the largest logit", above=0
    )


if __name__ == "__main__":  # the imports below take seconds; a wrong word is answered before
    GIVEN = start(Config, description=__doc__, check=lambda given: find_model(given.checkpoint))

import json
import logging
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model import SiameseUNet, restore_model
from pairs.bands import Reading
from pairs.images import read_image
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError, run_script
from runtime.files import whole_folder

# Traced at a size that divides by nothing, so that no step of the program is left out, and beyond
# 512, where the windows of cross-attention are several at every stride.
TRACED = (2, 3, 543, 607)
LARGE = ((1, 3, 320, 288), (2, 3, 288, 352), (1, 3, 289, 383))  # every backbone takes these
SMALL = (256, 224, 97, 64, 33, 32, 31, 17, 1)  # heights to try, with a width that is larger

EXAMPLE = '''"""Run {onnx} without PyTorch: python {script} before.png after.png"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(Path(__file__).with_name("{onnx}"))


def read(path):  # (1, 3, H, W) {input}
    pixels = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)[None]
    return {pixels}


if len(sys.argv) != 3:
    sys.exit(__doc__)
before, after = map(read, sys.argv[1:])
(logits,) = session.run(None, {{"before": before, "after": after}})  # (1, {channels}, H, W)
{mask}
Image.fromarray(mask * np.uint8({scale})).save("change.png")
print(f"{{(mask > 0).mean():.2%}} changed, written to change.png")
'''
SIGMOID = """probability = 1 / (1 + np.exp(-logits[0, 0]))
mask = np.uint8(probability > 0.5)"""
ARGMAX = "mask = np.uint8(logits[0].argmax(0))  # classes, 0 = no change"

Run = Callable[[Tensor, Tensor], NDArray[np.float32]]


def export(given: dict[str, Any]) -> dict[str, float]:
    """Export from the options that a command line gives.

    Returns:
        The largest difference of a logit from PyTorch's, of "onnx" and of "pt2".

    Raises:
        UserError: anything the user can mend; then nothing is written.
    """
    config = Config(**given)
    _import_onnx()  # says at once where it is missing
    path = find_model(config.checkpoint)
    state = read_checkpoint(path)
    model = restore_model(state, path).eval().requires_grad_(False)
    out = Path(config.output_dir) if config.output_dir else path.parent
    names = [f"{path.stem}.onnx", f"{path.stem}.pt2", f"{path.stem}_onnx.py"]
    there = [out / name for name in names if (out / name).exists()]
    if there and not config.overwrite:
        raise UserError(f"{there[0]}: is there already; --overwrite, or another --output-dir")
    if len(config.pairs) % 2:
        raise UserError(f"{config.pairs[-1]}: has no partner; give before, after, before, ...")
    reading = Reading.saved(state["data"], path)
    paths = list(map(Path, config.pairs))
    real = [_read_pair(paths[i], paths[i + 1], reading) for i in range(0, len(paths), 2)]
    with whole_folder(out) as folder:
        print("tracing the model: seconds for most, minutes for a Swin", flush=True)
        about = {
            "task": model.task,
            "num_classes": str(model.num_classes),
            "class_names": json.dumps(state["data"].get("class_names") or []),
            "input": config.input,
            "version": VERSION,
        }
        onnx, runs = write_programs(model, config.input, about, *(folder / n for n in names[:2]))
        worst, smallest = compare(model, runs, real, config.input, config.tolerance)
        onnx.model.metadata_props["smallest_side"] = str(smallest["onnx"])
        onnx.save(folder / names[0], external_data=False)
        is_softmax = model.task == "change" and model.num_classes > 1
        scaled = "np.ascontiguousarray(pixels)"
        example = EXAMPLE.format(
            onnx=names[0],
            script=names[2],
            input=config.input,
            pixels=scaled if config.input == "uint8" else "np.float32(pixels) / 255",
            channels="K" if is_softmax else "1" if model.task == "change" else "1 + 2K",
            mask=ARGMAX if is_softmax else SIGMOID,
            scale=255 // (model.num_classes - 1) if is_softmax else 255,
        )
        (folder / names[2]).write_text(example, encoding="utf-8")
    for kind, name in (("onnx", names[0]), ("pt2", names[1])):
        size, side = (out / name).stat().st_size / 1e6, smallest[kind]
        print(
            f"{out / name}: {size:.0f} MB, any size from {side} x {side} on; logits differ by at "
            f"most {worst[kind]:.1e}"
        )
    print(f"{out / names[2]}: runs it without PyTorch; python {names[2]} before.png after.png")
    return worst


def write_programs(
    model: SiameseUNet, dtype: str, about: dict[str, str], onnx_file: Path, torch_file: Path
) -> tuple[Any, dict[str, Run]]:
    """Trace the model and save both programs.

    Returns:
        ONNX's, which may be saved again with more to say, and what runs each file.
    """
    program, onnx = trace(model, dtype)
    onnx.model.metadata_props.update(about)
    onnx.save(onnx_file, external_data=False)
    session = _import_onnx().InferenceSession(onnx_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory
        torch.export.save(program, torch_file)
        # its guards are about layouts at the traced size; the comparison with the model decides
        loaded = torch.export.load(torch_file).module(check_guards=False)
    return onnx, {
        "onnx": lambda before, after: session.run(
            None, {"before": before.numpy(), "after": after.numpy()}
        )[0],
        "pt2": lambda before, after: loaded(before, after).numpy(),
    }


class Exported(nn.Module):
    """The model, on two tensors of one dtype."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Turn (B, 3, H, W) of both dates into logits (B, K, H, W)."""
        return self.model(before, after)


def trace(model: nn.Module, kind: str) -> tuple[ExportedProgram, Any]:
    """Return the model as torch's program and as ONNX, of any batch, height and width."""
    example = tuple(convert(image, kind) for image in random_pair(TRACED))
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of both exporters, about their own insides
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.export.export(Exported(model), example, dynamic_shapes=(free, free))
            onnx = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False,
                input_names=["before", "after"], output_names=["logits"],
            )  # fmt: skip
        except Exception as error:  # exporters raise what they like for what they do not know
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"this model cannot be exported by torch {torch.__version__}: {reason}"
            ) from None
    assert onnx is not None
    import onnx_ir

    for value in onnx.model.graph.inputs:
        value.shape = onnx_ir.Shape(["batch", 3, "height", "width"])
    return program, onnx


def compare(
    model: nn.Module,
    runs: dict[str, Run],
    real: Sequence[tuple[Tensor, Tensor]],
    kind: str,
    tolerance: float,
) -> tuple[dict[str, float], dict[str, int]]:
    """Compare exported programs with the model.

    Returns:
        Of each the largest difference, and the smallest height and width that it is good for.

    Raises:
        UserError: they differ at a size that every backbone takes, or on a given pair.
    """
    worst = dict.fromkeys(runs, 0.0)
    cases = [*((random_pair(size), True) for size in LARGE), *((pair, True) for pair in real)]
    cases += [(random_pair((1 + side % 2, 3, side, side + side // 3)), False) for side in SMALL]
    smallest = dict.fromkeys(runs, 1)
    for images, must_agree in cases:
        before, after = (convert(image, kind) for image in images)
        with torch.no_grad():
            expected = model(before, after).numpy()
        limit = tolerance * max(1.0, float(np.abs(expected).max()))
        size = " x ".join(map(str, before.shape))
        for name, run in runs.items():
            try:
                found = run(before, after)
                gap = float(np.abs(found - expected).max())
            except Exception as error:
                gap, reason = float("inf"), str(error).strip().splitlines()[0]
            else:
                reason = f"its logits differ by {gap:.1e}"
            if gap <= limit:
                worst[name] = max(worst[name], gap)
            elif must_agree:
                raise UserError(f"{name} fails at {size}: {reason}; --tolerance is {tolerance}")
            else:
                smallest[name] = max(smallest[name], before.shape[-2] + 1)
    return worst, smallest


def random_pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return two dates of noise, uint8, the same at each call."""
    draw = torch.Generator().manual_seed(0)
    before, after = torch.randint(0, 256, (2, *shape), generator=draw, dtype=torch.uint8)
    return before, after


def convert(image: Tensor, kind: str) -> Tensor:
    """Turn uint8 into what the exported model takes."""
    return image if kind == "uint8" else image.float() / 255


def _read_pair(before: Path, after: Path, reading: Reading) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.from_numpy(read_image(p, reading).transpose(2, 0, 1).copy())[None]
        for p in (before, after)
    )
    if first.shape != second.shape:
        raise UserError(f"{before} and {after}: differ in size")
    return first, second


def _import_onnx() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"export needs {error.name}: pip install -r requirements-onnx.txt"
        ) from None
    return onnxruntime


if __name__ == "__main__":
    sys.exit(run_script(lambda: export(GIVEN)))
