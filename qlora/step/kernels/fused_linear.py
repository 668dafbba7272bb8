"""The linear layer of QLoRA: products with frozen 4-bit weights, and the adapter's in the same products.

Layers that read the same input (q, k and v; gate and up) are one group: their weights are stored and decoded as one
matrix, so that the input is read once and the gradients with respect to it are summed inside the product. What is kept
for the backward pass, which decodes the weights again, is the input and its small product with the A matrices.

A pass over a group's output to add the adapter's would cost a third of what its product costs in 8 bits. In 16 bits the
large product adds itself to the adapter's; in 8 bits the adapter's half product is more columns of the input, and its
other matrix more columns of the weight. (The latter costs more in 16 bits: compiled code keeps the input twice.)

The operators are opaque to `torch.compile`: it would keep decoded weights for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.quantization.bnb4.quantized_weight import E4M3_MAX, GROUP, QuantizedWeight, decode_plain

PIECE = 2**27
"""Most bytes that decoded weights take at a time in 16 bits: a 65B model's largest matrices take 721 MB together."""

_library = torch.library.Library("qlora", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function an operator of torch; `custom_op` would add a call's worth of checks in Python."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        # Compiled code may lay the rows of a matrix apart; by default it would copy them together for an operator.
        _library.define(schema, tags=[torch.Tag.needs_fixed_stride_order])
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qlora::{name}", fake, lib=_library)
        found: Callable[..., Any] = getattr(torch.ops.qlora, name).default
        return found

    return register


def _joint(tensors: list[Tensor], rows: int, columns: int) -> QuantizedWeight:
    """Returns the tensors of a group's `QuantizedWeight` as one; the packed bytes may be several tensors."""
    *packed, absmax, codebook, nested_codebook, nested_absmax, nested_offset = tensors
    joint = (packed[0] if len(packed) == 1 else torch.cat(packed)).view(torch.uint8).view(-1)
    return QuantizedWeight(joint, absmax, codebook, nested_codebook, nested_absmax, nested_offset, rows, columns)


def _decode(
    codes: QuantizedWeight,
    dtype: torch.dtype,
    factor: Tensor | None = None,
    *,
    transposed: bool = False,
    before: int = 0,
    room: int = 0,
) -> Tensor:
    """Returns the weights, [rows, columns] or transposed, times `factor`: by kernels on a GPU, else by their twin.

    `before` and `room` are how many columns stand before and behind them that hold nothing yet.
    """
    rows, columns = (codes.columns, codes.rows) if transposed else (codes.rows, codes.columns)
    out = torch.empty(rows, before + columns + room, dtype=dtype, device=codes.packed.device)
    place = out[:, before : before + columns]
    if codes.packed.is_cuda:
        from qlora.quantization.bnb4.decode_kernels import decode_columns, decode_rows  # Triton is there with CUDA only

        (decode_columns if transposed else decode_rows)(codes, place, factor)
    else:
        plain = decode_plain(codes, dtype if factor is None else torch.float32)
        plain = (plain if factor is None else plain * factor).to(dtype)
        place.copy_(plain.t() if transposed else plain)
    return out


def _pieces(codes: QuantizedWeight, width: int) -> Iterator[tuple[int, int]]:
    """Yields where about equal pieces of at most `PIECE` bytes begin and end, in rows; a number has `width` bytes."""
    count = -(-codes.rows * codes.columns * width // PIECE)
    step = -(-codes.rows // (count * GROUP)) * GROUP
    for start in range(0, codes.rows, step):
        yield start, min(start + step, codes.rows)


_unread: int | None = None


@contextlib.contextmanager
def unread(packed: Tensor) -> Iterator[None]:
    """Inside, the outputs of the layers whose stored weights `packed` are will not be read: all of it is NaN.

    So a layer that is computed again for its backward pass saves a product, and one that reads it nevertheless is seen.
    """
    global _unread
    _unread = packed.data_ptr()
    try:
        yield
    finally:
        _unread = None


def _is_unread(codes: list[Tensor]) -> bool:
    return _unread is not None and codes[0].data_ptr() == _unread


def _fake_linear(x, xa, b, codes, rows):
    return [xa.new_empty(x.shape[0], count) for count in rows]


@_operator("linear(Tensor x, Tensor xa, Tensor[] b, Tensor[] codes, int[] rows) -> Tensor[]", _fake_linear)
def linear(x: Tensor, xa: Tensor, b: list[Tensor], codes: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Returns the outputs of a group of layers, each [tokens, rows]; they are apart, so that each can be freed.

    `x` [tokens, columns] is their input, `xa` [tokens, all ranks] its product with the A matrices, `b` the scaled B
    matrices, each [rows, rank], `codes` the tensors of the layers' `QuantizedWeight`.
    """
    if _is_unread(codes):
        return [xa.new_full((len(x), count), torch.nan) for count in rows]
    halves = xa.split([each.shape[1] for each in b], 1)
    out = [half @ matrix.t() for half, matrix in zip(halves, b, strict=True)]
    joint = _joint(codes, sum(rows), x.shape[1])
    for start, stop in _pieces(joint, x.element_size()):
        weights = _decode(joint.part(start, stop), x.dtype)
        for part, own, other in overlaps(rows, start, stop):
            out[part][:, own].addmm_(x, weights[other].t())
    return out


def overlaps(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields which of the parts of `sizes` lie between `start` and `stop`, and where in the part and in that piece."""
    for part, (first, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(sizes)])):
        begin, last = max(first, start), min(end, stop)
        if begin < last:
            yield part, slice(begin - first, last - first), slice(begin - start, last - start)


def _fake_backward(dy, dxa, a, codes, columns):
    return dy[0].new_empty(dy[0].shape[0], columns)


@_operator("linear_backward(Tensor[] dy, Tensor? dxa, Tensor a, Tensor[] codes, int columns) -> Tensor", _fake_backward)
def linear_backward(dy: list[Tensor], dxa: Tensor | None, a: Tensor, codes: list[Tensor], columns: int) -> Tensor:
    """Returns the gradient with respect to `x` of `linear`, [tokens, columns]; the adapter's share only with `dxa`.

    `dy` are the gradients with respect to each layer's output.
    """
    rows = [each.shape[1] for each in dy]
    joint = _joint(codes, sum(rows), columns)
    out = None if dxa is None else dxa @ a
    for start, stop in _pieces(joint, dy[0].element_size()):
        weights = _decode(joint.part(start, stop), dy[0].dtype)
        for part, own, other in overlaps(rows, start, stop):
            factors = dy[part][:, own], weights[other]
            out = torch.mm(*factors) if out is None else out.addmm_(*factors)
    assert out is not None
    return out


@functools.cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(1, count, device=device)


def _write_diagonal(out: Tensor, blocks: Sequence[Tensor]) -> None:
    """Writes the blocks along the diagonal of `out`, in 8 bits; what is beside them becomes zero."""
    out = out.view(torch.int8)  # whose kernels are faster
    if len(blocks) > 1 or blocks[0].shape[1] < out.shape[1]:
        out.zero_()
    row = column = 0
    for block in blocks:
        height, width = block.shape
        out[row : row + height, column : column + width] = block.view(torch.int8)
        row, column = row + height, column + width


def _fake_product(x, scale, factor, beside, codes, rows, columns):
    return [x.new_empty(x.shape[0], count, dtype=torch.bfloat16) for count in rows]


@_operator(
    "product(Tensor x, Tensor scale, Tensor factor, Tensor[] beside, Tensor[] codes, int[] rows, int columns) "
    "-> Tensor[]",
    _fake_product,
)
def product(
    x: Tensor,
    scale: Tensor,
    factor: Tensor,
    beside: list[Tensor],
    codes: list[Tensor],
    rows: list[int],
    columns: int,
) -> list[Tensor]:
    """Returns `x`, in e4m3, times the transposed weights of each layer of a group: bf16 [tokens, rows], apart.

    The weights, in e4m3 too, are multiplied with `factor` [1], the results with `scale` [tokens, 1]. Other columns of
    `x` are for the layers' matrices `beside`, in e4m3 [rows, ...]: those of the first of several layers stand before
    the weights' `columns`, those of the others behind. So only from the third layer on there are zeros to multiply.
    """
    if _is_unread(codes):
        return [x.new_full((len(x), count), torch.nan, dtype=torch.bfloat16) for count in rows]
    before = beside[0].shape[1] if len(rows) > 1 else 0
    room = x.shape[1] - before - columns
    weight = _decode(_joint(codes, sum(rows), columns), x.dtype, factor, before=before, room=room)
    if before:
        _write_diagonal(weight[: rows[0], :before], beside[:1])
        _write_diagonal(weight[rows[0] :, before + columns :], beside[1:])
    else:
        _write_diagonal(weight[:, columns:], beside)
    own = [slice(0, before + columns)] if before else []
    behind = itertools.accumulate(block.shape[1] for block in beside[len(own) :])
    own += [slice(before, before + columns + end) for end in behind]
    parts = zip(weight.split(rows), own, strict=True)
    return [_multiply_scaled(x[:, read], part[:, read], scale) for part, read in parts]


def _fake_transposed(dy, scale, factor, beside, codes, rows, columns):
    return dy.new_empty(dy.shape[0], columns, dtype=torch.bfloat16)


@_operator(
    "product_transposed(Tensor dy, Tensor scale, Tensor factor, Tensor? beside, Tensor[] codes, int rows, int columns)"
    " -> Tensor",
    _fake_transposed,
)
def product_transposed(
    dy: Tensor, scale: Tensor, factor: Tensor, beside: Tensor | None, codes: list[Tensor], rows: int, columns: int
) -> Tensor:
    """Returns `dy`, in e4m3, times the weights [rows, columns]: bf16 [tokens, columns]; else as `product`.

    Columns that `dy` has after the weights' rows are for the matrix `beside` [columns, ...].
    """
    room = dy.shape[1] - rows
    weight = _decode(_joint(codes, rows, columns), dy.dtype, factor, transposed=True, room=room)
    if beside is not None:
        _write_diagonal(weight[:, rows:], [beside])
    return _multiply_scaled(dy, weight, scale)


def _multiply_scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if not x.is_cuda:
        return ((x.float() @ weight.float().t()) * scale).bfloat16()
    ones = _ones(len(weight), x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=True)


def scale_parts(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """As `scale_rows` for a matrix in parts; compiled code scales where it computes them."""
    if torch.compiler.is_compiling():
        return _scale_parts_plain(parts)
    x, scale = scale_rows(torch.cat(tuple(parts), 1) if parts[1:] else parts[0])
    return [x], scale


def _scale_parts_plain(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    largest = [part.abs().amax(1, keepdim=True) for part in parts]
    scale = functools.reduce(torch.maximum, largest).float().clamp(min=1e-12) / E4M3_MAX
    return [(part.float() / scale).to(torch.float8_e4m3fn) for part in parts], scale


def scale_rows_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of `scale_rows`."""
    (scaled,), scale = _scale_parts_plain([x])
    return scaled, scale


def _fake_scale(x):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@_operator("scale_rows(Tensor x) -> (Tensor, Tensor)", _fake_scale)
def scale_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x` [tokens, columns] in e4m3, each row divided to fill its range, and by what: float32 [tokens, 1]."""
    if not x.is_cuda:
        return scale_rows_plain(x)
    from qlora.quantization.bnb4.decode_kernels import scale_rows as kernel

    return kernel(x)


FACTOR, LARGEST_A, LARGEST_B = slice(0, 1), slice(1, 2), slice(2, 3)
"""Where in the `ranges` of a group stands what its weights are multiplied with, and the largest numbers of its A and
scaled B matrices."""
ALIGNED = 16
"""Numbers of 8 bits after which a matrix may begin or end in a row."""


class _Scaled(NamedTuple):
    """Factors of products in e4m3, and what the products are multiplied with."""

    parts: list[Tensor]
    pieces: list[Tensor]
    """For each adapter what stands beside the parts, [tokens, ...], and for each what stands beside the weights."""
    blocks: list[Tensor]
    scale: Tensor
    """float32 [tokens, 1]."""
    factor: Tensor
    """What the weights are to be multiplied with, [1]."""


def _scale(
    parts: Sequence[Tensor], half: Tensor | None, others: Sequence[Tensor], factor: Tensor, largest: Tensor
) -> _Scaled:
    """Returns in e4m3 a matrix in `parts`, and beside it the columns of `half` with the matrix of `others` they are of.

    Each number of these two is the sum of two of 8 bits, of which the second is what the first lost: about as exact as
    16 bits. `half` is divided by how much larger than the largest number of its row of `parts` any of it is, and
    `others`, in which no number is larger than `largest` [1], are multiplied with that, so that neither leaves the
    range of 8 bits; for the sake of `others`, `factor` may shrink.
    """
    scaled, scale = scale_parts(parts)
    if half is None:
        return _Scaled(scaled, [], [], scale / factor, factor)
    reach = (half.abs().amax(1, keepdim=True) / scale).amax().clamp(min=1e-12) / E4M3_MAX
    factor = torch.minimum(factor, E4M3_MAX / (reach * largest).clamp(min=1e-12))
    pieces, blocks = [], []
    for own, other in zip(half.split([each.shape[1] for each in others], 1), others, strict=True):
        (first, rest), (top, lost) = _split(own.float() / (scale * reach)), _split(other.float() * (factor * reach))
        missing = -3 * own.shape[1] % ALIGNED
        piece, block = torch.cat([first, rest, first], 1), torch.cat([top, top, lost], 1)
        pieces.append(torch.nn.functional.pad(piece, (0, missing)) if missing else piece)
        blocks.append(torch.nn.functional.pad(block, (0, missing)) if missing else block)
    return _Scaled(scaled, pieces, blocks, scale / factor, factor)


def _multiply(
    x: Tensor, xa: Tensor, b: Sequence[Tensor], ranges: Tensor, codes: list[Tensor], rows: list[int]
) -> list[Tensor]:
    """Returns the outputs of `linear`, by products in e4m3."""
    (scaled,), pieces, blocks, scale, factor = _scale([x], xa, b, ranges[FACTOR], ranges[LARGEST_B])
    first = pieces[:1] if len(rows) > 1 else []
    wide = torch.cat([*first, scaled, *pieces[len(first) :]], 1)
    return product(wide, scale, factor, blocks, codes, rows, x.shape[1])


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two tensors in e4m3 whose sum is nearly `x`."""
    first = x.to(torch.float8_e4m3fn)
    return first, (x - first.float()).to(first.dtype)


class GroupedLinear(torch.autograd.Function):
    """A group of frozen linear layers with their adapters."""

    @staticmethod
    def forward(ctx, x, dropped, a, ranges, rows, *tensors):
        """Returns the layers' outputs, each [tokens, rows], for `x` [tokens, columns].

        `dropped` is what the adapters read, `x` after dropout; None: `x` itself. `a` [all ranks, columns] are the A
        matrices; `tensors` the scaled B matrices, one a layer [rows, rank], and the tensors of the `QuantizedWeight`s.
        With `ranges`, float32 [3], products with the weights are in e4m3: what the weights are multiplied with, and
        the largest numbers of A and of B.
        """
        b, codes = list(tensors[: len(rows)]), list(tensors[len(rows) :])
        read = x if dropped is None else dropped
        xa = read @ a.t()
        ctx.save_for_backward(read, xa, a, ranges, *tensors)
        ctx.rows, ctx.drops = rows, dropped is not None
        return tuple(linear(x, xa, b, codes, rows) if ranges is None else _multiply(x, xa, b, ranges, codes, rows))

    @staticmethod
    def backward(ctx, *dy):
        """Returns the gradients with respect to `x`, `dropped`, `a` and the B matrices."""
        read, xa, a, ranges, *tensors = ctx.saved_tensors
        with torch.autocast(read.device.type, enabled=False):  # which knows no 8-bit floats on a CPU
            return GroupedLinear._differentiate(ctx, dy, read, xa, a, ranges, tensors)

    @staticmethod
    def _differentiate(ctx, dy, read, xa, a, ranges, tensors):
        rows, columns = ctx.rows, a.shape[1]
        b, codes = tensors[: len(rows)], tensors[len(rows) :]
        dy = [part.contiguous() for part in dy]
        dxa = torch.cat([part @ matrix for part, matrix in zip(dy, b, strict=True)], 1)
        if ranges is None:
            dx = linear_backward(dy, None if ctx.drops else dxa, a, codes, columns)
        else:
            adapter = (None, []) if ctx.drops else (dxa, [a.t()])
            scaled, pieces, blocks, scale, factor = _scale(dy, *adapter, ranges[FACTOR], ranges[LARGEST_A])
            wide = torch.cat([*scaled, *pieces], 1) if len(scaled) + len(pieces) > 1 else scaled[0]
            dx = product_transposed(wide, scale, factor, next(iter(blocks), None), codes, sum(rows), columns)
        halves = xa.split([each.shape[1] for each in b], 1)
        db = [part.t() @ half for part, half in zip(dy, halves, strict=True)]
        return dx, dxa @ a if ctx.drops else None, dxa.t() @ read, None, None, *db, *([None] * len(codes))
