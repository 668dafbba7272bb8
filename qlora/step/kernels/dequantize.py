"""What all matmuls of fused layers share: dequantized weights, torch operators, and outputs that nothing reads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from qlora.quantization.bnb4.quantized_weight import GROUP, QuantizedWeight, decode_plain

Weight = TypeVar("Weight")
CHUNK_BYTES = 2**27
"""The maximum of dequantized 16-bit weights at a time, in bytes: the largest group of a 65B model takes 721 MB."""

_library = torch.library.Library("qlora", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator of torch; `custom_op` would add a call's worth of checks in Python."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        # Compiled code may give a matrix another row stride; by default it would copy the matrix for an operator.
        _library.define(schema, tags=[torch.Tag.needs_fixed_stride_order])
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qlora::{name}", fake, lib=_library)
        registered: Callable[..., Any] = getattr(torch.ops.qlora, name).default
        return registered

    return register


_registered: WeakValueDictionary[tuple[int, int], Any] = WeakValueDictionary()
"""Frozen weights by the address and number of their packed bytes, for operators of torch are given tensors alone.

The first layer of a group begins where the group does.
"""


def register(packed: Tensor, weight: Weight) -> Weight:
    """Lets operators find a weight by its packed bytes alone, as long as what this returns is there.

    It is this weight, or what was registered for the same bytes before; `weight.packed` are the bytes. Each tensor
    more that a compiled layer reads takes the host time: it is checked at each call, saved for the backward pass, and
    unpacked there.
    """
    result: Weight = _registered.setdefault((packed.data_ptr(), packed.numel()), weight)
    return result


def find_moved() -> None:
    """Finds the registered weights where their packed bytes lie now; whatever moves tensors in memory calls it."""
    weights = [*_registered.values()]
    _registered.clear()
    for weight in weights:
        register(weight.packed, weight)


def registered(packed: Tensor) -> Any:
    """Returns the weight that is registered for its packed bytes."""
    return _registered[packed.data_ptr(), packed.numel()]


def join_tensors(tensors: list[Tensor], rows: int, columns: int) -> QuantizedWeight:
    """Returns the `QuantizedWeight` of a group: the registered one of the packed bytes, or that of its tensors.

    Of the latter the packed bytes may be several tensors.
    """
    if len(tensors) == 1:
        weight: QuantizedWeight = registered(tensors[0])
        return weight
    *packed, scales, values, scale_values, scale_scales, offsets = tensors
    joint = (packed[0] if len(packed) == 1 else torch.cat(packed)).view(torch.uint8).view(-1)
    return QuantizedWeight(joint, scales, values, scale_values, scale_scales, offsets, rows, columns)


def dequantize(
    codes: QuantizedWeight,
    dtype: torch.dtype,
    weight_scale: Tensor | None = None,
    *,
    transposed: bool = False,
    left: int = 0,
    right: int = 0,
) -> Tensor:
    """Returns the weights, [rows, columns] or transposed, times `weight_scale`.

    Triton kernels compute them on a GPU, else their twin does. `left` and `right` are the numbers of uninitialised
    columns on either side of them.
    """
    rows, columns = (codes.columns, codes.rows) if transposed else (codes.rows, codes.columns)
    out = torch.empty(rows, left + columns + right, dtype=dtype, device=codes.packed.device)
    target = out[:, left : left + columns]
    if codes.packed.is_cuda:
        from qlora.quantization.bnb4.decode_kernels import decode_columns, decode_rows  # Triton is there with CUDA only

        (decode_columns if transposed else decode_rows)(codes, target, weight_scale)
    else:
        plain = decode_plain(codes, dtype if weight_scale is None else torch.float32)
        plain = (plain if weight_scale is None else plain * weight_scale).to(dtype)
        target.copy_(plain.t() if transposed else plain)
    return out


def chunks(codes: QuantizedWeight, width: int) -> Iterator[tuple[int, int]]:
    """Yields the first row and the end of about equal chunks of at most `CHUNK_BYTES`; a number has `width` bytes."""
    count = -(-codes.rows * codes.columns * width // CHUNK_BYTES)
    step = -(-codes.rows // (count * GROUP)) * GROUP
    for start in range(0, codes.rows, step):
        yield start, min(start + step, codes.rows)


_unread: int | None = None


@contextlib.contextmanager
def unread(packed: Tensor) -> Iterator[None]:
    """Declares that nothing in the block reads the outputs of the layers whose packed weights are `packed`.

    A layer that is recomputed for its backward pass saves a matmul so. The outputs are NaN, which shows where something
    reads them after all.
    """
    global _unread
    _unread = packed.data_ptr()
    try:
        yield
    finally:
        _unread = None


def is_unread(codes: list[Tensor]) -> bool:
    return _unread is not None and codes[0].data_ptr() == _unread


def overlaps(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields the index of each part of `sizes` from `start` to `stop`, and its range in the part and in the chunk."""
    for part, (first, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(sizes)])):
        begin, last = max(first, start), min(end, stop)
        if begin < last:
            yield part, slice(begin - first, last - first), slice(begin - start, last - start)
