"""The training objectives that `loss.name` may name: where each is implemented, which rows it takes, what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GROUP = "qlora.objectives"
"""The entry points by which an installed package adds objectives."""

RowKind = StrEnum("RowKind", "tokens pairs labelled classes values texts")
"""What a row is to an objective: tokens to predict, a pair of answers to one prompt, an answer with a label that says
whether it is a good one, a text with the name of its class, a text with numbers, or texts of which the first two belong
together."""

WHOLE_TEXTS = (RowKind.classes, RowKind.values, RowKind.texts)
"""The kinds of rows that are read as a whole: nothing in them is an answer."""

Head = StrEnum("Head", "causal classify regress embed")
"""What a model makes of a text: the next token, one of several classes, numbers, or a unit vector."""


@dataclass(frozen=True)
class ShippedObjective:
    """An objective of this package."""

    path: str
    """The class, `module:Class`."""
    rows: RowKind = RowKind.tokens
    settings: tuple[str, ...] = ()
    """The fields of the group `loss` that it reads."""
    head: Head = Head.causal
    """The head that it trains."""
    measured: tuple[str, ...] = ()
    """What held-out texts are measured by beside the loss, where rows are whole texts."""
    constant: str = ""
    """What is measured beside the head: to say the same of all texts, by its name; empty: the untuned base."""


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
    "reward": ShippedObjective("qlora.objectives.reward:RewardModel", RowKind.pairs, ("center_rewards",), Head.regress),
    "classify": ShippedObjective(
        "qlora.objectives.classify:Classification",
        RowKind.classes,
        head=Head.classify,
        measured=("accuracy", "macro_f1"),
        constant="the most frequent class",
    ),
    "regress": ShippedObjective(
        "qlora.objectives.regress:Regression",
        RowKind.values,
        head=Head.regress,
        measured=("pearson", "spearman"),
        constant="the mean",
    ),
    "absolute": ShippedObjective(
        "qlora.objectives.absolute:AbsoluteErrors",
        RowKind.values,
        head=Head.regress,
        measured=("pearson", "spearman"),
        constant="the median",
    ),
    "embed": ShippedObjective(
        "qlora.objectives.embed:Embedding",
        RowKind.texts,
        ("temperature",),
        head=Head.embed,
        measured=("mrr", "ndcg", "pearson", "spearman"),
    ),
}
"""The objectives of this package by name."""
OBJECTIVES = {name: objective.path for name, objective in SHIPPED.items()}
"""By name the class, `module:Class`."""


def rows_of(name: str) -> RowKind:
    """Returns which rows an objective takes; one of another package says so itself, and counts as `tokens` here."""
    return SHIPPED[name].rows if name in SHIPPED else RowKind.tokens
