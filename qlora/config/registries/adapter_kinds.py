"""The kinds of adapters that `lora.kind` may name beside LoRA itself. Needs no torch.

A kind says which class of PEFT's makes it, what it reads of the group `lora`, what it trains in a layer, and what it
does to the layer's weight. Loading, saving, counting, planning and merging follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

LORA = "lora"
"""LoRA and its variants, which have modules of their own."""

Change = StrEnum("Change", "added turned scaled")
"""What an adapter does to the weight of its layer: adds a matrix, turns its inputs by a matrix, or scales its rows or
columns by a vector."""


@dataclass(frozen=True)
class LayerSize:
    """A linear layer that an adapter is put on."""

    name: str
    """The last part of its name, such as `q_proj`."""
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class AdapterKind:
    """A kind of adapter that PEFT has beside LoRA."""

    title: str
    """What the screen and the card call it."""
    config: str
    """The class of PEFT's config."""
    arguments: Callable[[Any, Sequence[str]], dict[str, Any]]
    """Returns what that class takes beside the layers and `options`, of `lora` and the names of the layers."""
    sizes: Callable[[LayerSize, int, Mapping[str, Any]], tuple[int, ...]]
    """Returns the elements of each tensor that is trained in a layer, of the rank and the options."""
    fields: frozenset[str] = frozenset()
    """The fields of `lora` that it reads, beside those that every kind reads."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `lora.options` may hold, by PEFT's names, with the values that hold where it says nothing."""
    change: Change
    fresh: tuple[str, float]
    """A part of the name of the tensors that begin as one number, and this number: all of them are that before the
    first step."""
    shared: Callable[[Sequence[LayerSize], int], int] = lambda layers, rank: 0
    """Returns the elements of frozen tensors that all layers share."""

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options with the values of those that are not given."""
        return {**self.options, **options}

    @property
    def has_rank(self) -> bool:
        """Whether `lora.r` says how large the adapter is."""
        return "r" in self.fields


EVERY_KIND = frozenset(("enabled", "kind", "options", "target_modules", "layers", "exclude"))
"""The fields of `lora` that every kind reads."""

KINDS: dict[str, AdapterKind] = {}
"""The kinds beside LoRA, by the name that `lora.kind` and, in capitals, PEFT give them."""

KINDS["vera"] = AdapterKind(
    title="VeRA",
    config="VeraConfig",
    arguments=lambda lora, layers: {"r": lora.r, "vera_dropout": lora.dropout},
    sizes=lambda layer, rank, options: (layer.outputs, rank),
    fields=frozenset(("r", "dropout")),
    options={"d_initial": 0.1, "projection_prng_key": 0},
    change=Change.added,
    fresh=(".vera_lambda_b", 0.0),
    shared=lambda layers, rank: rank * (max(layer.inputs for layer in layers) + max(layer.outputs for layer in layers)),
)
