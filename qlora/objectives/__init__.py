"""What a training run minimises: the objectives by name (`loss.name`).

Another package adds its own under the entry point group `qlora.objectives`, or is named as `module:Class`. Nothing
here imports torch, so that the memory plan can ask an objective for its bytes.
"""

from __future__ import annotations

from qlora.config.schema import LossConfig
from qlora.objectives.protocol import Objective, TokenWork
from qlora.runtime.registry import load_named

__all__ = ["OBJECTIVES", "Objective", "TokenWork", "build_objective"]

OBJECTIVES = {"sft": "qlora.objectives.sft:SupervisedFinetuning"}
METHODS = (
    *("columns", "is_model_loss", "labels", "prepare", "loss_on_hidden", "loss_on_logits", "metrics"),
    "activation_bytes",
)


def build_objective(config: LossConfig) -> Objective:
    """Returns the objective of the config; raises `ConfigError` for a name that means none."""
    objective: Objective = load_named(
        config.name, OBJECTIVES, group="qlora.objectives", key="loss.name", methods=METHODS
    )(config)
    return objective
