"""The training objectives that `loss.name` may name: where each is implemented, which rows it takes, what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GROUP = "qlora.objectives"
"""The entry points by which an installed package adds objectives."""

RowKind = StrEnum("RowKind", "tokens pairs labelled")
"""What a row is to an objective: tokens to predict, a pair of answers to one prompt, or an answer with a label that
says whether it is a good one."""


@dataclass(frozen=True)
class ShippedObjective:
    """An objective of this package."""

    path: str
    """The class, `module:Class`."""
    rows: RowKind = RowKind.tokens
    settings: tuple[str, ...] = ()
    """The fields of the group `loss` that it reads."""
    head: bool = False
    """Whether it trains a head that gives a text one number, a reward, in place of the next token."""


SHIPPED = {
    "sft": ShippedObjective("qlora.objectives.sft:SupervisedFinetuning"),
    "dpo": ShippedObjective(
        "qlora.objectives.dpo:DirectPreference",
        RowKind.pairs,
        ("beta", "label_smoothing", "reference", "length_normalize", "sft_weight"),
    ),
    "ipo": ShippedObjective(
        "qlora.objectives.ipo:IdentityPreference",
        RowKind.pairs,
        ("beta", "reference", "length_normalize", "sft_weight"),
    ),
    "orpo": ShippedObjective("qlora.objectives.orpo:OddsRatio", RowKind.pairs, ("beta",)),
    "simpo": ShippedObjective(
        "qlora.objectives.simpo:SimplePreference", RowKind.pairs, ("beta", "gamma", "label_smoothing", "sft_weight")
    ),
    "kto": ShippedObjective(
        "qlora.objectives.kto:KahnemanTversky",
        RowKind.labelled,
        ("beta", "reference", "desirable_weight", "undesirable_weight"),
    ),
    "reward": ShippedObjective("qlora.objectives.reward:RewardModel", RowKind.pairs, ("center_rewards",), head=True),
}
"""The objectives of this package by name."""
OBJECTIVES = {name: objective.path for name, objective in SHIPPED.items()}
"""By name the class, `module:Class`."""


def rows_of(name: str) -> RowKind:
    """Returns which rows an objective takes; one of another package says so itself, and counts as `tokens` here."""
    return SHIPPED[name].rows if name in SHIPPED else RowKind.tokens
