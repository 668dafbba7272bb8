"""Loading: every precision, stored 4-bit checkpoints, placement, and the shapes of models to draw."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.errors import ConfigError, UserError
from qlora.models import loading
from qlora.models.json_files import library_reads
from qlora.models.model_config import build_model_config, load_model_config
from qlora.models.new_tokens import resize_embeddings
from qlora.models.tokenizer import load_tokenizer
from qlora.quantization.placement import find_placement
from qlora.runtime.device import Placement, find_device
from tests.models.bases import build, write

IDS = torch.arange(3, 35)[None]


def load(folder: Path, *overrides: str) -> torch.nn.Module:
    config = compose([f"model.name={folder}", "model.tokenizer=tiny", "recipe=none", "device=cpu", *overrides])
    return loading.load_base(
        config.model,
        config.quantization,
        placement=find_placement(config.quantization, find_device(config.device)),
        model_config=load_model_config(config.model),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("overrides", "kind", "dtype"),
    [
        (["quantization=nf4"], bnb.nn.Linear4bit, torch.uint8),
        (["quantization=fp4"], bnb.nn.Linear4bit, torch.uint8),
        (["quantization=int8"], bnb.nn.Linear8bitLt, torch.int8),
        (["quantization=none"], torch.nn.Linear, torch.bfloat16),
        (["quantization=none", "quantization.compute_dtype=fp16"], torch.nn.Linear, torch.float16),
        (["quantization=fp32"], torch.nn.Linear, torch.float32),
    ],
)
def test_weights_are_stored_in_the_bits_asked_for(
    base_folder: Path, overrides: list[str], kind: type, dtype: torch.dtype
) -> None:
    model = load(base_folder, *overrides)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    assert all(type(layer) is kind and layer.weight.dtype is dtype for layer in layers)
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.matrix(2)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4bit_weights_have_the_type_and_nesting_asked_for(base_folder: Path, quant_type: str, double: bool) -> None:
    model = load(base_folder, f"quantization={quant_type}", f"quantization.double_quant={str(double).lower()}")
    states = [module.weight.quant_state for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {(state.quant_type, state.nested) for state in states} == {(quant_type, double)}


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_4bit_layer_computes_in_compute_dtype(base_folder: Path, dtype: str, expected: torch.dtype) -> None:
    model = load(base_folder, "quantization=nf4", f"quantization.compute_dtype={dtype}")
    assert {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} == {expected}
    assert model.get_input_embeddings().weight.dtype is expected


def test_the_int8_threshold_reaches_every_layer(base_folder: Path) -> None:
    model = load(base_folder, "quantization=int8", "quantization.int8_threshold=3.5")
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert {layer.state.threshold for layer in layers} == {3.5}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none", "fp32"])
def test_a_loaded_base_is_frozen(base_folder: Path, quantization: str) -> None:
    assert not any(p.requires_grad for p in load(base_folder, f"quantization={quantization}").parameters())


@pytest.mark.full
def test_attention_is_computed_by_the_implementation_asked_for(base_folder: Path) -> None:
    eager = load(base_folder, "quantization=fp32", "model.attn_implementation=eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(load(base_folder, "quantization=fp32")))


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama as transformers saves it in nf4 with double quantization."""
    folder = tmp_path_factory.mktemp("stored")
    load(base_folder, "quantization=nf4").save_pretrained(folder)
    return folder


def test_a_stored_4bit_checkpoint_gives_equal_logits(base_folder: Path, saved: Path) -> None:
    again = load(saved, "quantization=nf4")
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in again.modules())
    assert torch.equal(logits(again), logits(load(base_folder, "quantization=nf4")))


def test_a_stored_4bit_checkpoint_computes_in_the_configs_dtype(saved: Path) -> None:
    model = load(saved, "quantization=nf4", "quantization.compute_dtype=bf16")
    others = [parameter for parameter in model.parameters() if not isinstance(parameter, bnb.nn.Params4bit)]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype is torch.bfloat16
    assert {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} == {torch.bfloat16}
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    "overrides", [["quantization=none"], ["quantization=fp4"], ["quantization.double_quant=false"]]
)
def test_a_stored_checkpoint_in_other_bits_says_what_to_set(saved: Path, overrides: list[str]) -> None:
    remedy = "set quantization.bits=4 quantization.quant_type=nf4 quantization.double_quant=true"
    with pytest.raises(UserError, match=rf"is stored in 4 bits \(nf4, double-quantized\), but .*; {remedy}"):
        load(saved, *overrides)
    bits = remedy.removeprefix("set ").split()
    load(saved, *overrides, *bits)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("overrides", [["device_map=auto"], ["max_memory=1GiB"], []])
