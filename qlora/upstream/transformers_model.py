"""What the fast step reads and sets of `transformers.PreTrainedModel` under a private name.

The implementation of attention has a public setter, `set_attn_implementation`, which checks and imports too much to be
called in every training step.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel


def attention_of(config: PretrainedConfig) -> str | None:
    """Returns the name of the attention that a model computes with."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Makes a model compute with the attention that `AttentionInterface` holds under `name`."""
    config._attn_implementation = name


PLAIN_LAYERS = frozenset(
    {"full_attention", "sliding_attention", "linear_attention", "conv", "moe", "hybrid", "hybrid_sliding"}
)
"""The kinds of layers, as `layer_types` of a config names them, that attend to all earlier tokens or to the last ones,
or not at all. Others choose tokens by a mask of their own: in chunks, by an indexer, in compressed blocks."""


def takes_any_attention(model: PreTrainedModel) -> bool:
    """Returns whether a model calls its attention through `AttentionInterface`, for plain causal attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return bool(getattr(model, "_supports_attention_backend", False)) and PLAIN_LAYERS.issuperset(kinds)
