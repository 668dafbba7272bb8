"""Shapes that are read from transformers' own model, against real models and against the table of families."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import BF16, composed, saved_bytes, setup
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import qlora.models.meta_layout
from qlora import adapters
from qlora.config.options import model_presets
from qlora.config.schema import described_settings
from qlora.errors import ConfigError, DataError
from qlora.models import loading
from qlora.models.json_files import read_object
from qlora.models.random_weights import RandomWeights
from qlora.planning.built_shape import build_shape
from qlora.planning.memory_plan import Ledger
from qlora.planning.model_shape import Shape
from qlora.planning.read_shape import read_shape
from qlora.planning.time_plan import count_operations
from tests import real_models
from tests.planning import test_mixture_plan

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 2048,
}  # fmt: skip
HEADS = SIZES | {"head_dim": 32}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
GEMMA_4 = HEADS | {"vocab_size_per_layer_input": 96, "global_head_dim": 48, "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", HEADS | DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", HEADS | DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_next": ("qwen3_next", HEADS | DELTA | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "gemma4": ("gemma4_text", GEMMA_4 | {
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "gemma4_moe": ("gemma4_text", GEMMA_4 | {
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 48, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "glm4_moe": ("glm4_moe", HEADS | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}),
    "glm4": ("glm4", HEADS),
    "ernie4_5": ("ernie4_5", HEADS),
    "ernie4_5_moe": ("ernie4_5_moe", SIZES | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 1}),
    "lfm2": ("lfm2", SIZES | {"full_attn_idxs": [2], "block_multiple_of": 8}),
    "lfm2_moe": ("lfm2_moe", SIZES | EXPERTS | {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 1}),
    "granite": ("granite", SIZES),
    "granitemoehybrid": ("granitemoehybrid", SIZES | MAMBA | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention", "mamba", "mamba"]}),
    "olmo2": ("olmo2", SIZES),
    "olmo3": ("olmo3", SIZES),
    "smollm3": ("smollm3", SIZES | {"bos_token_id": 1}),
    "ministral": ("ministral", HEADS),
    "ministral3": ("ministral3", HEADS),
    "cohere2": ("cohere2", HEADS),
    "exaone4": ("exaone4", HEADS),
    "seed_oss": ("seed_oss", HEADS),
    "hunyuan": ("hunyuan_v1_dense", HEADS),
    "apertus": ("apertus", SIZES),
    "nemotron": ("nemotron", HEADS),
    "gemma3n": ("gemma3n_text", HEADS | {
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 2,
        "intermediate_size": [160] * 4, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "bamba": ("bamba", SIZES | MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", HEADS | MAMBA | {"mamba_d_ssm": 128}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 256}),
    "starcoder2": ("starcoder2", SIZES),
    "stablelm": ("stablelm", SIZES),
    "phi": ("phi", SIZES),
}  # fmt: skip
"""Small models by what is particular in them: their type and settings."""


def shape(name: str, **sizes: Any) -> Shape:
    kind, settings = KINDS[name]
    return read_shape({"model_type": kind, **settings, **sizes}, "test")


def config_of(name: str, **sizes: Any) -> Any:
    kind, settings = KINDS[name]
    return AutoConfig.for_model(kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings, **sizes})


def base(name: str, *overrides: str, **sizes: Any) -> PreTrainedModel:
    config = composed(*overrides)
    weights = RandomWeights(config_of(name, **sizes), placement=BF16, seed=0)
    return loading.build_random_base(config.model, config.quantization, weights)


def adapted(name: str, *overrides: str, **sizes: Any) -> Any:
    overrides = ("lora.r=8", "lora.expert_r=4", "lora.dropout=0", *overrides)
    if shape(name).experts is None:
        overrides = tuple(word for word in overrides if "expert" not in word)
    config = composed(*overrides)
    model = adapters.add_lora(config.lora, base(name, *overrides, **sizes), tensors=list, new_token_ids=[], batches=[])
    model.config.use_cache = False
    return model.train()


@pytest.mark.matrix(6)
@pytest.mark.parametrize("name", KINDS)
def test_parameters_and_their_bytes_are_those_of_the_model(name: str) -> None:
    sizes = shape(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    as_loaded = model.config.to_dict()  # what a run knows of its base
    assert build_shape(as_loaded, "test") == replace(sizes, context=build_shape(as_loaded, "test").context)
    packed = base(name)
    placed = [parameter for parameter in packed.parameters() if parameter.dtype is not torch.uint8]
    experts = {id(getattr(module, projection)) for module in qlora.models.meta_layout.find_experts(packed).values()
               for projection in qlora.models.meta_layout.ExpertsLayout.of(module).projections}  # fmt: skip
    plain = sum(2 * parameter.numel() for parameter in placed if id(parameter) not in experts)
    assert Ledger(sizes, setup(sizes)).unquantized == plain
    linears = {path: linear for layer in range(sizes.layers) for path, linear in sizes.full_names(layer).items()}
    for path, linear in linears.items():
        if not linear.is_quantized:
            assert not hasattr(packed.get_submodule(path).weight, "quant_state"), path
            continue
        assert packed.get_submodule(path).weight.quant_state.shape == (linear.outputs, linear.inputs), path


@pytest.mark.matrix(6)
@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_on_what_training_puts_them_on(name: str) -> None:
    sizes = shape(name)
    trained = [parameter for parameter in adapted(name).parameters() if parameter.requires_grad]
    ledger = Ledger(sizes, setup(sizes, expert_r=4 if sizes.experts is not None else 0))
    assert sorted(ledger.trained.elements()) == sorted(parameter.numel() for parameter in trained)


TABLE = {**real_models.KINDS, **test_mixture_plan.KINDS}


@pytest.mark.parametrize("kind", TABLE)
def test_the_table_of_families_says_what_the_modules_say(kind: str) -> None:
    """Both ways to a shape agree, so that a plan without torch is one of the same formula."""
    defaults = AutoConfig.for_model(kind).to_dict()
    settings = {"model_type": kind, **TABLE[kind], "num_hidden_layers": 6, "pad_token_id": 0}
    settings |= {"sliding_window": 32} if "sliding_window" in defaults else {}
    settings |= {"use_sliding_window": True, "max_window_layers": 2} if "use_sliding_window" in defaults else {}
    settings |= {"q_lora_rank": None} if settings.get("q_lora_rank") == 0 else {}
    table, built = read_shape(settings, "test"), build_shape(AutoConfig.for_model(**settings).to_dict(), "test")
    for name in ("parameters", "active_parameters", "linear_weights", "expert_weights", "unquantized", "windows"):
        assert getattr(table, name) == getattr(built, name), name
    assert count_operations(table, 100) == count_operations(built, 100)
    for layer in range(table.layers):
        known, read = table.layer(layer), built.layer(layer)
        assert table.full_names(layer).keys() <= built.full_names(layer).keys()
        assert (known.feed_forward, known.has_experts) == (read.feed_forward, read.has_experts)
        assert sum(width for width, _ in known.norms) == sum(width for width, _ in read.norms), kind


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    "name",
    [
        *("smollm3", "ministral", "ministral3", "olmo2", "olmo3", "glm4", "glm4_moe", "ernie4_5", "ernie4_5_moe"),
        *("granite", "exaone4", "hunyuan", "cohere2"),
    ],
)
def test_what_a_layer_keeps_is_estimated_within_a_tenth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, length = shape(name, num_hidden_layers=3), 128
    ledger = Ledger(sizes, setup(sizes, length=length, expert_r=4 if sizes.experts is not None else 0))
    three, two = (saved_bytes(adapted(name, num_hidden_layers=count), monkeypatch, 1, length) for count in (3, 2))
    planned = ledger.saved(2) + ledger.activations.copies(2, ledger.targets[2])
    assert planned == pytest.approx(three - two, rel=0.1)


PRESETS = model_presets()


@pytest.mark.matrix(12)
@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_of_a_preset_are_counted_to_the_last(name: str) -> None:
    settings = described_settings(PRESETS[name]["architecture"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert read_shape(settings, name).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_layer_with_a_window_computes_the_pairs_inside_of_it() -> None:
    sizes = shape("olmo3", sliding_window=32, layer_types=["sliding_attention"] * 3 + ["full_attention"])
    operations = count_operations(sizes, 0)
    width = 3.5 * 2 * 2 * 64
    assert operations.per_pair == {None: width, 32: 3 * width}
    assert operations.total(10, 55, 40) == 10 * operations.per_token + 55 * width + 40 * 3 * width


def test_a_recurrence_computes_its_state_for_each_token() -> None:
    sizes = shape("qwen3_5")
    channels = 2 * 2 * 16 + 4 * 16
    assert [mixer.state for mixer in sizes.layer(0).mixers] == [3 * 4 * 16 * 16 + 4 * channels]
    assert [bool(sizes.layer(layer).mixers[0].queries) for layer in range(4)] == [False, False, False, True]
    hybrid, without = count_operations(sizes, 0), 6 * (sizes.linear_weights + sizes.hidden * sizes.vocabulary)
    assert hybrid.per_token == without + 6 * 3 * sizes.layer(0).mixers[0].state


def test_what_was_read_of_a_model_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model_type": "glm4", **HEADS, "vocab_size": 100}
    read = read_shape(settings, "test", tmp_path)
    assert len([*tmp_path.iterdir()]) == 1
    monkeypatch.setattr(qlora.models.meta_layout, "read_layout", None)
    assert read_shape(settings, "another place", tmp_path) == read
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(TypeError):
        read_shape(settings, "a third", tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "lama"},
            r"test: transformers does not know the model type 'lama' \(did you mean llama\?\)",
        ),
        ({"model_type": "bert"}, "test is not a decoder-only causal language model: bert is an encoder"),
        (
            {"model_type": "glm4", **HEADS, "num_attention_heads": 0},
            "test: transformers builds no glm4 of these",
        ),
        ({"model_type": "recurrent_gemma", "hidden_size": "wide"}, "test: transformers builds no recurrent_gemma of "),
    ],
)
def test_settings_of_no_model_are_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_shape(settings, "test")
    assert "\n" not in str(error.value)


def test_a_config_with_an_infinite_setting_is_planned(tmp_path: Path) -> None:
    """transformers writes the limit of Mamba 2's time steps as an object."""
    AutoConfig.for_model("mamba2", hidden_size=64, num_heads=8, head_dim=16, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    text = (tmp_path / "config.json").read_text()
    assert '"__float__": "Infinity"' in text
    settings = read_object(tmp_path / "config.json", "model.name=x")
    assert settings["time_step_limit"] == [0.0, math.inf]
    assert build_shape(settings, "model.name=x").layers == 2


def test_a_setting_that_a_model_type_does_not_have_ends_its_plan() -> None:
    described = {"model_type": "qwen3_5_text", **HEADS, **DELTA, "linear_num_value_heds": 4}
    with pytest.raises(ConfigError, match=r"linear_num_value_heds=4: qwen3_5_text has no such setting \(did you "
                       r"mean linear_num_value_heads\?\); leave it out"):  # fmt: skip
        read_shape(described, "model.architecture", options=["linear_num_value_heds"])
    assert read_shape(described, "config.json").model_type == "qwen3_5_text"
