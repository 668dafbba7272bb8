"""Counts the parameters of a model, with and without an adapter."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qlora.adapters.experts import expert_wrappers
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.experts_per_token import experts_per_token
from qlora.quantization.method import method_of
from qlora.text import format_count, format_percent
from qlora.upstream.peft import is_of_adapter


@dataclass(frozen=True)
class ParameterCount:
    """Counts of parameters; a packed tensor counts as the parameters in it."""

    trainable: int
    total: int
    base: int
    by_dtype: dict[str, int]
    """Those of the base, by the data type that they are stored in: `nf4`, `int8`, `bfloat16` ..."""
    on_experts: int = 0
    """Those of adapters on routed experts."""
    expert_ranks: tuple[int, ...] = ()
    """The ranks of these adapters."""
    idle: int = 0
    """Those of the base in experts that a token is not routed to."""
    routing: str = ""
    """How many of a layer's experts compute a token, e.g. `8 of 128 experts`; "": the base is no mixture."""

    def describe_base(self) -> str:
        """Returns how many parameters the base has, and of a mixture how many of them compute a token."""
        active = f", {format_count(self.base - self.idle, ' M')} of them active ({self.routing} a token)"
        return f"{format_count(self.base, ' M')} parameters{active if self.routing else ''}"

    def describe_experts(self) -> str:
        """Returns what a line on the adapter says of its part on routed experts; "": it has none."""
        if not self.on_experts:
            return ""
        return f"r={' and '.join(map(str, self.expert_ranks))} on experts ({self.on_experts:,} parameters)"

    def __str__(self) -> str:
        fraction = format_percent(self.trainable / self.total, 2)
        return f"{self.trainable:,} of {self.total:,} parameters train ({fraction})"


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Counts trainable and all parameters; shared matrices count once."""
    by_dtype: Counter[str] = Counter()
    trainable = total = base = 0
    method = method_of(model)
    for name, parameter in model.named_parameters():
        count, dtype = method.count(parameter)
        total += count
        if not (is_of_adapter(name, model) if isinstance(model, PeftModel) else "lora_" in name):
            base += count
            by_dtype[dtype] += count
        trainable += count if parameter.requires_grad else 0
    wrappers = expert_wrappers(model).values() if isinstance(model, PeftModel) else ()
    ranks = {rank for wrapper in wrappers for rank in wrapper.r.values()}
    on_experts = sum(
        parameter.numel()
        for wrapper in wrappers
        for matrices in (wrapper.lora_A, wrapper.lora_B)
        for parameter in matrices.parameters()
    )
    idle, routing = _count_idle(model)
    return ParameterCount(trainable, total, base, dict(by_dtype), on_experts, tuple(sorted(ranks)), idle, routing)


def _count_idle(model: torch.nn.Module) -> tuple[int, str]:
    """Returns the parameters in experts that a token is not routed to, and how many of them compute one."""
    layouts = [ExpertsLayout.of(module) for module in find_experts(model).values()]
    config: Any = getattr(model, "config", None)
    if not layouts or config is None:
        return 0, ""
    per_token = experts_per_token(config.get_text_config().to_dict())
    sizes = [sum(math.prod(unit.shape) for unit in layout.units) for layout in layouts]
    idle = sum(size * max(layout.count - per_token, 0) for size, layout in zip(sizes, layouts, strict=True))
    return idle, f"{per_token} of {max(layout.count for layout in layouts)} experts"
