"""A base that is sharded: what it is stored as, and that the fast step learns from it what it learns from a whole one.

Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.tensor import DTensor

from qlora.runtime import distributed
from qlora.step.parts.fused_linear import FastLinear
from qlora.step.shard import _store_as_floats, shard_base

ROOT = Path(__file__).parents[2]
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "linear": ((), 0),
    "checkpointed": ((), 2),
    "fp8": (("quantization.compute=fp8",), 2),
    "compiled": (("trainer.compile=true", "trainer.fused_loss=auto"), 2),
}
"""Overrides and how many of the three layers are checkpointed."""


def test_every_byte_of_a_4_bit_weight_survives_a_copy_by_way_of_32_bits() -> None:
    """On a GPU torch's copy of several tensors computes in 32 bits, where 16-bit numbers that are none change."""
    layer = torch.nn.Sequential(Linear4bit(512, 512, bias=False, quant_type="nf4"))
    layer.to("cpu")
    packed = layer[0].weight.data
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    packed.copy_(pairs.view_as(packed))
    _store_as_floats(layer)
    saved = layer[0].weight.data
    assert saved.is_floating_point()
    assert len(saved) % 2 == 0
    copied = saved.to(torch.float32).to(saved.dtype)
    assert torch.equal(copied.view(torch.uint8).view(-1), pairs.view(-1)[: packed.numel()])


def learn_in_two_processes(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Returns what each of two processes found, by case."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder), *names],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found, by case, without compiled layers."""
    return learn_in_two_processes(tmp_path_factory.mktemp("sharded"), *(name for name in CASES if name != "compiled"))


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in CASES if name != "compiled"])
def test_fused_layers_learn_from_a_sharded_base_what_they_learn_from_a_whole_one(
    results: list[dict[str, Any]], name: str
) -> None:
    assert results[0][name]["sharded"]["loss"] != results[1][name]["sharded"]["loss"]  # of other rows
    for local in (item[name] for item in results):
        whole, sharded = local["whole"], local["sharded"]
        assert local["fused"] == 7 * 3
        assert sharded["parts"]["fused_linear"] == "on"
        assert sharded["parts"].get("fp8", "on") == "on"
        assert sharded["loss"] == whole["loss"]
        assert sharded["gradients"].keys() == whole["gradients"].keys()
        assert all(torch.equal(sharded["gradients"][key], whole["gradients"][key]) for key in whole["gradients"])
        assert sharded["evaluated"] == whole["evaluated"]


@pytest.mark.full
def test_sharded_layers_are_compiled_once_and_learn_the_same(tmp_path: Path) -> None:
    for local in (item["compiled"] for item in learn_in_two_processes(tmp_path, "compiled")):
        whole, sharded = local["whole"], local["sharded"]
        assert sharded["parts"]["compile"] == sharded["parts"]["fused_linear"] == "on"
        assert sharded["graphs"] == 2  # the first layer's input needs no gradient
        assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        for key, gradient in whole["gradients"].items():
            assert (sharded["gradients"][key] - gradient).norm() <= 1e-5 * gradient.norm(), key
        assert sharded["evaluated"] == whole["evaluated"]


def test_each_process_keeps_half_of_the_bytes_before_and_after_a_step(results: list[dict[str, Any]]) -> None:
    whole = 3 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 320) // 2
    assert [local["linear"]["held"] for local in results] == [[whole // 2, whole // 2]] * 2


def main(folder: Path, *names: str) -> None:
    from tests.step.test_fast import batch, build, build_step, learn

    def train(name: str, *, shards: bool) -> tuple[dict[str, Any], Any]:
        overrides, checkpointed = CASES[name]
        if not shards:
            overrides = tuple(item for item in overrides if item != "trainer.compile=true")
        model, config = build(overrides=overrides)
        if name == "fp8":
            model.to(torch.bfloat16)
        rows = batch(seed=2 + distributed.rank())
        held = [0, 0]
        if shards:
            shard_base(model, torch.device("cpu"), distributed.world_size())
            held[0] = held_bytes(model)
        step = build_step(model, config)
        step.checkpointed = checkpointed
        for _ in range(2):  # weights that are put together anew lie where they lay before
            with step:
                loss, gradients = learn(model, rows, num_items_in_batch=31)
                fused = sum(isinstance(module, FastLinear) for module in model.modules())
        held[1] = held_bytes(model) if shards else 0
        evaluated = learn(model.eval(), rows)[0]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        mine = {"loss": loss, "gradients": gradients, "evaluated": evaluated, "parts": step.parts, "graphs": graphs}
        return mine, (held, fused)

    distributed.init_process_group()
    results = {}
    for name in names:
        whole, _ = train(name, shards=False)
        sharded, (held, fused) = train(name, shards=True)
        results[name] = {"whole": whole, "sharded": sharded, "held": held, "fused": fused}
    torch.save(results, folder / f"{distributed.rank()}.pt")
    distributed.destroy_process_group()


def held_bytes(model: torch.nn.Module) -> int:
    """Returns how many bytes of the 4-bit weights this process holds."""
    weights = [item.weight for item in model.modules() if isinstance(item, Linear4bit)]
    assert all(isinstance(weight, DTensor) for weight in weights)
    return sum(weight.to_local().nbytes for weight in weights)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
