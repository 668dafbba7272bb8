"""The optimizers and schedules on offer, what each of them takes, and what it needs; no torch.

Names and arguments are those of transformers; what its trainer offers beside these cannot run here, for a reason.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.config.foreign_names import known_value
from qlora.errors import ConfigError, ResourceError, did_you_mean

Choices = tuple[str, ...]


@dataclass(frozen=True)
class Bound:
    """The range of a number: from `low`, or right above it, to below `high`."""

    low: float = 0.0
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is excluded, in a range with a `high`."""

    def allows(self, number: float) -> bool:
        """Returns whether a number is in the range."""
        return (self.low < number if self.is_open else self.low <= number) and number < self.high

    @property
    def rule(self) -> str:
        """The rule, as a message states it."""
        if self.high == math.inf:
            return f"be {self.low:g} or more" if self.low else "not be negative"
        return f"be {'above' if self.is_open else 'at least'} {self.low:g} and below {self.high:g}"


NOT_NEGATIVE, SHARE, INNER_SHARE, COUNT = Bound(), Bound(high=1), Bound(high=1, is_open=True), Bound(low=1)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer takes and needs."""

    arguments: Mapping[str, type | Choices] = field(default_factory=dict)
    """The keys of `trainer.optim_args` that it reads."""
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    """The ranges of those numbers, as the library checks them or divides by them."""
    module: str | None = None
    package: str | None = None
    """The package of the module, if it is not transformers, torch or bitsandbytes."""
    needs_cuda: bool = False
    is_schedule_free: bool = False
    """Whether it averages weights in place of a schedule."""


_ADEMAMIX = {"beta3": float, "alpha": float, "t_alpha": int, "t_beta3": int}
_RMSPROP = {"alpha": float, "momentum": float, "eps": float}
_ADEMAMIX_BOUNDS = {"beta3": SHARE, "t_alpha": NOT_NEGATIVE, "t_beta3": NOT_NEGATIVE}
_RMSPROP_BOUNDS = {"alpha": INNER_SHARE, "momentum": SHARE, "eps": NOT_NEGATIVE}
"""Those of bitsandbytes; torch takes 1 and more."""
_AVERAGING = {"r": float, "weight_lr_power": float}


def _torchao() -> Optimizer:
    return Optimizer({"block_size": int, "bf16_stochastic_round": bool}, {"block_size": COUNT}, "torchao", "torchao")


def _schedule_free() -> Optimizer:
    return Optimizer(_AVERAGING, module="schedulefree", package="schedulefree", is_schedule_free=True)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(),
    "adamw_torch_fused": Optimizer(),
    "adamw_torch_8bit": _torchao(),
    "adamw_torch_4bit": _torchao(),
    "adamw_8bit": Optimizer(),
    "adamw_bnb_8bit": Optimizer(),
    "paged_adamw_32bit": Optimizer(),
    "paged_adamw_8bit": Optimizer(),
    "adafactor": Optimizer(),
    "adagrad": Optimizer({"lr_decay": float, "eps": float}, dict.fromkeys(("lr_decay", "eps"), NOT_NEGATIVE)),
    "ademamix": Optimizer(_ADEMAMIX, _ADEMAMIX_BOUNDS),
    "ademamix_8bit": Optimizer(_ADEMAMIX, _ADEMAMIX_BOUNDS),
    "paged_ademamix_32bit": Optimizer(_ADEMAMIX, _ADEMAMIX_BOUNDS, needs_cuda=True),
    "paged_ademamix_8bit": Optimizer(_ADEMAMIX, _ADEMAMIX_BOUNDS, needs_cuda=True),
    "lion_32bit": Optimizer(),
    "lion_8bit": Optimizer(),
    "paged_lion_32bit": Optimizer(),
    "paged_lion_8bit": Optimizer(),
    "rmsprop": Optimizer({**_RMSPROP, "centered": bool}, dict.fromkeys(_RMSPROP, NOT_NEGATIVE)),
    "rmsprop_bnb": Optimizer(_RMSPROP, _RMSPROP_BOUNDS),
    "rmsprop_bnb_32bit": Optimizer(_RMSPROP, _RMSPROP_BOUNDS),
    "rmsprop_bnb_8bit": Optimizer(_RMSPROP, _RMSPROP_BOUNDS),
    "sgd": Optimizer({"momentum": float, "dampening": float, "nesterov": bool}, {"momentum": NOT_NEGATIVE}),
    "stable_adamw": Optimizer(
        {"decouple_lr": bool, "max_lr": float, "kahan_sum": bool}, {"max_lr": NOT_NEGATIVE}, "optimi", "torch-optimi"
    ),
    "schedule_free_adamw": _schedule_free(),
    "schedule_free_radam": _schedule_free(),
    "schedule_free_sgd": _schedule_free(),
}  # fmt: skip
"""By transformers' names; it has 41, those in `LEFT_OUT` too."""

