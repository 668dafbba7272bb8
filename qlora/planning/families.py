"""How the architectures that are planned without torch differ from LLaMA."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How an architecture differs from LLaMA."""

    norms: int = 2
    """Norms of the hidden state in a layer."""
    layer_norm: bool = False
    """LayerNorm with a bias instead of RMSNorm."""
    head_norms: bool = False
    """Norms of queries and keys."""
    gated: bool = True
    """The feed-forward layer multiplies a gate with its input's other half."""
    joined: bool = False
    """One matrix makes queries, keys and values, and one makes gate and up."""
    biases: frozenset[str] = frozenset()
    """The linear layers with a bias, by the last part of their names."""
    capped: bool = False
    """Scores go through tanh, so attention holds a matrix of all pairs of tokens."""
    capped_logits: bool = False
    """Logits go through tanh."""
    wide_norms: bool = False
    """Norms of all queries and keys of a token together, before they are split into heads."""
    sinks: bool = False
    """A number for each head that attention adds to its rows' sums."""
    head_dim: int | None = None
    """The default; None: hidden size / heads."""
    tied: bool = False
    """The default of `tie_word_embeddings`."""
    window: int | None = None
    """The default of `sliding_window`."""
    full_every: int = 0
    """One layer of how many looks at all tokens, where the others have a window; 0: none does."""
    window_from: bool | None = None
    """Whether the layers from `max_window_layers` on have a window, or those before it; None: that counts for none."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(window=4096),
    "qwen2": Family(biases=frozenset({"q_proj", "k_proj", "v_proj"}), window_from=True),
    "qwen3": Family(head_norms=True, head_dim=128, window_from=True),
    "gemma2": Family(norms=4, capped=True, capped_logits=True, head_dim=256, tied=True, window=4096, full_every=2),
    "gemma3_text": Family(norms=4, head_norms=True, head_dim=256, tied=True, window=4096, full_every=6),
    "phi3": Family(joined=True),
    "qwen3_moe": Family(head_norms=True),
    "qwen2_moe": Family(biases=frozenset({"q_proj", "k_proj", "v_proj"}), full_every=2, window_from=False),
    "mixtral": Family(),
    "gpt_oss": Family(
        biases=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}), sinks=True, head_dim=64, window=128, full_every=2
    ),
    "granitemoe": Family(),
    "olmoe": Family(wide_norms=True),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "gpt_neox": Family(
        layer_norm=True,
        gated=False,
        joined=True,
        biases=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ),
}
"""By transformers' name of the model type."""
