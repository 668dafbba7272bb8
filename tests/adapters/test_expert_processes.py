"""Adapters on experts that two processes train are those that one trains.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from qlora.experts.layout import Placeholder
from qlora.quantization.bnb4.expert_unit import QuantizedUnit
from qlora.runtime import distributed
from qlora.step.layers import find_layers
from qlora.step.shard import shard_base
from tests.models.bases import write
from tests.step.test_fast_experts import attach
from tests.test_many import adapter, launch, losses, train

STEPS = ["trainer.max_steps=3", "trainer.num_train_epochs=null", "trainer.eval_steps=null", "trainer.logging_steps=1"]
FSDP = ["trainer.parallel=fsdp", "trainer.gradient_checkpointing=true"]
RUNS = {
    "whole": ["quantization=nf4"],
    "sharded": [*FSDP, "quantization=fp32"],
    "sharded in 4 bits": [*FSDP, "quantization=nf4"],
    "sharded in the fast step": [*FSDP, "quantization=nf4", "trainer.fused_experts=true", "trainer.fused_linear=true"],
}
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


@pytest.mark.matrix(1)
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_train_what_one_trains(together: Path, tmp_path: Path, run: str) -> None:
    alone = [key for key in RUNS[run] if key not in FSDP]
    train(tmp_path / "alone", 4, *overrides(together / "base"), *alone)
    assert len(one := losses(tmp_path / "alone")) == 3
    assert losses(together / run) == pytest.approx(one, rel=2e-5)
    expected, after = adapter(tmp_path / "alone"), adapter(together / run)
    assert expected.keys() == after.keys()
    assert sum(".experts." in name for name in expected) == 8
    assert all(torch.allclose(expected[name], after[name], rtol=1e-3, atol=2e-5) for name in expected)
    logged = [json.loads((folder / "history.json").read_text())[0] for folder in (tmp_path / "alone", together / run)]
    assert [logged[1][name] for name in ROUTED] == pytest.approx([logged[0][name] for name in ROUTED], rel=1e-4)


def test_each_process_keeps_half_of_the_experts_and_gives_the_answers_of_the_whole(together: Path) -> None:
    for rank in (0, 1):
        held = json.loads((together / f"held-{rank}.json").read_text())
        assert held["part"] == held["after"] == held["whole"] // 2
        assert held["equal"]
        assert held["placeholders"] == 2 * 2  # layers and projections: as they were, without storage


def sharded_answers(base: Path) -> dict[str, int]:
    """Returns the bytes of packed experts that this process holds, before and after the model is called."""
    ids, cpu = torch.arange(24).view(2, 12), torch.device("cpu")
    expected = attach(base, "quantization=nf4").eval()(input_ids=ids).logits
    model = attach(base, "quantization=nf4").eval()

    def units() -> list[QuantizedUnit]:
        return [module for module in model.modules() if isinstance(module, QuantizedUnit)]

    whole = sum(unit.packed.nbytes for unit in units())
    shard_base(model, cpu, distributed.world_size())
    part = sum(unit.packed.to_local().nbytes for unit in units())
    equal = torch.equal(model(input_ids=ids).logits, expected)
    for layer in find_layers(model.get_base_model()):
        layer.reshard()
    after = sum(unit.packed.to_local().nbytes for unit in units())
    placeholders = sum(isinstance(weight, Placeholder) for weight in model.parameters())
    return {"whole": whole, "part": part, "after": after, "equal": equal, "placeholders": placeholders}


def main(folder: Path) -> None:
    distributed.init_process_group()
    keys = overrides(folder / "base")
    for name, choices in RUNS.items():
        train(folder / name, 2, *keys, *choices)
    held = sharded_answers(folder / "base")
    distributed.barrier()
    (folder / f"held-{distributed.rank()}.json").write_text(json.dumps(held))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
