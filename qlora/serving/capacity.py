"""How many requests are answered together: as many as were asked for, or as the memory holds keys and values of."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from qlora.config.schema import GenerationConfig, ServeConfig
from qlora.config.schema.generation import Loop
from qlora.errors import ConfigError, ResourceError
from qlora.evaluation.measure import evaluation_mode
from qlora.generation.answering import Slots
from qlora.generation.linears import decoded_bytes
from qlora.generation.slot_model import SlotModel, differs_reason, serving, unsupported_option, unsupported_reason
from qlora.runtime.device import free_memory
from qlora.text import format_bytes

LONGEST = 8192
"""Tokens of a prompt with its answer, unless `serve.context` says otherwise."""
SHARE = 0.5
"""Of the memory that is free, what keys and values may take."""


@dataclass(frozen=True)
class Capacity:
    """What is answered at the same time."""

    context: int
    slots: int
    """Of each model."""
    note: str | None = None
    """Why it is less than was asked for."""


def check_answers(generation: GenerationConfig) -> None:
    """Raises `ConfigError` for options of `generation` under which slots do not answer."""
    reason = "generation.loop=transformers" if generation.loop is Loop.transformers else unsupported_option(generation)
    if reason is not None:
        key = reason.partition("=")[0]
        raise ConfigError(f"task=serve answers by slots, which have no place for {key}; leave it out ({reason})")


def choose_context(config: ServeConfig, context: int | None) -> int:
    """Returns the most tokens of a prompt with its answer; `context` is what the model reads, None: it names no limit.

    Raises `ConfigError` for more than that.
    """
    if config.context is None:
        return LONGEST if context is None else min(context, LONGEST)
    if context is not None and config.context > context:
        raise ConfigError(
            f"serve.context={config.context} is more than the model's context of {context:,} tokens; set it to "
            f"{context} at most, or leave it out"
        )
    return config.context


def plan_capacity(config: ServeConfig, slots: Slots, model: torch.nn.Module, *, models: int, context: int) -> Capacity:
    """Returns how many requests of each of `models` models are answered together.

    Raises `ConfigError` where slots do not serve the model, and `ResourceError` where not one request fits.
    """
    with evaluation_mode(model), torch.inference_mode(), slots.autocast():
        reason = unsupported_reason(model, slots.config) or differs_reason(model, slots.dtype)
        if reason is not None:
            raise ConfigError(
                f"task=serve cannot answer with this model: {reason}; merge it and serve the folder with another "
                "server (docs/serve.md), or let it answer rows with task=predict"
            )
        free = _free_bytes(slots.device)
        if free is None:
            return Capacity(context, config.slots)
        one = _token_bytes(slots, model) * context * models
    free -= decoded_bytes(model, slots.dtype) if slots.are_decoded(model) else 0
    fit = int(free * SHARE) // one
    if fit >= config.slots:
        return Capacity(context, config.slots)
    takes = f"keys and values of {context:,} tokens take {format_bytes(one)} a slot" + (
        f" with {models} models" if models > 1 else ""
    )
    if fit < 1:
        raise ResourceError(
            f"task=serve: {takes}, and {format_bytes(max(free, 0))} of memory are free; set a smaller serve.context"
        )
    note = f"{fit} in place of {config.slots} slots: {takes}, and {format_bytes(free)} are free"
    return Capacity(context, fit, note)


def _token_bytes(slots: Slots, model: torch.nn.Module) -> int:
    """Returns the bytes of the keys and values of one token."""
    one = SlotModel(model, slots=1, length=1)
    with serving(model, slots.dtype, decoded=False):
        one.read([[0]])
    held = (*one.cache.keys.values(), *one.cache.values.values())
    return max(sum(states.numel() * states.element_size() for states in held), 1)


def _free_bytes(device: torch.device) -> int | None:
    """Returns the memory that is free; None: a device of this kind does not say."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return free_memory(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else None
