"""The values of a sweep: those of the command line, and those of a `sweep=` file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep, Sweep
from omegaconf import DictConfig, OmegaConf

from qlora.config.fields import field_type, is_enum
from qlora.config.options import group_names
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import parse_overrides
from qlora.errors import ConfigError


def swept_values(override: Override) -> list[str] | None:
    """Returns the values of a sweep as overrides write them, or the ends of an interval; None: it is not a sweep.

    Raises `ConfigError` for an empty one.
    """
    if not override.is_sweep_override():
        return None
    value, text = override.value(), override.input_line
    if isinstance(value, Glob):
        raise ConfigError(f"{text}: glob(...) is not read here; list the values, e.g. lora=all-linear,attention")
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        if not value.start < value.end:
            raise ConfigError(f"{text} is empty: an interval runs from its lower end to its higher one")
        if field_type(override.key_or_group) is int and isinstance(value.start, float):
            raise ConfigError(
                f"{text}: {override.key_or_group} must be a whole number; write int(interval("
                f"{value.start:g},{value.end:g}))"
            )
        return [repr(value.start), repr(value.end)]
    if isinstance(value, RangeSweep) and not value.step:
        raise ConfigError(f"{text}: the step of a range must not be 0")
    if not (values := list(override.sweep_string_iterator())):
        raise ConfigError(f"{text} is empty: a range runs from its start up to its stop, which is not part of it")
    return values


def is_logarithmic(override: Override) -> bool:
    """Returns whether the values of a sweep are drawn on a logarithmic scale, as `tag(log,interval(1,9))` says.

    Raises `ConfigError` for another tag, and for bounds that have no logarithm.
    """
    text, value = override.input_line, override.value()
    tags = value.tags if isinstance(value, Sweep) else set()
    if unknown := sorted(tags - {"log"}):
        raise ConfigError(f"{text}: the tag {unknown[0]!r} is unknown; there is log only, as in tag(log,interval(1,9))")
    if "log" in tags and isinstance(value, IntervalSweep) and value.start is not None and value.start <= 0:
        raise ConfigError(f"{text}: a logarithmic scale needs bounds above 0, got {value.start:g}")
    return "log" in tags


def sweep_params(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Returns the sweep that a `sweep=` file describes as overrides, without the keys that `overrides` name."""
    given = {}
    for override in parse_overrides(overrides):
        given[override.get_key_element()] = override
    if "sweep" in given and given["sweep"].is_sweep_override():
        raise ConfigError(
            f"{given['sweep'].input_line}: one sweep at a time; name the keys to combine on the command line"
        )
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    return keep_spelling([f"{key}={value}" for key, value in params.items() if key not in given])


def unconditional_sweep(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Returns `overrides` and the sweep of a `sweep=` file, without the keys of `hydra.sweeper.conditions`."""
    conditions = OmegaConf.select(composed, "hydra.sweeper.conditions") or {}
    given = [text for text, override in zip(overrides, parse_overrides(overrides), strict=True)
             if not (override.is_sweep_override() and override.key_or_group in conditions)]  # fmt: skip
    params = sweep_params(composed, overrides)
    return given + [text for text, override in zip(params, parse_overrides(params), strict=True)
                    if override.key_or_group not in conditions]  # fmt: skip


def refuse_sweeps(overrides: Sequence[str]) -> None:
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            hint, key = field_type(override.key_or_group), override.get_key_element()
            if (meant := _without_comma((override.input_line or "").partition("=")[2])) and hint in (int, float):
                said = f"{override.input_line}: a number holds no comma"
                raise ConfigError(f"{said}; write {key}={meant}, or -m for a sweep")
            is_number = hint in (int, float, bool) or is_enum(hint) or key in group_names()
            raise ConfigError(
                f"{override.input_line} gives several values: add -m to run a sweep, "
                + (f"or write {key}=VALUE for one run" if is_number
                   else f"write {key}=[A,B] for one list, or quote a text that holds a comma")
            )  # fmt: skip


def _without_comma(text: str) -> str | None:
    """Returns `1,000` or `0,5` as it is written here; None: it may well be a list."""
    if re.fullmatch(r"\d(,\d{3})+|\d{2,3}(,\d{3})*,000", text):
        return text.replace(",", "")
    return text.replace(",", ".") if re.fullmatch(r"0,\d+", text) else None


def refuse_single_job(overrides: Sequence[str], composed: DictConfig) -> None:
    """Raises `ConfigError` for `-m` where nothing varies."""
    varies = any(override.is_sweep_override() for override in parse_overrides(overrides))
    if not varies and not sweep_params(composed, overrides):
        raise ConfigError(
            "-m runs a sweep, and nothing varies; give a key several values, e.g. -m lora.r=8,16, or leave -m out"
        )


def refuse_intervals(overrides: Sequence[str]) -> None:
    for override in parse_overrides(overrides):
        if override.is_interval_sweep():
            raise ConfigError(
                f"{override.input_line}: a grid cannot walk through an interval; add hydra/sweeper=optuna to search in "
                "it, or list the values"
            )
