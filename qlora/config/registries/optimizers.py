"""The optimizers: what each takes, needs and stores. One line offers one; needs no torch.

Names and arguments are those of transformers, and beside them `adopt_adamw`, `lorafa` and `muon`. What
transformers' trainer offers and is left out here cannot run, for a reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora.config.bounds import COUNT, INNER_SHARE, NOT_NEGATIVE, SHARE, Bound
from qlora.config.registries.optimizer_states import (
    BitsandbytesStates,
    Float32States,
    KahanStates,
    States,
    TorchaoStates,
    of_adafactor,
    of_apollo,
    of_galore,
    of_galore_adafactor,
    of_lorafa,
    of_muon,
    of_rmsprop,
    of_sgd,
    per_parameter,
)

Choices = tuple[str, ...]
Kinds = Mapping[str, type | Choices]


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes, needs and stores."""

    states: States
    arguments: Kinds = field(default_factory=dict)
    """The keys of `trainer.optim_args` that it reads."""
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    """The ranges of those numbers, as the library checks them or divides by them."""
    module: str | None = None
    package: str | None = None
    """The package of the module, if it is not transformers, torch or bitsandbytes."""
    needs_cuda: bool = False
    is_schedule_free: bool = False
    """Whether it averages weights in place of a schedule."""
    trains_all_weights: bool = False
    """Whether it is for `lora=none` alone: it projects gradients, and those of an adapter are of low rank already."""
    trains_b_alone: bool = False
    """Whether it is for `lora.freeze_a=true` alone: it reads A to change the gradient of B."""
    builder: str | None = None
    """The function that returns its class and arguments, `module:function`; None: transformers' trainer does."""


_ADAM8 = BitsandbytesStates(per_parameter(2), bits=8)
_BLOCKS: tuple[Kinds, Mapping[str, Bound]] = (
    {"block_size": int, "bf16_stochastic_round": bool}, {"block_size": COUNT},
)  # fmt: skip
_ADEMAMIX: tuple[Kinds, Mapping[str, Bound]] = (
    {"beta3": float, "alpha": float, "t_alpha": int, "t_beta3": int},
    {"beta3": SHARE, "t_alpha": NOT_NEGATIVE, "t_beta3": NOT_NEGATIVE},
)
_RMSPROP: dict[str, type | Choices] = {"alpha": float, "momentum": float, "eps": float}
_RMSPROP_BNB: tuple[Kinds, Mapping[str, Bound]] = (
    _RMSPROP, {"alpha": INNER_SHARE, "momentum": SHARE, "eps": NOT_NEGATIVE},
)  # fmt: skip
"""With the ranges of bitsandbytes; torch takes 1 and more."""


_PROJECTED = "qlora.training.optimizers.projected"
_PROJECTION_BOUNDS = {**dict.fromkeys(("rank", "update_proj_gap"), COUNT), "scale": Bound(is_open=True)}


def _torchao(bits: int) -> Optimizer:
    return Optimizer(TorchaoStates(per_parameter(2), one_tensor=4, bits=bits), *_BLOCKS, "torchao", "torchao")


def _schedule_free(numbers: int) -> Optimizer:
    return Optimizer(
        States(per_parameter(numbers), scratch=1),
        {"r": float, "weight_lr_power": float},
        module="schedulefree",
        package="schedulefree",
        is_schedule_free=True,
    )


def _ademamix(bits: int, *, paged: bool) -> Optimizer:
    return Optimizer(BitsandbytesStates(per_parameter(3), bits=bits, paged=paged), *_ADEMAMIX, needs_cuda=paged)


