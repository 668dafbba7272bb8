"""The shape of a model: what the memory and time plans need to know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora.errors import ConfigError, DataError, did_you_mean
from qlora.text import brief


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
    """Scores and logits go through tanh, so attention holds a matrix of all pairs of tokens."""
    head_dim: int | None = None
    """The default; None: hidden size / heads."""
    tied: bool = False
    """The default of `tie_word_embeddings`."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(biases=frozenset({"q_proj", "k_proj", "v_proj"})),
    "qwen3": Family(head_norms=True, head_dim=128),
    "gemma2": Family(norms=4, capped=True, head_dim=256, tied=True),
    "gemma3_text": Family(norms=4, head_norms=True, head_dim=256, tied=True),
    "phi3": Family(joined=True),
    "gpt_neox": Family(
        layer_norm=True,
        gated=False,
        joined=True,
        biases=frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ),
}
"""By transformers' name of the model type."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer."""

    name: str
    """Its full name below the decoder layer, e.g. `self_attn.q_proj`."""
    inputs: int
    outputs: int
    reads: str
    """What it reads: `attention` or `mlp` (shared with others), `heads` or `product`."""
    bias: bool

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int
    """Longest row, in tokens."""

    @property
    def family(self) -> Family:
        """How its architecture differs from LLaMA."""
        return FAMILIES[self.model_type]

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token; values have the same."""
        return self.key_value_heads * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer."""
        h, i, q, kv = self.hidden, self.intermediate, self.queries, self.keys
        if self.model_type == "gpt_neox":
            rows = [
                ("attention.query_key_value", h, q + 2 * kv, "attention"),
                ("attention.dense", q, h, "heads"),
                ("mlp.dense_h_to_4h", h, i, "mlp"),
                ("mlp.dense_4h_to_h", i, h, "product"),
            ]
        else:
            joined = self.family.joined
            heads = {"qkv_proj": q + 2 * kv} if joined else {"q_proj": q, "k_proj": kv, "v_proj": kv}
            middle = {"gate_up_proj": 2 * i} if joined else {"gate_proj": i, "up_proj": i}
            rows = [(f"self_attn.{name}", h, width, "attention") for name, width in heads.items()]
            rows.append(("self_attn.o_proj", q, h, "heads"))
            rows += [(f"mlp.{name}", h, width, "mlp") for name, width in middle.items()]
            rows.append(("mlp.down_proj", i, h, "product"))
        biases = self.family.biases
        return tuple(Linear(*row, bias=row[0].rpartition(".")[2] in biases) for row in rows)

    @property
    def linear_weights(self) -> int:
        """Elements of the matrices of all decoder layers."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def unquantized(self) -> int:
        """Parameters that stay in 16 or 32 bits: embedding, output matrix, norms, biases."""
        embeddings = self.hidden * self.vocabulary * (1 if self.tied else 2)
        a_norm = self.hidden * (2 if self.family.layer_norm else 1)
        in_heads = 2 * self.head_dim if self.family.head_norms else 0
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return embeddings + a_norm + self.layers * (self.family.norms * a_norm + in_heads + biases)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_weights + self.unquantized

    def full_names(self, layer: int) -> dict[str, Linear]:
        """Returns the linear layers of a decoder layer by their names in the model."""
        prefix = "gpt_neox" if self.model_type == "gpt_neox" else "model"
        return {f"{prefix}.layers.{layer}.{linear.name}": linear for linear in self.linears}


def read_shape(settings: Mapping[str, Any], where: str) -> Shape:
    """Returns the shape that `model.architecture` or a `config.json` describes; `where` names it in errors.

    Raises `DataError` for an architecture that is not known here, and for a size that is missing.
    """
    text = settings.get("text_config")
    settings = text if isinstance(text, Mapping) else settings
    kind = str(settings.get("model_type"))
    if kind not in FAMILIES:
        raise DataError(
            f"{where}: task=plan does not know the model type {kind!r}{did_you_mean(kind, FAMILIES)}; it knows "
            f"{', '.join(FAMILIES)}"
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [name for name in sizes if settings.get(name) is None]:
        raise DataError(f"{where}: {missing[0]} is missing, so the model's size is unknown; give it as a number")
    for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = settings.get(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (value is None or is_size):
            raise DataError(f"{where}: {name} must be a positive whole number, got {brief(value)}")
    hidden, intermediate, layers, heads, vocabulary = (int(settings[name]) for name in sizes)
    family = FAMILIES[kind]
    tied = settings.get("tie_word_embeddings")
    return Shape(
        model_type=kind,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        key_value_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or family.head_dim or hidden // heads,
        vocabulary=vocabulary,
        tied=family.tied if tied is None else bool(tied),
        context=settings.get("max_position_embeddings") or 2048,
    )


def find_targets(shape: Shape, requested: list[str]) -> tuple[frozenset[str], ...]:
    """Returns for each decoder layer the names of the linear layers that `lora.target_modules` gives an adapter.

    Raises `ConfigError` for a name or pattern that matches none.
    """
    layers = [shape.full_names(layer) for layer in range(shape.layers)]
    if requested == ["all-linear"]:
        return tuple(frozenset(linear.name for linear in names.values()) for names in layers)
    matches = [{pattern: _matches(pattern, names) for pattern in requested} for names in layers]
    if missing := [pattern for pattern in requested if not any(layer[pattern] for layer in matches)]:
        kinds = sorted({linear.name.rpartition(".")[2] for linear in shape.linears})
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; the model has "
            f"{kinds}, or use all-linear"
        )
    return tuple(frozenset().union(*layer.values()) for layer in matches)


def _matches(pattern: str, names: Mapping[str, Linear]) -> frozenset[str]:
    plain = {linear.name for name, linear in names.items() if name == pattern or name.endswith(f".{pattern}")}
    try:
        return frozenset(plain or {linear.name for name, linear in names.items() if re.fullmatch(pattern, name)})
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {pattern!r} is not a regular expression: {error}") from error
