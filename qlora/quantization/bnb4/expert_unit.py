"""One matrix in 4 bits, and such matrices of all experts of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora.experts.layout import Unit
from qlora.quantization.bnb4.layout import BLOCK, GROUP


@dataclass(frozen=True)
class Matrix4bit:
    """One matrix as bitsandbytes quantizes it, flat."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_codebook: Tensor | None = None
    is_finite: Tensor | None = None
    """Whether it was, before it was quantized; None: not known."""

    @classmethod
    def of(cls, packed: Tensor, state: bnb.QuantState, is_finite: Tensor | None = None) -> Matrix4bit:
        """Takes the tensors of a quantized weight apart."""
        flat = packed.view(torch.uint8).view(-1)
        if not state.nested:
            return cls(flat, state.absmax, state.code, is_finite=is_finite)
        inner = state.state2
        return cls(flat, state.absmax, state.code, inner.absmax, state.offset, inner.code, is_finite)


class QuantizedUnit(nn.Module):
    """The gate, up or down projection of all experts of a layer."""

    packed: Tensor
    """uint8 [experts, out * in / 2]; where processes share it, a parameter of the same bytes (`as_parameter`)."""
    absmax: Tensor
    """uint8 (double quantization) or float32, [experts, out * in / 64]"""
    nested_absmax: Tensor
    """float32 [experts, blocks / 256], or [experts, 0]"""
    nested_offset: Tensor
    """float32 [experts]"""
    finite: Tensor
    """bool [experts]: whether a matrix was finite before it was quantized."""

    def __init__(self, unit: Unit, count: int, *, double_quant: bool, device: torch.device) -> None:
        super().__init__()
        (self.rows, self.columns), self.count = unit.shape, count
        blocks = math.ceil(self.rows * self.columns / BLOCK)
        groups = math.ceil(blocks / GROUP) if double_quant else 0

        def add(name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))

        add("packed", (count, math.ceil(self.rows * self.columns / 2)), torch.uint8)
        add("absmax", (count, blocks), torch.uint8 if double_quant else torch.float32)
        add("nested_absmax", (count, groups), torch.float32)
        add("nested_offset", (count,), torch.float32)
        add("finite", (count,), torch.bool)

    def set(self, expert: int, matrix: Matrix4bit) -> None:
        """Stores the matrix of one expert."""
        self.packed[expert] = matrix.packed
        self.absmax[expert] = matrix.absmax
        self.finite[expert] = True if matrix.is_finite is None else matrix.is_finite
        if matrix.nested_absmax is not None and matrix.nested_offset is not None:
            self.nested_absmax[expert] = matrix.nested_absmax
            self.nested_offset[expert] = matrix.nested_offset

    def as_parameter(self) -> None:
        """Makes `packed` a parameter, as which processes can share it: the bytes as float32 numbers, flat.

        torch shards parameters of floating point alone. Bytes that are no whole numbers stay a buffer.
        """
        flat = self.packed.view(-1)
        if len(flat) % 4 == 0:
            del self._buffers["packed"]
            self.packed = nn.Parameter(flat.view(torch.float32), requires_grad=False)

    @property
    def codes(self) -> Tensor:
        """`packed` as uint8 [experts, out * in / 2]; of a layer that is not called, the part of this process, flat."""
        packed = self.packed
        if isinstance(packed, DTensor):
            return packed.to_local().view(torch.uint8)
        return packed.view(torch.uint8).view(self.count, -1) if isinstance(packed, nn.Parameter) else packed

    @property
    def is_sharded(self) -> bool:
        """Whether processes share it."""
        return isinstance(self._parameters.get("packed"), nn.Parameter)