def test_a_cpu_run_keeps_the_whole_model_on_the_cpu(base_folder: Path, overrides: list[str]) -> None:
    model = load(base_folder, "quantization=fp32", *[f"model.{text}" for text in overrides])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.full
def test_a_memory_limit_lets_accelerate_spread_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu = Placement(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16)
    unlimited, limited = compose([]).model, compose(["model.max_memory=40GiB"]).model
    assert loading._device_map(unlimited, gpu) == {"": gpu.device}
    assert loading._max_memory(unlimited, gpu) is None
    assert loading._device_map(limited, gpu) == "auto"
    assert loading._max_memory(limited, gpu) == {0: "40GiB", 1: "40GiB"}
    assert loading._device_map(compose(["model.device_map=balanced"]).model, gpu) == "balanced"


@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
def test_layers_that_do_not_fit_on_the_gpus_are_refused(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    spread = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    monkeypatch.setattr(loading, "_device_map", lambda config, placement: spread)
    message = "model.device_map=auto: the GPUs do not hold the base within model.max_memory=1GiB each, .*; raise"
    with pytest.raises(UserError, match=message):
        load(base_folder, f"quantization={quantization}", "model.max_memory=1GiB")


def architecture(**fields: object) -> Config:
    shape = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1700, "max_position_embeddings": 64,
        "tie_word_embeddings": "false",
    } | fields  # fmt: skip
    values = [f"model.architecture.{name}={value}" for name, value in shape.items()]
    return compose(["model.weights=random", "model.tokenizer=tiny", "quantization=fp32", *values])


@pytest.mark.matrix(3)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma3_text", "phi3"])
def test_rope_theta_arrives_in_every_family(model_type: str) -> None:
    extra = {"num_key_value_heads": "null"} if model_type == "gpt_neox" else {}
    config = architecture(model_type=model_type, rope_theta=500000, **extra)
    model_config = build_model_config(config.model, load_tokenizer(config.model))
    rope = model_config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == 500000


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_forgets_what_lies_further_back(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    config = architecture(model_type=model_type, sliding_window=4, num_hidden_layers=1)
    model_config = build_model_config(config.model, load_tokenizer(config.model))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config)
    other = IDS.clone()
    other[0, 0] += 1
    with torch.no_grad():
        logits, after = model(input_ids=IDS).logits, model(input_ids=other).logits
    assert not torch.equal(logits[0, 3], after[0, 3])
    assert torch.equal(logits[0, 4:], after[0, 4:])


def test_the_norms_floor_arrives() -> None:
    config = architecture(rms_norm_eps=1e-3)
    assert build_model_config(config.model, load_tokenizer(config.model)).rms_norm_eps == 1e-3


MIXTURES: dict[str, dict[str, object]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "q_lora_rank": 24},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 0},
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": "null"}
LATENT |= {"num_key_value_heads": "null", "first_k_dense_replace": 1, "moe_intermediate_size": 16}


