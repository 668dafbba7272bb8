"""Watches a training run for what goes wrong over days, names the likely cause, and acts as `watchdog` demands.

The losses and gradients of a step are read when the run logs, saves or ends, for then the host waits for the device
anyway. A step with bad gradients is undone on the device itself, before anything is known of it here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl

from qlora.config.schema import WATCHDOG_COUNTS, WatchdogAction, WatchdogConfig
from qlora.runtime import distributed
from qlora.runtime.atomic_files import read_json, write_text
from qlora.training.batch_alarm import Halted, alarm, await_lost_worker, explain_lost_worker, stalled_message
from qlora.training.step_review import Course, Event, StepReview, StepSummary, mean_of_kept
from qlora.training.update_guard import UpdateGuard
from qlora.upstream.torch import set_last_rate

log = logging.getLogger(__name__)

STATE_FILE = "watchdog.json"


class Rollback(Exception):
    """Takes a training run back to a checkpoint of `step` or before."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class Watchdog(TrainerCallback):
    """Notes every step, keeps bad updates out, and acts on what the review of the steps finds.

    For `find_rows` and `scales` see `StepReview`.
    """

    def __init__(
        self, config: WatchdogConfig, device: torch.device, *, find_rows: Callable[[int], list[str]], scales: bool
    ) -> None:
        self.config, self.device = config, device
        self.counts = Counter[str]()
        self.review = StepReview(config, self.counts, find_rows=find_rows, scales=scales)
        self._guard = UpdateGuard()
        self._steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._times: list[tuple[Any, Any, float]] = []
        self._unlogged: list[StepSummary] = []
        self._loss: Tensor | None = None
        self._tokens: Tensor | None = None
        self._begun: Any = None
        self._waited = 0.0
        self._verdict: Exception | None = None

    # What the trainer reports

    @property
    def course(self) -> Course:
        """What is known of the steps so far."""
        return self.review.course

    @property
    def guards(self) -> bool:
        """Whether updates by gradients that are NaN or infinite are undone."""
        return self.config.nonfinite.keeps_out

    @contextlib.contextmanager
    def expecting_batches(self) -> Iterator[None]:
        """Acts on batches that do not come in time."""
        started = time.monotonic()
        ignored = self.config.stalled is WatchdogAction.ignore
        try:
            with contextlib.nullcontext() if ignored else alarm(self.config.stalled_seconds, self._report_stall):
                yield
        except (ConnectionError, EOFError):  # the end of a process that hands a batch over is reported later
            await_lost_worker()
            raise
        self._waited += time.monotonic() - started

    def _report_stall(self) -> None:
        self.counts["stalled"] += 1
        message = stalled_message(self.config.stalled_seconds)
        if self.config.stalled is WatchdogAction.stop:
            raise Halted(f"{message}; fix it and run the same command again, or raise watchdog.stalled_seconds")
        log.error(message)

    def explain_loss(self, error: RuntimeError) -> Halted | None:
        """Returns what to say of an error that reports a dead worker process; None: it is another error."""
        if (halted := explain_lost_worker(error)) is not None:
            self.counts["stalled"] += 1
        return halted

    def begin(self, tokens: Tensor | int | None) -> None:
        """Begins an optimizer step, whose loss counts `tokens` tokens."""
        self._loss, self._tokens = None, tokens if isinstance(tokens, Tensor) else None

    def add_loss(self, loss: Tensor) -> Tensor:
        """Notes the loss of a micro-batch; returns what counts as it: 0 for one that is NaN and is undone."""
        loss = loss.to(self.device)  # it is on another device where the base is spread over several
        self._loss = loss if self._loss is None else self._loss + loss
        return torch.where(loss.isfinite(), loss, 0) if self.guards else loss

    def judge(self, norm: Tensor) -> None:
        """Notes the norm of the gradients, which is the same in all processes."""
        assert self._loss is not None
        norm = norm.to(self.device)
        self._steps.append((self._loss, norm, self._tokens))
        self._guard.is_bad = ~norm.isfinite() if self.guards else None

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Undoes steps of an optimizer by bad gradients, where the config demands it."""
        if self.guards:
            self._guard.attach(optimizer)

    def mean_since_log(self, logged: float) -> tuple[float, float]:
        """Returns the mean loss since the last call without steps that were undone, and by how much its sum is larger.

        `logged` is the mean in which those count as zero.
        """
        steps, self._unlogged = self._unlogged, []
        return mean_of_kept(logged, steps, self.review)

    # Events of the training run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up what a checkpoint knows, and lowers the learning rate if this is a rollback."""
        self._steps, self._times, self._unlogged, self._verdict = [], [], [], None
        factor = self.course.rate_factor
        saved = read_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)
        self.review.restart(Course(**saved["course"]) if saved is not None else Course())
        if saved is not None:
            self.counts |= Counter(saved["counts"])  # the larger ones: a rollback forgets none
        if factor < self.course.rate_factor:
            _scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], factor / self.course.rate_factor)
            self.course.rate_factor = factor

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step, after the wait for its batches."""
        self._begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Reviews the steps since the last review, where the host waits for the device anyway."""
        self._times.append((self._begun, self._now(), self._waited))
        self._waited = 0.0
        stops = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if stops:
            self._verdict = self._review(state.global_step)
            if not control.should_log:
                self._act()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts, after the line of the log."""
        self._act()

    def save(self, checkpoint: Path) -> None:
        """Saves what is known in a checkpoint."""
        record = {"course": asdict(self.course), "counts": dict(self.counts)}
        write_text(checkpoint / STATE_FILE, json.dumps(record) + "\n")

    def go_back(self) -> None:
        """Counts a rollback; the run that begins next has a lower learning rate."""
        self.counts["rollbacks"] += 1
        self.course.rate_factor *= self.config.rollback_factor

    def metrics(self) -> dict[str, int]:
        """Returns how often each thing was seen and done."""
        return {f"train_watchdog_{name}": self.counts[name] for name in WATCHDOG_COUNTS}

    # Review

    def _act(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            raise verdict

    def _review(self, last: int) -> Exception | None:
        summaries = self._read(last)
        events = [event for summary in summaries for event in self.review.events(summary)]
        verdict: Exception | None = None
        for kind in dict.fromkeys(event.kind for event in events):
            same = [event for event in events if event.kind == kind]
            self.counts[kind] += len(same)
            verdict = verdict or self._decide(same)
        return verdict

    def _read(self, last: int) -> list[StepSummary]:
        """Returns the steps since the last review, the same in all processes."""
        steps, self._steps = self._steps, []
        times, self._times = self._times, []
        if not steps:
            return []
        unknown = torch.full((), math.nan, device=steps[0][0].device)
        cells = [torch.stack([torch.as_tensor(value, device=unknown.device).detach().float().reshape(())
                              for value in (loss, norm, unknown if tokens is None else tokens)])
                 for loss, norm, tokens in steps]  # fmt: skip
        numbers = torch.stack(cells).tolist()  # waits for the device, and so for its clock
        clock = [(_seconds(begun, ended) + waited, waited) for begun, ended, waited in times]
        everywhere = distributed.all_gather((numbers, clock))
        summaries = []
        for index in range(len(steps)):
            rows = [numbers[index] for numbers, _ in everywhere]
            seconds, waited = max(clock[index] for _, clock in everywhere)
            loss = sum(row[0] for row in rows) / len(rows)
            summaries.append(StepSummary(last - len(steps) + 1 + index, loss, rows[0][1], rows[0][2], seconds, waited))
        self._unlogged += summaries
        return summaries

    def _now(self) -> Any:
        """Returns this moment; on a device, an event at the end of the work that it has been given."""
        if self.device.type == "cpu":
            return time.monotonic()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def _decide(self, events: Sequence[Event]) -> Exception | None:
        first = events[0]
        action: WatchdogAction = getattr(self.config, first.kind)
        more = f" (and so at {len(events) - 1} more steps)" if len(events) > 1 else ""
        told = f"watchdog.{first.kind}: step {first.step}: {first.what}{more}"
        if action is WatchdogAction.rollback and self.counts["rollbacks"] < self.config.max_rollbacks:
            return Rollback(first.good, f"{told}; {first.remedy}")
        if action is WatchdogAction.rollback:
            return Halted(
                f"{told}, after {self.counts['rollbacks']} rollbacks (watchdog.max_rollbacks); {first.remedy}"
            )
        if action is WatchdogAction.stop:
            return Halted(f"{told}; {first.remedy}. The same command resumes from the last checkpoint")
        bad = self.review.bad_in_a_row
        if action is WatchdogAction.skip and bad >= self.config.max_skips:
            return Halted(f"{told}, {bad} steps in a row (watchdog.max_skips); {first.remedy}")
        done = "; the step is skipped" if action is WatchdogAction.skip else ""
        log.warning("%s%s; %s", told, done, first.remedy)
        return None


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else float(begun.elapsed_time(ended)) / 1e3


def _scale_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiplies the learning rate now, and what the schedule makes of it from now on."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    set_last_rate(scheduler, [group["lr"] for group in optimizer.param_groups])
