"""Which families a GGUF file is written for: their names and settings there, and what becomes of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora.errors import DataError
from qlora.export.rope import check_rope
from qlora.text import listed

SCRIPT = "llama.cpp's convert_hf_to_gguf.py"
"""What writes the families that are not written here."""


@dataclass(frozen=True)
class Architecture:
    """How a family of models is written."""

    name: str
    """Its name in `gguf.MODEL_ARCH`."""
    activation: str = "silu"
    """The only activation that llama.cpp computes for it."""
    interleaves_rope: bool = False
    """Whether llama.cpp rotates neighbours, where transformers rotates halves: rows of q and k change their order."""
    shifts_norms: bool = False
    """Whether norms multiply by 1 + weight, which the file holds as one number."""
    sliding_period: int | None = None
    """The last of every N layers attends to all tokens and the others to a window; None: there is no window."""


FAMILIES: dict[str, Architecture] = {
    "llama": Architecture("LLAMA", interleaves_rope=True),
    "mistral": Architecture("LLAMA", interleaves_rope=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE"),
    "gemma": Architecture("GEMMA", "gelu_pytorch_tanh", shifts_norms=True),
    "gemma2": Architecture("GEMMA2", "gelu_pytorch_tanh", shifts_norms=True, sliding_period=2),
    "gemma3_text": Architecture("GEMMA3", "gelu_pytorch_tanh", shifts_norms=True, sliding_period=6),
}
"""By transformers' `model_type`."""
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""The 27B models, by their number of layers, whose attention is scaled by the width of the model."""


def find_architecture(config: Any, key: str) -> Architecture:
    """Returns how the model of a transformers config is written; raises `DataError` where it cannot be, with the cause.

    `config` is that of the language model alone.
    """
    architecture = FAMILIES.get(config.model_type)
    if architecture is None:
        raise DataError(
            f"{key}: a model of type {config.model_type} is not written as GGUF here (only "
            f"{listed(sorted(FAMILIES))}); merge the adapter with qlora merge and convert the folder with {SCRIPT}"
        )
    reason = _unsupported_reason(config, architecture) or check_rope(config)
    if reason is not None:
        raise DataError(
            f"{key}: llama.cpp has no {config.model_type} with {reason}, so a GGUF file would answer otherwise"
        )
    return architecture


def _unsupported_reason(config: Any, architecture: Architecture) -> str | None:
    """Returns what of a model's settings llama.cpp does not compute; None: it computes all of them."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    layers = getattr(config, "layer_types", None) or []
    expected = _layer_types(config, architecture)
    if activation != architecture.activation:
        return f"the activation {activation}"
    if architecture.sliding_period is not None and layers and layers != expected:
        return "this order of layers with a sliding window"
    if architecture.sliding_period is None and config.model_type != "mistral" and "sliding_attention" in layers:
        return "a sliding window"
    if config.model_type == "qwen3_moe":
        return _mixture_reason(config)
    if architecture.sliding_period is not None:
        return _gemma_reason(config)
    return None


def _layer_types(config: Any, architecture: Architecture) -> list[str]:
    period = architecture.sliding_period or 1
    return [
        "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(config.num_hidden_layers)
    ]


def _mixture_reason(config: Any) -> str | None:
    if not config.norm_topk_prob:
        return "router weights that are not normalised (norm_topk_prob=false)"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "layers that are no mixture among those that are"
    return None


def _gemma_reason(config: Any) -> str | None:
    head = config.hidden_size // config.num_attention_heads
    is_largest = config.num_hidden_layers == SCALED_BY_WIDTH[config.model_type]
    scale = head if is_largest else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"attention scaled by {config.query_pre_attn_scalar} (query_pre_attn_scalar), only by {scale}"
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if config.model_type == "gemma2" and None in caps:
        return "no cap on logits"
    if config.model_type == "gemma3_text" and caps[0] is not None:
        return "a cap on attention's logits"
    return None


def head_size(config: Any) -> int:
    """Returns the numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def row_order(architecture: Architecture, config: Any, parameter: str) -> Callable[[Tensor], Tensor] | None:
    """Returns what puts the rows of q or k, or of a LoRA's B, in llama.cpp's order; None: they stay."""
    if not architecture.interleaves_rope:
        return None
    module = parameter.rsplit(".", 2)[-2] if "." in parameter else parameter
    if module not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads

    def interleave(value: Tensor) -> Tensor:
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return halves.swapaxes(1, 2).reshape(value.shape)

    return interleave


def write_settings(writer: Any, config: Any, architecture: Architecture) -> None:
    """Writes what llama.cpp reads of a model's shape, its rope apart."""
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(config))
    if architecture.sliding_period is not None:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def context_length(config: Any) -> int:
    """Returns the tokens that the file allows: no more than a window that llama.cpp leaves out."""
    window = getattr(config, "sliding_window", None)
    limit = int(config.max_position_embeddings)
    return min(limit, window) if config.model_type == "mistral" and window else limit


def shift_norm(architecture: Architecture, parameter: str, value: Tensor) -> Tensor:
    """Returns a norm's weight as llama.cpp multiplies by it."""
    return value + 1 if architecture.shifts_norms and parameter.endswith("norm.weight") else value
