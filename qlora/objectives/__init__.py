"""What a training run minimises, one module per objective; `qlora.config.registries.objectives` names them.

Nothing here imports torch, so that the memory plan can ask an objective for its bytes.
"""

from __future__ import annotations

from typing import Any

from qlora.config.registries.objectives import GROUP, OBJECTIVES, RowKind
from qlora.config.schema import HeadConfig, LossConfig
from qlora.objectives.protocol import Objective, TokenWork
from qlora.runtime.registry import check_methods, load_named

__all__ = ["Objective", "TokenWork", "build_objective"]

METHODS = ("columns", "is_model_loss", "labels", "prepare")
LOSSES = {
    RowKind.tokens: ("loss_on_hidden", "loss_on_logits"),
    RowKind.pairs: ("loss_on_batch", "losses", "rewards"),
    RowKind.labelled: ("loss_on_batch", "losses", "rewards"),
    RowKind.classes: ("loss_on_batch", "losses", "measures"),
    RowKind.values: ("loss_on_batch", "losses", "measures"),
    RowKind.texts: ("loss_on_batch", "losses", "measures"),
}
"""What computes the loss, by what a row is to it."""


def build_objective(config: LossConfig, head: HeadConfig | None = None, *, label_smoothing: float = 0.0) -> Objective:
    """Returns the objective of the config; raises `ConfigError` for a name that means none.

    `head` is read by the losses that train one, `label_smoothing` by `sft` alone.
    """
    kind = load_named(config.name, OBJECTIVES, group=GROUP, key="loss.name", methods=())
    needed = (*METHODS, *LOSSES[getattr(kind, "rows", RowKind.tokens)], "metrics", "activation_bytes")
    check_methods(kind, needed, f"loss.name={config.name}")
    more: tuple[Any, ...] = (label_smoothing,) if label_smoothing else ()
    if config.has_head:
        more = (head or HeadConfig(),)
    objective: Objective = kind(config, *more)
    return objective
