"""torch's grouped matmul, and what it takes: its documentation names neither strides nor devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
"""Bytes: of the first number of a tensor, and of the strides between its rows and matrices."""
CAPABILITY = (8, 0)
"""Of a GPU of NVIDIA."""

_functional: Any = torch.nn.functional
grouped_mm_public = getattr(_functional, "grouped_mm", None)  # since 2.10
grouped_mm_private = getattr(torch, "_grouped_mm", None)


def grouped_mm_kernel(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies group by group: [rows, in] by [groups, in, out], or [out, rows] by [rows, in]; `offsets` are int32."""
    kernel: Any = grouped_mm_public or grouped_mm_private
    output: Tensor = kernel(left, right, offs=offsets)
    return output


def takes_grouped_mm(left: Tensor, right: Tensor) -> bool:
    """Returns whether the kernel takes two tensors: their device, dtype and strides."""
    if left.dtype != right.dtype or left.dtype not in DTYPES or not (grouped_mm_public or grouped_mm_private):
        return False
    if left.device.type not in ("cpu", "cuda") or left.numel() == 0:
        return False
    if left.device.type == "cuda" and torch.cuda.get_device_capability(left.device) < CAPABILITY:
        return False
    return _is_aligned(left) and _is_aligned(right)


def _is_aligned(tensor: Tensor) -> bool:
    """Returns whether one of the last two strides is 1, and the others are multiples of 16 bytes, as the first byte."""
    *outer, rows, columns = tensor.stride()
    if columns == 1:
        stride, length = rows, tensor.shape[-1]
    elif rows == 1:
        stride, length = columns, tensor.shape[-2]
    else:
        return False
    sizes = [count * tensor.element_size() for count in (*outer, stride)]
    return stride >= length and all(size % ALIGNMENT == 0 for size in (*sizes, tensor.data_ptr()))
