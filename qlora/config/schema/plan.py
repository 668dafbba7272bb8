"""The GPU and the step that memory and time are planned for: the group `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from qlora.errors import ConfigError, did_you_mean, require
from qlora.planning.gpus import GPUS

PlanStep = StrEnum("PlanStep", "auto plain fast")
"""How a training step is computed, as far as its memory and speed depend on it."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What `task=plan` plans for: memory and time of the training that the rest of the config describes."""

    device: str = "this"
    """The GPU: `this` (the one found here), `t4`, `v100-32gb`, `rtx-3090`, `rtx-4090`, `rtx-5090`, `a10`, `l4`,
    `a6000`, `l40s`, `a100-40gb`, `a100-80gb`, `h100` or `h200`."""
    step: PlanStep = MISSING
    """`plain`: transformers' layers with PEFT's adapters, operation by operation. `fast`: fused linear layers and
    attention, compiled layers, the loss without all logits. `auto`: what `trainer.compile`, `fused_linear`,
    `fused_attention` and `fused_loss` choose on a GPU, `plain` if any of them is off. Chosen with `plan=`."""
    length: int | None = None
    """Tokens of a row; unset: `data.pack_length`, else the longest that the limits of `data` leave."""

    def __post_init__(self) -> None:
        names = ("this", *GPUS)
        if self.device not in names:
            raise ConfigError(
                f"plan.device={self.device!r} is unknown{did_you_mean(self.device, names)}; choose one of "
                f"{', '.join(names)}"
            )
        require(self.length is None or self.length > 0, "plan.length", "be positive or null", self.length)
