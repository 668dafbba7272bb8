"""Counts the parameters of a model, with and without an adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from peft import PeftModel

from qlora.adapters.experts import expert_wrappers
from qlora.quantization.method import method_of
from qlora.text import format_percent


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
        if "lora_" not in name:
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
    return ParameterCount(trainable, total, base, dict(by_dtype), on_experts, tuple(sorted(ranks)))
