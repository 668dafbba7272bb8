"""Tiny random models of every causal type that the installed transformers knows, as `families.py` trains them.

A config of a type gets small numbers wherever it has a setting of `SIZES`, and a layer of each kind that it knows; what
differs from that stands in `CHANGES`.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "qlora/demo/model"
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FEWEST_LAYERS = 2

_NAMES: dict[int | float, str] = {
    128: "hidden_size d_model n_embd attention_hidden_size embedding_size",
    256: "intermediate_size ffn_hidden_size dff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_dim mamba_intermediate",
    64: "index_topk moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size q_lora_rank o_lora_rank dense_intermediate_size",
    32: "head_dim kv_channels global_head_dim dim_head swa_head_dim v_head_dim kv_lora_rank index_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim laurel_rank swa_v_head_dim "
    "attention_head_dim mamba_headdim",
    16: "qk_nope_head_dim qk_rope_head_dim rotary_dim mamba_d_state ssm_state_size state_size mamba_dt_rank "
    "gated_norm_rank time_step_rank hidden_size_per_layer_input rel_extent index_block_size chunk_size "
    "mamba_chunk_size d_rel",
    24: "sliding_window sliding_window_size attention_window_size window_size local_attention",
    8: "mamba_n_heads mamba_num_heads attention_chunk_size block_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
    "linear_num_value_heads expert_num",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k index_n_heads linear_num_key_heads num_hidden_layers n_layer n_layers num_layers encoder_layers "
    "decoder_layers mamba_n_groups n_groups index_topk_blocks hc_mult o_groups mamba_ngroups zero_expert_num",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers",
    1600: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length keep_window_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Settings by name, as configs of transformers call them."""
PICTURES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14, "num_heads": 2, "depth": 1,
            "mlp_dim": 64, "encoder_layers": 1, "max_source_positions": 30, "mm_embed_dim": 32, "mm_posemb_size": 8,
            "output_proj_dims": 32, "position_embedding_size": 32, "adapter_input_size": 32,
            "adapter_out_dim": 128}  # fmt: skip
"""Settings of the parts that are not for text."""

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_expand": 2, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16,
           "indexer_compress_ratio": 4}  # fmt: skip
GRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 128, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
         "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1}  # fmt: skip
SHARED_KEYS = {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
               "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
BYTES = {"hidden_size": 128, "hidden_size_global": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1600, "head_dim": 32}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "blt": {"patcher_config": BYTES, "encoder_config": BYTES, "decoder_config": BYTES, "global_config": BYTES,
            "encoder_hash_byte_group_vocab": 50, "vocab_size": 1600},
    "bamba": MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}, "layer_types": ["full_attention"] * 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {"vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 128, "adapter_merge_size": 2,
    }},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 64, "swa_kv_lora_rank": 32,
        "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 32, "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    },
    "falcon": {"num_kv_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 256},
    "gemma3n_text": SHARED_KEYS | {"intermediate_size": 256, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_assistant": {"backbone_hidden_size": 128, "text_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32, "vocab_size": 1600,
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, **IDS,
    }},
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 2},
    "qwen4_exp_text": INDEXER | GRAMS,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [64, 64]},
    "zamba": {"num_hidden_layers": 5, "mamba_dt_rank": 16, "attention_hidden_size": 256, "attention_head_dim": 64,
              "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]},
    "zamba2": {"n_mamba_heads": 8, "num_hidden_layers": 5, "attention_head_dim": 64, "num_key_value_heads": 4,
               "attention_hidden_size": 256, "adapter_rank": 16,
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip
"""What a type needs beside `SIZES`, by setting; `text_config` where it has one."""


def tiny_config(kind: str) -> Any:
    """Returns the config of a tiny model of a type."""
    from transformers import CONFIG_MAPPING

    kinds, changes = CONFIG_MAPPING[kind], copy.deepcopy(CHANGES.get(kind, {}))
    try:
        default = kinds()
    except Exception:  # some types have no default
        return kinds(**changes)
    parts = {name: getattr(default, name, None) for name in getattr(kinds, "sub_configs", {})}
    defaults = {name: value for name, value in default.to_dict().items() if name not in parts}
    settings = shrink(defaults, changes)
    for name, part in parts.items():
        if not hasattr(part, "model_type") or (name in changes and name != "text_config"):
            continue
        about = {"model_type": part.model_type} if part.model_type else {}
        if name == "text_config":
            settings[name] = about | shrink(part.to_dict(), CHANGES.get(part.model_type, {}))
        else:
            settings[name] = about | {key: value for key, value in PICTURES.items() if key in part.to_dict()}
    return kinds(**settings)


def shrink(defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns small settings for a config with these defaults."""
    settings = {name: SIZES[name] for name in defaults if name in SIZES} | IDS
    kinds = {name: value for name, value in defaults.items() if name.endswith(("layer_types", "layers_block_type"))}
    kinds = {name: value for name, value in kinds.items() if isinstance(value, list) and name not in changes}
    orders = {name: list(dict.fromkeys(value)) for name, value in kinds.items()}
    layers = max([FEWEST_LAYERS, *map(len, orders.values())])
    layers = changes.get("num_hidden_layers", layers)
    former = next((defaults[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in defaults), None)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in defaults:
            settings[name] = layers
    if "kv_lora_rank" in defaults:  # DeepSeek's attention: as many keys as queries, and the rotated part is the head
        settings |= {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
    for name, value in defaults.items():
        if name in orders:
            settings[name] = [*orders[name], *[orders[name][-1]] * layers][:layers]
        elif isinstance(value, list) and former and len(value) == former and name not in changes:
            settings[name] = [SIZES.get(name.removesuffix("_per_layer"), entry) for entry in value][:layers]
    return settings | changes


def write_config(kind: str, folder: Path) -> None:
    """Writes the config of a tiny model of a type and the embedded tokenizer, without weights."""
    tiny_config(kind).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def write_tiny(kind: str, folder: Path) -> None:
    """Writes the weights of a tiny random model of a type, beside what `write_config` writes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    except ImportError:  # a package for pictures is not installed: what a user without it sees is examined
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
        return
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and weight.is_floating_point():  # so that each token changes what follows it
                scale = 1.0 if "embed" in name else max(weight.shape[-1], 1) ** -0.5
                weight.normal_(0.0, scale)
    model.save_pretrained(folder)
