"""The experts of a layer in 4 bits: each expert's gate, up and down as bitsandbytes would quantize a linear layer.

The tensors of all experts lie in one, so that a kernel decodes them at once; the bits of each are those that
`bitsandbytes.functional.quantize_4bit` makes of its matrix, the offset of double quantization included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from qlora.experts.host import WaitingLayer, WaitingTensor, is_waiting, on_device, waiting_layer
from qlora.experts.layout import STORE, ExpertsLayout, Placeholder, Unit
from qlora.quantization.bnb4.expert_unit import Matrix4bit, QuantizedUnit
from qlora.quantization.bnb4.layers import Rounding
from qlora.quantization.bnb4.layout import BLOCK
from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, decode_absmax, decode_plain


class QuantizedExperts(nn.Module):
    """The quantized weights of a layer's experts (`StoredExperts`)."""

    codebook: Tensor
    """float32 [16]: the value of each 4-bit code."""
    nested_codebook: Tensor
    """float32 [256]: the value of each byte of `absmax`, or empty."""

    def __init__(self, layout: ExpertsLayout, quant_type: str, *, double_quant: bool, device: torch.device) -> None:
        super().__init__()
        self.layout, self.quant_type, self.double_quant = layout, quant_type, double_quant
        codebook, nested = torch.zeros(16, device=device), torch.zeros(256 if double_quant else 0, device=device)
        self._waiting: list[WaitingTensor] = []
        self.register_buffer("codebook", codebook)
        self.register_buffer("nested_codebook", nested)
        self._is_hf_initialized = True  # transformers initialises what it did not load

    @classmethod
    def on(cls, experts: nn.Module, quant_type: str, *, double_quant: bool, device: torch.device) -> QuantizedExperts:
        """Returns the store of a module, a new one if it has none."""
        if (store := experts._modules.get(STORE)) is None:
            store = cls(ExpertsLayout.of(experts), quant_type, double_quant=double_quant, device=device)
            experts.add_module(STORE, store)
        assert isinstance(store, cls)
        return store

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        """Moves the tensors as a model is moved; one that is given another dtype keeps its scales in float32.

        What waits in the host's memory stays there.
        """

        def move(tensor: Tensor) -> Tensor:
            if is_waiting(tensor):
                return tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    @property
    def data_type(self) -> str:
        """The 4-bit data type."""
        return self.quant_type

    def unit(self, name: str) -> QuantizedUnit:
        """Returns the tensors of `gate`, `up` or `down`."""
        module = self.get_submodule(name)
        assert isinstance(module, QuantizedUnit)
        return module

    @property
    def units(self) -> list[QuantizedUnit]:
        """The tensors of all projections."""
        return [module for module in self.children() if isinstance(module, QuantizedUnit)]

    def holds(self, projection: str) -> bool:
        """Returns whether the weights of a projection are in here."""
        units = self.layout.units_of(projection)
        return bool(units) and all(unit.name in self._modules for unit in units)

    def reserve(self, projection: str, device: torch.device) -> None:
        """Makes room for a projection."""
        for unit in self.layout.units_of(projection):
            empty = QuantizedUnit(unit, self.layout.count, double_quant=self.double_quant, device=device)
            self.add_module(unit.name, empty)

    def wait(self, projection: str, layer: WaitingLayer) -> None:
        """Moves the weights of a projection to the host's memory; what decodes them is small, and stays."""
        for unit in self.layout.units_of(projection):
            module = self.unit(unit.name)
            for name in ("packed", "absmax"):
                waiting = layer.store(f"{unit.name}.{name}", getattr(module, name))
                setattr(module, name, waiting.tensor)
                self._waiting.append(waiting)

    def quantize(self, unit: Unit, expert: int, weight: Tensor) -> None:
        """Quantizes the weight [out, in] of a unit of one expert."""
        packed, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        self.set(unit, expert, Matrix4bit.of(packed, state, torch.stack(torch.aminmax(weight)).isfinite().all()))

    def set(self, unit: Unit, expert: int, matrix: Matrix4bit) -> None:
        """Stores the quantized weight of a unit of one expert."""
        self.unit(unit.name).set(expert, matrix)
        self.codebook.copy_(matrix.codebook)
        if matrix.nested_codebook is not None:
            self.nested_codebook.copy_(matrix.nested_codebook)

    def decode(self, projection: str, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
        """Returns a projection as [experts, out, in], or that of the experts whose ids are given."""
        units = self.layout.units_of(projection)
        if len(units) == 1:
            return self._decode(self.unit(units[0].name), dtype, experts)
        count = self.layout.count if experts is None else len(experts)
        output = torch.empty(count, *self.layout.projections[projection], dtype=dtype, device=self.codebook.device)
        for unit in units:
            output[:, unit.rows] = self._decode(self.unit(unit.name), dtype, experts)
        return output

    def decode_unit(self, unit: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Returns the weight [out, in] of a unit of one expert."""
        ids = torch.tensor([expert], device=self.codebook.device)
        return self._decode(self.unit(unit), dtype, ids)[0]

    def _decode(self, unit: QuantizedUnit, dtype: torch.dtype, experts: Tensor | None) -> Tensor:
        weight = self._on_device(self.weight_of(unit, experts))
        if unit.columns % BLOCK:  # bitsandbytes decodes such a matrix wrongly on a CPU (0.50)
            return decode_plain(weight, dtype)
        count = len(weight.packed)
        flat = self._dequantize(weight.packed, decode_absmax(weight), (count * unit.rows, unit.columns), dtype)
        return flat.view(count, unit.rows, unit.columns)

    def weight_of(self, unit: QuantizedUnit, experts: Tensor | None = None) -> QuantizedWeight:
        """Returns the weights of a unit of all experts, where they lie, or of those whose ids are given, on the device.

        Of experts that wait only these are copied.
        """
        packed, absmax, nested_absmax, offset = (
            tensor if experts is None else tensor[experts.to(tensor.device)].to(self.codebook.device)
            for tensor in (unit.codes, unit.absmax, unit.nested_absmax, unit.nested_offset)
        )
        nested_offset = offset[:, None].expand(nested_absmax.shape).contiguous()
        codebooks = self.codebook, self.nested_codebook
        return QuantizedWeight(packed, absmax, *codebooks, nested_absmax, nested_offset, unit.rows, unit.columns)

    def _on_device(self, weight: QuantizedWeight) -> QuantizedWeight:
        packed, absmax = on_device([weight.packed, weight.absmax])
        return replace(weight, packed=packed, absmax=absmax)

    def _dequantize(self, packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        state = bnb.QuantState(
            absmax=absmax.reshape(-1),
            shape=torch.Size(shape),
            code=self.codebook,
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=dtype,
        )
        return bnb.dequantize_4bit(packed.reshape(-1, 1), state)

    def rounding(self) -> Callable[[Tensor], Tensor]:
        """Returns how the weight of a unit is rounded, to the bit."""
        quant_type, double_quant = self.quant_type, self.double_quant

        def round_to_4_bits(weight: Tensor) -> Tensor:
            rounding = Rounding(quant_type, double_quant, BLOCK)
            if weight.shape[1] % BLOCK == 0:
                return rounding(weight)
            packed, state = rounding.quantize(weight)
            absmax = (
                bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
            )
            empty = absmax.new_empty(0)
            quantized = QuantizedWeight(packed.view(-1), absmax, state.code, empty, empty, empty, *weight.shape)
            return decode_plain(quantized, weight.dtype)

        return round_to_4_bits

    def nonfinite(self) -> list[str]:
        """Returns the projections that were NaN or infinite before they were quantized, or decode to such numbers."""
        spoiled = []
        for projection in self.layout.projections:
            units = (
                [self.unit(unit.name) for unit in self.layout.units_of(projection)] if self.holds(projection) else []
            )
            if not all(
                bool(unit.finite.all() & decode_absmax(self._on_device(self.weight_of(unit))).isfinite().all())
                for unit in units
            ):
                spoiled.append(projection)
        return spoiled

    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(buffer.nbytes for buffer in self.buffers())


def put_placeholder(experts: nn.Module, projection: str, dtype: torch.dtype, store: QuantizedExperts) -> Placeholder:
    """Puts a placeholder where a projection's weights were, and returns it; they wait where the module's do."""
    if (layer := waiting_layer(experts)) is not None:
        store.wait(projection, layer)
    parameter: Any = getattr(experts, projection)
    device = store.codebook.device
    result = Placeholder.of(parameter.shape, dtype, device, store.quant_type)
    result._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers initialises what it did not load
    setattr(experts, projection, result)
    return result


def quantize_parameter(
    experts: nn.Module, projection: str, weight: Tensor, quant_type: str, *, double_quant: bool
) -> Placeholder:
    """Quantizes a projection, given in the layout of its parameter, and returns what takes the parameter's place."""
    store = QuantizedExperts.on(experts, quant_type, double_quant=double_quant, device=weight.device)
    store.reserve(projection, weight.device)
    matrices = weight.transpose(1, 2) if store.layout.is_transposed else weight
    if not weight.is_meta:
        for unit in store.layout.units_of(projection):
            for expert, matrix in enumerate(matrices[:, unit.rows]):
                store.quantize(unit, expert, matrix)
    return put_placeholder(experts, projection, weight.dtype, store)


def store_matrices(
    experts: nn.Module,
    projection: str,
    units: Iterable[Iterable[Tensor | Matrix4bit]],
    dtype: torch.dtype,
    quant_type: str,
    *,
    double_quant: bool,
) -> Placeholder:
    """Stores a projection that is given expert by expert for each of its units, quantized already or not."""
    store: QuantizedExperts | None = None
    layout = ExpertsLayout.of(experts)
    for unit, matrices in zip(layout.units_of(projection), units, strict=True):
        count = 0
        for expert, matrix in enumerate(matrices):
            device = matrix.device if isinstance(matrix, Tensor) else matrix.packed.device
            if store is None:
                store = QuantizedExperts.on(experts, quant_type, double_quant=double_quant, device=device)
                store.reserve(projection, device)
            if isinstance(matrix, Matrix4bit):
                store.set(unit, expert, matrix)
            else:
                if tuple(matrix.shape) != unit.shape:
                    raise ValueError(f"expert {expert} has a matrix {tuple(matrix.shape)}, and {unit.shape} is needed")
                store.quantize(unit, expert, matrix)
            count += 1
        if count != layout.count:
            raise ValueError(f"{count} experts of {layout.count}")
    assert store is not None
    return put_placeholder(experts, projection, dtype, store)
