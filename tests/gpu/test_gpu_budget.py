"""On a GPU that is too small, steps continue with less memory, and a budget is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.planning.training_plan import build_plan
from qlora.quantization.bnb4.layers import set_compute_dtype
from qlora.run import Run
from qlora.runtime.device import Placement
from qlora.training.memory_budget import StepMemory
from tests.step.test_fast import batch, build, build_step, learn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = [
    *("model=llama-7b", "model.weights=random", "model.tokenizer=tiny", "lora.r=8", "lora.dropout=0.1"),
    *("model.architecture.num_hidden_layers=4", "model.architecture.vocab_size=2048", "trainer.max_steps=4"),
    *("trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2", "evaluation=loss"),
    *("data=local", "data.format=text", "data.eval_dataset_size=1", "data.source_max_len=null"),
    *("data.target_max_len=null", "data.max_length=2048", "evaluation.baseline=false", "task.predict=false"),
    *("trainer.eval_steps=null", "trainer.save_steps=null", "trainer.gradient_checkpointing=false"),
]


@pytest.fixture(autouse=True)
def whole_gpu() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def run(folder: Path, rows: Path, *overrides: str) -> dict[str, Any]:
    torch.cuda.empty_cache()
    return Run(compose([*SHAPE, f"data.path={rows}", *overrides]), folder).execute()["metrics"]


@pytest.fixture(scope="module")
def plain(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The metrics with no layer checkpointed, and with all."""
    folder = tmp_path_factory.mktemp("plain")
    chosen = {"none": "false", "all": "true"}
    return {name: run(folder / name, rows, f"trainer.gradient_checkpointing={on}") for name, on in chosen.items()}


def between(plain: dict[str, dict[str, Any]]) -> float:
    """Returns bytes in which some layers must be checkpointed, and not all."""
    least, most = (plain[name]["peak_memory_gb"] * 1e9 for name in ("all", "none"))
    assert most > 1.3 * least
    return (least + most) / 2


def test_steps_that_run_out_of_memory_are_run_again_and_learn_the_same(
    plain: dict[str, dict[str, Any]], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fraction = between(plain) / torch.cuda.get_device_properties(0).total_memory
    begin = StepMemory.begin

    def begin_on_a_small_gpu(memory: StepMemory) -> None:
        torch.cuda.set_per_process_memory_fraction(fraction)
        begin(memory)

    monkeypatch.setattr(StepMemory, "begin", begin_on_a_small_gpu)
    results = run(tmp_path / "run", rows)
    assert 1 <= results["train_memory_retries"] <= 2
    for name in ("train_loss", "eval_loss"):
        assert results[name] == pytest.approx(plain["none"][name], rel=1e-3)


def test_a_budget_is_kept(plain: dict[str, dict[str, Any]], rows: Path, tmp_path: Path) -> None:
    budget = round(between(plain) / 1e6)
    results = run(tmp_path / "run", rows, f"trainer.memory_budget={budget}MB")
    print(f"budget {budget / 1e3:.2f} GB, peak {results['peak_memory_gb']:.2f} GB, {plain}")
    assert plain["all"]["peak_memory_gb"] < results["peak_memory_gb"] <= budget / 1e3
    assert results["eval_loss"] == pytest.approx(plain["none"]["eval_loss"], rel=1e-3)


def test_the_whole_gpu_needs_no_layer_checkpointed(
    plain: dict[str, dict[str, Any]], rows: Path, tmp_path: Path
) -> None:
    results = run(tmp_path / "run", rows, "trainer.memory_budget=auto", "trainer.gradient_checkpointing=true")
    assert results["train_memory_retries"] == 0
    assert results["peak_memory_gb"] == pytest.approx(plain["none"]["peak_memory_gb"], rel=0.02)


def test_what_no_plan_makes_fit_ends_in_one_sentence(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"4 layers checkpointed, .* in 4 parts; take a larger trainer.memory_budget, shorter"
    ):
        run(tmp_path / "run", rows, "trainer.memory_budget=100MB")


def test_a_budget_hardly_larger_than_what_is_needed_is_kept_with_all_gaps(rows: Path, tmp_path: Path) -> None:
    chosen = ["model=llama-13b", "model.architecture.vocab_size=32000", "model.architecture.num_hidden_layers=40"]
    chosen += ["lora.r=64", "data.max_length=512", "trainer.per_device_train_batch_size=1", f"data.path={rows}"]
    needed = build_plan(compose([*SHAPE, *chosen, "trainer.gradient_checkpointing=true", "plan.device=h200"]))
    budget = 1.06 * (needed.memory.peak + needed.memory.paged)
    chosen += [f"trainer.memory_budget={round(budget / 1e6)}MB", "trainer.max_steps=3", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "qlora", *SHAPE, *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["train_memory_retries"] == 0
    assert metrics["peak_memory_gb"] <= budget / 1e9


def test_offloaded_inputs_change_no_bit_and_leave_the_gpu() -> None:
    placement = Placement(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    model, config = build(overrides=("trainer.fused_attention=auto",), num_hidden_layers=8)
    model.to("cuda", torch.bfloat16)
    set_compute_dtype(model, torch.bfloat16)
    rows = {name: tensor.repeat(64, 4).cuda() for name, tensor in batch().items()}
    step = build_step(model, config, placement)
    step.checkpointed = 8
    results, held = [], []
    for step.offloaded in (0, 8):
        with step, placement.autocast():
            results.append(learn(model, rows, num_items_in_batch=31))
            allocated = torch.cuda.memory_allocated()
            kept = model(**rows, num_items_in_batch=31).loss
            held.append(torch.cuda.memory_allocated() - allocated)
            del kept
    (loss, gradients), (other, others) = results
    assert loss == other
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    inputs = 8 * rows["input_ids"].numel() * 256 * 2
    assert held[0] - held[1] > 0.8 * inputs
