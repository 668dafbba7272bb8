"""Answers batches of prompts by slots, and says where they do not serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import psutil
import torch

from qlora.config.schema import GenerationConfig
from qlora.config.schema.generation import Loop, Weights
from qlora.errors import ConfigError
from qlora.generation.engine import Engine, Request
from qlora.generation.linears import decoded_bytes
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import differs_reason, serving, unsupported_reason
from qlora.runtime.device import free_memory

log = logging.getLogger(__name__)

ROOM = 2
"""How many times the memory of decoded weights must be free."""
_reasons: WeakKeyDictionary[torch.nn.Module, dict[tuple[str, torch.dtype], str | None]] = WeakKeyDictionary()
"""Why slots do not serve a model, by what it was asked with: it is tried once, not at each evaluation of a run."""


@dataclass(frozen=True)
class Slots:
    """How prompts are answered by slots."""

    config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    """What the model computes in."""
    autocast: Callable[[], AbstractContextManager[None]]

    def unsupported_reason(self, model: torch.nn.Module) -> str | None:
        """Returns why transformers' own loop answers; None: slots do. The model is in evaluation mode.

        Raises `ConfigError` where `generation.loop=slots` cannot be.
        """
        loop = self.config.loop
        if loop is Loop.transformers:
            return "generation.loop=transformers"
        if loop is Loop.auto and self.device.type != "cpu":
            return "auto takes slots on a CPU only"
        reasons, key = _reasons.setdefault(model, {}), (repr(self.config), self.dtype)
        if key not in reasons:
            reasons[key] = self._find_reason(model)
        reason = reasons[key]
        if reason is not None and loop is Loop.slots:
            raise ConfigError(
                f"generation.loop=slots cannot answer with this model: {reason}; set generation.loop=auto"
            )
        return reason

    def _find_reason(self, model: torch.nn.Module) -> str | None:
        if (reason := unsupported_reason(model, self.config)) is not None:
            return reason
        with torch.inference_mode(), self.autocast():
            return differs_reason(model, self.dtype)

    def serving(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Returns the context in which an `Engine` answers."""
        return serving(model, self.dtype, decoded=self.are_decoded(model))

    def are_decoded(self, model: torch.nn.Module) -> bool:
        """Returns whether the weights of a 4-bit base are decoded once."""
        weights = self.config.weights
        if weights is not Weights["auto"]:
            return weights is Weights["16bit"]
        free = psutil.virtual_memory().available if self.device.type == "cpu" else free_memory(self.device)
        return ROOM * decoded_bytes(model, self.dtype) <= free


@dataclass
class Batch:
    """Prompts that are answered together, and what is known of their answers."""

    number: int
    requests: list[Request] = field(default_factory=list)
    left: int = 0
    """How many have not ended."""


def answer_batches(
    slots: Slots,
    model: torch.nn.Module,
    batches: Iterable[tuple[int, list[int], list[list[int]]]],
    *,
    end_ids: list[int],
    seed: int,
    length: int,
) -> Iterator[tuple[int, list[list[int]], float]]:
    """Yields the number of each batch, its answers (token ids, an end token included), and the seconds since the last.

    A batch is its number, the numbers of its rows and their prompts (token ids). A row's number decides what is drawn
    for it, with `seed`. `length` is the most tokens of a prompt and its answer. The model is in evaluation mode.
    """
    engine = Engine(model, Sampler(slots.config, end_ids, seed), slots=slots.config.batch_size, length=length)
    left, started = iter(batches), time.monotonic()
    with slots.serving(model):
        while True:
            while len(engine.waiting) < engine.slots and (following := next(left, None)) is not None:
                number, rows, prompts = following
                batch = Batch(number, left=len(rows))
                asked = zip(rows, prompts, strict=True)
                batch.requests += [engine.add(batch, prompt, row=row) for row, prompt in asked]
            if not engine.is_busy:
                return
            with torch.inference_mode(), slots.autocast():
                ended = engine.step()
            for request in ended:
                batch = request.key
                batch.left -= 1
                if not batch.left:
                    now = time.monotonic()
                    yield batch.number, [done.answer for done in batch.requests], now - started
                    started = now
