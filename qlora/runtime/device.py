"""The device a run uses and the precision it computes in."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.config.schema import ComputeDtype, Device
from qlora.errors import ResourceError
from qlora.runtime import distributed
from qlora.text import plural
from qlora.upstream.torch_models import cpu_computes_bf16

DTYPES = {
    ComputeDtype.bf16: torch.bfloat16,
    ComputeDtype.fp16: torch.float16,
    ComputeDtype.fp32: torch.float32,
}


@dataclass(frozen=True)
class Placement:
    """The device that a model runs on, and its precision."""

    device: torch.device
    compute_dtype: torch.dtype
    """That of matrix products (autocast)."""
    param_dtype: torch.dtype
    """That of the parameters that are not quantized."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which forward passes run; training and evaluation use the same."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def __str__(self) -> str:
        return f"{device_name(self.device)}, computing in {str(self.compute_dtype).removeprefix('torch.')}"


def planned_dtype(plan: dict[str, torch.dtype], name: str, otherwise: torch.dtype) -> torch.dtype:
    """Returns the dtype that transformers loads a tensor in; by a model's plan of dtypes it keeps a few in float32."""
    return next((dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)), otherwise)


def find_device(requested: Device) -> torch.device:
    """Returns the device of `device=`; `auto` takes the first accelerator there is.

    ROCm builds of torch answer to the name `cuda`. Raises `ResourceError` for a device that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "xpu": torch.xpu.is_available(), "cpu": True}
    if requested is Device.auto:
        kind = next(kind for kind in ("cuda", "xpu", "cpu") if there[kind])
    elif there[requested.value]:
        kind = requested.value
    else:
        present = " and ".join(kind for kind, is_there in there.items() if is_there)
        raise ResourceError(
            f"device={requested.value}: torch {torch.__version__} sees no such device here, only {present}; use "
            "device=auto, or install a torch build and driver for it"
        )
    if kind == "cpu":
        return torch.device("cpu")
    number, count = distributed.local_rank(), getattr(torch, kind).device_count()
    if number >= count:
        raise ResourceError(
            f"device={requested.value}: process {number + 1} of this machine has no GPU of its own, there are {count}; "
            f"launch {count} (torchrun --nproc-per-node {count}), or use device=cpu"
        )
    return torch.device(kind, number)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that torch may hold on a CUDA device, with those that it holds already."""
    return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def computes_bf16(device: torch.device) -> bool:
    """Returns whether the hardware multiplies bf16 matrices itself; emulation on a CPU is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return True
    return cpu_computes_bf16()


def device_name(device: torch.device) -> str:
    """Returns the product name of a device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    return f"CPU ({plural(torch.get_num_threads(), 'thread')})"


def peak_memory_gb(device: torch.device) -> float:
    """Returns the most memory held so far, in 10^9 bytes: of torch on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    if device.type == "xpu":
        return float(torch.xpu.max_memory_allocated(device)) / 1e9
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1024 if Path("/proc").exists() else 1) / 1e9


def reset_peak_memory(device: torch.device) -> None:
    """Starts the measurement of `peak_memory_gb` anew where the device allows it."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream in which all CUDA graphs of a device are captured.

    cuBLAS sets 32 MB aside for each stream that it has computed in, for good.
    """
    return torch.cuda.Stream(device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measures the operations a second of one large matrix product, in some milliseconds; None without CUDA."""
    if device.type != "cuda":
        return None
    size, repeats = 4096, 10
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    begin.record()
    for _ in range(repeats):
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return repeats * 2 * size**3 / (begin.elapsed_time(end) / 1e3)
