"""Matmuls of a few rows with weights in 4 bits, which are read as they are stored, an adapter's part included.

To decode a token of each of a few rows, reading the weights takes longest, and in 4 bits they are a quarter as large as
in 16. On a GPU, `few_rows.cu` computes; `multiply_plain` is its twin. The kernel multiplies with the codes, rounded to
16 bits, and scales the sums in 32, so it is about as exact as a matmul with decoded weights, but does not equal it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qlora.quantization.bnb4.layout import BLOCK
from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, decode_plain
from qlora.upstream.torch import CudaKernel, compile_cuda, cuda_compiler_reason

MOST_ROWS = 32
"""Beyond, decoding the weights first is faster."""
TILE = 16
"""Rows of a weight that one block of threads multiplies; so no two adapters may share them."""
MEMBERS = 3
"""Most layers that read one input, and have an adapter each."""
_WIDE = 8192
"""Rows of a weight from which on smaller blocks are faster, for there are enough of them."""
_SLICES, _WARPS = (16, 8, 8, 8), 8
"""How the product with the A matrices is split: slices of the columns, for up to 8, 16, 24 and 32 rows, and warps of a
slice. Whoever multiplies with B sums the slices."""
_NAMES = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}


def unsupported_reason(weight: QuantizedWeight, dtype: torch.dtype, members: Sequence[int]) -> str | None:
    """Returns why `multiply` cannot compute with a weight on a GPU; `members` are the rows of the layers in it."""
    if dtype not in _NAMES:
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if len(members) > MEMBERS or any(rows % TILE for rows in members):
        return f"it takes at most {MEMBERS} layers of a multiple of {TILE} rows together"
    if torch.cuda.get_device_capability(weight.packed.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return cuda_compiler_reason()


def multiply(x: Tensor, weight: QuantizedWeight, a: Tensor | None, b: Tensor | None, members: Sequence[int]) -> Tensor:
    """Returns `x` [rows, columns] times the transposed weight, and the adapters' part: [rows, weight rows].

    `members` are the rows of the layers whose weights are stacked in `weight`, `a` [members * rank, columns] their A
    matrices in this order, `b` [weight rows, rank] their scaled B matrices; a rank is a multiple of 16. On a GPU there
    are at most `MOST_ROWS` rows.
    """
    if not x.is_cuda:
        return multiply_plain(x, weight, a, b, members)
    x, tiles, rank = x.contiguous(), -(-len(x) // 8), 0 if b is None else b.shape[1]
    sizes, width, slices = (
        (len(x), weight.columns),
        0 if a is None else len(a),
        min(_SLICES[tiles - 1], weight.columns // BLOCK),
    )
    read, kernel, warps = _kernels(weight, x.dtype, tiles)
    xa = torch.empty(slices, len(x), width, dtype=torch.float32, device=x.device)
    fragments = torch.empty(tiles * 8, weight.columns, dtype=x.dtype, device=x.device)
    out = torch.empty(len(x), weight.rows, dtype=x.dtype, device=x.device)
    grid = max(1, -(-width // TILE)), slices, 1
    read(grid, _WARPS * 32, [x, x if a is None else a, xa, fragments, *sizes, width])
    tensors = [weight.packed, weight.absmax, weight.nested_codebook, weight.nested_absmax, weight.nested_offset]
    ends = [sum(members[: index + 1]) for index in range(MEMBERS - 1)]
    kernel(
        (-(-weight.rows // TILE), 1, 1), warps * 32,
        [fragments, *tensors, xa, x if b is None else b, out, *sizes, weight.rows, rank, slices, *ends],
    )  # fmt: skip
    return out


def multiply_plain(
    x: Tensor, weight: QuantizedWeight, a: Tensor | None, b: Tensor | None, members: Sequence[int]
) -> Tensor:
    """The twin of `multiply`: the weight is decoded, in 32 bits."""
    decoded = decode_plain(weight, torch.float32).view(weight.rows, weight.columns)
    out = x.float() @ decoded.t()
    if a is not None and b is not None:
        halves = (x.float() @ a.float().t()).to(x.dtype).split(len(a) // len(members), 1)
        parts = zip(halves, b.split(list(members)), strict=True)
        out += torch.cat([half.float() @ part.float().t() for half, part in parts], 1)
    return out.to(x.dtype)


def _kernels(weight: QuantizedWeight, dtype: torch.dtype, tiles: int) -> tuple[CudaKernel, CudaKernel, int]:
    """Returns the two kernels of a weight, and how many warps a block of the second one has."""
    warps, resident = (4, 4) if tiles > 1 and weight.rows >= _WIDE else (8, 2)
    halves = _codebook_halves(weight.codebook, dtype)
    is_even = weight.columns // BLOCK % 4 == 0
    return (
        _compile("read_rows", dtype, halves, TILES=tiles, WARPS=_WARPS, RESIDENT=1, NESTED=0, EVEN=1),
        _compile(
            "multiply", dtype, halves,
            TILES=tiles, WARPS=warps, RESIDENT=resident, NESTED=int(weight.is_nested), EVEN=int(is_even),
        ),
        warps,
    )  # fmt: skip


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The numbers of a codebook by their dtype: reading them makes the host wait."""


def _codebook_halves(codebook: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the 16 numbers of a codebook in 16 bits: their upper bytes as four int32, then the lower ones."""
    known = _known.setdefault(codebook, {})
    if dtype not in known:
        pairs = codebook.to(dtype).cpu().view(torch.uint8).view(-1, 2)
        known[dtype] = tuple(pairs.t().flip(0).contiguous().view(torch.int32).view(-1).tolist())
    halves: tuple[int, ...] = known[dtype]
    return halves


@cache
def _compile(name: str, dtype: torch.dtype, halves: tuple[int, ...], **constants: int) -> CudaKernel:
    codes = {f"{half}{index}": f"{halves[4 * lower + index]}u" for lower, half in enumerate("TE") for index in range(4)}
    lines = [f"#define {key} {value}" for key, value in {"HALF": _NAMES[dtype], **codes, **constants}.items()]
    source = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    return compile_cuda("\n".join([*lines, source]), name)
