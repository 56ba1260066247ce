"""A network that trains in a moment, for tests of whole runs that ask nothing of the network."""

from pathlib import Path

import pytest
from torch import Tensor, nn

import evaluate
import main
import model
from networks.encoders import ENCODERS, Encoder
from scoring import counts, data, evaluation, protocols
from training import catalogue, results, splits

TINY = "tiny"  # what such a run gives as --backbone
CHANNELS = 8


class TinyStages(nn.Module):
    """Five convolutions, each of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(depth, CHANNELS, 3, 2, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()
            )
            for depth in (3, *4 * [CHANNELS])
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := stage(x) for stage in self.stages]


def install_tiny(patch: pytest.MonkeyPatch) -> None:
    """Let `--backbone tiny` name it, with a decoder as small, and draw one sample a picture."""
    strides = (2, 4, 8, 16, 32)
    patch.setitem(ENCODERS, TINY, lambda _: Encoder(TinyStages(), 5 * [CHANNELS], strides))
    known = catalogue.backbones()
    patch.setattr(catalogue, "backbones", lambda: (*known, TINY))
    patch.setattr(model, "WIDTHS", dict.fromkeys(strides, CHANNELS))
    patch.setattr(results, "SAMPLES", 1)


def send_to(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Keep what main.py and evaluate.py write beside them in a folder, and both short.

    Patches have 32 pixels a side, the network is tiny, the bootstrap draws 50 times.
    """
    for script in (main, evaluate):
        patch.setattr(script, "ROOT", folder)
    for module in (splits, evaluate, data, protocols):
        patch.setattr(module, "PATCH_SIZE", 32)
    install_tiny(patch)
    patch.setattr(counts, "NUM_RESAMPLES", 50)
    patch.setattr(evaluation, "NUM_WORST", 2)
