"""A GGUF file answers in llama.cpp as its model does in transformers, for every family that is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.config.compose import compose
from qlora.errors import DataError
from qlora.models.tokenizer import load_tokenizer
from tests.export.engines import divergence, llama_cpp, model_file, write

pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 1600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA2 = {"query_pre_attn_scalar": 32, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                                "norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3_text": ("gemma3_text", {**GEMMA2, "num_hidden_layers": 7}),
}  # fmt: skip


def build(folder: Path, kind: str, settings: dict[str, Any]) -> torch.nn.Module:
    """Saves a model with random weights, large enough that each layer matters, and the embedded tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3, mean=0.0)
        if name.endswith("norm.weight") and "gemma" not in kind:
            parameter.data += 1
    model.save_pretrained(folder)
    load_tokenizer(compose([]).model).save_pretrained(folder)
    return model


PROMPTS = [[1, *range(5, 5 + length)] for length in (1, 4, 30, 100)]


@pytest.mark.matrix(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_in_llama_cpp_as_in_transformers(tmp_path: Path, name: str) -> None:
    kind, settings = FAMILIES[name]
    model = build(tmp_path / "model", kind, settings)
    path = write(tmp_path / "model", tmp_path / "model.gguf")
    with llama_cpp(path, load_tokenizer(compose([]).model), 1600) as engine:
        assert divergence(model, engine, PROMPTS) < 1e-3
        assert engine.served.precision == "F16"


@pytest.mark.parametrize(
    ("kind", "settings", "cause"),
    [
        ("gpt_neox", {}, "a model of type gpt_neox is not written as GGUF here"),
        ("llama", {"rope_parameters": {**YARN, "rope_type": "dynamic"}}, "rope of the type dynamic"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "attention scaled by 7"),
        ("gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 2}, "this order of layers with a sliding window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "router weights that are not normalised"),
        ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "YaRN and its beta_fast"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused_in_a_sentence(
    kind: str, settings: dict[str, Any], cause: str
) -> None:
    from qlora.export.architectures import find_architecture

    sizes = SIZES if kind != "gpt_neox" else {}
    with pytest.raises(DataError) as error:
        find_architecture(AutoConfig.for_model(kind, **{**sizes, **settings}), "export.format=gguf")
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_another_family_names_the_script_of_llama_cpp() -> None:
    from qlora.export.architectures import find_architecture

    with pytest.raises(DataError, match=r"convert_hf_to_gguf\.py"):
        find_architecture(AutoConfig.for_model("gpt2"), "export.format=gguf")


def test_a_window_that_llama_cpp_leaves_out_limits_the_context(tmp_path: Path) -> None:
    import gguf

    build(tmp_path / "model", "mistral", {"sliding_window": 64})
    path = write(tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["llama.context_length"].contents() == 64


def test_eight_bits_are_near_and_a_row_that_is_no_multiple_of_a_block_stays_in_16(tmp_path: Path) -> None:
    import gguf

    model = build(tmp_path / "model", "llama", {"intermediate_size": 100})
    path = write(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    with llama_cpp(path, load_tokenizer(compose([]).model), 1600) as engine:
        assert divergence(model, engine, PROMPTS) < 1e-2


def test_numbers_that_float16_cannot_hold_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama", {})
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"blk\.0\.ffn_up\.weight holds numbers too large for f16"):
        write(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_same_tensors_are_named_once_where_matrices_are_tied(tmp_path: Path) -> None:
    build(tmp_path / "model", "qwen2", {"head_dim": 16, "tie_word_embeddings": True})
    names = [tensor.name for tensor in model_file(tmp_path / "model").gguf_tensors()]
    assert len(names) == len(set(names))
    assert "output.weight" not in names
