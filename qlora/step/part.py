"""What a part of the fast step is, and what it is given.

A part replaces something of transformers' or PEFT's forward pass while a training step runs. docs/extending.md shows
how to add one from another package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora.config.schema import QuantizationConfig, TrainerConfig
from qlora.runtime.device import Placement

if TYPE_CHECKING:
    from qlora.step.parts.experts import FastExperts
    from qlora.step.parts.fused_linear import LinearGroup

ON = "on"
IGNORED = -100
"""The label of a token that has no loss."""
SPREAD = "the model is spread over several devices (model.device_map)"


@dataclass(frozen=True)
class Packs:
    """The limits of the packs in a data set, so that shapes stay the same from step to step."""

    width: int
    """Tokens of a pack, padding included."""
    rows: int
    """The maximum number of rows in a pack."""
    max_seqlen: int
    """The maximum number of tokens in a row."""

    @property
    def max_rows(self) -> int:
        """The maximum number of rows in a pack whose padding is split into rows of at most `max_seqlen` tokens."""
        return self.rows + -(-self.width // self.max_seqlen)


class StepObjective(Protocol):
    """What the step asks of the training objective (a class of `qlora.objectives`)."""

    is_model_loss: bool

    def prepare(self, *, compiled: bool, scale: float = ..., cap: float | None = ...) -> None: ...

    def loss_on_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor, count: Any) -> Tensor: ...

    def loss_on_logits(self, logits: Tensor, labels: Tensor, count: Any) -> Tensor: ...


@dataclass
class StepContext:
    """The model and the settings that a step is built for."""

    model: torch.nn.Module
    """The model that is trained, a PEFT model for instance."""
    base: PreTrainedModel
    """The model of transformers inside it."""
    layers: list[GradientCheckpointingLayer]
    """Its decoder layers, in order."""
    trainer: TrainerConfig
    quantization: QuantizationConfig
    placement: Placement
    packs: Packs | None
    objective: StepObjective
    states: dict[str, str] = field(default_factory=dict)
    """The parts so far by name: `on`, or why not."""
    groups: list[LinearGroup] = field(default_factory=list)
    """The groups of fused linear layers."""
    experts: list[FastExperts] = field(default_factory=list)
    """The experts of the layers that compute them on sorted rows."""

    @property
    def is_spread(self) -> bool:
        """Whether the model lies on several devices."""
        return len(set((getattr(self.base, "hf_device_map", None) or {}).values())) > 1

    def is_on(self, name: str) -> bool:
        """Returns whether a part, one of those before in the registry, is on."""
        return self.states.get(name) == ON


class Part(Protocol):
    """A part of the fast step; built once for a model, with the `StepContext` as its only argument.

    A subclass writes `unsupported_reason`, and of the others those in which it does something.
    """

    def unsupported_reason(self) -> str | None:
        """Returns why the part cannot run with this model, on this device; None: it can."""

    def prepare(self) -> None:
        """Prepares a part that is on, once, before the first step."""

    def enter(self) -> None:
        """Changes the model before a step."""

    def exit(self, *, failed: bool) -> None:
        """Restores the model after a step, or after one that has raised an exception (`failed`)."""

    def measure_weights(self) -> None:
        """Measures anew what `enter` has measured of the trained weights, which are others for the time of a pass."""

    def extra_bytes(self, rows: int, length: int) -> float:
        """Returns what a micro-batch needs beyond the memory plan of the fast step, in bytes."""
        return 0


@dataclass(frozen=True)
class Request:
    """How the config asks for a part."""

    value: bool | str
    """True, False, or `auto`: on CUDA, where nothing speaks against it."""
    setting: str
    """As the command line writes it."""
    remedy: str
    """What a message proposes where a part that is asked for cannot run."""

    @classmethod
    def of_switch(cls, trainer: TrainerConfig, name: str) -> Request:
        """Returns what the key `trainer.NAME` asks for: true, false or auto."""
        value = getattr(trainer, name)
        if trainer.context_parallel > 1 and name in ("fused_attention", "fused_loss"):  # which share rows
            return cls(
                True, f"trainer.context_parallel={trainer.context_parallel} needs trainer.{name}", "leave it out"
            )
        return cls(value, f"trainer.{name}={str(value).lower()}", f"set trainer.{name}=auto")


class ConfiguredPart(Part, Protocol):
    """A part that a key of the config asks for."""

    label: str
    """Its name in `FastStep.parts`; "": it is not listed."""

    def request(self) -> Request | None:
        """Returns what the config asks for; None: the part stays off and is not listed."""
