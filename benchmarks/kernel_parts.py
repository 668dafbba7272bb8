"""Sums the kernels of a training step by what they do; `step.py --profile` prints it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

PARTS = {
    "copies to and from the host": r"Memcpy (HtoD|DtoH)",
    "optimizer": r"kOptimizer|multi_tensor_apply",
    "attention": r"sdpa|flash|fmha|cudnn::fusion|flex_attention",
    "matmuls of experts": r"^_matmul_kernel",
    "adapters on experts": r"^_(low_rank|sum)_kernel",
    "decoding": r"^_(turned_)?experts_kernel|^_(rows|columns)_kernel|[dD]equantize",
    "routing, sums of a token's rows": r"TopK|bitonicSort|^_(count|sum_counts|place|combine)_kernel",
    "matmuls of linear layers, of the output layer and of adapters on them": r"nvjet|gemm|cutlass|splitK",
    "scaling to 8 bits": r"^_scale_kernel|abs_amax|_amax_|clamp_(div|constant)",
    "other compiled code": r"^triton_",
}
"""By part, a pattern of the names of its kernels; the first that fits counts."""
OTHER = "others"


def by_part(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns the milliseconds of each part; `kernels` are names and microseconds."""
    parts: Counter[str] = Counter()
    for name, microseconds in kernels:
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHER)
        parts[part] += microseconds / 1e3
    return {part: parts[part] for part in (*PARTS, OTHER) if parts[part]}


def of_trace(trace: Any) -> list[tuple[str, float]]:
    """Returns the names and microseconds of what a torch profiler has seen a GPU do."""
    return [
        (event.key, event.device_time_total)
        for event in trace.key_averages()
        if str(event.device_type).endswith("CUDA")
    ]


def to_table(parts: dict[str, float], layers: int) -> str:
    """Returns a table of the parts of a step, and of each layer's share."""
    lines = ["| part | ms a step | ms a layer |", "| --- | ---: | ---: |"]
    lines += [f"| {part} | {value:.1f} | {value / layers:.2f} |" for part, value in parts.items()]
    return "\n".join(lines)
