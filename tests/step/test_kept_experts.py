"""Decoded experts that are kept where memory is free give the bits of experts that each pass decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.models.fingerprint import adapter_digest
from qlora.objectives import build_objective
from qlora.run import Run
from qlora.runtime import console
from qlora.step.fast_step import FastStep
from qlora.tasks import build_trainer
from qlora.training.memory_budget import Budget, Formula, MemoryPlan
from tests.models.bases import write
from tests.step.test_fast_experts import CPU, OFF, WIDTHS, attach, learn

FP8 = ("trainer.fused_linear=true", "quantization.compute=fp8")
FAST = ("trainer.fused_experts=true", "trainer.gradient_checkpointing=false")
RUN = [
    *("lora.r=4", "lora.dropout=0.1", "recipe=none", "trainer.eval_steps=2", "trainer.warmup_steps=0", *FAST[:1]),
    *("data.max_train_samples=8", "data.max_eval_samples=4", "evaluation=loss", "task.predict=false"),
    *("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.optim=adamw_torch"),
    *("model.tokenizer=tiny", "trainer.max_steps=3", "trainer.num_train_epochs=null", "evaluation.baseline=false"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen3_moe", tmp_path_factory.mktemp("base") / "qwen3_moe", **WIDTHS)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("overrides", "layers"),
    [((), 2), (FP8, 2), (("trainer.compile=true",), 1)],  # each layer is compiled for itself, kept or not
    ids=["native", "fp8", "compiled"],
)
def test_loss_and_gradients_have_the_bits_of_experts_decoded_anew(
    overrides: tuple[str, ...], layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write("qwen3_moe", tmp_path, **WIDTHS, num_hidden_layers=layers)
    model = attach(base, "quantization=nf4", "lora.dropout=0")
    expected, _ = learn(model, *FAST, *overrides)
    enter = FastStep.__enter__
    monkeypatch.setattr(FastStep, "__enter__", lambda step: (step.keep(layers), enter(step))[1])
    actual, step = learn(model, *FAST, *overrides)
    assert step.kept == layers
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("overrides", "copies", "width"), [((), 1, 4), (FP8, 2, 1)], ids=["native", "fp8"])
def test_what_is_kept_is_decoded_once_and_freed(
    base: Path, overrides: tuple[str, ...], copies: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.step.kernels import experts as kernels

    decodings: list[Any] = []
    decode = kernels.decode_experts

    def note(tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if kernels.is_quantized(tensors):
            decodings.append(tensors)
        return decode(tensors, *args, **kwargs)

    monkeypatch.setattr(kernels, "decode_experts", note)
    model = attach(base, "quantization=nf4", "lora.dropout=0")
    config = compose([*OFF, *FAST, *overrides])
    step = FastStep(model, config.trainer, config.quantization, CPU, None, build_objective(config.loss))
    first, _ = (module.fast_experts for module in model.modules() if "fast_experts" in vars(module))
    packed = first.first
    step.keep(1)
    assert (len(decodings), step.kept, step.packed_experts) == (2 * copies, 1, 2)
    held = sum(tensor.nbytes for weights in (first.first, first.down) for tensor in weights.tensors)
    assert held == 4 * 3 * 64 * 64 * copies * width  # experts, matrices and their sizes
    ids = torch.arange(32).view(2, 16)
    with step:
        model(input_ids=ids, labels=ids, num_items_in_batch=30).loss.backward()
    assert len(decodings) == 2 * copies + 4  # the other layer's, forward and backward
    step.keep(0)
    assert first.first is packed
    assert step.kept == 0


def test_a_run_that_keeps_them_ends_with_the_adapter_of_one_that_does_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def run(name: str) -> str:
        Run(compose([*RUN, f"model.name={base}"]), tmp_path / name).execute()
        return adapter_digest(tmp_path / name / "adapter")

    expected = run("decoded")
    keep = FastStep.keep
    monkeypatch.setattr(FastStep, "keep", lambda step, layers: (kept.append(layers), keep(step, layers)))
    monkeypatch.setattr(build_trainer, "build_budget", lambda *args, **kwargs: FreeMemory())
    assert run("kept") == expected
    # Two micro-batches a step; measuring after the second step and the end of training free them.
    assert kept == [2] * 4 + [0] + [2] * 2 + [0] * (len(kept) - 7)
    assert len(kept) > 7


class FreeMemory(Budget):
    """A budget that keeps two layers' experts, on a CPU."""

    def __init__(self) -> None:
        formula = Formula(0, True, lambda *args: 1, 2, 64, mixed=2, decoded=1)
        super().__init__(formula, 2, 100, None, torch.device("cpu"))

    def measured(self, *args: Any) -> Any:
        return self.kept()


def test_a_budget_keeps_as_many_as_fit_beside_the_optimizer_once_nothing_is_recomputed() -> None:
    def choose(limit: float, optimizer: float = 0) -> MemoryPlan:
        formula = Formula(
            50, False, lambda checkpointed, *_: 30 - 5 * checkpointed, 2, 3, mixed=4, decoded=7, optimizer=optimizer
        )
        return Budget(formula, 4, limit, None, torch.device("cpu")).choose()

    assert choose(108) == MemoryPlan(0, kept=4)
    assert choose(107) == MemoryPlan(0, kept=3)
    assert choose(107, optimizer=36) == MemoryPlan(0, kept=3)
    assert choose(107, optimizer=37) == MemoryPlan(0, kept=2)
    assert choose(86) == MemoryPlan(0)
    assert choose(79) == MemoryPlan(1)
    assert MemoryPlan(0, kept=3).leaner(4, 1) == MemoryPlan(0)
    assert str(MemoryPlan(0, kept=3)) == "3 layers with decoded experts, 0 layers checkpointed"


def test_the_start_screen_says_whether_they_are_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "say_rows", lambda rows: said.extend(text for _, text in rows))
    model = attach(base, "quantization=nf4")
    config = compose([*OFF, *FAST])
    step = FastStep(model, config.trainer, config.quantization, CPU, None, build_objective(config.loss))
    build_trainer._say_step(step, None)
    build_trainer._say_step(step, FreeMemory())
    anew, kept = said
    assert anew.endswith("; experts decoded in each pass: no trainer.memory_budget says that memory is free")
    assert kept.endswith("; decoded experts of 2 of 2 layers kept")
