"""The linear layers of a mixture's experts: matmuls of routed rows with frozen weights that compute the adapters' part too.

A layer's experts are two such layers, gate and up together, and down. Between them stands what the model itself computes
(its activation), which `torch.compile` fuses. The routing weights multiply the input of the down projection, which gives
the same sum as multiplying its output, and nothing needs that output in the backward pass.

Rows are gathered and summed where they are read and written: the input of gate and up, and the gradient of down's output,
have a row a token. The operators are opaque to `torch.compile`, which would keep dequantized weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, decode_plain
from qlora.step.kernels.dequantize import is_unread, operator
from qlora.step.kernels.grouped import Routing, combine, matmul, multiply_narrow, sum_rows
from qlora.step.kernels.matmul_fp8 import scale_rows

FIELDS = 6
"""The tensors of a quantized projection: those of a `QuantizedWeight`."""


@dataclass(frozen=True)
class FrozenExperts:
    """The frozen weights of all experts of a layer, [experts, rows, columns] when decoded: gate and up, or down."""

    tensors: list[Tensor]
    """One tensor, the weights; or for each projection those of a `QuantizedWeight`, with one row an expert but for the
    codebooks."""
    rows: int
    columns: int
    is_interleaved: bool = False
    """Whether the rows of the projections alternate; else they follow each other."""
    weight_scale: Tensor | None = None
    """With 8-bit matmuls, the factor with which the weights fill the range of e4m3: float32 [1]."""

    @property
    def shape(self) -> list[int]:
        """What the operators are told."""
        return [self.rows, self.columns, int(self.is_interleaved)]


def decode_experts(
    tensors: list[Tensor], shape: list[int], dtype: torch.dtype, weight_scale: Tensor | None, *, transposed: bool
) -> Tensor:
    """Returns the weights of `FrozenExperts`, times `weight_scale`: [experts, rows, columns], or a transposed view.

    8-bit weights that are asked for transposed are stored so, as their matmuls need it.
    """
    rows, columns, is_interleaved = shape
    if len(tensors) == 1:
        return tensors[0].transpose(1, 2) if transposed else tensors[0]
    projections = [tensors[start : start + FIELDS] for start in range(0, len(tensors), FIELDS)]
    experts, is_turned = len(tensors[0]), transposed and weight_scale is not None
    stored = (experts, columns, rows) if is_turned else (experts, rows, columns)
    out = torch.empty(stored, dtype=dtype, device=tensors[0].device)
    view = out.transpose(1, 2) if is_turned else out
    count = len(projections)
    for index, projection in enumerate(projections):
        part = view[:, index::count] if is_interleaved else view.chunk(count, 1)[index]
        if out.is_cuda:
            from qlora.quantization.bnb4 import decode_kernels  # Triton is there with CUDA only

            decode_kernels.decode_experts(projection, part, weight_scale)
        else:
            _decode_plain(projection, part, weight_scale)
    return out.transpose(1, 2) if transposed and not is_turned else out


def _decode_plain(tensors: list[Tensor], out: Tensor, weight_scale: Tensor | None) -> None:
    packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset = tensors
    dtype = out.dtype if weight_scale is None else torch.float32
    for expert, target in enumerate(out):
        own = (packed[expert], absmax[expert], codebook, nested_codebook)
        groups = (part[expert] if part.numel() else part for part in (nested_absmax, nested_offset))
        plain = decode_plain(QuantizedWeight(*own, *groups, *target.shape), dtype)
        target.copy_(plain if weight_scale is None else plain * weight_scale)


def _fake_linear(x, tensors, weight_scale, shape, transposed, offsets, source, xa, b, rows):
    return x.new_empty(rows, shape[1] if transposed else shape[0])


@operator(
    "expert_linear(Tensor x, Tensor[] tensors, Tensor? weight_scale, int[] shape, bool transposed, Tensor offsets, "
    "Tensor? source, Tensor? xa, Tensor? b, int rows) -> Tensor",
    _fake_linear,
)
def expert_linear(
    x: Tensor,
    tensors: list[Tensor],
    weight_scale: Tensor | None,
    shape: list[int],
    transposed: bool,
    offsets: Tensor,
    source: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    rows: int,
) -> Tensor:
    """Returns the product of routed rows with the transposed weights of their experts, or with the weights themselves.

    The first four arguments after `x` are those of `FrozenExperts`, the others those of `grouped.matmul`: [rows, weight
    rows], or `transposed` [rows, weight columns].
    """
    if not transposed and is_unread(tensors):
        return x.new_full((rows, shape[0]), torch.nan)
    dtype = x.dtype
    scale = None
    if weight_scale is not None:
        x, scale = scale_rows(x)
        scale = scale / weight_scale
    weight = decode_experts(tensors, shape, x.dtype, weight_scale, transposed=transposed)
    return matmul(x, weight, offsets, source, scale, xa, b, rows, dtype)


class ExpertLinear(torch.autograd.Function):
    """One frozen linear layer of all experts, with their adapters."""

    @staticmethod
    def forward(ctx, x, read, a, b, routing, gathers, weight_scale, shape, *tensors):
        """Returns the outputs of the routed rows for `x`.

        With `gathers`, `x` has a row a token, [tokens, columns], and the result a row of each, [rows, weight rows];
        else `x` is [rows, columns], and the result the sum of each token's rows, [tokens, weight rows]. `read` is what
        the adapters read, `x` after dropout; None: `x` itself. `a` [experts, rank, columns] and the scaled `b`
        [experts, weight rows, rank] may be None: no adapters.
        """
        _, source, positions, offsets = routing
        rows, source = len(source), source if gathers else None
        xa = None if a is None else multiply_narrow(x if read is None else read, a, offsets, source, rows)
        out = expert_linear(x, list(tensors), weight_scale, shape, False, offsets, source, xa, b, rows)
        ctx.save_for_backward(None if a is None else x if read is None else read, xa, a, b, *routing, weight_scale,
                              *tensors)  # fmt: skip
        ctx.shape, ctx.gathers, ctx.drops = shape, gathers, read is not None
        return out if gathers else combine(out, positions)

    @staticmethod
    def backward(ctx, dy):
        """Returns the gradients with respect to `x`, `read`, `a` and `b`."""
        read, xa, a, b, _, source, positions, offsets, weight_scale, *tensors = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            return ExpertLinear._differentiate(
                ctx, dy.contiguous(), read, xa, a, b, source, positions, offsets, weight_scale, tensors
            )

    @staticmethod
    def _differentiate(ctx, dy, read, xa, a, b, source, positions, offsets, weight_scale, tensors):
        rows, below, above = len(source), source if ctx.gathers else None, None if ctx.gathers else source
        dxa = da = db = dread = None
        if a is not None:
            dxa = multiply_narrow(dy, b.transpose(1, 2), offsets, above, rows)
            da = sum_rows(dxa, read, offsets, below, False)
            db = sum_rows(xa, dy, offsets, above, True)
        # The adapter's part of the gradient is computed in the same matmul, unless another tensor was read.
        fused = (None, None) if a is None or ctx.drops else (dxa, a.transpose(1, 2))
        dx = expert_linear(dy, tensors, weight_scale, ctx.shape, True, offsets, above, *fused, rows)
        if a is not None and ctx.drops:
            dread = matmul(dxa, a.transpose(1, 2), offsets, None, None, None, None, rows, dy.dtype)
        if ctx.gathers:
            dx = combine(dx, positions)
            dread = None if dread is None else combine(dread, positions)
        return dx, dread, da, db, None, None, None, None, *([None] * len(tensors))


def apply_experts(
    x: Tensor,
    read: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    routing: Routing,
    weights: FrozenExperts,
    *,
    gathers: bool,
) -> Tensor:
    """As `ExpertLinear`."""
    result: Tensor = ExpertLinear.apply(
        x, read, a, b, tuple(routing), gathers, weights.weight_scale, weights.shape, *weights.tensors
    )
    return result
