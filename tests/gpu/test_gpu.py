"""What needs a GPU: 4-bit training computes in the native precision, learns, and measures its memory."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qlora.config.compose import compose
from qlora.config.schema import Device
from qlora.quantization.placement import find_placement
from qlora.run import Run
from qlora.runtime.device import find_device, matrix_rate
from qlora.training.trainer import QLoraTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = [
    *("model=llama-7b", "model.weights=random", "model.tokenizer=tiny", "data=demo", "lora.r=8"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.vocab_size=2048", "trainer.max_steps=4"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1", "evaluation=loss"),
    *("data.max_eval_samples=16", "trainer.eval_steps=null", "generation.max_new_tokens=4"),
]


def test_the_gpu_is_found_and_computes_in_its_native_precision() -> None:
    device = find_device(Device.auto)
    assert device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert find_placement(compose([]).quantization, device).compute_dtype is (
        torch.bfloat16 if native else torch.float16
    )


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_wide_layers_train_on_the_gpu(tmp_path: Path, quantization: str) -> None:
    metrics = Run(compose([*SHAPE, f"quantization={quantization}"]), tmp_path).execute()["metrics"]
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert 0 < metrics["peak_memory_gb"] < 20


def test_scaled_losses_train_with_paged_optimizers(tmp_path: Path) -> None:
    overrides = ["quantization.compute_dtype=fp16", "trainer.optim=paged_adamw_32bit"]
    metrics = Run(compose([*SHAPE, *overrides]), tmp_path).execute()["metrics"]
    assert metrics["eval_loss"] < metrics["base_eval_loss"]


def test_a_training_run_reports_its_fraction_of_the_gpu_s_speed_and_its_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = matrix_rate(torch.device("cuda"), torch.bfloat16)
    assert rate is not None
    assert rate > 1e12
    result = Run(compose([*SHAPE, "trainer.max_steps=8", "trainer.profile=true"]), tmp_path).execute()
    assert 0 < result["metrics"]["train_mfu"] < 1
    assert Path(result["paths"]["profile"]).is_file()
    text = capsys.readouterr().out
    assert "  kernel" in text
    assert "ProfilerStep" not in text


class Watched(TrainerCallback):
    """Has torch warn of every wait for the GPU between the begin of a step and the optimizer's."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._stack = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 2:  # the first ones compile
            self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 2:
            torch.cuda.set_sync_debug_mode("default")
            self._stack.close()
            self.waits += [
                f"{item.filename}:{item.lineno}"
                for item in self._caught
                if "called a synchronizing" in str(item.message)
            ]


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
def test_forward_and_backward_passes_wait_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    watched, build = Watched(), QLoraTrainer.__init__

    def init(self: QLoraTrainer, **parts: Any) -> None:
        build(self, **{**parts, "callbacks": [*parts["callbacks"], watched]})

    monkeypatch.setattr(QLoraTrainer, "__init__", init)
    packs = ["data.packing=true", "data.pack_length=128"] if packing else []
    Run(compose([*SHAPE, *packs, "trainer.gradient_accumulation_steps=2", "trainer.max_steps=6"]), tmp_path).execute()
    assert watched.waits == []


def test_an_evaluation_before_training_leaves_the_gradients_unchanged(tmp_path: Path) -> None:
    run = Run(compose([*SHAPE, "lora.dropout=0"]), tmp_path).session
    model = run.add_adapter(run.load_base())
    ids = torch.arange(3, 67, device="cuda")[None]

    def gradients() -> torch.Tensor:
        model.train()
        model.zero_grad()
        with run.placement.autocast():
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    fresh = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.nn.functional.cosine_similarity(fresh, gradients(), dim=0) > 0.999
