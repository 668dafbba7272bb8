"""Devices and precision: what `auto` means, and what a missing device is answered with."""

from __future__ import annotations

import pytest
import torch

from qlora.config.compose import compose
from qlora.config.schema import Device, QuantizationConfig
from qlora.errors import UserError
from qlora.quantization.placement import find_placement
from qlora.runtime.device import Placement, computes_bf16, find_device
from qlora.text import plural

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU")


def quantization(*overrides: str) -> QuantizationConfig:
    return compose(overrides).quantization


def test_cpu_is_always_there() -> None:
    assert find_device(Device.cpu) == CPU


@NO_GPU
def test_auto_falls_to_the_cpu_without_an_accelerator() -> None:
    assert find_device(Device.auto) == CPU


@NO_GPU
@pytest.mark.parametrize("requested", [Device.cuda, Device.xpu])
def test_a_missing_device_is_refused_with_what_is_there(requested: Device) -> None:
    with pytest.raises(UserError, match=rf"device={requested.value}: torch .* only cpu; use device=auto"):
        find_device(requested)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(Device.cuda) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 of this machine has no GPU of its own, there are 2; launch 2"):
        find_device(Device.cuda)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_compute_dtype_that_is_named_is_taken(name: str, dtype: torch.dtype) -> None:
    placement = find_placement(quantization("quantization=nf4", f"quantization.compute_dtype={name}"), CPU)
    assert (placement.compute_dtype, placement.param_dtype) == (dtype, dtype)


def test_auto_computes_in_bf16_only_where_the_cpu_does() -> None:
    expected = torch.bfloat16 if computes_bf16(CPU) else torch.float32
    assert find_placement(quantization("quantization=nf4"), CPU).compute_dtype is expected


def test_16_bit_weights_stay_16_bit_on_any_cpu() -> None:
    assert find_placement(quantization("quantization=none"), CPU).param_dtype is torch.bfloat16


def test_32_bit_weights_stay_32_bit_whatever_is_computed_in() -> None:
    placement = find_placement(quantization("quantization=fp32", "quantization.compute_dtype=bf16"), CPU)
    assert (placement.compute_dtype, placement.param_dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrix_products_run_in_the_compute_dtype(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with Placement(CPU, dtype, torch.float32).autocast():
        assert layer(torch.ones(1, 4)).dtype is dtype
    assert layer(torch.ones(1, 4)).dtype is torch.float32


def test_a_placement_reads_as_a_sentence() -> None:
    text = str(Placement(CPU, torch.bfloat16, torch.bfloat16))
    assert text == f"CPU ({plural(torch.get_num_threads(), 'thread')}), computing in bfloat16"
