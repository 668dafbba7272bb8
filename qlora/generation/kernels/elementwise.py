"""What a decode step computes between its matmuls: norms, rotary positions, and gates, each as one kernel.

They round where the modules of transformers do. `qlora.generation.elementwise` has the twins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE_BLOCK = 1024
"""Numbers of a program that multiplies by a gate."""


@triton.jit
def _rounded(x, kind: tl.constexpr):
    # As kind holds it. Triton drops a conversion that is taken back at once, and integers are not converted.
    if kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(kind).to(tl.float32)
    return result


@triton.jit
def _norm_kernel(
    x, weight, out, width, inner, outer_stride, inner_stride, epsilon,
    OFFSET: tl.constexpr, ROUNDED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    source = x + program // inner * outer_stride + program % inner * inner_stride
    values = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / width + epsilon)
    if ROUNDED:
        normed = _rounded(normed, out.dtype.element_ty)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        factor = factor + 1.0
    tl.store(out + program * width + column, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_kernel(
    q, k, cos, sin, q_out, k_out, heads, shared, half, q_row, q_head, k_row, k_head, cos_row, sin_row,
    HALF: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < half
    if head < heads:
        source = q + row * q_row + head * q_head
        target = q_out + (row * heads + head) * 2 * half
    else:
        source = k + row * k_row + (head - heads) * k_head
        target = k_out + (row * shared + head - heads) * 2 * half
    kind = q_out.dtype.element_ty
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + column, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + row * cos_row + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * sin_row + column, mask=inside, other=0.0).to(tl.float32)
    turned = _rounded(first * cosine, kind) - _rounded(second * sine, kind)
    tl.store(target + column, turned.to(kind), mask=inside)
    cosine = tl.load(cos + row * cos_row + half + column, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * sin_row + half + column, mask=inside, other=0.0).to(tl.float32)
    turned = _rounded(second * cosine, kind) + _rounded(first * sine, kind)
    tl.store(target + half + column, turned.to(kind), mask=inside)


@triton.jit
def _gate_kernel(gate, up, out, width, gate_row, up_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    # The tanh form of GELU: 0.5 x (1 + tanh(y)) as x sigmoid(2y).
    slope = 1.5957691216057308 * (x + 0.044715 * x * x * x) if GELU else x
    active = x * tl.sigmoid(slope)
    kind = out.dtype.element_ty
    factor = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (_rounded(active, kind) * factor).to(kind), mask=inside)


def normalise(x: Tensor, weight: Tensor, epsilon: float, *, offset: bool, rounded: bool) -> Tensor:
    """Returns `x` [..., width], each row divided by its root mean square, times `weight`."""
    width = x.shape[-1]
    rows = x if x.stride(-1) == 1 else x.contiguous()
    inner = rows.shape[-2] if rows.dim() > 2 else 1
    rows = rows.reshape(-1, inner, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    _norm_kernel[(rows.shape[0] * inner,)](
        rows, weight, out, width, inner, *rows.stride()[:2], epsilon, OFFSET=offset, ROUNDED=rounded, WIDTH=padded,
        num_warps=min(max(padded // 512, 1), 16),
    )  # fmt: skip
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys [rows, heads, 1, width], turned by the angles of their positions, [rows, 1, width]."""
    (rows, heads, _, width), shared = q.shape, k.shape[1]
    q_out = torch.empty(rows, heads, 1, width, dtype=q.dtype, device=q.device)
    k_out = torch.empty(rows, shared, 1, width, dtype=k.dtype, device=k.device)
    _rotary_kernel[(rows, heads + shared)](
        q, k, cos, sin, q_out, k_out, heads, shared, width // 2, *q.stride()[:2], *k.stride()[:2], cos.stride(0),
        sin.stride(0), HALF=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return q_out, k_out


def multiply_gate(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """Returns SiLU(gate) * up, or with `gelu` the tanh form of GELU in its place: [..., width]."""
    width = gate.shape[-1]
    left, right = (tensor.reshape(-1, width) for tensor in (gate, up))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gate_kernel[(len(left), triton.cdiv(width, GATE_BLOCK))](
        left, right, out, width, left.stride(0), right.stride(0), GELU=gelu, BLOCK=GATE_BLOCK, num_warps=4
    )
    return out
