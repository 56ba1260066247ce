import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import picture, save
from PIL import Image
from test_predict import checkpoint_of
from torch import Tensor, nn

import export
from model import FUSIONS, SiameseUNet, load_model
from networks.backbones import PlainViT
from networks.encoders import Encoder, Stages
from predict import predict_scene
from runtime.errors import UserError

SCRIPT = Path(export.__file__)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("run")
    checkpoint = checkpoint_of(folder / "best.pt", {"class_names": ["no change", "change"]})
    files = [str(save(folder / f"{i}.png", picture(i, 75, 107))) for i in (1, 2)]
    worst = export.export({"checkpoint": str(checkpoint), "pairs": tuple(files)})
    assert 0 <= worst["pt2"] < 1e-4 and 0 <= worst["onnx"] < 1e-4
    yield folder
    (folder / "best.onnx").unlink()


@pytest.mark.fault("U5")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 3, 33, 70), (2, 3, 128, 96)])
def test_onnx_and_torch_agree_at_sizes_that_export_has_not_tried(
    exported: Path, shape: tuple[int, ...]
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "best.onnx")
    before, after = export.random_pair(shape)
    (logits,) = session.run(None, {"before": before.numpy(), "after": after.numpy()})
    with torch.no_grad():
        expected = load_model(exported / "best.pt")(before, after)
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert about["task"] == "change" and about["input"] == "uint8"
    assert about["smallest_side"] == "1" and about["class_names"] == '["no change", "change"]'
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_example_runs_without_torch_and_agrees(exported: Path, tmp_path: Path) -> None:
    script = exported / "best_onnx.py"
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise ImportError('the example must not need torch')")
    done = subprocess.run(
        [sys.executable, str(script), str(exported / "1.png"), str(exported / "2.png")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "change.png") as image:
        shown = np.asarray(image)
    probability = predict_scene(
        load_model(exported / "best.pt"), picture(1, 75, 107), picture(2, 75, 107), amp="off"
    ).numpy()
    is_clear = np.abs(probability - 0.5) > 1e-4
    assert np.array_equal(shown[is_clear] == 255, probability[is_clear] > 0.5)
    assert len(script.read_text().splitlines()) <= 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_semantic_model_with_cross_attention_is_exported(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(
        tmp_path / "best.pt", task="semantic", num_classes=3, fusion="cross_attention"
    )
    worst = export.export({"checkpoint": str(checkpoint), "input": "float32"})
    assert max(worst.values()) < 1e-4
    assert "1 + 2K" in (tmp_path / "best_onnx.py").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sizes_that_have_to_be_padded_are_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")

    class Padding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stem = nn.Conv2d(3, 2, 4, stride=4)
            self.encoder = Encoder(
                Stages(nn.Sequential(stem, nn.Identity()), channels_last=False),
                (2,),
                (4,),
                multiple=32,
            )

        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            return self.encoder(before.float() / 255)[0] + after.float().mean()

    model = Padding().eval()
    _, onnx = export.trace(model, "uint8")
    onnx.save(tmp_path / "a.onnx", external_data=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for shape in ((1, 3, 289, 383), (2, 3, 320, 288), (1, 3, 33, 1)):
        before, after = export.random_pair(shape)
        (found,) = session.run(None, {"before": before.numpy(), "after": after.numpy()})
        expected = model(before, after).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
        rows, columns = (-(-side // 32) * 8 for side in shape[2:])
        assert found.shape == (shape[0], 2, rows, columns)


def test_a_program_that_differs_is_refused() -> None:
    def model(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return before.float().mean(1, keepdim=True)

    def wrong_when_small(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
        return model(before, after).numpy() + (before.shape[-1] < 100)

    def wrong(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
        return model(before, after).numpy() + 3

    right = {"onnx": lambda before, after: model(before, after).numpy()}
    module: Any = model
    assert export.compare(module, right, [], "uint8", 1e-3) == ({"onnx": 0.0}, {"onnx": 1})
    worst, smallest = export.compare(module, {"pt2": wrong_when_small}, [], "uint8", 1e-3)
    assert worst == {"pt2": 0.0} and smallest == {"pt2": 65}
    with pytest.raises(UserError, match="onnx fails at 1 x 3 x 320 x 288: its logits differ by"):
        export.compare(module, {"onnx": wrong}, [], "uint8", 1e-3)


@pytest.mark.fault("U3")
@pytest.mark.parametrize("name", ["onnxruntime", "onnxscript", "onnx"])
def test_without_the_extra_one_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs {name}: pip install -r requirements-onnx\.txt"):
        export.export({"checkpoint": str(tmp_path / "best.pt")})


def test_what_is_there_stays_and_pairs_are_whole(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint = checkpoint_of(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"a\.png: has no partner"):
        export.export({"checkpoint": str(checkpoint), "pairs": ("a.png",)})
    (tmp_path / "best.onnx").write_text("mine")
    with pytest.raises(UserError, match=r"best\.onnx: is there already; --overwrite"):
        export.export({"checkpoint": str(checkpoint)})
    assert (tmp_path / "best.onnx").read_text() == "mine"


def test_help_answers_without_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['export.py', '--help']\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "checkpoint [pairs ...]" in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_plain_vit_is_exported_for_sizes_above_a_tile() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sizes = {"patch_size": 16, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    vit = PlainViT((-4, -3, -2, -1), image_size=64, **sizes)
    encoder = Encoder(vit, [32] * 4, (4, 8, 16, 32), multiple=32)
    torch.manual_seed(0)
    model = SiameseUNet(encoder, FUSIONS["concat"], 1).eval()
    program, onnx = export.trace(model, "uint8")
    runs = program.module(check_guards=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    for shape in ((1, 3, 64, 64), (2, 3, 33, 130), (1, 3, 97, 40)):
        before, after = export.random_pair(shape)
        with torch.no_grad():
            expected = model(before, after)
            torch.testing.assert_close(runs(before, after), expected)
        (found,) = session.run(None, {"before": before.numpy(), "after": after.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
