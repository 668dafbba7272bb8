"""A trainer callback that notes how fast each process of a training steps, and how much memory its GPU held."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora.training.peak_memory import PeakMemory


class Recorder(TrainerCallback):
    """Writes a file for each process into `folder`; steps after the first `warm_up` count."""

    def __init__(self, folder: str, warm_up: int) -> None:
        """Takes where to write and how many steps do not count."""
        self.folder, self.warm_up = Path(folder), warm_up
        self.times: dict[str, float] = {}
        self.began = time.time()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.memory = PeakMemory(device)

    def _note(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = time.time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the paged states of the optimizer from now on."""
        self.memory.watch(kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes when the first step begins."""
        if state.global_step == 0:
            self._note("begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes when the first step, the warm-up and the last step end."""
        for name, step in {"first": 1, "warm": self.warm_up, "last": state.max_steps}.items():
            if state.global_step == step:
                self._note(name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what was noted."""
        device = self.memory.device
        results = {
            "rank": int(os.environ.get("RANK", "0")),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "began": self.began,
            "first_step_began": self.times["begin"],
            "first_step_seconds": self.times["first"] - self.times["begin"],
            "seconds": self.times["last"] - self.times["warm"],
            "ended": self.times["last"],
            "peak_gb": self.memory.gb(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(results), encoding="utf-8")
