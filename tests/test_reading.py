"""What a run reads is what it goes on with, and what is scored."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import save, save_tree
from PIL import Image
from tiny import TINY, send_to

import evaluate
from main import train
from runtime.checkpoint import read_checkpoint
from runtime.errors import UserError

FAST: dict[str, Any] = {"device": "cpu", "workers": 0, "mlflow": False, "amp": "off"}
TRAINING: dict[str, Any] = {
    **FAST, "backbone": TINY, "weights": "none", "crop_size": 32, "batch_size": 2, "epochs": 1
}  # fmt: skip
VAL: dict[str, Any] = {"split": "val", "window": 32, "overlap": 8}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_to(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of 16 bits and a run whose scale they chose."""
    home = tmp_path_factory.mktemp("deep")
    tree = save_tree(home / "deep", train=4, val=2)
    for path in [*tree.glob("*/A/*"), *tree.glob("*/B/*")]:
        save(path, Image.fromarray(np.asarray(Image.open(path))[..., 0].astype(np.uint16) * 12))
    with pytest.MonkeyPatch.context() as patch:
        send_to(home, patch)
        train({**TRAINING, "data_dir": str(tree), "name": "a"})
    return home


@pytest.fixture
def deep(deep_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(deep_run / "deep", tmp_path / "deep")
    return Path(shutil.copytree(deep_run / "runs" / "a", tmp_path / "runs" / "a"))


def go_on(run: Path, **more: Any) -> dict[str, float]:
    data = str(run.parents[1] / "deep")
    return train({"resume": str(run), "data_dir": data, "epochs": 2, **FAST, **more})


@pytest.mark.fault("R10")
def test_the_scale_that_was_chosen_stays(deep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = read_checkpoint(deep / "last.pt")["data"]["scale"]
    assert 0 <= scale[0] < 200
    assert 2800 < scale[1] <= 3060
    text = f"scale   {scale[0]:g} becomes 0, {scale[1]:g} becomes 255"
    go_on(deep)
    assert text in capsys.readouterr().out
    assert read_checkpoint(deep / "last.pt")["data"]["scale"] == scale
    darker = deep.parents[1] / "darker"  # other percentiles, but the model has learnt with these
    shutil.copytree(deep.parents[1] / "deep", darker)
    for path in [*darker.glob("*/A/*"), *darker.glob("*/B/*")]:
        save(path, Image.fromarray(np.asarray(Image.open(path)) // 2))
    evaluate.evaluate({"checkpoints": (str(deep),), **FAST, "data_dir": str(darker)} | VAL)
    assert text in capsys.readouterr().out


@pytest.mark.fault("R10")
@pytest.mark.parametrize(
    "other",
    [{"scale": (0.0, 100.0)}, {"bands": (1,)}, {"alpha": 2}],
    ids=["scale", "bands", "alpha"],
)
def test_another_reading_is_refused_on_resume(deep: Path, other: dict[str, Any]) -> None:
    before = (deep / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"{next(iter(other))}"):
        go_on(deep, **other)
    assert (deep / "last.pt").read_bytes() == before


@pytest.mark.fault("U9")
@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_what_lies_under_holes_changes_no_score(tmp_path: Path, cache: str) -> None:
    reports = []
    for seed in (1, 2):
        tree = save_tree(tmp_path / str(seed) / "set", size=(40, 40), train=4, val=2)
        rng = np.random.default_rng(seed)
        for path in tree.glob("*/B/*"):
            rgb = np.asarray(Image.open(path)).copy()
            alpha = np.full((40, 40), 255, np.uint8)
            alpha[5:25, 5:30] = 0
            rgb[5:25, 5:30] = rng.integers(0, 256, (20, 25, 3))
            save(path, np.dstack([rgb, alpha]))
        train({**TRAINING, "data_dir": str(tree), "name": f"r{seed}", "cache": cache})
        run = tmp_path / "runs" / f"r{seed}"
        found = evaluate.evaluate(
            {"checkpoints": (str(run),), **FAST, **VAL, "cache": cache}
        )  # fmt: skip
        reports.append(found["runs"][0]["protocols"])
        pixels = read_checkpoint(run / "last.pt")["model"]
        reports.append({name: value.sum().item() for name, value in pixels.items()})
    assert reports[0] == reports[2]
    assert reports[1] == reports[3]
