"""The linear layer of QLoRA: matmuls with frozen 4-bit weights that compute the adapter's part too.

Layers that read the same input (q, k and v; gate and up) form one group: their weights are stored and dequantized as
one matrix, so that the input is read once and the gradients with respect to it are summed inside the matmul. The
backward pass dequantizes the weights again; kept for it are the input and its small product with the A matrices.

A separate pass that adds the adapter's output would cost a third of an 8-bit matmul. In 16 bits the large matmul
therefore accumulates into the adapter's output. In 8 bits the product with A becomes additional columns of the input,
and B additional columns of the weight. (In 16 bits the latter is slower: compiled code keeps the input twice.)

The operators are opaque to `torch.compile`, which would keep dequantized weights for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.step.kernels.dequantize import chunks, dequantize, is_unread, join_tensors, operator, overlaps
from qlora.step.kernels.matmul_fp8 import (
    AMAX_A,
    WEIGHT_SCALE,
    matmul_fp8_transposed,
    multiply_fp8,
    scale_operands,
)


def _fake_linear(x, xa, b, codes, rows):
    return [xa.new_empty(x.shape[0], count) for count in rows]


@operator("linear(Tensor x, Tensor xa, Tensor[] b, Tensor[] codes, int[] rows) -> Tensor[]", _fake_linear)
def linear(x: Tensor, xa: Tensor, b: list[Tensor], codes: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Returns the outputs of a group of layers, each [tokens, rows] and a tensor of its own, which can be freed.

    `x` [tokens, columns] is their input, `xa` [tokens, all ranks] its product with the A matrices, `b` the scaled B
    matrices, each [rows, rank], `codes` what `join_tensors` takes of the layers.
    """
    if is_unread(codes):
        return [xa.new_full((len(x), count), torch.nan) for count in rows]
    halves = xa.split([matrix.shape[1] for matrix in b], 1)
    out = [half @ matrix.t() for half, matrix in zip(halves, b, strict=True)]
    joint = join_tensors(codes, sum(rows), x.shape[1])
    for start, stop in chunks(joint, x.element_size()):
        weights = dequantize(joint.part(start, stop), x.dtype)
        for part, columns, other in overlaps(rows, start, stop):
            out[part][:, columns].addmm_(x, weights[other].t())
    return out


def _fake_backward(dy, dxa, a, codes, columns):
    return dy[0].new_empty(dy[0].shape[0], columns)


@operator("linear_backward(Tensor[] dy, Tensor? dxa, Tensor a, Tensor[] codes, int columns) -> Tensor", _fake_backward)
def linear_backward(dy: list[Tensor], dxa: Tensor | None, a: Tensor, codes: list[Tensor], columns: int) -> Tensor:
    """Returns the gradient with respect to `x` of `linear`, [tokens, columns]; the adapter's part only with `dxa`.

    `dy` are the gradients with respect to each layer's output.
    """
    rows = [part.shape[1] for part in dy]
    joint = join_tensors(codes, sum(rows), columns)
    out = None if dxa is None else dxa @ a
    for start, stop in chunks(joint, dy[0].element_size()):
        weights = dequantize(joint.part(start, stop), dy[0].dtype)
        for part, local, other in overlaps(rows, start, stop):
            factors = dy[part][:, local], weights[other]
            out = torch.mm(*factors) if out is None else out.addmm_(*factors)
    assert out is not None
    return out


class GroupedLinear(torch.autograd.Function):
    """A group of frozen linear layers with their adapters."""

    @staticmethod
    def forward(ctx, *arguments):
        """Returns the layers' outputs, each [tokens, rows], for `x, dropped, a, scales, rows, *tensors`.

        `x` is [tokens, columns].

        `dropped` is what the adapters read, `x` after dropout; None: `x` itself. `a` [all ranks, columns] are the A
        matrices; `tensors` the scaled B matrices, one a layer [rows, rank], and what `join_tensors` takes.
        With `scales`, float32 [3], matmuls with the weights are in e4m3: it holds the factor of the weights
        (`WEIGHT_SCALE`) and the largest absolute values of A and of the scaled B (`AMAX_A`, `AMAX_B`).
        """
        # Where nothing is differentiated, torch.compile takes one argument more than there are names for one without
        # `ctx`, which two `tensors` would be.
        x, dropped, a, scales, rows, *tensors = arguments
        b, codes = list(tensors[: len(rows)]), list(tensors[len(rows) :])
        read = x if dropped is None else dropped
        xa = read @ a.t()
        ctx.save_for_backward(read, xa, a, scales, *tensors)
        ctx.rows, ctx.drops = rows, dropped is not None
        return tuple(linear(x, xa, b, codes, rows) if scales is None else multiply_fp8(x, xa, b, scales, codes, rows))

    @staticmethod
    def backward(ctx, *dy):
        """Returns the gradients with respect to `x`, `dropped`, `a` and the B matrices."""
        read, xa, a, scales, *tensors = ctx.saved_tensors
        with torch.autocast(read.device.type, enabled=False):  # which knows no 8-bit floats on a CPU
            return GroupedLinear._differentiate(ctx, dy, read, xa, a, scales, tensors)

    @staticmethod
    def _differentiate(ctx, dy, read, xa, a, scales, tensors):
        rows, columns = ctx.rows, a.shape[1]
        b, codes = tensors[: len(rows)], tensors[len(rows) :]
        dy = [part.contiguous() for part in dy]
        dxa = torch.cat([part @ matrix for part, matrix in zip(dy, b, strict=True)], 1)
        if scales is None:
            dx = linear_backward(dy, None if ctx.drops else dxa, a, codes, columns)
        else:
            adapter = (None, []) if ctx.drops else (dxa, [a.t()])
            scaled, extra, blocks, scale, weight_scale = scale_operands(
                dy, *adapter, scales[WEIGHT_SCALE], scales[AMAX_A]
            )
            joined = torch.cat([*scaled, *extra], 1) if len(scaled) + len(extra) > 1 else scaled[0]
            dx = matmul_fp8_transposed(joined, scale, weight_scale, next(iter(blocks), None), codes, sum(rows), columns)
        halves = xa.split([matrix.shape[1] for matrix in b], 1)
        db = [part.t() @ half for part, half in zip(dy, halves, strict=True)]
        return dx, dxa @ a if ctx.drops else None, dxa.t() @ read, None, None, *db, *([None] * len(codes))
