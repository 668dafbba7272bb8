"""Where the weights of experts lie in a base's files: each matrix of an expert alone, or those of a layer in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora.experts.layout import Unit
from qlora.models.weight_files import ModelNames


@dataclass(frozen=True)
class ExpertsPart:
    """A tensor in the files that holds weights of experts."""

    parameter: str
    """The projection of all experts that it is loaded into."""
    units: tuple[Unit, ...]
    expert: int | None = None
    """Whose matrix it is; None: the projection of all experts."""
    is_transposed: bool = False

    def shape(self, saved: torch.Size) -> torch.Size:
        """Returns its shape when it is not quantized."""
        return saved if self.expert is None else torch.Size(self.units[0].shape)

    def map(self, saved: Tensor, change: Callable[[Tensor, Unit, int], Tensor]) -> Tensor:
        """Returns the tensor with each matrix [out, in] in it changed, in float32."""
        if self.expert is not None:
            return change(saved, self.units[0], self.expert)
        result = torch.empty(saved.shape, device=saved.device)
        weights, changed = (tensor.transpose(1, 2) if self.is_transposed else tensor for tensor in (saved, result))
        for unit in self.units:
            for expert, weight in enumerate(weights[:, unit.rows]):
                changed[expert, unit.rows] = change(weight, unit, expert)
        return result


def find_experts_part(names: ModelNames, source: str) -> ExpertsPart | None:
    """Returns what a tensor of the files holds of experts; None: nothing, or not in a way that is known."""
    if not names.experts:
        return None
    matrix = names.find_matrix(source)
    parameter = names.find(source) if matrix is None else matrix.parameter
    path, _, projection = (parameter or "").rpartition(".")
    layout = names.experts.get(path)
    if parameter is None or layout is None or projection not in layout.projections:
        return None
    units = layout.units_of(projection)
    if matrix is None:
        is_whole = not names.is_converted(source)
        return ExpertsPart(parameter, units, is_transposed=layout.is_transposed) if is_whole else None
    if layout.is_transposed or layout.is_interleaved or matrix.parts != len(units):
        return None
    return ExpertsPart(parameter, (units[matrix.part],), matrix.expert)