_IN_BACKWARD = (
    "it changes weights within the backward pass, so that micro-batches do not add up, and keeps its state where no "
    "checkpoint finds it"
)
_PROJECTS = (
    "it projects the gradients of whole matrices, where an adapter's are of low rank already, and keeps objects in its "
    "state that a checkpoint, which holds tensors alone, does not read back"
)
_OTHER_DEVICE = "it runs on devices that this project does not know"
_LOW_RANK = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw")
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
    **dict.fromkeys(_LOW_RANK, _PROJECTS),
}
"""Optimizers of transformers' trainer that are not offered, and why."""


@dataclass(frozen=True)
class Schedule:
    """What a learning rate schedule takes and needs."""

    arguments: Mapping[str, type | Choices] = field(default_factory=dict)
    """The keys of `trainer.lr_scheduler_kwargs` that it reads."""
    one_of: tuple[str, ...] = ()
    """Arguments of which exactly one is needed."""
    needs: tuple[str, ...] = ()
    """Arguments without which it does not start."""
    follows_loss: bool = False
    """Whether it follows the held-out loss, measured every `trainer.eval_steps`."""


_SHAPES = ("linear", "cosine", "1-sqrt")
_THRESHOLD = ("rel", "abs")
_MIN_LR = {"num_cycles": float, "min_lr": float, "min_lr_rate": float}
_PLATEAU: dict[str, type | Choices] = {
    **dict.fromkeys(("factor", "threshold", "min_lr", "eps"), float),
    **dict.fromkeys(("patience", "cooldown"), int),
    "threshold_mode": _THRESHOLD,
}
_SCHEDULE_BOUNDS = {
    **dict.fromkeys(
        ("num_cycles", "power", "num_decay_steps", "num_stable_steps", "min_lr_rate", "min_lr_ratio", "warmup_lr_rate",
         "patience", "cooldown", "warmup", "threshold", "eps", "reset_start"),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("timescale", "window_size"), COUNT),
}  # fmt: skip
"""The ranges for all schedules: arguments of one name mean the same in each."""
SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(),
    "constant_with_warmup": Schedule(),
    "linear": Schedule(),
    "cosine": Schedule({"num_cycles": float}),
    "cosine_with_restarts": Schedule({"num_cycles": int}),
    "cosine_with_min_lr": Schedule(_MIN_LR, one_of=("min_lr", "min_lr_rate")),
    "cosine_warmup_with_min_lr": Schedule({**_MIN_LR, "warmup_lr_rate": float}, one_of=("min_lr", "min_lr_rate")),
    "polynomial": Schedule({"lr_end": float, "power": float}),
    "inverse_sqrt": Schedule({"timescale": int}),
    "warmup_stable_decay": Schedule(
        {
            **dict.fromkeys(("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"), float),
            **dict.fromkeys(("warmup_type", "decay_type"), _SHAPES),
        },
        needs=("num_decay_steps",),
    ),
    "reduce_lr_on_plateau": Schedule(_PLATEAU, follows_loss=True),
    "greedy": Schedule(
        {**_PLATEAU, "warmup": int, "max_lr": float, "smooth": bool, "window_size": int, "reset_start": int},
        needs=("min_lr", "max_lr"),  # its own limits, 0.001 and 1, are no adapter's
        follows_loss=True,
    ),
}
"""All schedules of transformers, by its names."""


