import pytest
import torch

from model import build_model
from training.engine import build_optimizer, warmup_cosine


def test_frozen_encoder_is_left_out() -> None:
    model = build_model(backbone="resnet18", freeze_backbone=True)
    optimizer = build_optimizer(model, lr=1.0, weight_decay=0.0)
    optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert optimized.isdisjoint(id(p) for p in model.encoder.parameters())
    assert len(optimized) == sum(1 for p in model.parameters() if p.requires_grad)


def test_encoder_takes_its_share_of_the_rate() -> None:
    model = build_model(backbone="resnet18", freeze_backbone=False)
    optimizer = build_optimizer(model, lr=1.0, weight_decay=0.0, encoder_factor=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.1]
    assert len(optimizer.param_groups[1]["params"]) == len(list(model.encoder.parameters()))


def test_schedule_rises_then_falls_to_nothing() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=2.0)
    scheduler = warmup_cosine(optimizer, warmup_steps=4, total_steps=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[8] == pytest.approx(1.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_schedule_survives_more_steps_than_planned() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, warmup_steps=3, total_steps=2)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
