"""What a training run minimises, one module per objective; `qlora.config.registries.objectives` names them.

Nothing here imports torch, so that the memory plan can ask an objective for its bytes.
"""

from __future__ import annotations

from qlora.config.registries.objectives import GROUP, OBJECTIVES, RowKind
from qlora.config.schema import LossConfig
from qlora.objectives.protocol import Objective, TokenWork
from qlora.runtime.registry import check_methods, load_named

__all__ = ["Objective", "TokenWork", "build_objective"]

METHODS = ("columns", "is_model_loss", "labels", "prepare")
LOSSES = {
    RowKind.tokens: ("loss_on_hidden", "loss_on_logits"),
    RowKind.pairs: ("loss_on_batch", "losses", "rewards"),
    RowKind.labelled: ("loss_on_batch", "losses", "rewards"),
}
"""What computes the loss, by what a row is to it."""


def build_objective(config: LossConfig, *, label_smoothing: float = 0.0) -> Objective:
    """Returns the objective of the config; raises `ConfigError` for a name that means none.

    `label_smoothing` is read by `sft` alone.
    """
    kind = load_named(config.name, OBJECTIVES, group=GROUP, key="loss.name", methods=())
    needed = (*METHODS, *LOSSES[getattr(kind, "rows", RowKind.tokens)], "metrics", "activation_bytes")
    check_methods(kind, needed, f"loss.name={config.name}")
    objective: Objective = kind(config, label_smoothing) if label_smoothing else kind(config)
    return objective
