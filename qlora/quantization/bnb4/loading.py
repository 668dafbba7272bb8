"""The experts of a base that transformers loads: quantized as they are read, or as they were saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from qlora.experts.host import choose_waiting
from qlora.experts.layout import ExpertsLayout, Unit, find_experts, is_stored
from qlora.quantization import mxfp4
from qlora.quantization.bnb4.expert_unit import Matrix4bit
from qlora.quantization.bnb4.experts import quantize_parameter, store_matrices
from qlora.upstream.transformers_quantizer import Saved


@dataclass(frozen=True)
class ExpertsIn4Bits:
    """Stores the experts of a base (`ExpertsLoading`)."""

    quant_type: str
    double_quant: bool
    quantizes: bool
    """Whether experts are stored in 4 bits; otherwise saved ones are decoded."""
    decodes_blocks: bool = False
    """Whether the files hold experts in MXFP4."""

    def projections(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters of experts that are to be quantized; chooses whose will wait."""
        if not self.quantizes:
            return []
        choose_waiting(model)
        experts = find_experts(model).items()
        return [
            f"{name}.{projection}" for name, module in experts for projection in ExpertsLayout.of(module).projections
        ]

    def quantize(self, experts: nn.Module, projection: str, weight: Tensor) -> nn.Parameter:
        """Quantizes a whole projection, in the layout of its parameter."""
        return quantize_parameter(experts, projection, weight, self.quant_type, double_quant=self.double_quant)

    def holds(self, experts: nn.Module, projection: str) -> bool:
        """Returns whether a projection is stored in 4 bits."""
        return is_stored(experts, projection)

    def takes_matrices(self, experts: nn.Module, projection: str, count: int) -> bool:
        """Returns whether a projection is made of `count` matrices an expert, stacked by rows."""
        layout = ExpertsLayout.of(experts)
        return not layout.is_transposed and not layout.is_interleaved and len(layout.units_of(projection)) == count

    def store_blocks(self, experts: nn.Module, projection: str, blocks: Tensor, scales: Tensor) -> nn.Parameter:
        """Stores a projection from the MXFP4 of all experts, one expert after another."""
        layout, dtype = ExpertsLayout.of(experts), getattr(experts, projection).dtype
        if self.quantizes:
            units = [_decoded(blocks, scales, unit, dtype) for unit in layout.units_of(projection)]
            kind = self.quant_type
            return store_matrices(experts, projection, units, dtype, kind, double_quant=self.double_quant)
        weight = mxfp4.decode(blocks, scales, dtype)
        return nn.Parameter(
            weight.transpose(1, 2).contiguous() if layout.is_transposed else weight, requires_grad=False
        )

    def store(self, experts: nn.Module, projection: str, matrices: list[Iterator[Saved]]) -> nn.Parameter:
        """Stores a projection from the matrices of all experts, one after another."""
        parameter: Tensor = getattr(experts, projection)
        if self.quantizes:
            units = [map(_as_matrix, part) for part in matrices]
            kind = self.quant_type
            return store_matrices(experts, projection, units, parameter.dtype, kind, double_quant=self.double_quant)
        parts = [torch.stack([_decode(saved, parameter.dtype) for saved in part]) for part in matrices]
        return nn.Parameter(torch.cat(parts, dim=1), requires_grad=False)


def _decoded(blocks: Tensor, scales: Tensor, unit: Unit, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the matrix of a unit of one expert after the other."""
    for expert in range(len(blocks)):
        yield mxfp4.decode(blocks[expert, unit.rows], scales[expert, unit.rows], dtype)


def _as_matrix(saved: Saved) -> Tensor | Matrix4bit:
    """Returns a matrix as it was saved: quantized, or full."""
    if len(saved) == 1:
        return saved["weight"]
    return Matrix4bit.of(saved["weight"], _state(saved))


def _decode(saved: Saved, dtype: torch.dtype) -> Tensor:
    weight = saved["weight"]
    return (weight if len(saved) == 1 else bnb.dequantize_4bit(weight, _state(saved))).to(dtype)


def _state(saved: Saved) -> bnb.QuantState:
    statistics = {name: tensor for name, tensor in saved.items() if name != "weight"}
    return bnb.QuantState.from_dict(statistics, saved["weight"].device)
