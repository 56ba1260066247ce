import re

import pytest
import torch

from runtime.devices import (
    describe,
    pick_device,
    pick_precision,
    pick_workers,
)
from runtime.errors import UserError

CPU = torch.device("cpu")


def test_auto_finds_a_device() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert pick_device("auto").type == (accelerator.type if accelerator else "cpu")
    assert pick_device("cpu") == CPU


@pytest.mark.fault("R16")
@pytest.mark.parametrize("name", ["cuda:99", "cpu:3", "gpu", "meta"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


@pytest.mark.fault("R16")
def test_cuda_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: .*--device auto"):
        pick_device("cuda")


def test_precision_is_bf16_where_it_pays_and_never_fp16_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for supported, expected in ((True, "bf16"), (False, "off")):
        monkeypatch.setattr("runtime.devices._cpu_multiplies_bf16", lambda s=supported: s)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        assert pick_precision("auto", CPU) == expected
        assert pick_precision("auto", torch.device("cuda")) == expected
    assert pick_precision("auto", torch.device("mps")) == "off"
    assert pick_precision("fp16", CPU) == "fp16"


def test_the_rest_answers() -> None:
    assert 0 <= pick_workers(None) <= 8
    assert pick_workers(11, 4) == 11
    assert re.fullmatch(r"cpu \((1 thread|\d+ threads)\)", describe(CPU))


def test_a_gpu_gets_its_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    assert pick_device("auto").type == "cuda"
    assert torch.backends.cudnn.benchmark and asked == ["high"]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    pick_device("cpu")
    assert not torch.backends.cudnn.benchmark
