"""`lora.start`: finds the adapter that is trained further, and gives the config its rank and its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.config.overrides import override_value
from qlora.config.schema import Config, LoraBias, LoraConfig, LoraExperts
from qlora.config.schema.adapter_kind import unread_reason
from qlora.config.schema.values import written
from qlora.errors import ConfigError, DataError, ResourceError, did_you_mean
from qlora.models.json_files import read_object
from qlora.runtime.run_folder import find_adapter
from qlora.runtime.trained import RUNS
from qlora.tasks.lora_size import with_size
from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline

FILES = ("adapter_config.json", "adapter_model.safetensors", "*.json")
"""The files of an adapter on the hub."""


def with_start(config: Config, overrides: Sequence[str] = ()) -> Config:
    """Returns a config whose `lora` is that of the adapter that `lora.start` names, and `lora.start` its folder.

    Without `lora.start` and `lora.parameters` it is returned unchanged.
    Raises a `UserError` for an adapter that cannot be trained further,
    and for one of `overrides` that asks for another adapter than it is.
    """
    for key in (text.partition("=")[0].lstrip("+") for text in overrides):
        if key.startswith("lora.") and (reason := unread_reason(config.lora, key.removeprefix("lora."))) is not None:
            raise ConfigError(reason)
    if config.lora.start is None:
        return with_size(config)
    folder = find_start(config)
    settings = read_object(folder / "adapter_config.json", f"lora.start={config.lora.start}")
    _check_kind(settings, config)
    lora = _own_settings(config.lora, settings, folder)
    given = {text.partition("=")[0].lstrip("+"): text for text in overrides}  # the last one of a key counts
    for name in OWN:
        key, value = f"lora.{name}", getattr(lora, name)
        if key in given and _differs(override_value(given[key]), value):
            raise ConfigError(
                f"{given[key]} is not what lora.start={config.lora.start} was trained with ({key}={written(value)}), "
                "and an adapter keeps its form; leave it out"
            )
    return replace(config, lora=lora)


OWN = ("r", "alpha", "bias", "target_modules", "experts", "expert_r", "router", "use_rslora", "use_dora",
       "rank_pattern", "alpha_pattern")  # fmt: skip
"""The fields of `lora` that an adapter brings along."""
PROJECTION = re.compile(r"(.*\.)?(\w*_proj|w[123])\.weight")
"""A linear layer among the parameters that an adapter targets, as PEFT must read some of them."""
ROUTED = re.compile(r"(.*\.)?\w*_proj")
"""The tensor of a layer's experts."""


def find_start(config: Config) -> Path:
    """Returns the folder of the adapter that `lora.start` names; one of the hub is downloaded."""
    name = config.lora.start
    assert name is not None
    folder = Path(name).expanduser()
    if not folder.is_dir() and (RUNS / name).is_dir():
        folder = RUNS / name
    if not folder.is_dir():
        if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not folder.parent.is_dir():
            return _download(config, name)
        siblings = [str(path) for path in folder.parent.glob("*/") if find_adapter(path)[0]]
        siblings += [path.name for path in RUNS.glob("*/") if find_adapter(path)[0]]
        raise ConfigError(
            f"lora.start={name}: no such folder, nor a run in {RUNS}{did_you_mean(name, siblings)}; give the folder of "
            "an adapter or of a finished run, or a hub id (OWNER/NAME)"
        )
    adapter, full = find_adapter(folder)
    if adapter is None:
        holds = "a whole model, which is a base: give it as model.name" if full else "no adapter"
        raise DataError(
            f"lora.start={name}: {folder} holds {holds}; give the folder of an adapter or of a finished run"
        )
    return adapter


def _download(config: Config, name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import

    read_cache_without_network()
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES), cache_dir=config.model.cache_dir))
    except (OSError, ValueError) as error:
        reason = why_offline() or " ".join(str(error).split())[:200].rstrip(".")
        raise ResourceError(
            f"lora.start={name}: there is no such folder, and the hub does not give it ({reason}); give the folder of "
            "an adapter, or check the name and the network"
        ) from error
    if not (folder / "adapter_config.json").is_file():
        raise DataError(f"lora.start={name}: this repository holds no adapter (adapter_config.json is missing)")
    return folder


def _check_kind(settings: Mapping[str, Any], config: Config) -> None:
    """Refuses an adapter that this project could load, but not train and save as it is."""
    init = settings.get("init_lora_weights")
    reasons = (
        (settings.get("peft_type") != "LORA", f"it is PEFT's {settings.get('peft_type')}, and only LoRA is trained"),
        (bool(settings.get("modules_to_save")), "it trains whole layers beside (modules_to_save)"),
        (
            isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
            f"it begins as a part of its base (init_lora_weights={init}); give the adapter that the run has saved at "
            "its end",
        ),
        (
            bool(config.model.new_tokens) and not settings.get("trainable_token_indices"),
            "it trains no new tokens, and model.new_tokens asks for some",
        ),
    )
    for is_so, reason in reasons:
        if is_so:
            raise DataError(f"lora.start={config.lora.start} cannot be trained further: {reason}")


def _own_settings(lora: LoraConfig, settings: Mapping[str, Any], folder: Path) -> LoraConfig:
    bias, modules = settings.get("bias", "none"), settings.get("target_modules") or []
    parameters = settings.get("target_parameters") or []
    targets = [modules] if isinstance(modules, str) else [*modules]
    targets += [name.removesuffix(".weight") for name in parameters if PROJECTION.fullmatch(name)]
    routed = [name for name in parameters if ROUTED.fullmatch(name)]
    ranks = {settings.get("rank_pattern", {}).get(name, settings.get("r")) for name in routed}
    try:
        return replace(
            lora,
            start=str(folder),
            r=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            bias=LoraBias(bias),
            target_modules=sorted(targets),
            experts=_experts(lora, routed, targets),
            expert_r=ranks.pop() if len(ranks) == 1 else None,
            router=any(not PROJECTION.fullmatch(name) for name in {*parameters} - {*routed}),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            rank_pattern=_pattern(settings.get("rank_pattern"), parameters),
            alpha_pattern=_pattern(settings.get("alpha_pattern"), parameters),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'adapter_config.json'} is not that of a LoRA adapter ({error!r})") from error


def _pattern(pattern: Mapping[str, Any] | None, parameters: Sequence[str]) -> dict[str, Any]:
    """Returns the part of a pattern of PEFT's that is about linear layers."""
    return {name: value for name, value in (pattern or {}).items() if name not in parameters}


def _experts(lora: LoraConfig, routed: list[str], targets: list[str]) -> LoraExperts:
    """Returns which experts an adapter is on; `auto` where it is on none and none were asked for."""
    if routed:
        return LoraExperts.all
    if any(".shared_" in f".{name}" for name in targets):
        return LoraExperts.shared if lora.experts is not LoraExperts.none else lora.experts
    return LoraExperts.auto if lora.experts is LoraExperts.auto else LoraExperts.none


def _differs(given: Any, value: Any) -> bool:
    if isinstance(value, list):
        return sorted(given) != value if isinstance(given, list) else given not in (*value[:1], "all-linear")
    return bool(given != (value.value if isinstance(value, LoraBias | LoraExperts) else value))
