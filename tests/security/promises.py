"""What the tests of the promises share: quick runs, planted secrets, a pickle that leaves a mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config.command import check_overrides
from qlora.errors import UserError

ROOT = Path(__file__).parent.parent.parent
QUICK = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1"),
    *("trainer.eval_steps=null", "trainer.lr_scheduler_kwargs.num_decay_steps=1", "trainer.warmup_steps=0"),
    "trainer.lr_scheduler_type=warmup_stable_decay",
    *("data.max_eval_samples=4", "data.max_train_samples=16", "generation.max_new_tokens=4", "device=cpu"),
    "trainer.save_steps=1",
]
SECRETS = {
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-planted-0123456789abcdefghij",
    "MY_SERVICE_PASSWORD": "correct horse battery",
}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_overrides(overrides)
    return str(error.value)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "history.json").read_text()) if "loss" in row]


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)
