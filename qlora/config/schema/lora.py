"""The adapter: the group `lora`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qlora.config.registries.adapter_kinds import KINDS, LORA, AdapterKind
from qlora.config.schema.adapter_kind import check_kind
from qlora.config.schema.values import HOLDS, MAPPINGS, written
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
    kind: str = LORA
    """Which kind of adapter: `lora`, or one that PEFT has beside it (`lora=KIND`), which reads its own keys of the
    group and `lora.options`."""
    r: int = MISSING
    """Rank of the adapter matrices."""
    parameters: int | None = None
    """How many parameters train at most: the largest rank that keeps to it takes the place of `r`, and `alpha` keeps
    its proportion to `r`. Unset: `r` as it stands."""
    alpha: float = MISSING
    """The adapter's output is scaled by `alpha / r` (with `use_rslora`: `alpha / sqrt(r)`)."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed in training."""
    bias: LoraBias = LoraBias.none
    """Which bias vectors train too: `none`, `all`, `lora_only`."""
    target_modules: Any = field(default="all-linear", metadata={HOLDS: list[str] | str})
    """`all-linear` (every linear layer but the output layer, as in the paper), or a list of module names or
    regular expressions; each must match a linear layer."""
    layers: Any = field(default=None, metadata={HOLDS: list[int] | int | None})
    """The decoder layers that get adapters, by their numbers from 0 (PEFT's `layers_to_transform`); unset: all."""
    exclude: Any = field(default_factory=list, metadata={HOLDS: list[str] | str})
    """Linear layers that get no adapter, by names or regular expressions as in `target_modules` (PEFT's
    `exclude_modules`); each must match one that would have got it."""
    modules_to_save: Any = field(default_factory=list, metadata={HOLDS: list[str] | str})
    """Modules that train whole beside the adapter, as copies in `lora.dtype` that are saved with it (PEFT's
    `modules_to_save`): `embed_tokens`, `lm_head`, norms and what else is not quantized, by names or regular expressions
    as in `target_modules`, e.g. `[norm]` or `[.*layernorm]`; each must match."""
    rank_pattern: Any = field(default_factory=dict, metadata={HOLDS: dict[str, int]})
    """Ranks of layers that have another one than `r`, by names or regular expressions as in `target_modules`, e.g.
    `{down_proj: 16}`; each must match a layer with an adapter, and no layer two."""
    alpha_pattern: Any = field(default_factory=dict, metadata={HOLDS: dict[str, float]})
    """As `rank_pattern`, for `alpha`."""
    freeze_a: bool = False
    """Keep the A matrices as they are drawn, and train B alone (LoRA-FA, arXiv 2308.03303), with any optimizer."""
    options: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any]})
    """Settings of another `kind` than `lora`, by PEFT's names; `docs/models.md` lists them."""
    experts: LoraExperts = LoraExperts.auto
    """Which experts of a mixture get adapters: `all` (those that tokens are routed to, and the shared ones that every
    token runs through), `shared`, or `none`. `auto`: all with `lora.target_modules=all-linear`, as far as the other
    keys of `lora` have a meaning for experts (the start screen says what is left out); none with named modules."""
    expert_r: int | None = None
    """Rank of the adapters on routed experts; unset: `r` over the experts of a token, at least 1, so that a token runs
    through as much rank as elsewhere. Their output is scaled as that of the other layers."""
    router: bool = False
    """Adapt the routers of a mixture too, which choose the experts of a token; they stay frozen otherwise."""
    per_expert: bool = False
    """Write the finished adapter a second time, to `adapter_per_expert`, with a name for each expert's layers
    (`...experts.0.gate_proj.lora_A.weight`), as servers read them that keep experts apart; `adapter` is PEFT's."""
    use_rslora: bool = False
    """Scale by `alpha / sqrt(r)` (rank-stabilized LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353)."""
    start: str | None = None
    """An adapter that is trained further, with a fresh optimizer: the folder of an adapter or of a finished run, the
    name of a run in `outputs/runs`, or a hub id. `r`, `alpha`, `bias`, `target_modules`, `experts`, `expert_r`,
    `router`, `use_rslora`, `use_dora`, `rank_pattern` and `alpha_pattern` are its own."""
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
        self._check_choice()
        check_kind(self)
        if self.start is not None:
            require(self.enabled, "lora.start", "be unset with lora=none, which trains no adapter", self.start)
            require(self.init is LoraInit.default, "lora.init", "be default beside lora.start, whose weights are "
                    "trained further", self.init.value)  # fmt: skip
        self._check_experts()
        ratio = self.loraplus_lr_ratio
        require(ratio is None or 1 <= ratio < math.inf, "lora.loraplus_lr_ratio", "be at least 1 and finite", ratio)

    @property
    def other_kind(self) -> AdapterKind | None:
        """The kind of adapter where it is not LoRA."""
        return KINDS[self.kind] if self.enabled and self.kind != LORA else None

    def _check_choice(self) -> None:
        """Checks which layers are chosen, and which of them have ranks and alphas of their own."""
        self.layers = [self.layers] if isinstance(self.layers, int) else self.layers
        chosen = self.layers
        is_list = isinstance(chosen, list) and chosen and all(type(index) is int and index >= 0 for index in chosen)
        require(chosen is None or bool(is_list), "lora.layers", "be numbers of decoder layers, from 0", chosen)
        self.exclude = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        is_list = isinstance(self.exclude, list) and all(isinstance(name, str) and name for name in self.exclude)
        require(bool(is_list), "lora.exclude", "be a list of module names", self.exclude)
        for name, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            key, pattern = f"lora.{name}", getattr(self, name)
            if not isinstance(pattern, dict):
                raise ConfigError(f"{key} must be a mapping such as {MAPPINGS[key]}, got {written(pattern)}")
            is_pattern = all(
                isinstance(module, str)
                and isinstance(value, kinds)
                and not isinstance(value, bool)
                and 0 < value < math.inf
                for module, value in pattern.items()
            )
            rule = f"be a mapping from module names to {'ranks' if kinds is int else 'positive numbers'}"
            require(is_pattern, key, rule, pattern)
        self._check_modules_to_save()
        self._check_parameters()
        if self.rank_pattern and self.init is LoraInit.eva:
            raise ConfigError(
                "lora.rank_pattern and lora.init=eva exclude each other: EVA chooses ranks by what the layers "
                "read; leave one of them out"
            )
        if self.freeze_a and self.loraplus_lr_ratio is not None:
            raise ConfigError(
                f"lora.freeze_a=true trains B alone, and lora.loraplus_lr_ratio={self.loraplus_lr_ratio:g} compares "
                "its learning rate with that of A; leave one of them out"
            )

    def _check_modules_to_save(self) -> None:
        """Refuses whole modules where they cannot be trained, or not at the learning rate that was asked for."""
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        names = self.modules_to_save
        is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        require(bool(is_list), "lora.modules_to_save", "be a list of module names", names)
        reasons = {
            "lora=none": (not self.enabled, "all weights train"),
            "lora.start": (self.start is not None, "that adapter keeps its form"),
            f"lora.bias={self.bias.value}": (
                self.bias is not LoraBias.none, "the bias of such a module trains with it, and once more by itself"
            ),
            f"lora.loraplus_lr_ratio={self.loraplus_lr_ratio or 0:g}": (
                self.loraplus_lr_ratio is not None, "LoRA+ has learning rates for A and B alone"
            ),
        }  # fmt: skip
        for name, (is_set, reason) in reasons.items():
            if names and is_set:
                raise ConfigError(
                    f"lora.modules_to_save={written(names)} and {name} exclude each other: {reason}; leave one of them "
                    "out"
                )

    def _check_parameters(self) -> None:
        """Refuses a number of parameters where no rank decides it."""
        if self.parameters is None:
            return
        require(self.parameters > 0, "lora.parameters", "be positive, or null for lora.r as it stands", self.parameters)
        kind = self.other_kind
        reasons = {
            "lora=none": (not self.enabled, "all weights train"),
            f"lora.kind={self.kind}": (kind is not None and not kind.is_sized, "nothing decides how many it trains"),
            "lora.start": (self.start is not None, "that adapter keeps its rank"),
            "lora.rank_pattern": (bool(self.rank_pattern), "it sets ranks itself"),
            "lora.expert_r": (self.expert_r is not None, "it sets a rank itself"),
            f"lora.bias={self.bias.value}": (self.bias is not LoraBias.none, "biases are not counted"),
        }
        for name, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(
                    f"lora.parameters={self.parameters} and {name} exclude each other: {reason}; leave one of them out"
                )

    def _check_experts(self) -> None:
        """Refuses what adapters on experts or routers are asked for, and have no meaning there."""
        if not self.enabled:
            asked = {
                f"lora.experts={self.experts.value}": self.experts not in (LoraExperts.auto, LoraExperts.none),
                f"lora.expert_r={self.expert_r}": self.expert_r is not None,
                "lora.router=true": self.router,
                "lora.per_expert=true": self.per_expert,
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
        if self.per_expert and self.experts in (LoraExperts.none, LoraExperts.shared):
            raise ConfigError(
                f"lora.per_expert=true names the adapters of routed experts, and lora.experts={self.experts.value} "
                "adapts none of them; set lora.experts=all, or leave lora.per_expert out"
            )
        if self.per_expert and self.router:
            raise ConfigError(
                "lora.per_expert=true is for servers, and these read no adapters on routers (lora.router=true); leave "
                "one of them out"
            )
        reason = self.experts_unsupported_reason()
        if reason is not None and (self.experts is LoraExperts.all or self.router):
            setting, remedy = "lora.router=true", "leave lora.router out"
            if self.experts is LoraExperts.all:
                setting, remedy = "lora.experts=all", "set lora.experts=shared or none"
            raise ConfigError(f"{setting}: {reason}; {remedy}, or leave {reason.partition('=')[0]} out")

    def experts_unsupported_reason(self) -> str | None:
        """Returns why tensors of experts cannot have this kind of adapter, beginning with its key; None: they can."""
        if self.kind != LORA:
            return f"lora.kind={self.kind} is defined for linear layers, and experts are one tensor a layer"
        for key, is_set in (("layers", self.layers), ("exclude", self.exclude), ("freeze_a", self.freeze_a)):
            if is_set:
                return f"lora.{key}={written(is_set)} is for linear layers, and experts are one tensor a layer"
        if self.use_dora:
            return "lora.use_dora=true is defined for linear layers, and experts are one tensor a layer"
        if self.bias is not LoraBias.none:
            return f"lora.bias={self.bias.value} trains biases of linear layers, and experts are one tensor a layer"
        if self.init not in (LoraInit.default, LoraInit.gaussian):
            return f"lora.init={self.init.value} is defined for linear layers, and experts are one tensor a layer"
        return None
