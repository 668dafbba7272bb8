"""Judges the optimizer steps of a training run: which were bad, what the likely cause is, and what to do about it."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qlora.config.schema import WatchdogAction, WatchdogConfig

SETTLED = 10
"""Steps until the course of the loss and the time of a step are known."""
DECAY = 0.9
"""The weight of the previous smoothed loss in the next."""
RISE = 1.0
"""By how many nats the smoothed loss must have risen, beside the factor: a loss near zero may double."""
MIN_SECONDS = 1.0
"""A step that takes less is not slow, whatever the others take."""
MAX_NAMES = 3


@dataclass(frozen=True)
class StepSummary:
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


class StepReview:
    """Finds what went wrong in a step.

    `find_rows` runs the rows of a step one by one and names those whose loss or gradients are NaN or infinite. `scales`
    says whether the loss is scaled for fp16, whose gradients then overflow now and then, and are left out.
    """

    def __init__(
        self, config: WatchdogConfig, counts: Counter[str], *, find_rows: Callable[[int], list[str]], scales: bool
    ) -> None:
        self.config, self.counts, self.find_rows, self.scales = config, counts, find_rows, scales
        self.course = Course()
        self.bad_in_a_row = 0
        self._seconds: deque[float] = deque(maxlen=50)
        self._norms: deque[float] = deque(maxlen=50)

    def restart(self, course: Course) -> None:
        """Takes up the course of a checkpoint; times and norms are measured anew."""
        self.course, self.bad_in_a_row = course, 0
        self._seconds.clear()
        self._norms.clear()

    def is_bad(self, summary: StepSummary) -> bool:
        """Returns whether the loss or the gradients of a step are NaN or infinite."""
        return not (math.isfinite(summary.loss) and (math.isfinite(summary.norm) or self.scales))

    def is_undone(self, summary: StepSummary) -> bool:
        """Returns whether the update of a step was undone."""
        return self.config.nonfinite.keeps_out and self.is_bad(summary)

    def events(self, summary: StepSummary) -> Iterator[Event]:
        """Yields what went wrong in the next step."""
        is_masked = summary.tokens == 0 or summary.loss == 0
        is_bad = self.is_bad(summary)
        self.counts["skipped"] += self.is_undone(summary)
        self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0
        if is_masked and self.config.zero is not WatchdogAction.ignore:
            yield Event(
                "zero", summary.step, "the loss is zero" if summary.loss == 0 else "no token has a loss",
                "everything in its rows is masked; see with task=preview what is trained, and look at data.train_on, "
                "data.target_max_len and data.template", summary.step - 1,
            )  # fmt: skip
        elif is_bad and self.config.nonfinite is not WatchdogAction.ignore:
            yield self._explain(summary)
        if is_bad or is_masked:
            return
        yield from self._slow(summary)
        self._norms.append(summary.norm)
        yield from self._diverged(summary)

    def _diverged(self, summary: StepSummary) -> Iterator[Event]:
        course = self.course
        course.seen += 1
        course.smoothed = summary.loss if course.seen == 1 else DECAY * course.smoothed + (1 - DECAY) * summary.loss
        if course.seen < SETTLED:
            return
        if course.smoothed <= course.lowest:
            course.lowest, course.lowest_step = course.smoothed, summary.step
        high = max(self.config.divergence_factor * course.lowest, course.lowest + RISE)
        if course.smoothed > high and self.config.divergence is not WatchdogAction.ignore:
            yield Event(
                "divergence", summary.step, f"the smoothed loss has risen to {course.smoothed:.3g} from "
                f"{course.lowest:.3g} at step {course.lowest_step}",
                "the learning rate is too high, most likely; lower trainer.learning_rate, or raise "
                "trainer.warmup_steps", course.lowest_step,
            )  # fmt: skip
            course.lowest, course.lowest_step = course.smoothed, summary.step  # once for each rise

    def _slow(self, summary: StepSummary) -> Iterator[Event]:
        if len(self._seconds) >= SETTLED and self.config.slow is not WatchdogAction.ignore:
            usual = statistics.median(self._seconds)
            if summary.seconds > max(self.config.slow_factor * usual, MIN_SECONDS):
                waited = summary.waited > summary.seconds / 2
                cause = "it waited for its batches" if waited else "the device or another process on this machine"
                remedy = "set trainer.dataloader_num_workers" if waited else "look for what else runs, and at its heat"
                yield Event(
                    "slow", summary.step, f"it took {summary.seconds:.1f} s, and half of them take less than "
                    f"{usual:.2g} s: {cause}", remedy, summary.step,
                )  # fmt: skip
        self._seconds.append(summary.seconds)

    def _explain(self, summary: StepSummary) -> Event:
        what = f"{'the gradients are' if math.isfinite(summary.loss) else 'the loss is'} not a number"
        usual = statistics.median(self._norms) if self._norms else math.nan
        if rows := self.find_rows(summary.step):
            more = f" and {len(rows) - MAX_NAMES} more" if len(rows) > MAX_NAMES else ""
            cause = f"by itself in {'; '.join(rows[:MAX_NAMES])}{more}"
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
        return Event("nonfinite", summary.step, f"{what}, {cause}", remedy, summary.step - 1)


def mean_of_kept(logged: float, summaries: Sequence[StepSummary], review: StepReview) -> tuple[float, float]:
    """Returns the mean loss of the steps that were not undone, and by how much their sum is larger than logged.

    `logged` is the mean in which those that were undone count as zero.
    """
    kept = [summary.loss for summary in summaries if not review.is_undone(summary)]
    if len(kept) == len(summaries):
        return logged, 0.0
    return (sum(kept) / len(kept) if kept else math.nan), sum(kept) - logged * len(summaries)
