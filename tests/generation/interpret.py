"""Runs the kernels of a decode step in Triton's interpreter and prints the largest difference from each twin.

The interpreter multiplies no matrices in bf16: tests/gpu does.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools

import torch

from qlora.generation.kernels.attention import attend_decoding
from qlora.generation.slots import Kind, Pass, attend_plainly

differences: dict[str, float] = {}


def note(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    apart = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    differences[name] = float(apart)


def attention(dtype: torch.dtype, heads: int, shared: int, width: int, splits: int, **options: object) -> None:
    """Compares a step of rows of many lengths, whose new tokens are written, and one that reads them from the slots."""
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 63, 64, 130, 699])
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


for dtype, width in itertools.product((torch.float32, torch.float16), (64, 80, 96, 128, 256)):
    attention(dtype, 4, 2, width, 1 if width == 128 else 4)
attention(torch.float32, 4, 4, 64, 2, window=5)
attention(torch.float32, 4, 1, 64, 1, window=100, softcap=2.0)
attention(torch.float32, 20, 1, 64, 4, sinks=True)
attention(torch.float32, 4, 2, 64, 1, sinks=True, window=70)
attention(torch.float16, 6, 2, 64, 2, sinks=True, softcap=3.0)
print(json.dumps(differences))
