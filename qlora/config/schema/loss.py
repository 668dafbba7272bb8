"""The training objective: the group `loss`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from qlora.config.registries.installed import check_name
from qlora.config.registries.objectives import GROUP, OBJECTIVES, SHIPPED, WHOLE_TEXTS, Head, RowKind, rows_of
from qlora.config.schema.code_names import check_plain
from qlora.config.schema.data import DataConfig, TrainOn
from qlora.config.schema.lora import LoraConfig, LoraInit
from qlora.config.schema.trainer import TrainerConfig
from qlora.config.schema.values import HOLDS, MAPPINGS
from qlora.errors import ConfigError, require
from qlora.text import brief, listed

Reference = StrEnum("Reference", "auto base start none")
"""The model that a preference loss compares with."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The training objective: what is minimised."""

    name: str = "sft"
    """`sft`: the mean cross entropy of the tokens that are trained; the name of a preference loss, of which
    docs/preferences.md has a table; or an objective of another package, by the name that it registers (entry point
    group `qlora.objectives`) or as `module:Class` of a package in `trusted`. `loss=NAME` sets what it reads below."""
    beta: float | None = None
    """What log-probabilities, or their ratios to the reference, are multiplied by to be rewards: the larger, the nearer
    the model stays to the reference. In ORPO the weight of the odds ratio."""
    label_smoothing: float | None = None
    """The share of pairs whose order is taken to be wrong (cDPO), at least 0 and below 0.5."""
    reference: Reference | None = None
    """The model that the trained one is compared with. `base` is the model without an adapter, `start` that with the
    adapter of `lora.start` as it was; `auto` takes `start` where `lora.start` is set, else `base`. `none` compares
    with nothing: all log-probabilities of the reference count as 0."""
    length_normalize: bool | None = None
    """Divide the log-probability of an answer by the number of its tokens."""
    gamma: float | None = None
    """The margin by which the reward of the chosen answer is to be larger."""
    sft_weight: float | None = None
    """The weight of the mean cross entropy of the chosen answers, which is added; 0: it is not."""
    desirable_weight: float | None = None
    """The weight of answers that are labelled good."""
    undesirable_weight: float | None = None
    """The weight of answers that are labelled bad."""
    center_rewards: float | None = None
    """The weight of the squared sum of both rewards of a pair, which keeps them around 0."""
    cache_reference: Any = "auto"
    """Compute the log-probabilities that the reference gives the answers once, before training, and keep them in
    `data.cache_dir` for other runs with the same reference and rows, whatever else these set: true, false (in each
    step) or `auto` (where the run passes over its pairs more than once). They differ from those of a step by the
    rounding of another batch."""
    temperature: float | None = None
    """What cosines are divided by where a text's partner is to be found: the smaller, the more the nearest wrong texts
    count."""
    options: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any]})
    """Settings of an objective of another package, e.g. `{smoothing: 0.1}`; those of this package have none."""

    def __post_init__(self) -> None:
        check_name("loss.name", self.name, OBJECTIVES, GROUP)
        if not isinstance(self.options, dict):
            given = "null" if self.options is None else brief(self.options)
            raise ConfigError(f"loss.options must be a mapping such as {MAPPINGS['loss.options']}, got {given}")
        check_plain("loss.options", self.options)
        if self.name in SHIPPED and self.options:
            raise ConfigError(f"loss.options is not read by loss.name={self.name}; leave it out")
        self._check_read()
        self._check_values()
        self._check_cache()

    def _check_read(self) -> None:
        """Refuses a setting that the loss does not read, and a missing one that it does."""
        read = SHIPPED[self.name].settings if self.name in SHIPPED else ()
        for name in LOSS_SETTINGS:
            value = getattr(self, name)
            if value is not None and name not in read:
                readers = [f"loss={other}" for other, shipped in SHIPPED.items() if name in shipped.settings]
                way_out = f"choose {'one of ' if len(readers) > 1 else ''}{listed(readers)}, or leave it out"
                if self.name not in SHIPPED:
                    way_out = f"write loss.options.{name}={value}"
                raise ConfigError(f"loss.{name}={value} is not read by loss.name={self.name}; {way_out}")
            if value is None and name in read:
                raise ConfigError(
                    f"loss.{name} is not set, and loss.name={self.name} reads it; loss={self.name} sets it"
                )

    def _check_values(self) -> None:
        limits = {
            "beta": (lambda value: 0 < value < math.inf, "be positive and finite"),
            "label_smoothing": (lambda value: 0 <= value < 0.5, "be at least 0 and below 0.5"),
            "temperature": (lambda value: 0 < value < math.inf, "be positive and finite"),
            "gamma": (lambda value: 0 <= value < math.inf, "be at least 0 and finite"),
            "sft_weight": (lambda value: 0 <= value < math.inf, "be at least 0 and finite"),
            "desirable_weight": (lambda value: 0 < value < math.inf, "be positive and finite"),
            "undesirable_weight": (lambda value: 0 < value < math.inf, "be positive and finite"),
            "center_rewards": (lambda value: 0 <= value < math.inf, "be at least 0 and finite"),
        }
        for name, (holds, rule) in limits.items():
            value = getattr(self, name)
            require(value is None or holds(value), f"loss.{name}", rule, value)

    def _check_cache(self) -> None:
        value, key = self.cache_reference, "loss.cache_reference"
        require(value == "auto" or isinstance(value, bool), key, "be true, false or auto", value)
        if value is not True or self.can_cache_reference:
            return
        if not self.compares:
            none = " with loss.reference=none" if self.reference is not None else ""
            raise ConfigError(f"{key}=true: loss={self.name}{none} compares with no reference; leave it out")
        raise ConfigError(
            f"{key}=true: loss={self.name} compares prompts with answers of other rows of a micro-batch, too, which "
            "change with every epoch; leave it out"
        )

    @property
    def can_cache_reference(self) -> bool:
        """Whether what the reference says of a row is the same in every step."""
        return self.compares and self.rows is RowKind.pairs

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with a reference."""
        return self.reference not in (None, Reference.none)

    @property
    def head(self) -> Head:
        """The head that the loss trains; one of another package predicts tokens."""
        return SHIPPED[self.name].head if self.name in SHIPPED else Head.causal

    @property
    def has_head(self) -> bool:
        """Whether the model says something of whole texts in place of the next token."""
        return self.head is not Head.causal

    @property
    def is_preference(self) -> bool:
        """Whether the loss is one over answers of which one is better than another, or good or bad."""
        return self.rows in (RowKind.pairs, RowKind.labelled)

    @property
    def reads_whole_texts(self) -> bool:
        """Whether nothing in a row is an answer."""
        return self.rows in WHOLE_TEXTS

    @property
    def measured(self) -> list[str]:
        """The plain names of what held-out rows are measured by, besides the metrics of all rows."""
        kind = self.rows
        if not self.is_preference:
            return [*SHIPPED[self.name].measured] if self.name in SHIPPED else []
        names = ["preference_loss", "reward_accuracy", "reward_margin"]
        names += ["reference_divergence"] if kind is RowKind.labelled else []
        names += ["reference_kl"] if self.compares else []
        names += ["chosen_reward", "rejected_reward"] if self.has_head else []
        return [*names, *(("chosen_tokens", "rejected_tokens") if kind is RowKind.pairs else ("answer_tokens",))]

    @property
    def rows(self) -> RowKind:
        """What a row is to the loss; one of another package says so itself, and counts as `tokens` here."""
        return rows_of(self.name)


LOSS_SETTINGS = tuple(
    item.name for item in fields(LossConfig) if item.name not in ("name", "cache_reference", "options")
)
"""The settings of which every loss reads some."""


def may_share_prompts(loss: LossConfig, trainer: TrainerConfig, *, on_gpu: bool) -> bool:
    """Returns whether a training step is to compute the prompt of a pair once, as fused attention can.

    Few architectures cannot, which the step finds out; its pairs are then computed row by row.
    """
    fused = trainer.fused_attention
    return loss.rows is RowKind.pairs and (fused is True or (fused == "auto" and on_gpu))


def check_preferences(loss: LossConfig, lora: LoraConfig, data: DataConfig, trainer: TrainerConfig) -> None:
    """Refuses what a loss over answers cannot be trained with."""
    if not loss.is_preference:
        return
    name = f"loss={loss.name}"
    if data.train_on is TrainOn.all:
        raise ConfigError(
            f"data.train_on=all counts the tokens of the prompt, and {name} compares answers; leave it out"
        )
    if trainer.neftune_noise_alpha is not None:
        raise ConfigError(
            f"trainer.neftune_noise_alpha={trainer.neftune_noise_alpha:g} would compare answers with noise, and {name} "
            "compares their log-probabilities; leave it out"
        )
    if data.packing and loss.rows is RowKind.labelled:
        raise ConfigError(
            f"data.packing=true joins rows into one, and {name} lays answers of other rows beside each; leave it out"
        )
    if loss.rows is RowKind.labelled and trainer.per_device_train_batch_size < 2:
        raise ConfigError(
            f"{name} estimates the divergence from the reference by the answers of other rows in a micro-batch, and "
            "trainer.per_device_train_batch_size=1 leaves none; set it to 2 or more"
        )
    _check_reference(loss, lora, name)


def _check_reference(loss: LossConfig, lora: LoraConfig, name: str) -> None:
    """Refuses a reference that the run does not have."""
    if loss.reference is Reference.start and lora.start is None:
        raise ConfigError(
            "loss.reference=start is the adapter of lora.start, which is not set; set it, or leave loss.reference out"
        )
    if not loss.compares:
        return
    if not lora.enabled:
        raise ConfigError(
            f"{name} compares with the model that was before, and lora=none trains all of its weights: there is no "
            "reference; train an adapter (lora=all-linear), or set loss.reference=none"
        )
    if loss.reference is Reference.base and lora.init in (LoraInit.pissa, LoraInit.olora, LoraInit.loftq):
        raise ConfigError(
            f"loss.reference=base and lora.init={lora.init.value} exclude each other: that adapter begins as a part of "
            "the base, so nothing is the base without it; set loss.reference=auto, which is the model as the run begins"
        )
