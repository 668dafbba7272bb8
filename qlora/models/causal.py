"""Says by a model's config alone whether it is a decoder-only causal language model, the one kind that is trained."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from qlora.errors import DataError

AUTO_CLASS = "AutoModelForCausalLM"


def check_is_causal(model_config: Any, key: str) -> None:
    """Raises `DataError` unless transformers builds a decoder-only causal language model from `model_config`.

    `key` is the key and value that name the model, e.g. `model.name=bert-base-cased`.
    """
    if (reason := _why_not_causal(model_config)) is not None:
        raise DataError(
            f"{key} is not a decoder-only causal language model: {model_config.model_type} {reason}; choose a base "
            "that predicts the next token, such as a Llama, Qwen or Mistral"
        )


def _why_not_causal(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder and a decoder"
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and AUTO_CLASS not in (getattr(config, "auto_map", None) or {}):
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return "reads pictures too, and transformers has no class for its text alone"
        return f"has no {AUTO_CLASS} in transformers"
    if hasattr(config, "backbone_hidden_size"):
        return "drafts tokens for another model, whose keys and values it reads"
    if _is_encoder(config):
        return "is an encoder, whose tokens see those behind them (is_decoder is false in its config)"
    text = config.get_text_config()
    # Gemma's flag is also "vision", which concerns pictures alone.
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "attn_type", None) == "bi":
        return "lets tokens see those behind them (bidirectional attention in its config)"
    return None


def _is_encoder(config: Any) -> bool:
    """Returns whether a model of BERT's kind is left an encoder: its causal class masks nothing unless it is told to.

    Such a kind has a masked language model, or may attend to an encoder of its own. XLM calls the flag `causal`.
    """
    of_its_kind = type(config) in MODEL_FOR_MASKED_LM_MAPPING or hasattr(config, "add_cross_attention")
    has_flag = any(hasattr(config, flag) for flag in ("is_decoder", "causal"))
    return of_its_kind and has_flag and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
