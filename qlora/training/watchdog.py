"""Watches a training for what goes wrong in days of it, names the likely cause, and acts as `watchdog` says.

What a step computed is looked at when the training logs, saves or ends, for then the device is waited for anyway. A
step whose gradients are no numbers is undone on the device itself, before anything is known of it here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import signal
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails
from transformers import TrainerCallback, TrainerControl

from qlora.config.schema import WATCHDOG_COUNTS, WatchdogAction, WatchdogConfig
from qlora.errors import ConfigError
from qlora.runtime import distributed
from qlora.runtime.atomic_files import read_json, write_text

log = logging.getLogger(__name__)

STATE_FILE = "watchdog.json"
SETTLED = 10
"""Steps until the course of the loss and the time of a step are known."""
MEMORY = 0.9
"""How much of the smoothed loss is the one of the step before."""
RISE = 1.0
"""What the smoothed loss must have risen by, in nats, beside the factor: a loss near zero may double."""
LOST_SECONDS = 5.0
"""How long the system may take to tell that a process has ended whose connection is gone."""
LEAST_SECONDS = 1.0
"""A step that takes less is not slow, whatever the others take."""
SHOWN = 3


class Halted(ConfigError):
    """Ends a training as `watchdog` says: the message names what was seen, the likely cause and the way out."""


class Rollback(Exception):
    """Takes a training back to a checkpoint of `step` or before."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


@dataclass(frozen=True)
class StepFacts:
    """What one optimizer step was like, over all processes."""

    step: int
    loss: float
    norm: float
    """Of the gradients, before they are scaled down."""
    tokens: float
    """Those that the loss counts; NaN: not known."""
    seconds: float
    waited: float
    """Seconds of them in which there was no batch."""


@dataclass(frozen=True)
class Event:
    """Something that went wrong in a step."""

    kind: str
    """The key of `watchdog` that says what is done."""
    step: int
    what: str
    remedy: str
    good: int
    """The last step before it began."""


@dataclass
class Course:
    """What is known of the steps so far; a checkpoint keeps it."""

    smoothed: float = math.nan
    lowest: float = math.inf
    lowest_step: int = 0
    seen: int = 0
    rate_factor: float = 1.0
    """What the learning rate is multiplied with, after rollbacks."""


