"""Runs the Triton kernels of experts in the interpreter and prints the largest relative difference from each twin."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import bitsandbytes.functional as bnb
import torch

from qlora.quantization.bnb4.decode_kernels import decode_experts
from qlora.step.kernels import grouped, grouped_kernels

differences = {}


def note(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    differences[name] = float((actual - expected).abs().max() / expected.abs().max())


torch.manual_seed(0)
for experts, tokens, picks, tiles in (
    (5, 37, 2, 1024),
    (3, 1, 1, 1024),
    (300, 150, 4, 2),
    (4, 0, 2, 1024),
    (1, 260, 1, 2),
):
    grouped_kernels.SORT_TILES = tiles
    index = torch.rand(tokens, experts).topk(picks).indices
    expected = grouped.route_plain(index, experts)
    actual = [torch.full_like(tensor, -1) for tensor in expected]
    grouped_kernels.route(index, *actual)
    for field, *tensors in zip(grouped.Routing._fields, actual, expected, strict=True):
        differences[f"{field} of {tokens} tokens"] = float(not torch.equal(*tensors))

for experts, depth, columns, tokens, picks, rank in ((5, 128, 96, 37, 2, 16), (3, 100, 72, 9, 1, 32)):
    rows, label = tokens * picks, f"{experts} experts"
    x, weight = torch.randn(tokens, depth), torch.randn(experts, columns, depth)
    a, b = torch.randn(experts, rank, depth), torch.randn(experts, columns, rank)
    index = torch.randn(tokens, experts).topk(picks).indices if picks > 1 else torch.ones(tokens, 1, dtype=torch.int64)
    _, source, positions, offsets = grouped.route_tokens(index, experts)
    xa = grouped.multiply_low_rank(x, a, offsets, source)
    out = torch.empty(rows, rank)
    grouped_kernels.multiply_low_rank(x, a, offsets, source, out)
    note(f"{label}: narrow", out, xa)
    for name, scale, left, right in (
        ("plain", None, None, None), ("adapter", None, xa, b), ("scaled", torch.rand(tokens, 1), xa, b),
    ):  # fmt: skip
        out = torch.empty(rows, columns)
        options = {"source": source, "scale": scale, "xa": left, "b": right}
        grouped_kernels.matmul(x, weight, offsets, out, **options)
        expected = grouped.matmul_plain(x, weight, offsets, x.dtype, **options)
        note(f"{label}: {name}", out, expected)
    dy, turned = torch.randn(rows, columns), (weight.transpose(1, 2), a.transpose(1, 2))
    out = torch.empty(rows, depth)
    grouped_kernels.matmul(dy, turned[0], offsets, out, xa=xa, b=turned[1])
    note(f"{label}: turned", out, grouped.matmul_plain(dy, turned[0], offsets, x.dtype, xa=xa, b=turned[1]))
    out = torch.empty(experts, rank, depth)
    grouped_kernels.sum_rows(xa, x, offsets, source, out)
    note(f"{label}: sum of gathered rows", out, grouped.sum_rows_plain(xa, x, offsets, source))
    out = torch.empty(experts, columns, rank)
    grouped_kernels.sum_rows(xa, dy, offsets, None, out.transpose(1, 2))
    note(f"{label}: sum of rows", out.transpose(1, 2), grouped.sum_rows_plain(xa, dy, offsets, None))
    out = torch.empty(tokens, columns)
    grouped_kernels.combine(dy, positions, out)
    note(f"{label}: combined", out, grouped.combine_plain(dy, positions))

for nested in (True, False):
    experts, rows, columns = 3, 96, 192
    scales = torch.tensor([1, 0.1, 3.0])[:, None, None]
    quantized = [
        bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=nested)
        for matrix in torch.randn(experts, rows, columns) * scales
    ]
    states, empty = [state for _, state in quantized], torch.empty(0)
    tensors = [
        torch.stack([packed.view(-1) for packed, _ in quantized]),
        torch.stack([state.absmax for state in states]),
        states[0].code,
        states[0].state2.code if nested else empty,
        torch.stack([state.state2.absmax for state in states]) if nested else empty,
        torch.stack([state.offset.expand(len(state.state2.absmax)) for state in states]) if nested else empty,
    ]
    expected = torch.stack([bnb.dequantize_4bit(*pair) for pair in quantized])
    label = "nested" if nested else "plain"
    out = torch.full((experts, 2 * rows, columns), -1.0)
    decode_experts(tensors, out[:, rows:])
    note(f"{label}: the second half", out[:, rows:], expected)
    assert (out[:, :rows] == -1).all()
    decode_experts(tensors, out[:, 1::2], torch.tensor([2.0]))
    note(f"{label}: every other row, scaled", out[:, 1::2], 2 * expected)
    turned_out = torch.empty(experts, columns, 2 * rows).transpose(1, 2)
    decode_experts(tensors, turned_out[:, ::2])
    note(f"{label}: turned", turned_out[:, ::2], expected)
print(json.dumps(differences))
