"""Records what a few steps of a training run spend their time on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from qlora.runtime import distributed
from qlora.runtime.console import say
from qlora.text import shorten

WAIT, WARM_UP, RECORDED = 3, 1, 2
"""Steps: those that compile and allocate, one with the profiler running, and those that are recorded."""
TOP = 10


class ProfileCallback(TrainerCallback):
    """Writes a Chrome trace of two steps to `file` and prints the most expensive kernels, on a CPU operators.

    A run with too few steps is recorded from an earlier step.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file, self.device = file, device
        self._profile: profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepares the recording."""
        steps = state.max_steps - state.global_step
        if steps <= 0 or not distributed.is_main_process():
            return
        recorded = min(RECORDED, steps)
        warm_up = min(WARM_UP, steps - recorded)
        wait = min(WAIT, steps - recorded - warm_up)
        kinds = [ProfilerActivity.CPU]
        if self.device.type in ("cuda", "xpu"):
            kinds.append(getattr(ProfilerActivity, self.device.type.upper()))
        self._profile = profile(
            activities=kinds,
            schedule=schedule(wait=wait, warmup=warm_up, active=recorded, repeat=1),
            on_trace_ready=self._report,
            acc_events=True,
        )
        self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a step of the profiler."""
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the recording of a run that has ended early."""
        self._end()

    def _end(self) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _report(self, recording: profile) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        recording.export_chrome_trace(str(self.file))
        on_device = self.device.type != "cpu"
        name = "self_device_time_total" if on_device else "self_cpu_time_total"
        rows = [
            (getattr(event, name) / 1e3, event.count, event.key)
            for event in recording.key_averages()
            if (event.device_type != DeviceType.CPU) == on_device and not event.is_user_annotation
        ]
        say()
        for line in table(rows, "kernel" if on_device else "operator"):
            say(Text(line))
        say()


def table(rows: list[tuple[float, int, str]], kind: str) -> list[str]:
    """Returns the ten most expensive of `rows`, each milliseconds, calls and a name, as lines of 80 columns."""
    total = sum(time for time, _, _ in rows)
    first = sorted(rows, reverse=True)[:TOP]
    lines = [f"  share    ms in all    calls  {kind}"]
    for time, calls, name in first:
        lines.append(f"{time / max(total, 1e-9):7.1%} {time:12,.2f} {calls:8,}  {shorten(name, 48)}")
    return lines
