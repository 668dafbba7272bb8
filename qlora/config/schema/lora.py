"""The adapter: the group `lora`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qlora.config.schema.values import HOLDS
from qlora.errors import ConfigError, require

LoraBias = StrEnum("LoraBias", "none all lora_only")
"""Which bias vectors are trained with the adapter."""

LoraInit = StrEnum("LoraInit", "default gaussian orthogonal pissa olora loftq eva")
"""How the adapter weights are initialised."""

LoraDtype = StrEnum("LoraDtype", "fp32 bf16")
"""What the adapter weights are stored in while they train."""

LoraExperts = StrEnum("LoraExperts", "auto none all shared")
"""Which experts of a mixture get adapters."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """The adapter (LoRA, arXiv 2106.09685), in PEFT's vocabulary."""

    enabled: bool = True
    """Train an adapter; false (`lora=none`) trains all weights, with `bits` 16 or 32."""
    r: int = MISSING
    """Rank of the adapter matrices."""
    alpha: float = MISSING
    """The adapter's output is scaled by `alpha / r` (with `use_rslora`: `alpha / sqrt(r)`)."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    bias: LoraBias = LoraBias.none
    """Which bias vectors train too: `none`, `all`, `lora_only`."""
    target_modules: Any = field(default="all-linear", metadata={HOLDS: list[str] | str})
    """`all-linear` (every linear layer but the output layer, as in the paper), or a list of module names or
    regular expressions; each must match a linear layer."""
    experts: LoraExperts = LoraExperts.auto
    """Which experts of a mixture get adapters: `all` (those that tokens are routed to, and the shared ones that every
    token runs through), `shared`, or `none`. `auto`: all with `lora.target_modules=all-linear`, as far as the other
    keys of `lora` have a meaning for experts (the start screen says what is left out); none with named modules."""
    expert_r: int | None = None
    """Rank of the adapters on routed experts; unset: `r` over the experts of a token, at least 1, so that a token runs
    through as much rank as elsewhere. Their output is scaled as that of the other layers."""
    router: bool = False
    """Adapt the routers of a mixture too, which choose the experts of a token; they stay frozen otherwise."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` (rank-stabilized LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353)."""
    start: str | None = None
    """An adapter that is trained further, with a fresh optimizer: the folder of an adapter or of a finished run, the
    name of a run in `outputs/runs`, or a hub id. `r`, `alpha`, `bias`, `target_modules`, `experts`, `expert_r`,
    `router`, `use_rslora` and `use_dora` are its own."""
    init: LoraInit = LoraInit.default
    """`default`, `gaussian`, `orthogonal`, `pissa`, `olora`, `loftq` or `eva`."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv 2402.12354); unset: equal."""
    dtype: LoraDtype = LoraDtype.fp32
    """What the adapter and its gradients are stored in while it trains: `fp32`, or `bf16` as in the original script,
    which takes half of their memory; steps below about 1/256 of a weight are then lost."""

    def __post_init__(self) -> None:
        require(self.r > 0, "lora.r", "be positive", self.r, "use lora=none to train all weights")
        require(0 < self.alpha < math.inf, "lora.alpha", "be positive and finite", self.alpha)
        if self.expert_r is not None:
            require(self.expert_r > 0, "lora.expert_r", "be positive, or null for r over the experts of a token",
                    self.expert_r)  # fmt: skip
        require(0 <= self.dropout < 1, "lora.dropout", "be at least 0 and below 1", self.dropout)
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        names = self.target_modules
        is_list = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        require(bool(is_list), "lora.target_modules", "be 'all-linear' or a list of module names", names)
        if "all-linear" in names and len(names) > 1:
            raise ConfigError(
                "lora.target_modules: all-linear stands alone: it takes every linear layer but the output layer, which "
                "cannot be a target; write lora.target_modules=all-linear"
            )
        if self.start is not None:
            require(self.enabled, "lora.start", "be unset with lora=none, which trains no adapter", self.start)
            require(self.init is LoraInit.default, "lora.init", "be default beside lora.start, whose weights are "
                    "trained further", self.init.value)  # fmt: skip
        self._check_experts()
        ratio = self.loraplus_lr_ratio
        require(ratio is None or 1 <= ratio < math.inf, "lora.loraplus_lr_ratio", "be at least 1 and finite", ratio)

    def _check_experts(self) -> None:
        """Refuses what adapters on experts or routers are asked for, and have no meaning there."""
        if not self.enabled:
            asked = {
                f"lora.experts={self.experts.value}": self.experts not in (LoraExperts.auto, LoraExperts.none),
                f"lora.expert_r={self.expert_r}": self.expert_r is not None,
                "lora.router=true": self.router,
            }
            for setting in (name for name, is_set in asked.items() if is_set):
                raise ConfigError(
                    f"{setting} asks for an adapter, and lora=none trains all weights; leave one of them out"
                )
        if self.expert_r is not None and self.experts in (LoraExperts.none, LoraExperts.shared):
            raise ConfigError(
                f"lora.expert_r={self.expert_r} is the rank of adapters on routed experts, and lora.experts="
                f"{self.experts.value} adapts none of them; set lora.experts=all, or leave lora.expert_r out"
            )
        reason = self.experts_unsupported_reason()
        if reason is not None and (self.experts is LoraExperts.all or self.router):
            setting, remedy = "lora.router=true", "leave lora.router out"
            if self.experts is LoraExperts.all:
                setting, remedy = "lora.experts=all", "set lora.experts=shared or none"
            raise ConfigError(f"{setting}: {reason}; {remedy}, or leave {reason.partition('=')[0]} out")

    def experts_unsupported_reason(self) -> str | None:
        """Returns why tensors of experts cannot have this kind of adapter, beginning with its key; None: they can."""
        if self.use_dora:
            return "lora.use_dora=true is defined for linear layers, and experts are one tensor a layer"
        if self.bias is not LoraBias.none:
            return f"lora.bias={self.bias.value} trains biases of linear layers, and experts are one tensor a layer"
        if self.init not in (LoraInit.default, LoraInit.gaussian):
            return f"lora.init={self.init.value} is defined for linear layers, and experts are one tensor a layer"
        return None
