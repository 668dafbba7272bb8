"""Linear layers that read one input, as one group of weights and adapters.

`multiply_packed` is where weights in 4 bits meet their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from qlora.generation import few_rows
from qlora.quantization.bnb4.quantized_weight import (
    QuantizedWeight,
    can_join,
    decode_plain,
    join,
    read_quantized_weight,
)
from qlora.step.kernels.dequantize import dequantize
from qlora.step.kernels.fused_linear import linear as multiply_decoding
from qlora.upstream.torch_models import weight_of

FEWER = 16
"""Rows up to which weights that are decoded too are faster read in 4 bits, on a GPU."""
ALIGNED = 8
"""Numbers of 16 bits that a matmul reads at a time: rows of matrices are multiples of it."""


class ServedGroup:
    """Layers that read one input; the first one that is called computes the outputs of all."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        self.modules, self.dtype = modules, dtype
        self.layers = [base_layer_of(module) for module in modules]
        self.rows = [int(_shape_of(layer)[0]) for layer in self.layers]
        self.adapters = [module for module in modules if isinstance(module, LoraLayer)]
        self.names = list(dict.fromkeys(name for module in self.adapters for name in module.lora_A))
        self.shared: list[Tensor] = []
        """Parameters that are views of the group's tensors meanwhile."""
        self.pending: tuple[Tensor, list[Tensor]] | None = None

    def output(self, slot: int, x: Tensor) -> Tensor:
        """Returns the output of a member for its input `x` [..., columns]."""
        if len(self.rows) == 1:
            return self.compute(x)[0]
        if self.pending is None or self.pending[0] is not x:
            self.pending = (x, self.compute(x))
        output = self.pending[1][slot]
        if slot == len(self.rows) - 1:
            self.pending = None
        return output

    def compute(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of all members, each [..., rows]."""
        outputs = self.multiply(x.reshape(-1, x.shape[-1]).to(self.dtype), self._active)
        return [output.view(*x.shape[:-1], -1) for output in outputs]

    def multiply(self, x: Tensor, adapter: str | None) -> list[Tensor]:
        """Returns the outputs, each [tokens, rows], for `x` [tokens, columns]; no adapter: of the bare weights."""
        raise NotImplementedError

    def release(self) -> None:
        """Gives the parameters a memory of their own again."""
        for parameter in self.shared:
            parameter.data = parameter.data.clone()

    @property
    def _active(self) -> str | None:
        """The adapter that takes part; None: the bare weights compute."""
        if not self.adapters or self.adapters[0].disable_adapters:
            return None
        return next((name for name in self.adapters[0].active_adapters if name in self.names), None)

    def _join_biases(self, device: torch.device, rows: int) -> Tensor | None:
        """Returns the biases and zeros, [rows]; the parameters become views of it, for they may be changed in place."""
        biases = [getattr(layer, "bias", None) for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        joint = torch.zeros(rows, dtype=self.dtype, device=device)
        for bias, part in zip(biases, joint[: sum(self.rows)].split(self.rows), strict=True):
            if bias is not None:
                self._view(bias, part)
        return joint

    def _view(self, parameter: Tensor, view: Tensor) -> None:
        view.copy_(parameter.detach())
        if parameter.dtype is view.dtype:
            parameter.data = view
            self.shared.append(parameter)


class DecodedGroup(ServedGroup):
    """Layers whose weights, and A matrices, are one matrix in `dtype`."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__(modules, dtype)
        self.total = sum(self.rows)
        parts: list[Tensor] = []
        self.b: dict[str, tuple[slice, Tensor]] = {}
        """Of each adapter where its A matrices stand, and its B matrices, whose blocks meet their own A alone."""
        end = self.total
        for name in self.names:
            a, b = _join_matrices(self.modules, self.rows, name, dtype)
            padding = -len(a) % ALIGNED
            parts.append(pad(a, (0, 0, 0, padding)))
            begin, end = end, end + len(parts[-1])
            self.b[name] = slice(begin, end), pad(torch.block_diag(*b), (0, padding))
        weights = [weight_of(layer) for layer in self.layers]
        self.weight = torch.empty(end, _shape_of(self.layers[0])[1], dtype=dtype, device=weights[0].device)
        for weight, view in zip(weights, self.weight[: self.total].split(self.rows), strict=True):
            if read_quantized_weight(weight) is None:
                self._view(weight, view)
            else:
                view.copy_(_decode(weight, dtype))
        torch.cat(parts or [self.weight[:0]], out=self.weight[self.total :])
        self.bias = self._join_biases(self.weight.device, end)
        self.few = FewRows.of(self, dtype)

    def multiply(self, x: Tensor, adapter: str | None) -> list[Tensor]:
        """Returns the outputs: one matmul for the weights and all A matrices, one for all B matrices.

        For the few rows of a decode step, a GPU reads the weights as they are stored, in 4 bits.
        """
        if self.few is not None and len(x) <= FEWER:
            return self.few.multiply(x, adapter, self.bias)
        if adapter is None:
            joint = linear(x, self.weight[: self.total], None if self.bias is None else self.bias[: self.total])
        else:
            columns, b = self.b[adapter]
            whole = linear(x, self.weight, self.bias)
            joint = whole[:, : self.total].addmm_(whole[:, columns], b.t())
        return list(joint.split(self.rows, dim=-1))


class PackedGroup(ServedGroup):
    """Layers whose weights stay in 4 bits."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype) -> None:
        super().__init__(modules, dtype)
        self.weights: QuantizedWeight = join([weight_of(layer) for layer in self.layers])
        self.matrices = {name: _join_matrices(modules, self.rows, name, dtype) for name in self.names}
        self.bias = self._join_biases(self.weights.packed.device, sum(self.rows))
        self.few = FewRows.of(self, dtype)

    def multiply(self, x: Tensor, adapter: str | None) -> list[Tensor]:
        """Returns the outputs, the adapter's part in the same matmuls."""
        if self.few is not None and len(x) <= few_rows.MOST_ROWS:
            return self.few.multiply(x, adapter, self.bias)
        outputs = multiply_packed(x, self.weights, self.rows, None if adapter is None else self.matrices[adapter])
        if self.bias is None:
            return outputs
        return [output + bias for output, bias in zip(outputs, self.bias.split(self.rows), strict=True)]


class FewRows:
    """Layers of one input, as the kernel for a few rows on a GPU computes them."""

    def __init__(self, weights: QuantizedWeight, rows: list[int]) -> None:
        self.weights, self.rows = weights, rows
        self.matrices: dict[str | None, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}
        """The A matrices and the scaled B matrices of each adapter, of one rank."""

    @classmethod
    def of(cls, group: ServedGroup, dtype: torch.dtype) -> FewRows | None:
        """Returns those of a group; None: the kernel does not compute it."""
        packed = [read_quantized_weight(weight_of(layer)) for layer in group.layers]
        known = [weight for weight in packed if weight is not None]
        if len(known) < len(packed) or not known[0].packed.is_cuda or not can_join(known):
            return None
        if few_rows.unsupported_reason(known[0], dtype, group.rows) is not None:
            return None
        few = cls(join([weight_of(layer) for layer in group.layers]), group.rows)
        for name in group.names:
            a, b = _join_matrices(group.modules, group.rows, name, dtype)
            ranks = [matrix.shape[1] for matrix in b]
            rank = -(-max(ranks) // few_rows.TILE) * few_rows.TILE
            missing = [rank - present for present in ranks]
            few.matrices[name] = (
                torch.cat([pad(part, (0, 0, 0, more)) for part, more in zip(a.split(ranks), missing, strict=True)]),
                torch.cat([pad(part, (0, more)) for part, more in zip(b, missing, strict=True)]),
            )
        return few

    def multiply(self, x: Tensor, adapter: str | None, bias: Tensor | None) -> list[Tensor]:
        """Returns the outputs, each [rows of x, rows]; `bias` may be longer than their columns."""
        joint = few_rows.multiply(x, self.weights, *self.matrices[adapter], self.rows)
        if bias is not None:
            joint += bias[: joint.shape[1]]
        return list(joint.split(self.rows, dim=-1))


def multiply_packed(
    x: Tensor, weights: QuantizedWeight, rows: list[int], adapter: tuple[Tensor, list[Tensor]] | None
) -> list[Tensor]:
    """Returns the outputs of layers of one input, each [tokens, rows], whose 4-bit weights are stacked by rows.

    `x` is [tokens, columns]; `adapter` holds the A matrices, [all ranks, columns], and each layer's scaled B, [rows,
    rank].
    """
    a, b = adapter or (x.new_empty(0, x.shape[1]), [x.new_empty(count, 0) for count in rows])
    outputs: list[Tensor] = multiply_decoding(x, linear(x, a), b, weights.tensors(), rows)
    return outputs


def base_layer_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _shape_of(layer: nn.Module) -> Sequence[int]:
    weight = weight_of(layer)
    packed = read_quantized_weight(weight)
    return weight.shape if packed is None else (packed.rows, packed.columns)


def _decode(weight: Tensor, dtype: torch.dtype) -> Tensor:
    packed = read_quantized_weight(weight)
    assert packed is not None
    decoded = dequantize(packed, dtype) if weight.is_cuda else decode_plain(packed, dtype)
    return decoded.view(packed.rows, packed.columns)


def _join_matrices(
    modules: list[nn.Module], rows: list[int], adapter: str, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Returns the A matrices of an adapter, [all ranks, columns], and the scaled B matrices, each [rows, rank].

    Of a layer without the adapter they are those of rank 0.
    """
    holder = next(module for module in modules if isinstance(module, LoraLayer) and adapter in module.lora_A)
    empty = weight_of(holder.lora_A[adapter]).detach()[:0].to(dtype)
    a, b = [], []
    for module, count in zip(modules, rows, strict=True):
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a.append(weight_of(module.lora_A[adapter]).detach().to(dtype))
            b.append((weight_of(module.lora_B[adapter]).detach() * module.scaling[adapter]).to(dtype))
        else:
            a.append(empty)
            b.append(empty.new_empty(count, 0))
    return torch.cat(a), b
