"""Adapters on the experts of a mixture: PEFT holds and saves them, and what computes the experts reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from qlora.experts.forward import ADAPTERS, ExpertAdapter, use_experts
from qlora.experts.layout import ExpertsLayout
from qlora.upstream.peft import ExpertsWrapper, base_of
from qlora.upstream.transformers_experts import is_experts


class ExpertAdapters(Mapping[str, ExpertAdapter]):
    """The adapters of a layer's experts by projection, as they are in a forward pass: PEFT may switch or move them."""

    def __init__(self, wrappers: Mapping[str, ExpertsWrapper], dropout: float) -> None:
        self.wrappers, self.dropout = dict(wrappers), dropout

    def __getitem__(self, projection: str) -> ExpertAdapter:
        wrapper = self.wrappers[projection]
        if (name := wrapper.active) is None:
            raise KeyError(projection)
        a, b, scaling = wrapper.matrices(name)
        return ExpertAdapter(a, b, scaling, self.dropout, lambda: wrapper.active is not None)

    def __iter__(self) -> Iterator[str]:
        return (projection for projection, wrapper in self.wrappers.items() if wrapper.active is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def attach_experts(model: PeftModel, dropout: float) -> None:
    """Lets the experts of a model read the adapters that PEFT holds for them, with `dropout` in training."""
    wrappers: dict[nn.Module, dict[str, ExpertsWrapper]] = {}
    for module in model.modules():
        if not isinstance(module, ParamWrapper) or not is_experts(experts := module.get_base_layer()):
            continue
        if (name := str(module.parameter_name)) in ExpertsLayout.of(experts).projections:
            wrappers.setdefault(experts, {})[name] = ExpertsWrapper.adopt(module)
    for experts, of_projections in wrappers.items():
        experts.__dict__[ADAPTERS] = ExpertAdapters(of_projections, dropout)
    if wrappers:
        use_experts(model)


def set_dropout(model: PeftModel, dropout: float) -> None:
    """Gives the linear layers of an adapter a dropout that PEFT does not know of: it refuses one beside experts."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


def expert_wrappers(model: PeftModel) -> dict[str, ExpertsWrapper]:
    """Returns what holds the adapters of a model's experts, by the names of the tensors in the plain base."""
    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in base_of(model).named_modules()
        if isinstance(module, ExpertsWrapper)
    }


def expert_deltas(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns what adapters add to a projection of all experts, float32 [experts, out, in]."""
    return scaling * (b.float() @ a.float())
