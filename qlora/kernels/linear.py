"""The linear layer of QLoRA: products with frozen 4-bit weights, and the adapter's second half on top of them.

Layers that read the same input (q, k and v; gate and up) are one group: their weights are stored and decoded as one
matrix, so that the input is read once and the gradients with respect to it are summed inside the product. Only the
small product of the input with the A matrices is kept for the backward pass, which decodes the weights again.

The operators are opaque to `torch.compile`: it would keep decoded weights for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora.kernels.codes import E4M3_MAX, Codes, decode_plain

_library = torch.library.Library("qlora", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator of torch; `custom_op` would add a call's worth of checks in Python."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qlora::{name}", fake, lib=_library)
        found: Callable[..., Any] = getattr(torch.ops.qlora, name).default
        return found

    return register


def _joint(tensors: list[Tensor], rows: int, columns: int) -> Codes:
    packed, scales, values, scale_values, scale_scales, offsets = tensors
    return Codes(packed, scales, values, scale_values, scale_scales, offsets, rows, columns)


def _decode(codes: Codes, dtype: torch.dtype, factor: Tensor | None, *, transposed: bool = False) -> Tensor:
    """Returns the weights, [rows, columns] or transposed, times `factor`: by kernels on a GPU, else by their twin."""
    if not codes.packed.is_cuda:
        plain = decode_plain(codes, dtype if factor is None else torch.float32)
        plain = (plain if factor is None else plain * factor).to(dtype)
        return plain.t().contiguous() if transposed else plain
    from qlora.kernels.decode import decode_columns, decode_rows  # Triton is there with CUDA only

    shape = (codes.columns, codes.rows) if transposed else (codes.rows, codes.columns)
    out = torch.empty(shape, dtype=dtype, device=codes.packed.device)
    (decode_columns if transposed else decode_rows)(codes, out, factor)
    return out


def _product(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Returns `x @ weight.t()` of e4m3 matrices in bf16, its rows times `scale`; both have contiguous rows."""
    if not x.is_cuda:
        return ((x.float() @ weight.float().t()) * scale).bfloat16()
    ones = torch.ones(1, weight.shape[0], device=x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=True)


def _fake_linear(x, scale, factor, xa, b, codes, rows):
    return xa.new_empty(x.shape[0], sum(rows))


@_operator(
    "linear(Tensor x, Tensor? scale, Tensor? factor, Tensor xa, Tensor[] b, Tensor[] codes, int[] rows) -> Tensor",
    _fake_linear,
)
def linear(
    x: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    xa: Tensor,
    b: list[Tensor],
    codes: list[Tensor],
    rows: list[int],
) -> Tensor:
    """Returns the outputs of a group of layers one beside the other: [tokens, all rows].

    `x` [tokens, columns] is their input, `xa` [tokens, all ranks] its product with the A matrices, `b` the scaled B
    matrices, each [rows, rank], `codes` the tensors of the layers' `Codes`. An `x` in e4m3 comes with its `scale`
    [tokens, 1] and the weights' `factor` [1].
    """
    weight = _decode(_joint(codes, sum(rows), x.shape[1]), x.dtype, factor)
    out = xa.new_empty(len(x), sum(rows)) if scale is None else _product(x, scale, weight)
    ranks = [each.shape[1] for each in b]
    for part, half, matrix in zip(out.split(rows, 1), xa.split(ranks, 1), b, strict=True):
        part.addmm_(half, matrix.t(), beta=0 if scale is None else 1)
    # Where it can, the large product adds itself to the small ones: that costs no pass over the output.
    return out.addmm_(x, weight.t()) if scale is None else out


def _fake_backward(dy, scale, factor, codes, columns):
    return dy.new_empty(dy.shape[0], columns, dtype=dy.dtype if scale is None else torch.bfloat16)


@_operator(
    "linear_backward(Tensor dy, Tensor? scale, Tensor? factor, Tensor[] codes, int columns) -> Tensor", _fake_backward
)
def linear_backward(
    dy: Tensor, scale: Tensor | None, factor: Tensor | None, codes: list[Tensor], columns: int
) -> Tensor:
    """Returns the frozen weights' share of the gradient with respect to `x` of `linear`: [tokens, columns]."""
    joint = _joint(codes, dy.shape[1], columns)
    if scale is None:
        return dy @ _decode(joint, dy.dtype, None)
    return _product(dy, scale, _decode(joint, dy.dtype, factor, transposed=True))


def scale_rows_plain(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `scale_rows`; compiled code uses it, and scales where it computes `x`."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale / factor


def _fake_scale(x, factor):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@_operator("scale_rows(Tensor x, Tensor factor) -> (Tensor, Tensor)", _fake_scale)
def scale_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` [tokens, columns] in e4m3, each row scaled to its range, and what to multiply the product with.

    `factor` [1] is what the weights are multiplied with; the second result is float32 [tokens, 1].
    """
    if not x.is_cuda:
        return scale_rows_plain(x, factor)
    from qlora.kernels.decode import scale_rows as kernel

    return kernel(x, factor)


def _scaled(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return scale_rows_plain(x, factor) if torch.compiler.is_compiling() else scale_rows(x, factor)


class GroupedLinear(torch.autograd.Function):
    """A group of frozen linear layers and the second half of their adapters."""

    @staticmethod
    def forward(ctx, x, xa, factor, rows, *tensors):
        """Returns [tokens, all rows] for `x` and `xa` as `linear` takes them.

        With a `factor`, the products with the frozen weights are in e4m3. `tensors` are the B matrices, one a layer,
        and the tensors of the layers' `Codes`.
        """
        b, codes = list(tensors[: len(rows)]), list(tensors[len(rows) :])
        ctx.save_for_backward(xa, factor, *tensors)
        ctx.rows, ctx.columns = rows, x.shape[1]
        read, scale = (x, None) if factor is None else _scaled(x, factor)
        return linear(read, scale, factor, xa, b, codes, rows)

    @staticmethod
    def backward(ctx, dy):
        """Returns the gradients with respect to `x`, `xa` and the B matrices."""
        xa, factor, *tensors = ctx.saved_tensors
        rows = ctx.rows
        b, codes = tensors[: len(rows)], tensors[len(rows) :]
        dy = dy.contiguous()
        read, scale = (dy, None) if factor is None else _scaled(dy, factor)
        dx = linear_backward(read, scale, factor, codes, ctx.columns)
        parts, halves = dy.split(rows, 1), xa.split([each.shape[1] for each in b], 1)
        dxa = torch.cat([part @ matrix for part, matrix in zip(parts, b, strict=True)], 1)
        db = [part.t() @ half for part, half in zip(parts, halves, strict=True)]
        return dx, dxa, None, None, *db, *([None] * len(codes))
