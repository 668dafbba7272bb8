"""The linear layers of a mixture's experts: matmuls of routed rows with frozen weights, the adapters' part included.

A layer's experts are two such layers, gate and up together, and down. Between them stands what the model itself
computes (its activation), which `torch.compile` fuses. The routing weights multiply the input of the down projection,
which gives the same sum as multiplying its output, and nothing needs that output in the backward pass.

Rows are gathered and summed where they are read and written: the input of gate and up has a row a token, and so has the
gradient of down's output. The operators are opaque to `torch.compile`, which would keep dequantized weights; each does
as much as possible, for calling one takes the host longer than a small kernel takes the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora.experts.host import is_waiting, on_device
from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, decode_plain, weight_scale
from qlora.step.kernels.dequantize import is_unread, operator, register, registered
from qlora.step.kernels.grouped import Routing, combine, matmul, multiply_low_rank, sum_rows
from qlora.step.kernels.matmul_fp8 import scale_rows

FIELDS = 4
"""The tensors of a quantized projection beside the two codebooks, which all projections share."""


@dataclass(frozen=True)
class QuantizedProjections:
    """Quantized projections of all experts of a layer, in the order of their rows."""

    weights: list[QuantizedWeight]
    """Each of their tensors with a row an expert, but for the codebooks."""
    waits: bool
    """Whether they wait in the host's memory, but for what decodes them."""

    @classmethod
    def register(cls, weights: Sequence[QuantizedWeight]) -> QuantizedProjections:
        """Lets operators find projections by the packed bytes of the first, as long as what this returns is there."""
        packed = weights[0].packed
        return register(packed, cls([_by_expert(weight) for weight in weights], is_waiting(packed)))

    @property
    def packed(self) -> Tensor:
        """The packed bytes of the first, by which operators find them."""
        return self.weights[0].packed

    def on_device(self) -> list[QuantizedWeight]:
        """Returns them as a device computes with them."""
        if not self.waits:
            return self.weights
        copies = [on_device([weight.packed, weight.absmax]) for weight in self.weights]
        return [
            replace(weight, packed=packed, absmax=absmax)
            for weight, (packed, absmax) in zip(self.weights, copies, strict=True)
        ]


@dataclass(frozen=True)
class FrozenExperts:
    """The frozen weights of all experts of a layer, [experts, rows, columns] when decoded: gate and up, or down."""

    tensors: list[Tensor]
    """What operators read. One tensor, the weights; two, 8-bit weights as they are, and turned; the packed bytes that
    `quantized` is registered for; or those of a `QuantizedWeight`, with a row an expert: for each projection its own,
    then the codebooks, once, for `torch.compile` takes no tensor twice."""
    rows: int
    columns: int
    is_interleaved: bool = False
    """Whether the rows of the projections alternate; else they follow each other."""
    weight_scale: Tensor | None = None
    """With 8-bit matmuls, the factor with which the weights fill the range of e4m3: float32 [1]."""
    quantized: QuantizedProjections | None = None
    """What is registered for the packed bytes."""

    def find_scale(self) -> Tensor | None:
        """Returns a `weight_scale`; None: the weights have 16 bits."""
        scales = [weight_scale(projection) for projection in split_projections(self.tensors, self.shape)]
        return torch.stack(scales).amin(0) if scales else None

    def decode(self, dtype: torch.dtype) -> FrozenExperts:
        """Returns these weights as the matmuls of a forward and a backward pass read them; `dtype` is that of rows."""
        if not self.is_quantized:
            return self
        kinds = (False,) if self.weight_scale is None else (False, True)
        dtype = dtype if self.weight_scale is None else torch.float8_e4m3fn
        arguments = self.tensors, self.shape, dtype, self.weight_scale
        return replace(self, tensors=[decode_experts(*arguments, transposed=turned) for turned in kinds])

    @property
    def is_quantized(self) -> bool:
        """Whether the weights must be decoded."""
        return is_quantized(self.tensors)

    @property
    def shape(self) -> list[int]:
        """What the operators are told."""
        return [self.rows, self.columns, int(self.is_interleaved)]


def is_quantized(tensors: list[Tensor]) -> bool:
    """Returns whether the `tensors` of `FrozenExperts` are those of quantized weights."""
    return len(tensors) > 2 or tensors[0].dtype is torch.uint8


def join_projections(projections: Sequence[QuantizedWeight]) -> list[Tensor]:
    """Returns the `tensors` of `FrozenExperts`."""
    owned = ((part.packed, part.absmax, part.nested_absmax, part.nested_offset) for part in projections)
    return [*itertools.chain(*owned), projections[0].codebook, projections[0].nested_codebook]


