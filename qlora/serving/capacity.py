"""How many requests are answered together: as many as were asked for, or as the memory holds keys and values of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora.config.schema import GenerationConfig, ServeConfig
from qlora.config.schema.generation import Loop
from qlora.errors import ConfigError, ResourceError
from qlora.evaluation.measure import evaluation_mode
from qlora.generation.answering import Slots
from qlora.generation.memory import SHARE, free_bytes, token_bytes
from qlora.generation.slot_model import unsupported_option
from qlora.text import format_bytes

LONGEST = 8192
"""Tokens of a prompt with its answer, unless `serve.context` says otherwise."""


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
        reason = slots.find_reason(model)
        if reason is not None:
            raise ConfigError(
                f"task=serve cannot answer with this model: {reason}; merge it and serve the folder with another "
                "server (docs/serve.md), or let it answer rows with task=predict"
            )
        free = free_bytes(slots.device)
        if free is None:
            return Capacity(context, config.slots)
        one = token_bytes(model, slots.dtype) * context * models
    free -= slots.decoded_bytes(model) if slots.are_decoded(model) else 0
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