class Watchdog(TrainerCallback):
    """Notes every step, keeps bad updates out, and acts on what it finds.

    `find_rows` runs the rows of a step one by one and names those whose loss or gradients are no numbers. `scales` says
    whether the loss is scaled for fp16, whose gradients then overflow now and then, and are left out.
    """

    def __init__(
        self, config: WatchdogConfig, device: torch.device, *, find_rows: Callable[[int], list[str]], scales: bool
    ) -> None:
        self.config, self.device, self.find_rows, self.scales = config, device, find_rows, scales
        self.course, self.counts = Course(), Counter[str]()
        self._steps: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._times: list[tuple[Any, Any, float]] = []
        self._usual: deque[float] = deque(maxlen=50)
        self._norms: deque[float] = deque(maxlen=50)
        self._unlogged: list[StepFacts] = []
        self._loss: Tensor | None = None
        self._tokens: Tensor | None = None
        self._bad: Tensor | None = None
        self._begun: Any = None
        self._waited = 0.0
        self._in_a_row = 0
        self._verdict: Exception | None = None

    # What the trainer tells

    @property
    def guards(self) -> bool:
        """Whether updates by gradients that are no numbers are undone."""
        return self.config.nonfinite.keeps_out

    @contextlib.contextmanager
    def expecting_batches(self) -> Iterator[None]:
        """Acts on batches that do not come in time."""
        started = time.monotonic()
        try:
            with self._alarm():
                yield
        except (ConnectionError, EOFError):  # a process that dies while it hands a batch over is heard of later
            _await_lost_worker()
            raise
        self._waited += time.monotonic() - started

    def explain_loss(self, error: RuntimeError) -> Halted | None:
        """Returns what to say of an error that tells of a dead worker process; None: it is another."""
        if re.search(r"DataLoader worker \(pid", str(error)) is None:
            return None
        self.counts["stalled"] += 1
        return Halted(
            f"a process that prepares batches has ended ({str(error).splitlines()[0]}): killed from outside, or out of "
            "memory; lower trainer.dataloader_num_workers, and run the same command again to go on"
        )

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        ignored = self.config.stalled is WatchdogAction.ignore
        if ignored or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: Any) -> None:
            self.counts["stalled"] += 1
            message = (
                f"watchdog.stalled: no batch came within {self.config.stalled_seconds:g} s; the disk or a file system "
                "is stuck, or a function of your own in data.format is"
            )
            if self.config.stalled is WatchdogAction.stop:
                raise Halted(f"{message}; mend it and run the same command again, or raise watchdog.stalled_seconds")
            log.error(message)

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.config.stalled_seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def begin(self, tokens: Tensor | int | None) -> None:
        """Begins an optimizer step, whose loss counts so many tokens."""
        self._loss, self._tokens = None, tokens if isinstance(tokens, Tensor) else None

    def add_loss(self, loss: Tensor) -> Tensor:
        """Notes the loss of a micro-batch; returns what counts as it: 0 for one that is no number and is undone."""
        loss = loss.to(self.device)  # it is another one where the base is spread over several
        self._loss = loss if self._loss is None else self._loss + loss
        return torch.where(loss.isfinite(), loss, 0) if self.guards else loss

    def judge(self, norm: Tensor) -> None:
        """Notes the norm of the gradients, which is the same in all processes."""
        assert self._loss is not None
        norm = norm.to(self.device)
        self._steps.append((self._loss, norm, self._tokens))
        self._bad = ~norm.isfinite() if self.guards else None

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes steps by gradients that are no numbers leave all weights as they are, without waiting for the device.

        Such gradients count as zero for the optimizer's own averages.
        """
        if not self.guards:
            return
        if isinstance(optimizer, Optimizer8bit):
            optimizer.update_step = partial(self._update, optimizer.update_step)
            return
        kept: list[tuple[torch.nn.Parameter, Tensor]] = []

        def before(*_: Any) -> None:
            if self._bad is not None:
                for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                    if parameter.grad is not None:
                        kept.append((parameter, self._keep(parameter)))

        def after(*_: Any) -> None:
            for parameter, old in kept:
                self._undo(parameter, old)
            kept.clear()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def _update(self, own: Callable[..., None], group: Any, parameter: torch.nn.Parameter, *place: int) -> None:
        """Does what bitsandbytes does about one parameter, guarded; so only one is copied at a time."""
        old = self._keep(parameter) if self._bad is not None else None
        own(group, parameter, *place)
        if old is not None:
            self._undo(parameter, old)

    def _keep(self, parameter: torch.nn.Parameter) -> Tensor:
        assert self._bad is not None
        assert parameter.grad is not None
        parameter.grad.masked_fill_(self._bad.to(parameter.device, non_blocking=True), 0)
        return parameter.detach().clone()

    def _undo(self, parameter: torch.nn.Parameter, old: Tensor) -> None:
        assert self._bad is not None
        bad = self._bad.to(parameter.device, non_blocking=True)
        torch.where(bad, old, parameter.data, out=parameter.data)

    def mean_since_log(self, logged: float) -> tuple[float, float]:
        """Returns the mean loss since the last call without steps that were undone, and what its sum is more.

        `logged` is the mean in which those count as zero.
        """
        steps, self._unlogged = self._unlogged, []
        kept = [each.loss for each in steps if not self._is_undone(each)]
        if len(kept) == len(steps):
            return logged, 0.0
        return (sum(kept) / len(kept) if kept else math.nan), sum(kept) - logged * len(steps)

    def _is_undone(self, facts: StepFacts) -> bool:
        is_number = math.isfinite(facts.loss) and (math.isfinite(facts.norm) or self.scales)
        return self.guards and not is_number

    # Events of the training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up what a checkpoint knows, and lowers the rate if this is a rollback."""
        self._steps, self._times, self._unlogged, self._verdict, self._in_a_row = [], [], [], None, 0
        self._usual.clear()
        self._norms.clear()
        wanted = self.course.rate_factor
        stored = read_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)
        self.course = Course(**stored["course"]) if stored is not None else Course()
        if stored is not None:
            self.counts |= Counter(stored["counts"])  # the larger ones: a rollback forgets none
        if wanted < self.course.rate_factor:
            _scale_rate(kwargs["optimizer"], kwargs["lr_scheduler"], wanted / self.course.rate_factor)
            self.course.rate_factor = wanted

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step; the wait for its batches was before."""
        self._begun = self._now()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Looks at the steps since the last look, where the device is waited for anyway."""
        self._times.append((self._begun, self._now(), self._waited))
        self._waited = 0.0
        stops = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if stops:
            self._verdict = self._review(state.global_step)
            if not control.should_log:
                self._act()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts, behind the line of the log."""
        self._act()

    def save(self, checkpoint: Path) -> None:
        """Stores what is known in a checkpoint."""
        facts = {"course": asdict(self.course), "counts": dict(self.counts)}
        write_text(checkpoint / STATE_FILE, json.dumps(facts) + "\n")

    def go_back(self) -> None:
        """Counts a rollback; the training that begins next has a lower rate."""
        self.counts["rollbacks"] += 1
        self.course.rate_factor *= self.config.rollback_factor

    def metrics(self) -> dict[str, int]:
        """Returns how often each thing was seen and done."""
        return {f"train_watchdog_{name}": self.counts[name] for name in WATCHDOG_COUNTS}

    # What is made of it

    def _act(self) -> None:
        verdict, self._verdict = self._verdict, None
        if verdict is not None:
            raise verdict

    def _review(self, last: int) -> Exception | None:
        facts = self._read(last)
        events = [event for each in facts for event in self._events(each)]
        verdict: Exception | None = None
        for kind in dict.fromkeys(event.kind for event in events):
            same = [event for event in events if event.kind == kind]
            self.counts[kind] += len(same)
            verdict = verdict or self._decide(same)
        return verdict

    def _read(self, last: int) -> list[StepFacts]:
        """Returns the steps since the last look, the same in all processes."""
        steps, self._steps = self._steps, []
        times, self._times = self._times, []
        if not steps:
            return []
        unknown = torch.full((), math.nan, device=steps[0][0].device)
        cells = [torch.stack([torch.as_tensor(each, device=unknown.device).detach().float().reshape(())
                              for each in (loss, norm, unknown if tokens is None else tokens)])
                 for loss, norm, tokens in steps]  # fmt: skip
        numbers = torch.stack(cells).tolist()  # waits for the device, and so for what its clock says
        clock = [(_seconds(begun, ended) + waited, waited) for begun, ended, waited in times]
        everywhere = distributed.all_gather((numbers, clock))
        found = []
        for index in range(len(steps)):
            rows = [numbers[index] for numbers, _ in everywhere]
            seconds, waited = max(clock[index] for _, clock in everywhere)
            loss = sum(row[0] for row in rows) / len(rows)
            found.append(StepFacts(last - len(steps) + 1 + index, loss, rows[0][1], rows[0][2], seconds, waited))
        self._unlogged += found
        return found

    def _now(self) -> Any:
        """Returns this moment: on a device the one at which it will have come so far."""
        if self.device.type == "cpu":
            return time.monotonic()
        event = torch.get_device_module(self.device).Event(enable_timing=True)
        event.record()
        return event

    def _events(self, facts: StepFacts) -> Iterator[Event]:
        config, course = self.config, self.course
        is_masked = facts.tokens == 0 or facts.loss == 0
        is_bad = not math.isfinite(facts.loss) or not (math.isfinite(facts.norm) or self.scales)
        self.counts["skipped"] += self._is_undone(facts)
        self._in_a_row = self._in_a_row + 1 if is_bad else 0
        if is_masked and config.zero is not WatchdogAction.ignore:
            yield Event("zero", facts.step, "the loss is zero" if facts.loss == 0 else "no token has a loss",
                        "everything in its rows is masked; see with task=preview what is trained, and look at "
                        "data.train_on, data.target_max_len and data.template", facts.step - 1)  # fmt: skip
        elif is_bad and config.nonfinite is not WatchdogAction.ignore:
            yield self._explain(facts)
        if is_bad or is_masked:
            return
        yield from self._slow(facts)
        self._norms.append(facts.norm)
        course.seen += 1
        course.smoothed = facts.loss if course.seen == 1 else MEMORY * course.smoothed + (1 - MEMORY) * facts.loss
        if course.seen < SETTLED:
            return
        if course.smoothed <= course.lowest:
            course.lowest, course.lowest_step = course.smoothed, facts.step
        high = max(config.divergence_factor * course.lowest, course.lowest + RISE)
        if course.smoothed > high and config.divergence is not WatchdogAction.ignore:
            yield Event("divergence", facts.step, f"the smoothed loss has risen to {course.smoothed:.3g} from "
                        f"{course.lowest:.3g} at step {course.lowest_step}",
                        "the learning rate is too high, most likely; lower trainer.learning_rate, or raise "
                        "trainer.warmup_steps", course.lowest_step)  # fmt: skip
            course.lowest, course.lowest_step = course.smoothed, facts.step  # once for each rise

    def _slow(self, facts: StepFacts) -> Iterator[Event]:
        if len(self._usual) >= SETTLED and self.config.slow is not WatchdogAction.ignore:
            usual = statistics.median(self._usual)
            if facts.seconds > max(self.config.slow_factor * usual, LEAST_SECONDS):
                waited = facts.waited > facts.seconds / 2
                cause = "it waited for its batches" if waited else "the device or another process on this machine"
                remedy = "set trainer.dataloader_num_workers" if waited else "look for what else runs, and at its heat"
                yield Event("slow", facts.step, f"it took {facts.seconds:.1f} s, and half of them take less than "
                            f"{usual:.2g} s: {cause}", remedy, facts.step)  # fmt: skip
        self._usual.append(facts.seconds)

    def _explain(self, facts: StepFacts) -> Event:
        what = f"{'the gradients are' if math.isfinite(facts.loss) else 'the loss is'} not a number"
        usual = statistics.median(self._norms) if self._norms else math.nan
        if rows := self.find_rows(facts.step):
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            cause = f"by itself in {'; '.join(rows[:SHOWN])}{more}"
            remedy = "look at that row, and take it out of the data"
        elif self.scales:
            cause = "but in no row of it alone: fp16 overflows, most likely"
            remedy = "set quantization.compute_dtype=bf16 where the device has it, or fp32"
        elif self._norms and self._norms[-1] > 10 * usual:
            cause = f"after gradients of {self._norms[-1]:.3g}, {usual:.3g} being usual: the learning rate is too high"
            remedy = "lower trainer.learning_rate"
        else:
            cause = "but in no row of it alone"
            remedy = "lower trainer.learning_rate; if it comes back in other steps, suspect the hardware"
        return Event("nonfinite", facts.step, f"{what}, {cause}", remedy, facts.step - 1)

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
            return Halted(f"{told}; {first.remedy}. The same command goes on from the last checkpoint")
        if action is WatchdogAction.skip and self._in_a_row >= self.config.max_skips:
            return Halted(f"{told}, {self._in_a_row} steps in a row (watchdog.max_skips); {first.remedy}")
        done = "; the step is skipped" if action is WatchdogAction.skip else ""
        log.warning("%s%s; %s", told, done, first.remedy)
        return None


def _seconds(begun: Any, ended: Any) -> float:
    return ended - begun if isinstance(begun, float) else float(begun.elapsed_time(ended)) / 1e3


def _await_lost_worker() -> None:
    """Raises torch's `RuntimeError` that names a process which has ended, if there is one soon."""
    until = time.monotonic() + LOST_SECONDS
    while time.monotonic() < until:
        _error_if_any_worker_fails()
        time.sleep(0.05)


def _scale_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiplies the learning rate now, and what the schedule makes of it from now on."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
