"""What needs a GPU: 4-bit training computes in the native precision, learns, and measures its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora.compose import compose
from qlora.models.device import find_device, place
from qlora.run import Run
from qlora.schema import Device

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
    assert place(compose([]).quantization, device).compute is (torch.bfloat16 if native else torch.float16)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_wide_layers_train_on_the_gpu(tmp_path: Path, quantization: str) -> None:
    metrics = Run(compose([*SHAPE, f"quantization={quantization}"]), tmp_path).execute()["metrics"]
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert 0 < metrics["peak_memory_gb"] < 20


def test_an_evaluation_before_training_leaves_the_gradients_unchanged(tmp_path: Path) -> None:
    run = Run(compose([*SHAPE, "lora.dropout=0"]), tmp_path)
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
