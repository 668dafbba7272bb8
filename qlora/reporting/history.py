"""What the trainer logged, as curves: one for each metric, of points that were logged."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import DamagedFile
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.saved_run import read_history_file
from qlora.text import is_detail

Series = tuple[list[float], list[float]]

MEASURED = re.compile(r"eval_(?!.*(?:perplexity|runtime|per_second)$)")
"""Perplexity says what the loss says; the others are about the measuring."""
TRAINING = (
    *("loss", "grad_norm", "learning_rate", "train_tokens_per_second", "train_mfu", "train_data_wait"),
    *("reward_accuracy", "reward_margin", "reference_divergence"),
    *("expert_tokens_max", "expert_idle_share", "router_aux_loss"),
)
NOISY = ("loss", "grad_norm")
"""Logged of a few batches each, so that a mean over neighbours shows more."""


@dataclass(frozen=True)
class Curve:
    """A metric over a run; all three lists have the same length."""

    steps: list[float]
    values: list[float]
    tokens: list[float | None]
    """Tokens trained on until then, where that was logged."""

    def thin(self, most: int) -> Curve:
        """Returns at most `most` of the points, evenly spaced, the last among them."""
        every = math.ceil(len(self.steps) / most)
        if every <= 1:
            return self
        kept = slice((len(self.steps) - 1) % every, None, every)
        return Curve(self.steps[kept], self.values[kept], self.tokens[kept])


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Returns what a run logged during training; of a killed run up to its last checkpoint.

    A file that is damaged counts as missing.
    """
    run = RunFolder(folder)
    states = [path / "trainer_state.json" for path in sorted(run.checkpoints.glob("checkpoint-*"), key=_step)]
    for path in (run.history, *reversed(states)):
        with contextlib.suppress(DamagedFile):
            if (history := read_history_file(path)) is not None:
                return history
    return []


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def series(history: list[dict[str, Any]], key: str) -> Series:
    """Returns the steps and finite values of `key`; where a resumed run repeats a step, the last value counts."""
    points = {entry["step"]: float(entry[key]) for entry in history if "step" in entry and entry.get(key) is not None}
    kept = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    return [step for step, _ in kept], [value for _, value in kept]


def curves(history: list[dict[str, Any]]) -> dict[str, Curve]:
    """Returns the curves of a run by the names of their metrics, the most important first."""
    logged = dict.fromkeys(key for entry in history if "step" in entry for key in entry)
    measured = [key for key in logged if MEASURED.match(key) and not is_detail(key)]
    names = [key for key in (TRAINING[0], *measured, *TRAINING[1:]) if key in logged]
    tokens = {entry["step"]: entry.get("num_input_tokens_seen") for entry in history if "step" in entry}
    curves_of = {name: series(history, name) for name in names}
    return {
        name: Curve(steps, values, [tokens[step] for step in steps])
        for name, (steps, values) in curves_of.items()
        if values
    }


def with_base(measured: dict[str, Curve], base: Mapping[str, float]) -> dict[str, Curve]:
    """Returns curves in which those of held-out metrics begin at step 0 with what the untuned base scored.

    `base` has the metrics by their plain names. The held-out loss of the base is shown by itself until the first one
    is measured in training.
    """
    result = dict(measured)
    for name, curve in {"eval_loss": Curve([], [], []), **measured}.items():
        value = base.get(name.removeprefix("eval_"))
        if name.startswith("eval_") and value is not None and math.isfinite(value) and 0 not in curve.steps:
            result[name] = Curve([0, *curve.steps], [value, *curve.values], [0, *curve.tokens])
    return result


def held_out_loss(names: Container[str]) -> str:
    """Returns the metric that is the training loss of held-out rows; one over answers is not the loss of tokens."""
    return "eval_preference_loss" if "eval_preference_loss" in names else "eval_loss"


def curve_title(name: str) -> tuple[str, str]:
    """Returns the title of a curve, and its unit or how it was measured."""
    known = {
        "loss": ("training loss", "nats per token"),
        "eval_loss": ("held-out loss", "nats per token"),
        "grad_norm": ("gradient norm", "before it is clipped"),
        "learning_rate": ("learning rate", ""),
        "train_tokens_per_second": ("tokens per second", "between two logs"),
        "train_mfu": ("model FLOP utilisation", "share of the device's matrix rate"),
        "train_data_wait": ("waiting for batches", "share of the time"),
        "expert_tokens_max": ("tokens of the busiest expert", "a step"),
        "expert_idle_share": ("experts without tokens", "share"),
        "router_aux_loss": ("balancing loss of the routers", "not trained"),
    }
    plain = name.removeprefix("eval_")
    return known.get(name) or (plain.replace("_", " "), "training" if name == plain else "held out")
