"""The layout of a layer's experts, and their weights, whatever stores these.

A projection is [experts, out, in] throughout, its rows in the order that the module's own gate expects. A unit is what
a linear layer of one expert would be: gate, up or down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qlora.upstream.transformers_experts import gate_is_interleaved, has_post_norm, is_experts

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
"""The names of projections in transformers' modules."""
STORE = "quantized"
"""The name of the submodule that holds quantized weights."""


@dataclass(frozen=True)
class Unit:
    """The rows of a projection that one linear layer of an expert would hold."""

    name: str
    """`gate`, `up` or `down`."""
    projection: str
    rows: slice
    """Of the projection's rows."""
    shape: tuple[int, int]
    """[out, in]"""


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module keeps the experts of a layer."""

    count: int
    """Experts."""
    hidden: int
    """Inputs of an expert."""
    intermediate: int
    """Inputs of the down projection."""
    output: int
    """Outputs of an expert."""
    has_gate: bool
    """Whether the first projection is `gate_up_proj`, twice as tall as `up_proj` would be."""
    has_bias: bool
    is_transposed: bool
    """Whether the parameters are [experts, in, out]."""
    is_interleaved: bool
    """Whether the rows of gate and up alternate; otherwise all of gate come first."""
    has_post_norm: bool
    """Whether each expert's output is normalised before the routing weights."""

    @classmethod
    def of(cls, experts: nn.Module) -> ExpertsLayout:
        """Reads the layout of a module that `find_experts` returns."""
        module: Any = experts
        first, down = (getattr(module, name).shape for name in ((UP, GATE_UP)[module.has_gate], DOWN))
        axis = -2 if module.is_transposed else -1
        return cls(
            count=down[0],
            hidden=first[axis],
            intermediate=down[axis],
            output=down[-1 if module.is_transposed else -2],
            has_gate=module.has_gate,
            has_bias=module.has_bias,
            is_transposed=module.is_transposed,
            is_interleaved=module.has_gate and gate_is_interleaved(module),
            has_post_norm=has_post_norm(module),
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The parameters' names in the order of computing, each with [out, in]."""
        first = (GATE_UP, 2 * self.intermediate) if self.has_gate else (UP, self.intermediate)
        return {first[0]: (first[1], self.hidden), DOWN: (self.output, self.intermediate)}

    @property
    def units(self) -> tuple[Unit, ...]:
        """The linear layers that an expert would be, in the order of computing."""
        size, first = self.intermediate, (self.intermediate, self.hidden)
        down = Unit("down", DOWN, slice(None), (self.output, size))
        if not self.has_gate:
            return Unit("up", UP, slice(None), first), down
        gate, up = (slice(0, None, 2), slice(1, None, 2)) if self.is_interleaved else (slice(size), slice(size, None))
        return Unit("gate", GATE_UP, gate, first), Unit("up", GATE_UP, up, first), down

    def units_of(self, projection: str) -> tuple[Unit, ...]:
        """Returns the units of one projection."""
        return tuple(unit for unit in self.units if unit.projection == projection)


class StoredExperts(Protocol):
    """The quantized weights of a module's experts: its submodule `quantized`, which a quantization method makes."""

    def holds(self, projection: str) -> bool:
        """Returns whether the weights of a projection are in here."""

    def decode(self, projection: str, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
        """Returns a projection as [experts, out, in], or that of the experts whose ids are given."""

    def decode_unit(self, unit: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Returns the weight [out, in] of a unit of one expert."""

    @property
    def data_type(self) -> str:
        """The data type of a quantized weight, e.g. `nf4`."""

    def nonfinite(self) -> list[str]:
        """Returns the projections that were NaN or infinite before they were quantized, or decode to such numbers."""

    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that hold a layer's experts by their names in the base, with or without an adapter on it."""
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return {name.replace(".base_layer", ""): module for name, module in base.named_modules() if is_experts(module)}


def stored_experts(module: nn.Module | None) -> StoredExperts | None:
    """Returns what holds the quantized weights of a module's experts; None: its own parameters hold them."""
    return cast("StoredExperts | None", None if module is None else module._modules.get(STORE))


def is_stored(module: nn.Module | None, name: str) -> bool:
    """Returns whether a parameter is the placeholder of weights that are stored quantized."""
    store = stored_experts(module)
    return store is not None and store.holds(name)


class Placeholder(nn.Parameter):
    """A frozen parameter without storage, for weights that are stored elsewhere.

    Counts and adapters see its shape; whatever reads it by mistake gets NaN.
    """

    data_type: str

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device, data_type: str) -> Placeholder:
        """Returns a placeholder of weights that are stored as `data_type`."""
        parameter = cls(torch.full((), torch.nan, dtype=dtype, device=device).expand(shape), requires_grad=False)
        parameter.data_type = data_type
        return parameter

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Returns a placeholder of another device or dtype: torch's own would have storage."""
        number = self.detach().as_strided((), ()).to(*args, **kwargs)
        return Placeholder.of(self.shape, number.dtype, number.device, self.data_type)

    def __deepcopy__(self, memo: dict[int, Any]) -> Placeholder:
        """Returns a placeholder, too."""
        return Placeholder.of(self.shape, self.dtype, self.device, self.data_type)


def stored_units(model: nn.Module) -> Iterator[tuple[str, nn.Module, Unit]]:
    """Yields the units whose weights are quantized: the name of the experts' module, the module and the unit."""
    for name, experts in find_experts(model).items():
        for unit in ExpertsLayout.of(experts).units:
            if is_stored(experts, unit.projection):
                yield name, experts, unit


def nonfinite_projections(experts: nn.Module) -> list[str]:
    """Returns the quantized projections that were NaN or infinite, or decode to such numbers."""
    store = stored_experts(experts)
    return [] if store is None else store.nonfinite()


def expert_weight(experts: nn.Module, name: str, dtype: torch.dtype, active: Tensor | None = None) -> Tensor:
    """Returns a projection as [experts, out, in] in `dtype`, a view where that is possible.

    `active` are the ids of the experts to return, int64.
    """
    if is_stored(experts, name):
        return cast(StoredExperts, stored_experts(experts)).decode(name, dtype, active)
    weight: Tensor = getattr(experts, name)
    weight = (weight if active is None else weight[active]).to(dtype)
    module: Any = experts
    return weight.transpose(1, 2) if module.is_transposed else weight
