"""Which models attend in a way that the fast step can compute, and where their decoder is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora.step.layers import find_layers
from qlora.upstream.transformers_model import attention_of, decoder_of, takes_any_attention

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0}  # fmt: skip
LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
          "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "num_key_value_heads": 4, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 32}  # fmt: skip
CONV = {"layer_types": ["conv", "full_attention"]}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": SMALL | CONV,
    "nemotron": SMALL,
    "doge": SMALL,
    "deepseek_v32": SMALL | LATENT,
    "phimoe": SMALL | {"sliding_window": 8, "num_local_experts": 2},
    "lfm3": SMALL | {"head_dim": 16, "sliding_window": 8, "layer_types": ["conv", "sliding_attention"]},
    "llama4_text": SMALL | {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 16},
    "modernbert-decoder": SMALL,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200},
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind]))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "lfm2"])
def test_plain_attention_is_handed_on(kind: str) -> None:
    model = build(kind).train()
    former = attention_of(model.config)
    assert takes_any_attention(model)
    assert attention_of(model.config) == former
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nemotron", "its layers drop arguments"),
        ("doge", "it makes a mask of its own"),
        ("deepseek_v32", "an indexer chooses the tokens by the mask"),
        ("phimoe", "the window is in the mask alone"),
        ("lfm3", "rows that are laid out for the window would see each other in the convolution"),
        ("llama4_text", "chunks are in the mask alone"),
    ],
)
def test_attention_of_its_own_is_left_to_the_model(kind: str, why: str) -> None:
    assert not takes_any_attention(build(kind)), why


@pytest.mark.parametrize("kind", ["llama", "llama4_text", "modernbert-decoder", "gpt2"])
def test_the_decoder_holds_the_layers_and_not_the_output_layer(kind: str) -> None:
    model = build(kind)
    decoder = decoder_of(model)
    assert decoder is not model
    assert not any(module is model.get_output_embeddings() for module in decoder.modules())
    assert len(find_layers(model)) == 2
    assert decoder(torch.arange(4)[None]).last_hidden_state.shape == (1, 4, 64)
