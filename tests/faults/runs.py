"""Short training runs for fault tests: how they start, which fault occurs, and which files they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from qlora.config import compose
from qlora.run import Run
from qlora.training.checkpoints import damage_reason, find_checkpoints

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

QUICK = [
    *("lora.r=4", "lora.dropout=0.1", "lora.target_modules=[q_proj,up_proj]", "quantization.compute_dtype=fp32"),
    *("trainer.max_steps=8", "trainer.save_steps=2", "trainer.logging_steps=3", "trainer.eval_steps=4"),
    *("trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2", "trainer.warmup_steps=1"),
    *("recipe=none", "trainer.learning_rate=2e-3", "trainer.lr_scheduler_type=linear"),
    *(
        "trainer.gradient_checkpointing=false",
        "trainer.disk_wait=0",
        "trainer.save_total_limit=3",
        "data.max_train_samples=12",
    ),
    *("data.max_eval_samples=4", "evaluation=loss", "evaluation.baseline=false", "task.predict=false"),
]
"""Eight steps of two rows: the second epoch begins after the sixth, or before."""


def write_rows(path: Path, count: int, word: str = "row") -> Path:
    """Writes questions and answers to a file."""
    rows = [{"instruction": f"What is {word} {number}?", "output": "a " * (number % 7 + 1)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_preferences(folder: Path) -> tuple[Path, Path]:
    """Writes pairs of answers, and labelled answers, to a file each."""
    pairs = [
        {"prompt": f"What is row {number}? ", "chosen": "a " * (number % 5 + 1), "rejected": "b " * (number % 3 + 1)}
        for number in range(24)
    ]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs[:12]
        for side in ("chosen", "rejected")
    ]
    paths = folder / "pairs.jsonl", folder / "labelled.jsonl"
    for path, rows in zip(paths, (pairs, labelled), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def kinds(folder: Path) -> dict[str, list[str]]:
    """Returns overrides for each way in which rows reach a training run; `folder` gets what they read."""
    pairs, labelled = write_preferences(folder)
    mix = write_rows(folder / "a.jsonl", 10), write_rows(folder / "b.jsonl", 8, "stone")
    return {
        "plain": ["trainer.group_by_length=false"],
        "grouped": [],
        "workers": ["trainer.dataloader_num_workers=2", "trainer.group_by_length=false"],
        "packed": ["data.packing=true", "data.pack_length=64", "data.max_train_samples=24"],
        "pairs": ["loss=dpo", "data=local", f"data.path={pairs}", "data.eval_dataset_size=4", "loss.sft_weight=0.1"],
        "packed pairs": [
            *("loss=orpo", "data=local", f"data.path={pairs}", "data.eval_dataset_size=4"),
            *("data.packing=true", "data.pack_length=96", "data.max_train_samples=24"),
        ],
        "labelled": [
            *("loss=kto", "data=local", f"data.path={labelled}", "data.eval_dataset_size=4"),
            "trainer.per_device_train_batch_size=2",
        ],
        "mixed": [
            *("data=mix", f"data.mix.a={mix[0]}", f"data.mix.b.path={mix[1]}", "data.mix.b.weight=0.5"),
            *("data.eval_dataset_size=4", "trainer.group_by_length=false"),
        ],
        "streamed": [
            *("data=mix", f"data.mix.a.path={mix[0]}", "data.mix.a.probability=0.6", f"data.mix.b.path={mix[1]}"),
            *("data.mix.b.probability=0.4", "data.streaming=true", "data.stop=all", "data.shuffle_buffer=4"),
            *("data.packing=true", "data.pack_length=64", "data.eval_dataset_size=4", "data.max_train_samples=null"),
        ],
    }


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Runs a short training in this process."""
    all_overrides = [*QUICK, *overrides]
    return Run(compose.compose(all_overrides), folder, overrides=all_overrides).execute()


class Fault(TrainerCallback):
    """Does something at the end of a step; of the whole training, where there is none of this number."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts at its step."""
        if state.global_step == self.step:
            self.act()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts at the end."""
        if self.step > state.max_steps:
            self.act()


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Makes the next training runs of this process call a function at the end of a step."""
    monkeypatch.setattr("qlora.training.callbacks.build_callbacks", lambda *_: [Fault(step, act)])


def send(number: signal.Signals) -> Callable[[], None]:
    """Returns what sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


class Writes:
    """Calls `act` when the so-and-so-manieth write of this process below a folder begins; counts them in any case.

    Writes that are not Python's are none; those to the same files that precede and follow them are.
    """

    def __init__(self) -> None:
        self.count, self.number, self.folder = 0, -1, ""
        self.act: Callable[[], object] = lambda: None
        sys.addaudithook(self._hear)

    def watch(self, folder: Path, number: int, act: Callable[[], object]) -> None:
        """Counts from now on, below `folder`."""
        self.count, self.number, self.folder, self.act = 0, number, f"{folder}/", act

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir") or not self.folder:
            return
        if not str(args[0]).startswith(self.folder) or (event == "open" and not args[2] & WRITING):
            return
        self.count += 1
        if self.count == self.number:
            self.act()


def check_whole(folder: Path) -> None:
    """Raises unless all that stands in a run's folder under its name is whole, whatever befell the run."""
    for checkpoint in find_checkpoints(folder / "checkpoints"):
        assert damage_reason(checkpoint) is None
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in (folder / "adapter").glob("adapter_model.safetensors"):
        load_file(path)


def outcome(folder: Path) -> dict[str, Any]:
    """Returns what must not depend on what befell a finished run: losses, metrics, and the adapter's bytes."""
    history = json.loads((folder / "history.json").read_text())
    logged = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "num_input_tokens_seen")
    entries = [{key: entry[key] for key in logged if key in entry} for entry in history if "train_runtime" not in entry]
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "history": entries,
        "metrics": {key: metrics[key] for key in ("train_loss", "eval_loss", "eval_perplexity")},
        "adapter": hashlib.sha256(adapter).hexdigest(),
    }
