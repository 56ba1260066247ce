"""A run that was saved by an earlier version goes on in this one.

`tests/data/format_1.json` holds the last.pt of format 1 without its numbers: every tensor as
{"dtype": ..., "shape": ...}, all else as it was. A change of code that fails here needs either a
default for what old checkpoints lack, or a new `checkpoint.FORMAT` with a fixture beside this one:
`PYTHONPATH=. python tests/runtime/test_old_checkpoints.py`.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import save_tree

import main
from main import train
from model import load_model
from runtime.checkpoint import FORMAT, read_checkpoint
from training import splits

FIXTURES = Path(__file__).parents[1] / "data"
OPTIONS = {
    "backbone": "resnet18",
    "weights": "none",
    "freeze_backbone": True,
    "crop_size": 32,
    "batch_size": 2,
    "device": "cpu",
    "amp": "off",
    "epochs": 1,
    "name": "old",
    "data_dir": "levir",
    "output_dir": "runs",
}
ANEW = {"workers": 0, "mlflow": False}


def to_json(value: Any) -> Any:
    """Turn a checkpoint's content into JSON: tensors without numbers, pairs for dictionaries."""
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"pairs": [[key, to_json(content)] for key, content in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [to_json(content) for content in value]}
    return [to_json(content) for content in value] if isinstance(value, list) else value


def from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [from_json(content) for content in value]
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]))
    if "tuple" in value:
        return tuple(from_json(content) for content in value["tuple"])
    return {key: from_json(content) for key, content in value["pairs"]}


@pytest.mark.fault("C5")
@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_run_of_an_older_version_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "ROOT", tmp_path)
    monkeypatch.setattr(splits, "PATCH_SIZE", 32)
    save_tree(tmp_path / "levir", train=4, val=2)
    state = from_json(json.loads((FIXTURES / f"format_{number}.json").read_text("utf-8")))
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    torch.save(state, run / "last.pt")
    torch.save(state, run / "best.pt")
    model = load_model(run / "best.pt")
    pair = torch.zeros(2, 1, 3, 32, 32)
    assert model(*pair).shape == (1, 1, 32, 32)
    train({**ANEW, "resume": str(run), "epochs": 2})
    now = read_checkpoint(run / "last.pt")
    assert now["progress"]["epoch"] == 2
    assert set(state) <= set(now)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main.ROOT, splits.PATCH_SIZE = Path(folder), 32
        save_tree(Path("levir"), train=4, val=2)
        train({**OPTIONS, **ANEW})
        saved = to_json(read_checkpoint(Path("runs/old/last.pt")))
        for pair in saved["pairs"]:  # what this machine is called is nobody's business
            if pair[0] == "versions":
                pair[1]["pairs"] = [p for p in pair[1]["pairs"] if p[0] != "platform"]
        FIXTURES.mkdir(exist_ok=True)
        text = json.dumps(saved, separators=(",", ":"), ensure_ascii=False) + "\n"
        (FIXTURES / f"format_{FORMAT}.json").write_text(text, "utf-8")
