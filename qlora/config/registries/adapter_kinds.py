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
    size: str | None = None
    """Of a kind without a rank, the option that says how large the adapter is, where there is one."""
    fields: frozenset[str] = frozenset()
    """The fields of `lora` that it reads, beside those that every kind reads."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `lora.options` may hold, by PEFT's names, with the values that hold where it says nothing."""
    change: Change
    fresh: tuple[str, float]
    """A part of the name of the tensors that begin as one number, and this number: all of them are that before the
    first step."""
    steers: bool = False
    """Whether it changes what is trained itself, between the steps of the optimizer."""
    unsupported_reason: Callable[[Any], str | None] = lambda lora: None
    """Returns why the values of `lora` do not fit together; None: they do."""
    shared: Callable[[Sequence[LayerSize], int], int] = lambda layers, rank: 0
    """Returns the elements of frozen tensors that all layers share."""

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the options with the values of those that are not given."""
        return {**self.options, **options}

    @property
    def is_sized(self) -> bool:
        """Whether a number decides how many parameters train: `lora.r`, or the option `size`."""
        return self.has_rank or self.size is not None

    @property
    def has_rank(self) -> bool:
        """Whether `lora.r` says how large the adapter is."""
        return "r" in self.fields


EVERY_KIND = frozenset(("enabled", "kind", "options", "target_modules", "layers", "exclude", "parameters",
                        "modules_to_save"))  # fmt: skip
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


def _block(layer: LayerSize, size: int) -> int:
    """Returns the size of OFT's blocks: of those that divide the inputs, the nearest to the one asked for."""
    divisors = [block for block in range(1, layer.inputs + 1) if layer.inputs % block == 0]
    return min(divisors, key=lambda block: (abs(block - size), block))


def _oft_sizes(layer: LayerSize, rank: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    block = _block(layer, options["oft_block_size"])
    return ((1 if options["block_share"] else layer.inputs // block) * block * (block - 1) // 2,)


KINDS["oft"] = AdapterKind(
    title="OFT",
    config="OFTConfig",
    arguments=lambda lora, layers: {"r": 0},
    sizes=_oft_sizes,
    size="oft_block_size",
    options={  # not `coft`, which changes what is trained in every forward pass, evaluation included
        "oft_block_size": 32,
        "module_dropout": 0.0,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
    },
    change=Change.turned,
    fresh=(".oft_R", 0.0),
)


IA3_INPUTS = ["down_proj", "dense_4h_to_h", "fc2", "w2", "fc_out"]
"""The layers whose inputs IA3 scales: the last of a feed-forward layer, as models call it."""


def _ia3_arguments(lora: Any, layers: Sequence[str]) -> dict[str, Any]:
    names = lora.options.get("feedforward_modules", IA3_INPUTS)
    return {"feedforward_modules": [layer for layer in layers if layer.rpartition(".")[2] in names]}


KINDS["ia3"] = AdapterKind(
    title="IA3",
    config="IA3Config",
    arguments=_ia3_arguments,
    sizes=lambda layer, rank, options: (
        layer.inputs if layer.name in options["feedforward_modules"] else layer.outputs,
    ),
    options={"feedforward_modules": IA3_INPUTS},
    change=Change.scaled,
    fresh=(".ia3_l", 1.0),
)


def _first_rank(rank: int, options: Mapping[str, Any]) -> int:
    """Returns the rank with which AdaLoRA begins: `init_r`, or half as much again as the rank it ends with."""
    given: int | None = options["init_r"]
    return rank + max(rank // 2, 1) if given is None else given


def _adalora_arguments(lora: Any, layers: Sequence[str]) -> dict[str, Any]:
    first = _first_rank(lora.r, {"init_r": None, **lora.options})
    sizes = {"target_r": lora.r, "init_r": first, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return {**sizes, "tinit": 0, "tfinal": 0, "total_step": UNKNOWN_STEPS}


def _adalora_reason(lora: Any) -> str | None:
    options = {**KINDS["adalora"].options, **lora.options}
    if (first := _first_rank(lora.r, options)) <= lora.r:
        return (
            f"lora.options.init_r={first} must be above lora.r={lora.r}, the rank that the layers have on average then"
        )
    if options["deltaT"] < 1 or min(options["tinit"], options["tfinal"], options["orth_reg_weight"]) < 0:
        return "lora.options.deltaT must be at least 1, and tinit, tfinal and orth_reg_weight at least 0"
    if not (0 < options["beta1"] < 1 and 0 < options["beta2"] < 1):
        return "lora.options.beta1 and beta2 must lie between 0 and 1"
    return None


UNKNOWN_STEPS = 1 << 30
"""AdaLoRA's number of steps until the training begins, which knows it."""

KINDS["adalora"] = AdapterKind(
    title="AdaLoRA",
    config="AdaLoraConfig",
    arguments=_adalora_arguments,
    sizes=lambda layer, rank, options: tuple(
        _first_rank(rank, options) * width for width in (layer.inputs, layer.outputs, 1)
    ),
    fields=frozenset(("r", "alpha", "dropout")),
    options={
        "init_r": None,
        "tinit": 0.1,
        "tfinal": 0.3,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
    },
    steers=True,
    unsupported_reason=_adalora_reason,
    change=Change.added,
    fresh=(".lora_E", 0.0),
)
