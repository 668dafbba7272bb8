"""A sweep on a GPU: each job begins with the whole card, whatever the one before it left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUICK = [
    *("trainer.max_steps=20", "trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}"),
    *("trainer.warmup_steps=0", "trainer.eval_steps=10", "data.max_eval_samples=32", "evaluation=loss"),
]


def used_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def test_memory_is_free_between_the_jobs(tmp_path: Path) -> None:
    initial = used_mib()
    command = [sys.executable, "-m", "qlora", "-m", *QUICK, "seed=0,1,2,3", "name=gpu", "hydra.launcher.n_jobs=1"]
    sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    samples = []
    while sweep.poll() is None:
        samples.append(used_mib() - initial)
        time.sleep(0.05)
    assert sweep.stdout is not None
    assert sweep.returncode == 0, sweep.stdout.read()
    humps = 0
    in_use = False
    for sample in samples:
        humps += not in_use and sample > 100
        in_use = sample > 100 or (in_use and sample > 8)  # MiB
    assert humps == 4
    assert abs(used_mib() - initial) <= 8
    jobs = json.loads((tmp_path / "outputs/sweeps/gpu/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished"] * 4
    print("peak MiB above idle:", max(samples))
