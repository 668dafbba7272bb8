"""Runs the kernels of a decode step in Triton's interpreter and prints the largest difference from each twin.

The interpreter multiplies no matrices in bf16: tests/gpu does.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from qlora.generation.elementwise import GATES, NORM_KINDS, normalise_plainly, rotate_plainly
from qlora.generation.kernels import elementwise
from qlora.generation.kernels.attention import attend_decoding
from qlora.generation.kernels.prompts import attend_rows
from qlora.generation.slots import Kind, Pass, attend_plainly
from qlora.step.kernels.attention import attend_plain

differences: dict[str, float] = {}


def note(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    apart = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    differences[name] = float(apart)


def attention(dtype: torch.dtype, heads: int, shared: int, width: int, splits: int, **options: object) -> None:
    """Compares a step of rows of many lengths, whose new tokens are written, and one that reads them from the slots."""
    torch.manual_seed(0)
    # Tiles of 32 bits are small, and the interpreter takes its time for each.
    lengths = torch.tensor([0, 1, 63, 64, 130, 699] if dtype is torch.float16 else [0, 1, 15, 16, 75])
    rows, values_width = len(lengths), width if width != 96 else 32
    sinks = torch.randn(heads) if options.pop("sinks", False) else None
    keys = torch.randn(rows + 1, shared, 700, width).to(dtype)
    values = torch.randn(rows + 1, shared, 700, values_width).to(dtype)
    joint = torch.randn(rows, 1, heads + shared, width).to(dtype)  # as layers of one input give it
    query, key = (part.transpose(1, 2) for part in joint.split([heads, shared], dim=2))
    value = torch.randn(rows, shared, 1, values_width).to(dtype)
    written, written_values = keys.clone(), values.clone()
    for row, position in enumerate(lengths.tolist()):
        written[row, :, position], written_values[row, :, position] = key[row, :, 0], value[row, :, 0]
    step = Pass(torch.arange(rows), lengths, max_length=700)
    kind = Kind(width**-0.5, options.get("window"), options.get("softcap"), sinks)
    expected = attend_plainly(query, written[:rows], written_values[:rows], step, kind)
    arguments = (width**-0.5,)
    name = f"{str(dtype).removeprefix('torch.')} {heads}/{shared} {width} in {splits}, {options or ''}"
    name += "sinks" if sinks is not None else ""
    options |= {"sinks": sinks, "splits": splits}
    actual = attend_decoding(query, (key, value), keys, values, lengths, *arguments, **options)
    assert torch.equal(keys, written)
    assert torch.equal(values, written_values)
    note(name, actual, expected)
    note(f"{name}, read", attend_decoding(query, None, keys, values, lengths, *arguments, **options), expected)


for width in (64, 80, 96, 128, 256):
    attention(torch.float16, 4, 2, width, 1 if width == 128 else 4)
    attention(torch.float32, 4, 2, width, 4)
attention(torch.float32, 4, 4, 64, 2, window=5)
attention(torch.float32, 4, 1, 64, 1, window=30, softcap=2.0)
attention(torch.float32, 20, 1, 64, 4, sinks=True)
attention(torch.float32, 4, 2, 64, 1, sinks=True, window=20)
attention(torch.float16, 6, 2, 64, 2, sinks=True, softcap=3.0)


def prompts(dtype: torch.dtype, heads: int, shared: int, width: int, **options: object) -> None:
    """Compares the attention of prompts of several lengths."""
    torch.manual_seed(0)
    lengths = [1, 130, 5, 64, 70] if dtype is torch.float16 else [1, 33, 16, 40]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    joint = torch.randn(sum(lengths), heads + 2 * shared, width).to(dtype)
    q, k, v = joint.split([heads, shared, shared], dim=1)
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads)
    actual = attend_rows(q, k, v, cu_seqlens, max(lengths), width**-0.5, **options)
    expected = attend_plain(q, k, v, cu_seqlens, width**-0.5, **options)
    note(f"prompts, {str(dtype).removeprefix('torch.')} {heads}/{shared} {width} {sorted(options)}", actual, expected)


prompts(torch.float32, 4, 2, 64)
prompts(torch.float32, 4, 4, 80, window=7)
prompts(torch.float32, 4, 1, 64, window=20, softcap=2.0, sinks=True)
prompts(torch.float16, 4, 2, 64, sinks=True)
for dtype in (torch.float32, torch.float16):
    joint = torch.randn(5, 1, 7, 48).to(dtype)  # of five tokens, seven heads
    name = str(dtype).removeprefix("torch.")
    for kind in NORM_KINDS:
        x, weight = joint[:, :, 2:6], torch.randn(48).to(dtype)
        actual = elementwise.normalise(x, weight, 1e-5, **kind)
        note(f"norm, {name} {kind}", actual, normalise_plainly(x, weight, 1e-5, **kind))
    q, k = (part.transpose(1, 2) for part in joint.split([5, 2], dim=2))
    angles = [torch.randn(5, 1, 48).to(dtype) for _ in range(2)]
    for label, *pair in zip("qk", elementwise.rotate(q, k, *angles), rotate_plainly(q, k, *angles), strict=True):
        note(f"rotary, {name} {label}", *pair)
    joint = torch.randn(1, 3, 2 * 1100).to(dtype)
    gate, up = joint.split(1100, dim=-1)
    for kind, plain in GATES.items():
        actual = elementwise.multiply_gate(gate, up, gelu=kind == "gelu")
        note(f"gate, {name} {kind}", actual, plain(gate) * up)
print(json.dumps(differences))
