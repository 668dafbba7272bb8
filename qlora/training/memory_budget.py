"""Fits training steps into the memory that is available: what a budget chooses, and what follows when it runs out."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora.errors import ResourceError
from qlora.objectives.protocol import SHARED_ROWS
from qlora.runtime.random_states import random_states, set_random_states
from qlora.step.kernels.dequantize import find_moved
from qlora.training.batches import Micro, split
from qlora.training.peak_memory import PeakMemory

log = logging.getLogger(__name__)

MEASURED_STEP = 2
"""The optimizer step whose memory is measured: code is compiled, and the optimizer's states are there."""

SMALL = 2**20
"""Bytes up to which torch puts tensors together elsewhere."""
MOVED = 2**28
"""Most bytes of what is moved; for more, the room that moving takes would be too large."""


class Step(Protocol):
    """What a training step runs in."""

    checkpointed: int
    offloaded: int
    targets: int | None

    @property
    def base(self) -> torch.nn.Module: ...

    @property
    def layers(self) -> Sequence[torch.nn.Module]: ...

    @property
    def graph_bytes(self) -> int: ...

    def keep(self, layers: int) -> None: ...

    def free(self) -> None: ...

    def give_up_graphs(self) -> bool: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class MemoryPlan:
    """What steps do to need less memory, or with memory that is free."""

    checkpointed: int
    """Decoder layers, the first ones, that compute their activations again."""
    offloaded: int = 0
    """How many of those layers, the first ones, have their inputs wait in the host's memory."""
    chunks: int = 1
    """Parts with about the same number of rows in which a micro-batch is computed."""
    kept: int = 0
    """Layers with experts, the first ones, whose experts stay decoded; then nothing is computed again."""

    def leaner(self, layers: int, rows: int) -> MemoryPlan | None:
        """Returns the next plan for a model of `layers` and micro-batches that can be cut into `rows`; None: no such.

        Decoded experts are freed; half of the layers that are left are checkpointed, then all, then offloaded; then the
        chunks are halved.
        """
        if self.kept:
            return replace(self, kept=0)
        if 2 * self.checkpointed < layers:
            return replace(self, checkpointed=(self.checkpointed + layers + 1) // 2)
        if self.checkpointed < layers:
            return replace(self, checkpointed=layers)
        if self.offloaded < layers:
            return replace(self, offloaded=layers)
        return replace(self, chunks=min(2 * self.chunks, rows)) if self.chunks < rows else None

    def __str__(self) -> str:
        parts = [f"{self.kept} layers with decoded experts"] if self.kept else []
        parts += [f"{self.checkpointed} layers checkpointed"]
        which = "their inputs" if self.offloaded == self.checkpointed else f"the inputs of {self.offloaded}"
        parts += [f"{which} in the host's memory"] if self.offloaded else []
        parts += [f"micro-batches in {self.chunks} parts"] if self.chunks > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Formula:
    """What the memory of a training run should be, in bytes."""

    resident: float
    """What is held when a step's last micro-batch begins."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are a part of that."""
    added: Callable[[int, int, int, int], float]
    """What a micro-batch adds at most, by checkpointed and offloaded layers, rows, and tokens of a row."""
    rows: int
    """Rows of the largest micro-batch."""
    length: int
    """Tokens of the longest row."""
    paged: float = 0.0
    """Paged optimizer states, which are held beside what torch counts."""
    mixed: int = 0
    """Layers whose experts can be kept decoded."""
    decoded: float = 0
    """What the decoded experts of a layer take."""
    optimizer: float = 0
    """What the optimizer's step adds to `resident`. Decoded experts leave room for that."""


class Budget:
    """Chooses the fewest checkpointed and offloaded layers that fit: by the formula, and later by what steps took.

    Where no layer must be, the experts of as many layers as fit are kept decoded.

    `limit` is what tensors may take, paged states included; `cap` is what torch may reserve in a step (None: all there
    is), both in bytes. Measuring starts torch's own count anew, which `memory` keeps.
    """

    def __init__(
        self,
        formula: Formula,
        layers: int,
        limit: float,
        cap: float | None,
        device: torch.device,
        memory: PeakMemory | None = None,
    ) -> None:
        self.formula, self.layers, self.limit, self.cap, self.device = formula, layers, limit, cap, device
        self.memory = memory or PeakMemory(device)
        self._resident, self._paged, self._factor, self._tokens = formula.resident, formula.paged, 1.0, 0

    def choose(self) -> MemoryPlan:
        """Returns the plan of least work; where even all layers checkpointed are too much, the leanest one."""
        plans = [MemoryPlan(0, kept=count) for count in range(self.formula.mixed, 0, -1)]
        plans += [MemoryPlan(count) for count in range(self.layers + 1)]
        plans += [MemoryPlan(self.layers, count) for count in range(1, self.layers + 1)]
        return next((plan for plan in plans if self.needed(plan) <= self.limit), plans[-1])

    def needed(self, plan: MemoryPlan) -> float:
        """Returns the bytes that a step should hold by a plan, paged states included."""
        formula = self.formula
        added = self._factor * formula.added(plan.checkpointed, plan.offloaded, formula.rows, formula.length)
        if kept := plan.kept * formula.decoded:
            added = max(added, formula.optimizer) + kept
        return self._resident + self._paged + added

    @contextlib.contextmanager
    def measured(self, plan: MemoryPlan, batch: Micro) -> Iterator[None]:
        """Measures a micro-batch; the one with most tokens corrects the formula."""
        self.memory.restart()
        resident = torch.cuda.memory_allocated(self.device)
        yield
        # The tokens of a prompt that answers share count once.
        tokens = batch[SHARED_ROWS[1] if SHARED_ROWS[1] in batch else "input_ids"]
        rows, length = len(tokens), tokens[0].numel()
        if rows * length >= self._tokens:
            added = torch.cuda.max_memory_allocated(self.device) - resident
            self._tokens, self._paged = rows * length, self.memory.paged
            self._resident = resident + self.memory.in_graphs - plan.kept * self.formula.decoded
            self._factor = added / self.formula.added(plan.checkpointed, plan.offloaded, rows, length)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Lets torch reserve no more than `cap` inside; then it runs out of memory, whatever else the GPU has."""
        if self.cap is None:
            yield
            return
        previous = torch.cuda.get_per_process_memory_fraction(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(previous, self.cap / total), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(previous, self.device)


class StepMemory:
    """Runs micro-batches; one that runs out of memory is run once more by a leaner plan, which stays.

    What a failed backward pass has added to the gradients cannot be told from what was there before. So all
    micro-batches of the optimizer step are run again, from no gradients and from the random state before the first.
    Not with several processes: the others would wait for the one that begins again.
    """

    def __init__(self, step: Step, device: torch.device, budget: Budget | None, *, alone: bool) -> None:
        self.step, self.device, self.budget, self.alone = step, device, budget, alone
        self.retries = 0
        self.plan = budget.choose() if budget is not None else MemoryPlan(step.checkpointed, step.offloaded)
        self._batches: list[Micro] = []
        self._steps = 0
        if budget is not None:
            log.info("memory budget: %s at first", self.plan)
            if (needed := budget.needed(self.plan)) > budget.limit:
                log.warning(
                    "memory budget: a step should hold %.2f GB even so, more than the %.2f GB that it may; it is "
                    "tried, and may run out of memory: take a larger trainer.memory_budget, shorter rows, or a "
                    "smaller trainer.per_device_train_batch_size",
                    needed / 1e9,
                    budget.limit / 1e9,
                )

    def begin(self) -> None:
        """Begins an optimizer step."""
        if self.budget is not None and not self._steps:
            close_gaps(self.step.base, self.device)  # they count, too
        self._batches, self._steps = [], self._steps + 1
        if self.budget is not None and self._steps == MEASURED_STEP + 1 and self._is_by_formula:
            self.plan = self.budget.choose()
            log.info("memory budget: %s from now on", self.plan)

    def run(self, batch: Micro, learn: Callable[[Micro], Tensor], forget: Callable[[], None], rows: int) -> Tensor:
        """Runs the next micro-batch, which may be cut into `rows`; returns its loss.

        `learn` runs a micro-batch, or a part of one, forward and backward; `forget` drops all gradients. Raises
        `ResourceError` where the leanest plan is too much.
        """
        if not self._batches:
            self._random = random_states(self.device)
        self._batches.append(batch)
        waiting = [batch]
        while (loss := self._try(waiting, learn)) is None:
            if self.step.give_up_graphs():
                log.warning("out of memory in a training step; once more without CUDA graphs")
            elif (leaner := self.plan.leaner(len(self.step.layers), rows)) is not None:
                log.warning("out of memory in a training step; once more with %s", leaner)
                self.plan = leaner
            else:
                raise self._too_much()
            self.retries += 1
            self.step.keep(self.plan.kept)
            forget()
            _free(self.device)
            set_random_states(self.device, self._random)
            waiting = self._batches
        return loss

    def _try(self, batches: list[Micro], learn: Callable[[Micro], Tensor]) -> Tensor | None:
        """Returns the last micro-batch's loss; None: out of memory."""
        self.step.checkpointed, self.step.offloaded = self.plan.checkpointed, self.plan.offloaded
        try:
            self.step.keep(self.plan.kept)
            for batch in batches:
                loss = self._learn(batch, learn)
        except torch.OutOfMemoryError as error:
            if not self.alone:
                raise self._too_much() from error
            return None  # the tensors in the frames that the error holds go with it
        return loss

    def _learn(self, batch: Micro, learn: Callable[[Micro], Tensor]) -> Tensor:
        chunks = min(self.plan.chunks, len(batch["input_ids"]))
        with contextlib.ExitStack() as stack:
            if self.budget is not None:
                stack.enter_context(self.budget.kept())
                first = batch is self._batches[0] and self.budget.formula.accumulates
                if self._steps == MEASURED_STEP and self._is_by_formula and not first:
                    stack.enter_context(self.budget.measured(self.plan, batch))
            if chunks == 1:
                return learn(batch)
            return torch.stack([learn(part) for part in split(batch, chunks)]).sum()

    @property
    def _is_by_formula(self) -> bool:
        """Whether the plan is one that the formula counts: nothing is cut."""
        return self.plan.chunks == 1

    def _too_much(self) -> ResourceError:
        larger = "a larger trainer.memory_budget, " if self.budget is not None and self.budget.cap is not None else ""
        plan = f"even with {self.plan}" if self.alone else f"with {self.plan}"
        return ResourceError(
            f"a training step runs out of memory {plan}; take {larger}shorter rows (data.max_length, "
            "data.pack_length), a smaller trainer.per_device_train_batch_size, a smaller lora.r or quantization=nf4, "
            "or see with task=plan what fits"
        )


def close_gaps(model: torch.nn.Module, device: torch.device) -> None:
    """Moves a model's tensors into the gaps that loading has left, and releases the memory that is free then.

    A tensor's storage is emptied and filled anew, so that whatever shows a part of it does so still; torch puts it into
    the smallest gap that holds it. The last ones in memory go first: so gaps gather at its end.
    """
    _free(device)
    kept: dict[int, torch.UntypedStorage] = {}
    device = torch.empty(0, device=device).device  # with its index
    for parameter in (*model.parameters(), *model.buffers()):
        for tensor in (parameter, *_quantization_tensors(parameter)):
            storage = tensor.untyped_storage()
            if storage.device == device and SMALL < storage.nbytes() <= MOVED and storage.resizable():
                kept[storage.data_ptr()] = storage
    if not kept:
        return
    room = torch.empty(max(storage.nbytes() for storage in kept.values()), dtype=torch.uint8, device=device)
    for _, storage in sorted(kept.items(), reverse=True):
        size, whole = storage.nbytes(), torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        room[:size].copy_(whole)
        storage.resize_(0)
        storage.resize_(size)
        whole.copy_(room[:size])
    del room
    find_moved()
    _free(device)


def _quantization_tensors(weight: Tensor) -> list[Tensor]:
    """Returns what bitsandbytes keeps beside a 4-bit weight."""
    state = getattr(weight, "quant_state", None)
    return [] if state is None else [value for value in vars(state).values() if isinstance(value, Tensor)]


def _free(device: torch.device) -> None:
    """Releases memory that nothing holds any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
