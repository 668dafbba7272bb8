"""Random weights: a seed and a name decide those of a module, by the model's rules; never more than one is whole."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.config.compose import compose
from qlora.models import loading
from qlora.models.random_weights import RandomWeights
from qlora.runtime.device import Placement

CPU = torch.device("cpu")
BF16 = Placement(CPU, torch.bfloat16, torch.bfloat16)
FP32 = Placement(CPU, torch.float32, torch.float32)
SMALL = {"vocab_size": 1600, "max_position_embeddings": 64, "hidden_size": 64, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": 2, "intermediate_size": 96}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "qwen3": GROUPED | {"tie_word_embeddings": True},
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "gpt_neox": SMALL,
    "gpt2": {"vocab_size": 1600, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"vocab_size": 1600, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    # Most of a mixture is quantized where its experts are few and small.
    "mixtral": SMALL | {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 16},
    "gpt_oss": GROUPED | {"num_local_experts": 2, "intermediate_size": 16},
    "qwen3_moe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granitemoe": SMALL | {"num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size": 16},
    "olmoe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "deepseek_v3": SMALL
    | {
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}


def shape(kind: str) -> Any:
    return AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPES[kind])


def weights(kind: str, placement: Placement = FP32, seed: int = 0) -> RandomWeights:
    return RandomWeights(shape(kind), placement=placement, seed=seed)


def base(source: RandomWeights, quantization: str = "fp32") -> PreTrainedModel:
    config = compose([f"quantization={quantization}"])
    return loading.build_random_base(config.model, config.quantization, source)


def usual(kind: str, placement: Placement = FP32) -> PreTrainedModel:
    """A model as transformers initialises it, whole."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape(kind), dtype=placement.param_dtype)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_drawn_model_is_like_one_that_transformers_draws_whole(kind: str) -> None:
    random, expected = base(weights(kind, BF16), "none"), usual(kind, BF16)
    got = dict(random.named_parameters())
    assert {name: (p.shape, p.dtype) for name, p in expected.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in got.items()
    }
    for name, parameter in expected.named_parameters():
        few = 0 if parameter.numel() > 1000 else 0.05  # of few numbers, the spread is left to chance
        assert got[name].float().std().item() == pytest.approx(parameter.float().std().item(), rel=0.1, abs=few), name
        assert got[name].float().mean().item() == pytest.approx(parameter.float().mean().item(), abs=5e-3 + few), name
    tied = random.get_output_embeddings().weight is random.get_input_embeddings().weight
    assert tied == expected.config.tie_word_embeddings
    assert random.generation_config.eos_token_id == expected.generation_config.eos_token_id == 2


@pytest.mark.matrix(4)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp32"])
def test_buffers_are_those_of_a_model_built_as_usual(kind: str, quantization: str) -> None:
    tensors, expected = dict(base(weights(kind), quantization).named_buffers()), dict(usual(kind).named_buffers())
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts.quantized." not in name}  # are weights
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert all(tensors[name].dtype is expected[name].dtype for name in expected)


def test_what_loading_keeps_in_float32_is_drawn_in_float32() -> None:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1}
    config = AutoConfig.for_model("ernie4_5_moe", **SMALL, **experts)
    random = base(RandomWeights(config, placement=BF16, seed=0), "none")
    kept = {name for name, tensor in random.state_dict().items() if tensor.dtype is torch.float32}
    gate = "model.layers.1.mlp.gate"
    assert kept == {f"{gate}.weight", f"{gate}.moe_statics.e_score_correction_bias"}


def test_a_block_may_scale_what_its_layers_drew() -> None:
    random = base(weights("gpt2"))
    block = random.transformer.h[1]
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.05)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_rows_of_padding_are_zero_as_usual() -> None:
    random, expected = base(weights("llama")), usual("llama")
    assert not expected.get_input_embeddings().weight[0].any()
    assert not random.get_input_embeddings().weight[0].any()


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = base(weights("llama", seed=3)).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "other random numbers stay as they were"
    torch.manual_seed(6)
    second, other = base(weights("llama", seed=3)).state_dict(), base(weights("llama", seed=4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    layers = [first[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers), "equal modules of two layers differ"


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_base_is_the_whole_draw_quantized(kind: str, quantization: str, tmp_path: Any) -> None:
    source = weights(kind, BF16)
    base(source, "none").save_pretrained(tmp_path)
    config = compose([f"quantization={quantization}", f"model.name={tmp_path}", "model.tokenizer=tiny"])
    loaded = loading.load_base(config.model, config.quantization, placement=BF16, model_config=shape(kind))
    random = base(source, quantization)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    count = 0
    for (name, one), other in zip(random.named_modules(), loaded.modules(), strict=True):
        assert type(one) is type(other), name
        if isinstance(one, kinds):
            count += 1
            assert one.weight.shape == other.weight.shape
            assert one.weight.requires_grad is False
            assert (one.bias is None) == (other.bias is None)
    assert count >= 8
    for (name, one), other in zip(random.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.dtype is other.dtype, name
        assert torch.equal(one, other), name
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(random(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_its_tensors_are_read_as_from_a_file(kind: str) -> None:
    source = weights(kind)
    whole = base(source).state_dict()
    names = list(source)
    assert set(whole) - set(names) == ({"lm_head.weight"} if kind != "llama" else set())
    assert all(torch.equal(source.read(name), whole[name]) for name in names)
    assert all(source.shape(name) == whole[name].shape for name in names)
    assert names[0] in source


class Wide(TorchDispatchMode):
    """Counts the elements that exist at once in tensors of more than 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.dtype.itemsize > 1:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes() // tensor.dtype.itemsize
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.matrix(1)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_no_more_than_one_layer_exists_in_16_bits(quantization: str) -> None:
    config = shape("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size = 12, 128, 256, 64
    model = RandomWeights(config, placement=BF16, seed=0)
    whole = sum(p.numel() for p in model._skeleton.parameters())
    with Wide() as seen:
        base(model, quantization)
    if quantization == "none":
        assert seen.peak >= whole
    else:
        assert 256 * 128 <= seen.peak < whole / 6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_layers_that_bitsandbytes_gets_are_those_of_a_loaded_model(kind: str) -> None:
    random, plain = base(weights(kind, BF16), "nf4"), usual(kind)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    packed = {name for name, module in random.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert linear - packed == {"lm_head"}
    assert random.is_loaded_in_4bit
    assert random.is_quantized
    copy.deepcopy(random.config).to_dict()