def split_projections(tensors: list[Tensor], shape: list[int]) -> list[QuantizedWeight]:
    """Returns the projections on the device, each with a row an expert; weights that are not quantized have none."""
    if not is_quantized(tensors):
        return []
    if len(tensors) == 1:
        quantized: QuantizedProjections = registered(tensors[0])
        return quantized.on_device()
    *owned, codebook, nested_codebook = on_device(tensors)
    rows = shape[0] * FIELDS // len(owned)
    return [
        _by_expert(
            QuantizedWeight(
                packed.view(torch.uint8), absmax, codebook, nested_codebook, nested_absmax, offset, rows, shape[1]
            )
        )
        for packed, absmax, nested_absmax, offset in zip(*[iter(owned)] * FIELDS, strict=True)
    ]


def decode_experts(
    tensors: list[Tensor],
    shape: list[int],
    dtype: torch.dtype,
    weight_scale: Tensor | None,
    *,
    transposed: bool,
    experts: Tensor | None = None,
) -> Tensor:
    """Returns the weights of `FrozenExperts`, times `weight_scale`: [experts, rows, columns], or a transposed view.

    8-bit weights that are asked for transposed are stored so, as their matmuls need it. `experts` are the ids of those
    that are decoded, any number of times; None: all, once. They are read where weights are quantized alone.
    """
    rows, columns, is_interleaved = shape
    if not is_quantized(tensors):
        if len(tensors) == 2:
            return tensors[transposed]
        return tensors[0].transpose(1, 2) if transposed else tensors[0]
    projections = split_projections(tensors, shape)
    if experts is not None:
        projections = [_of_experts(projection, experts) for projection in projections]
    number, is_turned = projections[0].packed.shape[0], transposed and weight_scale is not None
    size = (number, columns, rows) if is_turned else (number, rows, columns)
    out = torch.empty(size, dtype=dtype, device=projections[0].packed.device)
    view = out.transpose(1, 2) if is_turned else out
    count = len(projections)
    height = rows // count
    for index, projection in enumerate(projections):
        part = view[:, index::count] if is_interleaved else view.narrow(1, index * height, height)
        if out.is_cuda:
            from qlora.quantization.bnb4 import decode_kernels  # Triton is there with CUDA only

            decode_kernels.decode_experts(projection.tensors(), part, weight_scale)
        else:
            plain = decode_plain(projection, dtype if weight_scale is None else torch.float32)
            part.copy_(plain if weight_scale is None else plain * weight_scale)
    return out.transpose(1, 2) if transposed and not is_turned else out


def _by_expert(weight: QuantizedWeight) -> QuantizedWeight:
    """Returns weights with a row an expert: the packed bytes that processes share are flat."""
    return replace(weight, packed=weight.packed.view(len(weight.absmax), -1))


def _of_experts(weight: QuantizedWeight, experts: Tensor) -> QuantizedWeight:
    """Returns the weights of some experts."""
    names = ("packed", "absmax", "nested_absmax", "nested_offset")
    return replace(weight, **{name: getattr(weight, name)[experts] for name in names})


