"""Runs the Triton kernels in Triton's interpreter and prints the largest difference from their twins, in steps."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from qlora.quantization.bnb4.decode_kernels import decode_columns, decode_rows, scale_rows
from qlora.quantization.bnb4.quantized_weight import decode_plain
from qlora.step.kernels.matmul_fp8 import scale_rows_plain
from tests.step.weights import quantized_weight

STEPS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def steps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Returns how many numbers of the data type lie between two tensors at most."""
    kind = STEPS[a.dtype]
    return int((a.contiguous().view(kind).int() - b.contiguous().view(kind).int()).abs().max())


differences = {}
for quant_type in ("nf4", "fp4"):
    for nested in (True, False):
        weight = quantized_weight(96, 192, quant_type=quant_type, nested=nested)
        name = f"{quant_type}{'-nested' if nested else ''}"
        for dtype in (torch.float32, torch.bfloat16):
            expected = decode_plain(weight, dtype)
            padded = torch.zeros(96, 200, dtype=dtype)
            decode_rows(weight, padded[:, :192])
            turned = torch.zeros(192, 96, dtype=dtype)
            decode_columns(weight, turned)
            assert not padded[:, 192:].any()
            differences[f"{name} {dtype}"] = max(steps(padded[:, :192], expected), steps(turned.t(), expected))
        factor, scaled = torch.tensor([90.0]), torch.zeros(96, 192)
        decode_rows(weight, scaled, factor)
        differences[f"{name} scaled"] = steps(scaled, decode_plain(weight, torch.float32) * factor)
x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
for name, factor in (("rows scale", None), ("rows scale of both", torch.tensor([3.7]))):
    (_, scale), (_, expected) = (scale(x, factor) for scale in (scale_rows, scale_rows_plain))
    differences[name] = steps(scale, expected)  # the interpreter's own rounding to 8 bits loses carries
print(json.dumps(differences))