def check_optimizer(name: str, arguments: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """Returns the typed arguments of an optimizer; raises `ConfigError` for an optimizer that cannot run with them."""
    if name in LEFT_OUT:
        raise ConfigError(f"trainer.optim={name} is not offered: {LEFT_OUT[name]}; choose another, e.g. adamw_torch")
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"trainer.optim={name!r} is unknown{_ours('trainer.optim', name, OPTIMIZERS)}; docs/run.md lists all "
            f"{len(OPTIMIZERS)}, e.g. adamw_torch, paged_adamw_32bit, adafactor"
        )
    if OPTIMIZERS[name].is_schedule_free and schedule != "constant":
        raise ConfigError(
            f"trainer.optim={name} averages weights in place of a schedule, and trainer.lr_scheduler_type={schedule}; "
            "set trainer.lr_scheduler_type=constant"
        )
    who = f"trainer.optim={name}"
    typed = _typed("trainer.optim_args", arguments, OPTIMIZERS[name].arguments, who)
    _check_bounds(who, "trainer.optim_args", typed, OPTIMIZERS[name].bounds)
    if typed.get("nesterov") and (not typed.get("momentum") or typed.get("dampening")):
        raise ConfigError(
            f"{who}: trainer.optim_args.nesterov=true needs a momentum and no dampening, got "
            f"momentum={typed.get('momentum', 0):g} and dampening={typed.get('dampening', 0):g}; set "
            "trainer.optim_args.momentum, e.g. to 0.9, and leave dampening out"
        )
    return typed


def _check_bounds(who: str, owner: str, typed: Mapping[str, Any], bounds: Mapping[str, Bound]) -> None:
    for key, bound in bounds.items():
        if key in typed and not bound.allows(typed[key]):
            raise ConfigError(f"{who}: {owner}.{key}={typed[key]:g} must {bound.rule}")


def check_installed(name: str) -> None:
    """Raises `ResourceError` where the package of an optimizer is not installed."""
    optimizer = OPTIMIZERS[name]
    if optimizer.module is not None and importlib.util.find_spec(optimizer.module) is None:
        raise ResourceError(
            f"trainer.optim={name} needs the package {optimizer.package}, which is not installed: pip install "
            f"{optimizer.package}, or choose another, e.g. trainer.optim=adamw_torch"
        )