def _multiply(
    x: Tensor, tensors: list[Tensor], weight_scale: Tensor | None, shape: list[int], offsets: Tensor, *,
    transposed: bool, source: Tensor | None, xa: Tensor | None, b: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns the product of routed rows with the transposed weights of their experts, or with the weights themselves.

    The first arguments after `x` are those of `FrozenExperts`, the others those of `grouped.matmul`.
    """
    dtype, scale, owners = x.dtype, None, None
    if (rows := (x if source is None else source).shape[0]) < offsets.shape[0] and is_quantized(tensors):
        owners, offsets = _owners(offsets, rows)
        b = None if b is None else b[owners]
    if weight_scale is not None:
        x, scale = scale_rows(x, weight_scale)
    weight = decode_experts(tensors, shape, x.dtype, weight_scale, transposed=transposed, experts=owners)
    return matmul(x, weight, offsets, dtype, source=source, scale=scale, xa=xa, b=b)


def _owners(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the expert of each row, and `offsets` that make a group of each row.

    Of fewer rows than experts, the experts that have rows are decoded so, without the host's asking for their number;
    one with several rows is decoded for each.
    """
    numbers = torch.arange(rows + 1, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, numbers[:-1], right=True), numbers[1:]


def _fake_linear(x, read, a, b, tensors, weight_scale, shape, source, positions, offsets, gathers):
    out = x.new_empty(source.shape[0] if gathers else positions.shape[0], shape[0])
    return out, x.new_empty(source.shape[0], 0 if a is None else a.shape[1])


@operator(
    "expert_linear(Tensor x, Tensor? read, Tensor? a, Tensor? b, Tensor[] tensors, Tensor? weight_scale, int[] shape, "
    "Tensor source, Tensor positions, Tensor offsets, bool gathers) -> (Tensor, Tensor)",
    _fake_linear,
)
def expert_linear(
    x: Tensor,
    read: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    tensors: list[Tensor],
    weight_scale: Tensor | None,
    shape: list[int],
    source: Tensor,
    positions: Tensor,
    offsets: Tensor,
    gathers: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the result of `ExpertLinear`, and the product of the rows with their A matrices, [rows, rank]."""
    rows, below = source.shape[0], source if gathers else None
    xa = None if a is None else multiply_low_rank(x if read is None else read, a, offsets, below)
    kept = x.new_empty(rows, 0) if xa is None else xa
    if is_unread(tensors):
        return x.new_full((rows if gathers else len(positions), shape[0]), torch.nan), kept
    out = _multiply(x, tensors, weight_scale, shape, offsets, transposed=False, source=below, xa=xa, b=b)
    return (out if gathers else combine(out, positions)), kept


def _fake_backward(dy, read, xa, a, b, tensors, weight_scale, shape, source, positions, offsets, gathers, drops):
    tokens = positions.shape[0] if gathers else source.shape[0]
    gradients = [dy.new_empty(tokens, shape[1])]
    if a is not None:
        gradients += [dy.new_empty(a.shape), dy.new_empty(b.shape)]
    return gradients + ([dy.new_empty(tokens, shape[1])] if drops else [])


@operator(
    "expert_linear_backward(Tensor dy, Tensor? read, Tensor xa, Tensor? a, Tensor? b, Tensor[] tensors, "
    "Tensor? weight_scale, int[] shape, Tensor source, Tensor positions, Tensor offsets, bool gathers, bool drops) "
    "-> Tensor[]",
    _fake_backward,
)
def expert_linear_backward(
    dy: Tensor,
    read: Tensor | None,
    xa: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    tensors: list[Tensor],
    weight_scale: Tensor | None,
    shape: list[int],
    source: Tensor,
    positions: Tensor,
    offsets: Tensor,
    gathers: bool,
    drops: bool,
) -> list[Tensor]:
    """Returns the gradients of `expert_linear` with respect to `x`, and with adapters to `a` and `b`.

    With `drops` the last one is that with respect to `read`, which is not in the first then.
    """
    below, above = (source, None) if gathers else (None, source)
    dxa, matrices = None, []
    if a is not None and b is not None:
        assert read is not None
        dxa = multiply_low_rank(dy, b.transpose(1, 2), offsets, above)
        matrices = [sum_rows(dxa, read, offsets, below), sum_rows(xa, dy, offsets, above, transposed=True)]
    # The adapter's part of the gradient is computed in the same matmul, unless another tensor was read.
    adapter = {"xa": None, "b": None} if a is None or drops else {"xa": dxa, "b": a.transpose(1, 2)}
    dx = [_multiply(dy, tensors, weight_scale, shape, offsets, transposed=True, source=above, **adapter)]
    if drops:
        assert dxa is not None
        assert a is not None
        dx.append(matmul(dxa, a.transpose(1, 2), offsets, dy.dtype))
    if gathers:
        dx = [combine(part, positions) for part in dx]
    return [dx[0], *matrices, *dx[1:]]


class ExpertLinear(torch.autograd.Function):
    """One frozen linear layer of all experts, with their adapters."""

    @staticmethod
    def forward(ctx, *arguments):
        x, read, a, b, routing, gathers, weight_scale, shape, *tensors = arguments  # as in `GroupedLinear`
        """Returns the outputs of the routed rows for `x`.

        With `gathers`, `x` has a row a token, [tokens, columns], and the result a row of each, [rows, weight rows];
        else `x` is [rows, columns], and the result the sum of each token's rows, [tokens, weight rows]. `read` is what
        the adapters read, `x` after dropout; None: `x` itself. `a` [experts, rank, columns] and the scaled `b`
        [experts, weight rows, rank] may be None: no adapters.
        """
        _, *indices = routing
        out, xa = expert_linear(x, read, a, b, list(tensors), weight_scale, shape, *indices, gathers)
        kept = None if a is None else x if read is None else read
        ctx.save_for_backward(kept, xa, a, b, *indices, weight_scale, *tensors)
        ctx.shape, ctx.gathers, ctx.drops = shape, gathers, read is not None
        return out

    @staticmethod
    def backward(ctx, dy):
        """Returns the gradients with respect to `x`, `read`, `a` and `b`."""
        read, xa, a, b, source, positions, offsets, weight_scale, *tensors = ctx.saved_tensors
        indices = source, positions, offsets
        with torch.autocast(dy.device.type, enabled=False):
            dx, *others = expert_linear_backward(
                dy.contiguous(), read, xa, a, b, tensors, weight_scale, ctx.shape, *indices, ctx.gathers, ctx.drops
            )
        dread = others.pop() if ctx.drops else None
        da, db = others or (None, None)
        return dx, dread, da, db, None, None, None, None, *([None] * len(tensors))


def apply_experts(
    x: Tensor,
    read: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    routing: Routing,
    weights: FrozenExperts,
    tensors: list[Tensor],
    *,
    gathers: bool,
) -> Tensor:
    """As `ExpertLinear`; `tensors` are those of the weights."""
    result: Tensor = ExpertLinear.apply(
        x, read, a, b, tuple(routing), gathers, weights.weight_scale, weights.shape, *tensors
    )
    return result
