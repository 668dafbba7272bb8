"""The checks of optimizers and schedules with their arguments, and the schedules on offer; no torch.

The optimizers on offer are in `registries/optimizers.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.config.bounds import COUNT, NOT_NEGATIVE, Bound
from qlora.config.foreign_names import known_value
from qlora.config.registries.optimizers import LEFT_OUT, OPTIMIZERS, Choices
from qlora.errors import ConfigError, ResourceError, did_you_mean


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
    return {key: _read(kinds[key], value) for key, value in pairs}


def _read(kind: type | Choices, text: str) -> Any:
    if kind is bool:
        return text == "True"
    return text if isinstance(kind, tuple) else kind(text)


def _ours(key: str, name: str, known: Iterable[str]) -> str:
    """Returns what a name was meant to be, in words: another tool's name, or one that is misspelled."""
    ours = known_value(key, name)
    return f"; write {ours}" if ours is not None else did_you_mean(name, known)
