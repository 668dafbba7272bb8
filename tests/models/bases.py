"""Small bases of many architectures, and what can be wrong with their folders."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.models import loading
from qlora.models.model_config import load_model_config
from qlora.models.tokenizer import load_tokenizer
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 1600, "max_position_embeddings": 256}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
PICTURES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
          "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
          "num_key_value_heads": 4}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "qwen2": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen3_moe": GROUPED | EXPERTS,
    "olmoe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "granitemoe": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "deepseek_v3": SMALL | LATENT,
    "qwen3_next": GROUPED | EXPERTS | LINEAR | {
        "shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"],
    },
    "llama4_text": GROUPED | {
        "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 64,
    },
    "falcon": SMALL,
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1600, "state_size": 8},
    "gemma2": GROUPED | {"sliding_window": 16},
    "gemma3": {
        "text_config": GROUPED | IDS | {"sliding_window": 16}, "vision_config": PICTURES, "mm_tokens_per_image": 4,
        "boi_token_index": 1590, "eoi_token_index": 1591, "image_token_index": 1592,
    },
    "llava": {"text_config": SMALL | {"model_type": "llama"}, "vision_config": PICTURES, "image_token_index": 1592},
    "bert": SMALL,
    "roberta": SMALL,
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 1600},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 1600},
}  # fmt: skip


def build(kind: str, **changes: Any) -> PreTrainedModel:
    """A base with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**IDS, **SHAPES[kind], **changes})
    auto = AutoModelForImageTextToText if "vision_config" in SHAPES[kind] else AutoModelForCausalLM
    # `sdpa`, which some releases of transformers choose for Gemma 2, leaves its soft cap out.
    options = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    return auto.from_config(config, **options)


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """The folder of a base with the embedded tokenizer."""
    build(kind, **changes).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose([]).model)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **settings: Any) -> Path:
    """Edits the tensors of a model's file and its config."""
    path, config = folder / "model.safetensors", folder / "config.json"
    if edit is not None:
        tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(path)).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def in_4_bits(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a base whose linear layers, those of experts too, are saved in 4 bits as bitsandbytes' layers are."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() != 2 or "embed" in name or "lm_head" in name or ".gate.weight" in name:
            tensors[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
        tensors |= {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
              "quant_method": "bitsandbytes"}  # fmt: skip
    return change(target, quantization_config=config | settings)


def choose(folder: Path, *overrides: str) -> Config:
    # A base that is not the preset's has no recipe, and is composed once where that is said.
    named = [f"model.name={folder}", "model.tokenizer=tiny", "recipe=none"]
    return compose([*named, "device=cpu", "lora.r=4", *overrides])


def load(folder: Path, *overrides: str) -> PreTrainedModel:
    config = choose(folder, *overrides)
    return loading.load_base(
        config.model,
        config.quantization,
        placement=find_placement(config.quantization, find_device(config.device)),
        model_config=load_model_config(config.model),
    )