@pytest.mark.matrix(4)
@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_built_from_its_shape(model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    shape = MIXTURES[model_type] | (LATENT if model_type.startswith("deepseek") else {})
    config = architecture(model_type=model_type, num_hidden_layers=2, **shape)
    model_config = build_model_config(config.model, load_tokenizer(config.model))
    for name, value in MIXTURES[model_type].items():
        assert getattr(model_config, name) == (value or None), name
    model = AutoModelForCausalLM.from_config(model_config)
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    has_dense_layer = {"mlp_only_layers", "first_k_dense_replace"} & set(shape)
    assert len(experts) == (1 if has_dense_layer else 2)
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


def test_heads_of_a_mixture_may_be_wider_than_its_hidden_state() -> None:
    config = architecture(model_type="qwen3_moe", head_dim=32, **MIXTURES["qwen3_moe"])
    assert build_model_config(config.model, load_tokenizer(config.model)).head_dim == 32


@pytest.mark.matrix(4)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 8}, r"num_experts=8: llama has no such setting; leave it out"),
        ({"model_type": "mixtral", "n_shared_experts": 1}, r"n_shared_experts=1: mixtral has no such setting"),
        ({"model_type": "gpt_neox", "num_key_value_heads": "null", "head_dim": 8}, r"head_dim=8: gpt_neox has no such"),
        ({"sliding_window": 8}, r"sliding_window=8: llama has no such setting; leave it out"),
        ({"model_type": "gpt_neox", "num_key_value_heads": 1}, r"num_key_value_heads=1: gpt_neox has no such setting"),
        ({"model_type": "gpt2", "rope_theta": 10000, "num_key_value_heads": "null", "intermediate_size": 64}, "gpt2"),
        (
            {"model_type": "qwen3_5_text", "options": "{linear_conv_kernel_dim: wide}"},
            r"transformers builds no qwen3_5_text of these settings \(",
        ),
        ({"options": "{head_dims: 8}"}, r"options\.head_dims=8: llama has no such setting \(did you mean head_dim\?\)"),
        ({"model_type": "lama"}, r"model_type='lama' is unknown to transformers \(did you mean llama\?\)"),
        ({"vocab_size": 100}, r"vocab_size=100 is too small for the tokenizer's \d+ tokens; raise it"),
    ],
)
def test_a_shape_that_cannot_be_built_names_its_field(fields: dict[str, object], message: str) -> None:
    config = architecture(**fields)
    with pytest.raises(UserError, match=rf"model\.architecture.*{message}"):
        build_model_config(config.model, load_tokenizer(config.model))


def test_new_rows_are_the_mean_of_the_old_and_equal_each_time(base_folder: Path) -> None:
    tokens = ",".join(f"'<t{number}>'" for number in range(200))
    config = compose([f"model.name={base_folder}", "model.tokenizer=tiny", f"model.new_tokens=[{tokens}]"])
    tokenizer = load_tokenizer(config.model)
    assert len(tokenizer) > 1600
    model = load(base_folder, "quantization=fp32")
    old = model.lm_head.weight.clone()
    resize_embeddings(model, [len(tokenizer) - 1])
    assert model.lm_head.weight.shape == (len(tokenizer), 64)
    assert torch.equal(model.lm_head.weight[:1600], old)
    torch.testing.assert_close(model.lm_head.weight[1600:], old.mean(0).expand(len(tokenizer) - 1600, 64))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.full
def test_spare_rows_are_used_before_the_embeddings_grow(base_folder: Path) -> None:
    config = compose([f"model.name={base_folder}", "model.tokenizer=tiny", "model.new_tokens=['<a>']"])
    model = load(base_folder, "quantization=fp32")
    resize_embeddings(model, load_tokenizer(config.model).convert_tokens_to_ids(["<a>"]))
    assert model.get_input_embeddings().weight.shape[0] == 1600


def test_a_revision_does_not_hinder_a_local_folder(base_folder: Path) -> None:
    load(base_folder, "quantization=fp32", "model.revision=v1.0")


def test_a_package_that_an_architecture_needs_is_named(tmp_path: Path) -> None:
    def build() -> None:
        raise ImportError(" X requires the timm library but it was not found in your environment. You can install it")

    with (
        pytest.raises(UserError, match=r"^key: .* with the package timm, .*; pip install timm$"),
        library_reads("key", "f"),
    ):
        build()


def test_a_soft_cap_on_scores_is_computed_whatever_attention_transformers_would_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write("gemma2", tmp_path, attn_logit_softcapping=2.0)
    kind = next(kind for kind in type(build("gemma2")).__mro__ if "_supports_sdpa" in vars(kind))
    monkeypatch.setattr(kind, "_supports_sdpa", True)  # as in some releases
    assert load(folder, "quantization=none").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=sdpa leaves out the soft cap that gemma2 "):
        load(folder, "quantization=none", "model.attn_implementation=sdpa")
    plain = write("gemma2", tmp_path / "plain", attn_logit_softcapping=None)
    assert load(plain, "quantization=none").config._attn_implementation == "sdpa"
