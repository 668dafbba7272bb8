"""The decoder computes hidden states from tokens, whatever it looks up by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora.step.hidden_states import hidden_states

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 200, "global_head_dim": 16, **LAYERS}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gemma4_text": SMALL | PER_LAYER,
    "gemma3n_text": SMALL | PER_LAYER | {"activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8},
    "llama4_text": SMALL | {"num_local_experts": 2, "intermediate_size_mlp": 64},
    "cpmant": {"hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 128, "num_hidden_layers": 2,
               "vocab_size": 200, "prompt_length": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_they_are_those_of_the_model(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind])).eval().requires_grad_(False)
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    hidden = hidden_states(model, {"input_ids": ids})
    assert hidden.requires_grad
    logits = model.get_output_embeddings()(hidden)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not model.get_input_embeddings()._forward_hooks
