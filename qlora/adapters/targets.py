"""Finds the linear layers that an adapter is put on."""

from __future__ import annotations

import re

from transformers import PreTrainedModel

from qlora.errors import ConfigError, did_you_mean
from qlora.models.decoder import ROUTER, linear_modules, read_decoder
from qlora.upstream.peft import calls_layer, names_of_experts


def find_target_modules(requested: list[str], model: PreTrainedModel) -> list[str]:
    """Turns `lora.target_modules` into what PEFT takes; each name or pattern must match a linear layer.

    Layers that text does not run through are left out, and with `all-linear` those that PEFT cannot adapt, too.
    """
    routers = {matrix.name.removesuffix(".weight") for matrix in read_decoder(model).matrices if matrix.kind == ROUTER}
    names = [name for name in linear_modules(model) if name not in routers]  # its output may be more than a tensor
    experts = names_of_experts({last_name(name) for name in names}, model)
    if requested == ["all-linear"]:
        chosen = [name for name in names if last_name(name) not in experts and calls_layer(last_name(name), model)]
        if not chosen:
            raise ConfigError(f"lora.target_modules: {model.config.model_type} has no linear layer; use lora=none")
        return chosen
    kinds = sorted({last_name(name) for name in names})
    matches: dict[str, list[str]] = {pattern: _matches(pattern, names) for pattern in requested}
    head = model.get_output_embeddings()
    output = next((last_name(name) for name, module in model.named_modules() if module is head), "")
    if output in [last_name(pattern) for pattern, matched in matches.items() if not matched]:
        raise ConfigError(
            f"lora.target_modules: {output} is the output layer, which cannot be a target here; leave it out: "
            "lora.target_modules=all-linear takes every other linear layer"
        )
    if missing := [pattern for pattern, matched in matches.items() if not matched]:
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; "
            f"the model has {kinds}, or use all-linear"
        )
    chosen = sorted({name for matched in matches.values() for name in matched})
    if taken := sorted({last_name(name) for name in chosen} & experts):
        raise ConfigError(
            f"lora.target_modules {taken}: in {model.config.model_type} PEFT gives these names to the experts, which "
            f"have no adapters here; choose among {sorted(set(kinds) - experts)}, or use all-linear"
        )
    is_plain = all(pattern in kinds for pattern in requested) and len(chosen) == _count(requested, model)
    return requested if is_plain else chosen


def last_name(name: str) -> str:
    """Returns the last part of a module's name, such as `q_proj`."""
    return name.rpartition(".")[2]


def _count(kinds: list[str], model: PreTrainedModel) -> int:
    """Returns how many modules PEFT matches by the last parts of their names."""
    return sum(last_name(name) in kinds for name, _ in model.named_modules())


def _matches(pattern: str, names: list[str]) -> list[str]:
    plain = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if plain:
        return plain
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {pattern!r} is not a regular expression: {error}") from error
