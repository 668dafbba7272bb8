"""Two processes train with every optimizer what one trains, and hold the same weights to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.runtime import distributed
from tests.training.test_optimizers import build, settings, weights

ROOT = Path(__file__).parents[2]
NAMES = ["adamw_torch", "lion_32bit", "ademamix", "muon", "schedule_free_adamw", "galore_adamw", "apollo_adamw"]
# Muon computes in bf16, Lion takes signs, projections turn: a gradient that is rounded otherwise moves more.
BOUNDS = {"muon": 1e-2, "lion_32bit": 1e-2, "galore_adamw": 1e-3, "apollo_adamw": 1e-3}
"""How far two processes may be from one, of the weights' norm."""


def train(folder: Path, name: str, accumulated: int) -> torch.Tensor:
    """Returns the weights after four steps of four rows."""
    given = {"rank": 3} if OPTIMIZERS[name].trains_all_weights else {}
    config = replace(settings(optim=name, optim_args=given), gradient_accumulation_steps=accumulated)
    trainer = build(folder / name, config)
    trainer.run(None)
    return weights(trainer)


@pytest.mark.full
def test_two_processes_train_with_each_optimizer_what_one_trains(tmp_path: Path) -> None:
    names = [name for name in NAMES if (module := OPTIMIZERS[name].module) is None or find_spec(module) is not None]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, str(tmp_path), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert torch.equal(first, second), name
        alone = train(tmp_path / "alone", name, 4)
        moved = (alone - first).norm() / alone.norm()
        assert moved < BOUNDS.get(name, 1e-4), (name, moved)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for optimizer in sys.argv[2:]:
        trained = train(folder / "together", optimizer, 2)
        torch.save(trained, folder / f"{optimizer}-{distributed.rank()}.pt")
