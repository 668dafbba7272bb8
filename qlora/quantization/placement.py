"""The precision that a quantized base computes in on a device."""

from __future__ import annotations

import torch

from qlora.config.schema import ComputeDtype, QuantizationConfig
from qlora.quantization.method import find_method
from qlora.runtime.device import DTYPES, Placement, computes_bf16


def find_placement(config: QuantizationConfig, device: torch.device) -> Placement:
    """Returns the precision of `config` on `device`, with `compute_dtype=auto` decided."""
    method = find_method(config)
    if config.compute_dtype is not ComputeDtype.auto:
        compute_dtype = DTYPES[config.compute_dtype]
    elif computes_bf16(device) or (method.prefers_bf16(config) and device.type == "cpu"):
        compute_dtype = torch.bfloat16
    else:
        compute_dtype = torch.float16 if device.type != "cpu" else torch.float32
    return Placement(device, compute_dtype, torch.float32 if method.stores_fp32(config) else compute_dtype)