def check_schedule(name: str, arguments: Mapping[str, Any], *, learning_rate: float, measures: bool) -> dict[str, Any]:
    """Returns the typed arguments of a schedule; raises `ConfigError` for those that it cannot start with.

    `measures` says whether the held-out loss is measured while it trains.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            f"trainer.lr_scheduler_type={name!r} is unknown{_ours('trainer.lr_scheduler_type', name, SCHEDULES)}; "
            f"docs/run.md lists all {len(SCHEDULES)}, e.g. constant, linear, cosine"
        )
    schedule, who = SCHEDULES[name], f"trainer.lr_scheduler_type={name}"
    if name == "constant":  # takes the place of a recipe's schedule, whose arguments stay behind
        known = {key: kind for other in SCHEDULES.values() for key, kind in other.arguments.items()}
        for key in arguments:
            if key not in known:
                raise ConfigError(
                    f"trainer.lr_scheduler_kwargs.{key} is not an argument of any trainer.lr_scheduler_type"
                    f"{did_you_mean(str(key), known)}; leave it out, as {who} takes none"
                )
        return {}
    typed = _typed("trainer.lr_scheduler_kwargs", arguments, schedule.arguments, who)
    if missing := [key for key in schedule.needs if key not in typed]:
        raise ConfigError(f"{who} needs trainer.lr_scheduler_kwargs.{missing[0]}; set it{_example(missing[0])}")
    if schedule.one_of and len(given := [key for key in schedule.one_of if key in typed]) != 1:
        said = "both are set" if given else "neither is set"
        raise ConfigError(
            f"{who} needs exactly one of trainer.lr_scheduler_kwargs.{' and '.join(schedule.one_of)}, and {said}; set "
            f"{schedule.one_of[1]} to a share of the learning rate, e.g. to 0.1"
        )
    if schedule.follows_loss and not measures:
        raise ConfigError(f"{who} follows the held-out loss during training; set trainer.eval_steps, e.g. to 100")
    _check_limits(who, typed, {"lr_end": 1e-7} if name == "polynomial" else {}, learning_rate)
    return typed


def _check_limits(who: str, typed: Mapping[str, Any], unset: Mapping[str, float], learning_rate: float) -> None:
    for key in ("min_lr", "lr_end"):
        low = typed.get(key, unset.get(key, 0.0))
        if not 0 <= low < learning_rate:
            raise ConfigError(
                f"{who}: trainer.lr_scheduler_kwargs.{key}={low:g} must lie between 0 and "
                f"trainer.learning_rate={learning_rate:g}; lower it"
            )
    if typed.get("max_lr", math.inf) < learning_rate:
        raise ConfigError(
            f"{who}: trainer.lr_scheduler_kwargs.max_lr={typed['max_lr']:g} lies below "
            f"trainer.learning_rate={learning_rate:g}; raise it"
        )
    factor = typed.get("factor", 0.5)
    if not 0 < factor < 1:
        raise ConfigError(f"{who}: trainer.lr_scheduler_kwargs.factor={factor:g} must lie between 0 and 1")
    _check_bounds(who, "trainer.lr_scheduler_kwargs", typed, _SCHEDULE_BOUNDS)


def _example(key: str) -> str:
    examples = {"num_decay_steps": ", e.g. to 0.2, a share of all steps"}
    return examples.get(key, ", a learning rate")


def _typed(owner: str, given: Mapping[str, Any], known: Mapping[str, type | Choices], who: str) -> dict[str, Any]:
    """Returns arguments in their types; raises `ConfigError` for an unknown or impossible one."""
    for key in given:
        if key not in known:
            reads = f"it reads {', '.join(known)}" if known else "it takes none"
            raise ConfigError(
                f"{owner}.{key} is not an argument of {who}{did_you_mean(str(key), known)}; {reads}; {owner}=null "
                "takes all out"
            )
    return {key: _cast(f"{owner}.{key}", value, known[key]) for key, value in given.items()}


def _cast(key: str, value: Any, kind: type | Choices) -> Any:
    if isinstance(kind, tuple):
        if value not in kind:
            raise ConfigError(f"{key} must be one of {', '.join(kind)}, got {value!r}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (kind is bool and isinstance(value, bool)) or (kind is float and is_number):
        return value
    if kind is int and is_number and value == int(value):
        return int(value)
    names = {bool: "true or false", float: "a number", int: "a whole number"}
    raise ConfigError(f"{key} must be {names[kind]}, got {value!r}")


def write_arguments(arguments: Mapping[str, Any]) -> str | None:
    """Returns the arguments of an optimizer as transformers' `optim_args` holds them; None: there are none."""
    return ",".join(f"{key}={value}" for key, value in arguments.items()) or None


def read_arguments(name: str, text: str | None) -> dict[str, Any]:
    """Returns the arguments that `write_arguments` wrote; transformers takes some of them as texts."""
    kinds = OPTIMIZERS[name].arguments
    pairs = (pair.partition("=")[::2] for pair in text.split(",")) if text else ()
    return {key: value == "True" if kinds[key] is bool else kinds[key](value) for key, value in pairs}  # type: ignore[operator]


def _ours(key: str, name: str, known: Iterable[str]) -> str:
    """Returns what a name was meant to be, in words: another tool's name, or one that is misspelled."""
    ours = known_value(key, name)
    return f"; write {ours}" if ours is not None else did_you_mean(name, known)
