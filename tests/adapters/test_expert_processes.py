"""Adapters on experts that two processes train are those that one trains.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qlora.runtime import distributed
from tests.models.bases import write
from tests.test_many import adapter, launch, losses, train

STEPS = ["trainer.max_steps=3", "trainer.num_train_epochs=null", "trainer.eval_steps=null", "trainer.logging_steps=1"]
FSDP = ["trainer.parallel=fsdp", "trainer.gradient_checkpointing=true"]
ROUTED = ("expert_tokens_mean", "expert_tokens_max", "expert_idle_share", "router_aux_loss")


def overrides(base: Path) -> list[str]:
    return [f"model.name={base}", *STEPS]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    write("qwen3_moe", folder / "base")
    done = launch(__file__, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(("run", "quantization"), [("whole", "nf4"), ("sharded", "fp32"), ("sharded in 4 bits", "nf4")])
def test_two_processes_train_what_one_trains(together: Path, tmp_path: Path, run: str, quantization: str) -> None:
    train(tmp_path / "alone", 4, *overrides(together / "base"), f"quantization={quantization}")
    assert len(one := losses(tmp_path / "alone")) == 3
    assert losses(together / run) == pytest.approx(one, rel=2e-5)
    expected, after = adapter(tmp_path / "alone"), adapter(together / run)
    assert expected.keys() == after.keys()
    assert sum(".experts." in name for name in expected) == 8
    assert all(torch.allclose(expected[name], after[name], rtol=1e-3, atol=2e-5) for name in expected)
    logged = [json.loads((folder / "history.json").read_text())[0] for folder in (tmp_path / "alone", together / run)]
    assert [logged[1][name] for name in ROUTED] == pytest.approx([logged[0][name] for name in ROUTED], rel=1e-4)


def main(folder: Path) -> None:
    distributed.init_process_group()
    keys = overrides(folder / "base")
    train(folder / "whole", 2, *keys, "quantization=nf4")
    train(folder / "sharded", 2, *keys, *FSDP, "quantization=fp32")
    train(folder / "sharded in 4 bits", 2, *keys, *FSDP, "quantization=nf4")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
