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


def takes_any_attention(model: PreTrainedModel) -> bool:
    """Returns whether a model calls its attention through `AttentionInterface`."""
    return bool(getattr(model, "_supports_attention_backend", False))
