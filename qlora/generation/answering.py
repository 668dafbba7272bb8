"""Answers batches of prompts by slots, and says where they do not serve."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

import torch

from qlora.config.schema import GenerationConfig
from qlora.config.schema.generation import GPU_ROWS, ROWS, Loop, Weights
from qlora.errors import ConfigError, ResourceError
from qlora.generation.engine import Engine, Request
from qlora.generation.experts import decoded_expert_bytes, served_experts
from qlora.generation.linears import decoded_bytes, decoded_linears, packed_linears
from qlora.generation.memory import SHARE, free_bytes, token_bytes
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import differs_reason, serving, unsupported_reason
from qlora.text import format_bytes

log = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
"""Where `generation.loop=auto` takes slots."""
ROOM = 2
"""How many times the memory of decoded weights must be free."""
_reasons: WeakKeyDictionary[torch.nn.Module, dict[tuple[str, torch.dtype], str | None]] = WeakKeyDictionary()
"""Why slots do not serve a model, by what it was asked with: it is tried once, not at each evaluation of a run."""

_smaller: WeakSet[torch.nn.Module] = WeakSet()
"""The models of which it was said that fewer rows are answered together."""


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
        if loop is Loop.auto and self.device.type not in DEVICES:
            return "auto takes slots on a CPU or a CUDA device only"
        reason = self.find_reason(model)
        if reason is not None and loop is Loop.slots:
            raise ConfigError(
                f"generation.loop=slots cannot answer with this model: {reason}; set generation.loop=auto"
            )
        return reason

    def find_reason(self, model: torch.nn.Module) -> str | None:
        """Returns why slots do not serve a model or the options, whatever `generation.loop` says."""
        reasons, key = _reasons.setdefault(model, {}), (repr(self.config), self.dtype)
        if key not in reasons:
            reasons[key] = self._find_reason(model)
        return reasons[key]

    def _find_reason(self, model: torch.nn.Module) -> str | None:
        if (reason := unsupported_reason(model, self.config)) is not None:
            return reason
        if self.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        with self._on_device, torch.inference_mode(), self.autocast():
            return differs_reason(model, self.dtype, partial(self._matmuls, model, decoded=False))

    @contextmanager
    def serving(self, model: torch.nn.Module) -> Iterator[None]:
        """Returns the context in which an `Engine` answers."""
        with self._on_device, self.matmuls(model), serving(model):
            yield

    def matmuls(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Returns the context in which a model computes with weights as `generation.weights` says."""
        return self._matmuls(model, decoded=self.are_decoded(model))

    @contextmanager
    def _matmuls(self, model: torch.nn.Module, *, decoded: bool) -> Iterator[None]:
        if self.device.type == "cuda":
            linears = decoded_linears if decoded else packed_linears
            is_exact = self.dtype is torch.float32  # kernels of experts round inputs to 19 bits
            experts = nullcontext() if is_exact else served_experts(model, self.dtype, decoded=decoded)
            with linears(model, self.dtype), experts:
                yield
        elif decoded:
            with decoded_linears(model, self.dtype):
                yield
        else:
            yield

    @property
    def _on_device(self) -> AbstractContextManager[None]:
        """The context in which kernels run on the device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def are_decoded(self, model: torch.nn.Module) -> bool:
        """Returns whether the weights of a 4-bit base are decoded once."""
        weights = self.config.weights
        if weights is not Weights["auto"]:
            return weights is Weights["16bit"]
        free = free_bytes(self.device)
        return free is None or ROOM * self.decoded_bytes(model) <= free

    def decoded_bytes(self, model: torch.nn.Module) -> int:
        """Returns what weights that are decoded once take beside the model."""
        experts = decoded_expert_bytes(model, self.dtype) if self.device.type == "cuda" else 0
        return decoded_bytes(model, self.dtype) + experts

    def fit_rows(self, model: torch.nn.Module, length: int) -> int:
        """Returns how many rows of `length` tokens are answered together, as many as the memory holds; says if fewer.

        The model is in evaluation mode, and served. Raises `ResourceError` where not one fits.
        """
        free = free_bytes(self.device)
        asked = self.config.batch_size or (GPU_ROWS if self.device.type == "cuda" else ROWS)
        if free is None:
            return asked
        with self.autocast():
            one = token_bytes(model, self.dtype) * length
        fit = int(free * SHARE) // one
        takes = (
            f"keys and values of {length:,} tokens take {format_bytes(one)} a row, and {format_bytes(free)} are free"
        )
        if fit < 1:
            raise ResourceError(f"generation: {takes}; set a smaller generation.max_new_tokens or data.max_length")
        if self.config.batch_size is not None and fit < asked and model not in _smaller:
            _smaller.add(model)
            log.warning("%s rows are answered together, not generation.batch_size=%s: %s", fit, asked, takes)
        return min(fit, asked)


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
    left, started = iter(batches), time.monotonic()
    with slots.serving(model):
        count = slots.fit_rows(model, length)
        engine = Engine(model, Sampler(slots.config, end_ids, seed), slots=count, length=length)
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
