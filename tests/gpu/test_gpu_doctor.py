"""The doctor and `trainer.deterministic` on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora.config.compose import compose
from qlora.doctor import examine
from qlora.doctor.findings import Status
from qlora.runtime.energy import read_energy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
QUICK = [
    *("lora.r=8", "trainer.max_steps=8", "trainer.per_device_train_batch_size=8", "trainer.logging_steps=1"),
    *("trainer.eval_steps=null", "trainer.lr_scheduler_kwargs.num_decay_steps=2", "trainer.warmup_steps=1"),
    *("data.max_eval_samples=16", "generation.max_new_tokens=4", "lora.dropout=0.1"),
]


def test_this_gpu_is_healthy_and_its_fast_step_is_on(tmp_path: Path) -> None:
    findings = list(examine(compose(["task=doctor"]), tmp_path))
    assert [finding for finding in findings if finding.status is Status.error] == []
    says = {finding.name: finding.says for finding in findings}
    for part in ("fused_linear", "fused_loss", "compile"):
        assert says[part] == "on"
    assert "driver" in says["gpu"]


def test_the_driver_counts_energy_or_says_that_it_does_not() -> None:
    initial = read_energy()
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(200):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    after = read_energy()
    assert (initial is None) == (after is None)
    assert initial is None or after is None or after > initial


@pytest.mark.parametrize("more", [[], ["data.packing=true"], ["trainer.compile=false"]], ids=" ".join)
def test_a_deterministic_run_gives_the_same_bits_in_another_process(tmp_path: Path, more: list[str]) -> None:
    def start(*overrides: str) -> None:
        # Each with a cache of compiled code of its own, so that nothing is taken over from the first.
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"),
        }
        command = [sys.executable, "-m", "qlora", *overrides]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    start(*QUICK, *more, "trainer.deterministic=true", "hydra.run.dir=first")
    start("task=replay", "run=first", "hydra.run.dir=second")
