"""A merged mixture has the tensors of its base's files, and answers as the adapter on the quantized base does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapters.adapted import Adapted, split_adapter
from qlora.adapters.merge_tensors import Merger
from qlora.config.schema import MergeBase
from qlora.errors import UserError
from qlora.experts.forward import ADAPTERS, ExpertAdapter
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.model_config import load_model_config
from qlora.models.weight_files import Checkpoint, ModelNames
from qlora.quantization.method import method_of
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from tests.models.bases import choose, in_4_bits, load, write

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe")
IDS = torch.arange(100, 132)[None]
FP32 = "quantization.compute_dtype=fp32"


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("bases") / request.param)


def attach(folder: Path, *overrides: str) -> PeftModel:
    """A base with random adapters on attention and on all experts."""
    torch.manual_seed(3)
    model = get_peft_model(load(folder, *overrides), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    for experts in find_experts(model).values():
        layout, adapters = ExpertsLayout.of(experts), {}
        for name, (rows, columns) in layout.projections.items():
            a, b = torch.randn(layout.count, 2, columns), torch.randn(layout.count, rows, 2)
            adapters[name] = ExpertAdapter(0.1 * a, 0.1 * b, 1.5)
        experts.__dict__[ADAPTERS] = adapters
    return model.eval()


def merge(folder: Path, target: Path, adapted: Adapted, base: MergeBase = MergeBase.dequantized) -> Merger:
    config = choose(folder, FP32)
    model_config = load_model_config(config.model)
    placement = find_placement(config.quantization, find_device(config.device))
    merger = Merger(Checkpoint(folder), ModelNames(model_config), adapted, base, torch.float32, placement)
    target.mkdir()
    merger.write(target, max_shard_size=10**9, on_progress=lambda done: None)
    settings: Any = load_model_config(config.model)
    settings.save_pretrained(target)
    return merger


def shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_slice(name).get_shape() for name in names}


@pytest.mark.matrix(1)
@torch.no_grad()
def test_the_merged_model_has_the_files_tensors_and_answers_as_the_adapter_does(folder: Path, tmp_path: Path) -> None:
    model = attach(folder, FP32)
    merger = merge(folder, tmp_path / "merged", split_adapter(model))
    assert shapes(tmp_path / "merged") == shapes(folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    experts = [label for label in merger.errors if ".experts." in label]
    assert len(experts) == sum(3 * ExpertsLayout.of(module).count for module in find_experts(model).values())
    assert all(merger.errors[label] < 0.2 for label in experts)


@pytest.mark.matrix(1)
@torch.no_grad()
def test_original_adds_the_adapter_to_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    merge(folder, tmp_path / "merged", split_adapter(attach(folder, FP32)), MergeBase.original)
    model = attach(folder, "quantization=fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_experts_that_are_saved_in_4_bits_are_decoded_into_the_merged_model(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "base")
    saved = in_4_bits(folder, tmp_path / "saved")
    model = attach(saved, FP32)
    merge(saved, tmp_path / "merged", split_adapter(model))
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    settings.pop("quantization_config")
    (tmp_path / "merged" / "config.json").write_text(json.dumps(settings))
    assert shapes(tmp_path / "merged") == shapes(folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.full
def test_experts_that_no_tensor_of_the_files_holds_are_refused(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    model = load(folder, FP32)
    adapted = Adapted(method_of(model), {}, rounded={"model.layers.0.mlp.experts.gate_up_proj": lambda weight: weight})
    with pytest.raises(UserError, match=r"no tensor in the files of the base holds .*gate_up_proj.* alone"):
        merge(folder, tmp_path / "merged", adapted)
