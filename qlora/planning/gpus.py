"""GPUs: memory, matmul speed without sparsity, and bandwidth, from the vendors' data sheets."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, replace

from qlora.errors import ResourceError


@dataclass(frozen=True)
class Gpu:
    """What a training run can use of a GPU."""

    name: str
    memory: float
    """Bytes. A data sheet's GB are taken for 10^9, about what error correction and the driver leave of 2^30."""
    tflops: float | None
    """10^12 operations a second in 16-bit matmuls that accumulate in 32 bits; None: unknown."""
    fp8_tflops: float | None
    """The same in 8-bit floats; None: it has none, or unknown."""
    bandwidth: float | None
    """10^9 bytes a second; None: unknown."""


def _gpu(name: str, gb: int, tflops: float, fp8_tflops: float | None, bandwidth: float) -> Gpu:
    return Gpu(name, gb * 1e9, tflops, fp8_tflops, bandwidth)


GPUS = {
    "t4": _gpu("T4", 16, 65, None, 320),
    "v100-32gb": _gpu("V100-SXM2-32GB", 32, 125, None, 900),
    "rtx-3090": _gpu("GeForce RTX 3090", 24, 71, None, 936),
    "rtx-4090": _gpu("GeForce RTX 4090", 24, 165.2, 330.3, 1008),
    "rtx-5090": _gpu("GeForce RTX 5090", 32, 209.5, 419, 1792),
    "a10": _gpu("A10", 24, 125, None, 600),
    "l4": _gpu("L4", 24, 121, 242.5, 300),
    "a6000": _gpu("RTX A6000", 48, 154.8, None, 768),
    "l40s": _gpu("L40S", 48, 362, 733, 864),
    "a100-40gb": _gpu("A100-SXM4-40GB", 40, 312, None, 1555),
    "a100-80gb": _gpu("A100-SXM4-80GB", 80, 312, None, 2039),
    "h100": _gpu("H100 80GB HBM3", 80, 989.4, 1978.9, 3350),
    "h200": _gpu("H200", 141, 989.4, 1978.9, 4800),
}
"""By the names that `plan.device` takes; the driver puts the vendor in front of `Gpu.name`."""


def find_gpu(requested: str) -> Gpu:
    """Returns the GPU of `plan.device`; `this` asks the driver. Raises `ResourceError` where there is none."""
    return _this_gpu() if requested == "this" else GPUS[requested]


def _this_gpu() -> Gpu:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        lines = done.stdout.splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.SubprocessError):
        lines = []
    if not lines:
        why = "nvidia-smi finds none" if shutil.which("nvidia-smi") else "there is no nvidia-smi"
        raise ResourceError(
            f"plan.device=this: this machine has no NVIDIA GPU ({why}); name one to plan for, e.g. plan.device=a6000"
        )
    name, mebibytes = (part.strip() for part in lines[0].rsplit(",", 1))
    known = [gpu for gpu in GPUS.values() if _plain(name).endswith(_plain(gpu.name))]
    gpu = known[0] if known else Gpu(name, 0, None, None, None)
    return replace(gpu, name=name, memory=float(mebibytes) * 2**20)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
