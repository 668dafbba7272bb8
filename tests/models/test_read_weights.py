"""A layer whose weight the model's code reads by itself is neither quantized nor adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.quantizers.base import get_keys_to_not_convert

from qlora.adapters.targets import find_targets
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.decoder import linear_modules
from qlora.models.read_weights import weights_read
from tests.models.bases import IDS, SMALL, load
from tests.models.bases import SHAPES as BASES

MAMBA = {"num_key_value_heads": 4, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 16}
GEMMA = {"head_dim": 16, "num_key_value_heads": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1600,
         "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8,
         "layer_types": ["sliding_attention", "full_attention"], "intermediate_size": 128}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "falcon_h1": SMALL | MAMBA,
    "gemma3n_text": SMALL | GEMMA,
    "mamba": BASES["mamba"],
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1600},
    "llama": SMALL,
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **IDS, **SHAPES[kind]))


def write(kind: str, folder: Path) -> Path:
    build(kind).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("falcon_h1", {"out_proj"}),
        ("gemma3n_text", {"prediction_coefs", "correction_coefs"}),
        ("mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("bloom", set()),
        ("llama", set()),
    ],
)
def test_layers_are_found_by_the_code_that_reads_them(kind: str, expected: set[str]) -> None:
    assert {name.rpartition(".")[2] for name in weights_read(build(kind))} == expected


class Describing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.placed, self.called = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.called.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(self.gate(x.to(self.gate.weight.dtype)).to(self.placed.weight.device))


def test_a_weight_that_is_described_is_told_from_one_that_is_computed_with() -> None:
    assert weights_read(Describing()) == {"gate": False}


@pytest.mark.parametrize("kind", ["falcon_h1", "gemma3n_text"])
def test_such_layers_stay_as_they_are_in_4_bits_and_get_no_adapter(kind: str, tmp_path: Path) -> None:
    model = load(write(kind, tmp_path))
    read = weights_read(model)
    assert read
    assert not any(isinstance(model.get_submodule(name), Linear4bit) for name in read)
    assert not isinstance(model.get_output_embeddings(), Linear4bit)
    others = [name for name in linear_modules(model) if name not in read]
    skipped = get_keys_to_not_convert(build(kind))  # as in any base
    assert {name for name in others if not isinstance(model.get_submodule(name), Linear4bit)} <= {*skipped}
    assert not read.keys() & set(find_targets(compose([]).lora, model).modules)
    model.train()(input_ids=torch.arange(5, 20)[None], labels=torch.arange(5, 20)[None], use_cache=False)


def test_one_that_is_asked_for_by_name_is_refused() -> None:
    lora = compose(["lora.target_modules=[in_proj,x_proj]"]).lora
    message = (
        r"lora\.target_modules \['x_proj'\]: the code of mamba reads the weight of such a layer without calling it"
    )
    with pytest.raises(UserError, match=message):
        find_targets(lora, build("mamba"))


def test_a_layer_of_a_class_of_its_own_that_maps_blocks_gets_no_adapter() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = DeepseekV4GroupedLinear(32, 64, n_groups=2)
    model.model.layers[0].self_attn.k_proj = FalconLinear(64, 64, bias=False)
    names = linear_modules(model)
    assert "model.layers.0.self_attn.q_proj" not in names
    assert "model.layers.0.self_attn.k_proj" in names