def _galore(states: States, builder: str) -> Optimizer:
    return Optimizer(
        states,
        {"rank": int, "update_proj_gap": int, "scale": float,
         "proj_type": ("std", "reverse_std", "right", "left", "full")},
        _PROJECTION_BOUNDS,
        "galore_torch", "galore-torch",
        trains_all_weights=True,
        builder=f"{_PROJECTED}:{builder}",
    )  # fmt: skip


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(States(per_parameter(2), scratch=1)),
    "adamw_torch_fused": Optimizer(States(per_parameter(2))),
    "adamw_torch_8bit": _torchao(8),
    "adamw_torch_4bit": _torchao(4),
    "adamw_8bit": Optimizer(_ADAM8),
    "adamw_bnb_8bit": Optimizer(_ADAM8),
    "paged_adamw_32bit": Optimizer(BitsandbytesStates(per_parameter(2), paged=True)),
    "paged_adamw_8bit": Optimizer(BitsandbytesStates(per_parameter(2), bits=8, paged=True)),
    "adafactor": Optimizer(Float32States(of_adafactor, one_tensor=3)),
    "adagrad": Optimizer(
        States(per_parameter(1)), {"lr_decay": float, "eps": float}, dict.fromkeys(("lr_decay", "eps"), NOT_NEGATIVE)
    ),
    "ademamix": _ademamix(32, paged=False),
    "ademamix_8bit": _ademamix(8, paged=False),
    "paged_ademamix_32bit": _ademamix(32, paged=True),
    "paged_ademamix_8bit": _ademamix(8, paged=True),
    "lion_32bit": Optimizer(BitsandbytesStates(per_parameter(1))),
    "lion_8bit": Optimizer(BitsandbytesStates(per_parameter(1), bits=8)),
    "paged_lion_32bit": Optimizer(BitsandbytesStates(per_parameter(1), paged=True)),
    "paged_lion_8bit": Optimizer(BitsandbytesStates(per_parameter(1), bits=8, paged=True)),
    "rmsprop": Optimizer(
        States(of_rmsprop, scratch=1), {**_RMSPROP, "centered": bool}, dict.fromkeys(_RMSPROP, NOT_NEGATIVE)
    ),
    "rmsprop_bnb": Optimizer(BitsandbytesStates(per_parameter(1)), *_RMSPROP_BNB),
    "rmsprop_bnb_32bit": Optimizer(BitsandbytesStates(per_parameter(1)), *_RMSPROP_BNB),
    "rmsprop_bnb_8bit": Optimizer(BitsandbytesStates(per_parameter(1), bits=8), *_RMSPROP_BNB),
    "sgd": Optimizer(
        States(of_sgd), {"momentum": float, "dampening": float, "nesterov": bool}, {"momentum": NOT_NEGATIVE}
    ),
    "stable_adamw": Optimizer(
        KahanStates(per_parameter(2)),
        {"decouple_lr": bool, "max_lr": float, "kahan_sum": bool}, {"max_lr": NOT_NEGATIVE}, "optimi", "torch-optimi",
    ),
    "galore_adamw": _galore(States(of_galore, one_tensor=4), "build_galore_adamw"),
    "galore_adafactor": _galore(Float32States(of_galore_adafactor, one_tensor=5), "build_galore_adafactor"),
    "apollo_adamw": Optimizer(
        States(of_apollo, one_tensor=4),
        {"rank": int, "update_proj_gap": int, "scale": float, "proj": ("random", "svd"),
         "scale_type": ("channel", "tensor")},
        _PROJECTION_BOUNDS,
        "apollo_torch", "apollo-torch",
        trains_all_weights=True,
        builder=f"{_PROJECTED}:build_apollo_adamw",
    ),
    "adopt_adamw": Optimizer(States(per_parameter(2), one_tensor=3), builder="qlora.training.optimizers.adopt:build"),
    "lorafa": Optimizer(
        States(of_lorafa, scratch=1), trains_b_alone=True, builder="qlora.training.optimizers.lorafa:build"
    ),
    "muon": Optimizer(
        States(of_muon, one_tensor=4),
        {"momentum": float, "nesterov": bool, "ns_steps": int, "adjust_lr_fn": ("original", "match_rms_adamw")},
        {"momentum": SHARE, "ns_steps": Bound(low=1, high=100)},
        builder="qlora.training.optimizers.muon:build",
    ),
    "schedule_free_adamw": _schedule_free(2),
    "schedule_free_radam": _schedule_free(2),
    "schedule_free_sgd": _schedule_free(1),
}  # fmt: skip
"""By transformers' names; it has 41, those in `LEFT_OUT` too, and not those with a module of ours in `builder`."""

_IN_BACKWARD = (
    "it changes weights within the backward pass, so that micro-batches do not add up, and keeps its state where no "
    "checkpoint finds it"
)
_OTHER_DEVICE = "it runs on devices that this project does not know"
LEFT_OUT: dict[str, str] = {
    "adamw_torch_xla": _OTHER_DEVICE,
    "adamw_torch_npu_fused": _OTHER_DEVICE,
    "adamw_anyprecision": "it belongs to the package torchdistx, which does not work with today's torch",
    "grokadamw": "it keeps its state where no checkpoint includes it, and needs losses that no trainer passes to it",
    **dict.fromkeys(("lomo", "adalomo"), _IN_BACKWARD),
    **dict.fromkeys(
        ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"), _IN_BACKWARD
    ),
    "apollo_adamw_layerwise": _IN_BACKWARD,
    "galore_adamw_8bit": "it puts projections in place of weights while it steps, so that no bad step can be undone",
}
"""Optimizers of transformers' trainer that are not offered, and why."""
