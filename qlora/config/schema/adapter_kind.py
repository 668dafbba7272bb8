"""What a kind of adapter reads of the group `lora`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from qlora.config.registries.adapter_kinds import EVERY_KIND, KINDS, LORA
from qlora.config.schema.code_names import check_plain
from qlora.config.schema.values import MAPPINGS, written
from qlora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from qlora.config.schema.lora import LoraConfig

GIVEN_BY_RECIPES = frozenset(("r", "alpha", "dropout"))
"""Fields that recipes set for LoRA, and so may hold a value that another kind does not read."""


def check_kind(lora: LoraConfig) -> None:
    """Raises `ConfigError` for a kind that is not known, and for what the kind does not read."""
    if lora.kind != LORA and lora.kind not in KINDS:
        names = [LORA, *KINDS]
        raise ConfigError(
            f"lora.kind={lora.kind} is unknown{did_you_mean(lora.kind, names)}; choose one of {', '.join(names)}"
        )
    if not isinstance(lora.options, dict):
        raise ConfigError(
            f"lora.options must be a mapping such as {MAPPINGS['lora.options']}, got {written(lora.options)}"
        )
    check_plain("lora.options", lora.options)
    if lora.kind == LORA or not lora.enabled:
        if lora.options:
            choice = "lora.kind=lora" if lora.enabled else "lora=none"
            raise ConfigError(f"lora.options is not read by {choice}; leave it out")
        return
    kind = KINDS[lora.kind]
    for item in fields(lora):
        default = item.default if item.default is not MISSING else _made(item)
        value = getattr(lora, item.name)
        if item.name in EVERY_KIND | kind.fields | GIVEN_BY_RECIPES or value == default:
            continue
        if item.name == "experts":
            continue  # refused with what experts are
        raise ConfigError(
            f"lora.{item.name}={written(value)} is LoRA's, and {kind.title} (lora.kind={lora.kind}) does not have it; "
            "leave one of them out"
        )
    _check_options(lora)
    if (reason := kind.unsupported_reason(lora)) is not None:
        raise ConfigError(reason)


def _check_options(lora: LoraConfig) -> None:
    known = KINDS[lora.kind].options
    for name, value in lora.options.items():
        key = f"lora.options.{name}"
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{key} is not read by lora.kind={lora.kind}{did_you_mean(name, known)}; {takes}")
        if not _is_like(value, known[name]):
            raise ConfigError(f"{key} must be {_describe(known[name])}, got {written(value)}")


def unread_reason(lora: LoraConfig, name: str) -> str | None:
    """Returns why a field that recipes set is not to be given beside a kind of adapter; None: the kind reads it."""
    kind = lora.other_kind
    if kind is None or name not in GIVEN_BY_RECIPES - kind.fields:
        return None
    return f"lora.{name} is LoRA's, and {kind.title} (lora.kind={lora.kind}) does not read it; leave it out"


def _made(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else None


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, list):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if default is None or isinstance(default, int):  # None: a number that follows from others
        return isinstance(value, int)
    return isinstance(value, int | float)


def _describe(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, list):
        return "a list of names"
    return "a whole number" if default is None or isinstance(default, int) else "a number"


def describe_adapter(lora: LoraConfig, *, short: bool = False) -> str:
    """Returns the kind of an adapter with its sizes: `LoRA r=64, alpha=16`; `short` says the rank alone."""
    kind = lora.other_kind
    sizes = [f"r={lora.r}"] if kind is None or kind.has_rank else []
    if short:
        return " ".join(["LoRA" if kind is None else kind.title, *sizes])
    sizes += [f"alpha={lora.alpha:g}"] if kind is None or "alpha" in kind.fields else []
    sizes += [f"{name}={written(value)}" for name, value in lora.options.items()]
    return f"{'LoRA' if kind is None else kind.title} {', '.join(sizes)}".rstrip()


def describe_choice(lora: LoraConfig) -> str:
    """Returns which layers an adapter is on: `all-linear in layers 0, 1 without down_proj`."""
    where = ", ".join(lora.target_modules)
    where += f" in layers {', '.join(map(str, lora.layers))}" if lora.layers is not None else ""
    return where + (f" without {', '.join(lora.exclude)}" if lora.exclude else "")
