"""The list of names: every entry is there, with numbers of its own model."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from losses import LOSSES
from model import build_model, count_parameters
from networks.encoders import ENCODERS
from networks.fusion import FUSIONS
from training.catalogue import catalogue, cost


@pytest.mark.slow
def test_everything_is_listed() -> None:
    lines = catalogue().splitlines()
    for name in (*ENCODERS, *FUSIONS):
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert all(name in lines[-3] for name in LOSSES)


def test_costs_are_those_of_a_real_forward_pass() -> None:
    import torch

    parameters, operations = cost("resnet18", "diff")
    model = build_model(backbone="resnet18", fusion="diff", freeze_backbone=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    assert operations == counter.get_total_flops() / 1e9
    assert parameters == count_parameters(model)[1] / 1e6
