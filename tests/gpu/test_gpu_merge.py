"""Merging on a GPU: the merged model answers as the adapter on its base, whose weights are the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file

from qlora.config.compose import compose
from qlora.run import Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = [
    *("model=llama-7b", "model.weights=random", "model.tokenizer=tiny", "data=demo", "lora.r=8"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.vocab_size=2048", "trainer.max_steps=4"),
    *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1", "evaluation=loss"),
    *("data.max_eval_samples=16", "trainer.eval_steps=null", "task.predict=false"),
]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_wide_layers_merge_to_the_same_answers(tmp_path: Path, quantization: str, dtype: str) -> None:
    chosen = [*SHAPE, f"quantization={quantization}"]
    Run(compose(chosen), tmp_path).execute()
    Run(compose([*chosen, "task=merge", f"merge.dtype={dtype}"]), tmp_path).execute()
    report = json.loads((tmp_path / "merge_report.json").read_text())
    assert report["accepted"]
    if quantization in ("nf4", "fp4") and dtype == "fp32":
        assert report["kl_mean"] < 1e-4
        run = Run(compose([*chosen, "task=merge"]), tmp_path).session
        model = run.load_trained().get_base_model()
        layer = model.model.layers[1].mlp.down_proj
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        delta = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(merged, (weight + delta).cpu())
