"""The shape of a model: what the memory and time plans need to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora.errors import DataError, did_you_mean
from qlora.planning.families import FAMILIES, Family
from qlora.planning.mixture import Experts, Latent, read_experts, read_latent
from qlora.text import brief


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
    experts: Experts | None = None
    """Those of a mixture."""
    latent: Latent | None = None
    """Compressed attention; None: the usual one."""

    @property
    def family(self) -> Family:
        """How its architecture differs from LLaMA."""
        return FAMILIES[self.model_type]

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        if self.latent is not None:
            return self.heads * (self.latent.plain + self.latent.rotated)
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token."""
        return self.queries if self.latent is not None else self.key_value_heads * self.head_dim

    @property
    def values(self) -> int:
        """Width of all values of a token, as attention returns them for each query head."""
        return self.heads * (self.latent.values if self.latent is not None else self.head_dim)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers that decoder layers have: all of them, or those with experts and those without."""
        return tuple(dict.fromkeys((*self._linears(mixed=False), *self._linears(mixed=True))))

    def linears_of(self, layer: int) -> tuple[Linear, ...]:
        """Returns the linear layers of one decoder layer."""
        return self._dense if not self.has_experts(layer) else self._mixed

    def has_experts(self, layer: int) -> bool:
        """Returns whether a decoder layer has experts."""
        return self.experts is not None and layer in self.experts.layers

    def a_layer(self, *, has_experts: bool) -> int:
        """Returns the first decoder layer with experts, or without."""
        return next(layer for layer in range(self.layers) if self.has_experts(layer) is has_experts)

    @cached_property
    def _dense(self) -> tuple[Linear, ...]:
        return self._linears(mixed=False)

    @cached_property
    def _mixed(self) -> tuple[Linear, ...]:
        return self._linears(mixed=True)

    def _linears(self, *, mixed: bool) -> tuple[Linear, ...]:
        """Returns the linear layers of a decoder layer with experts, or of one without; () where there is no such."""
        count = len(self.experts.layers) if self.experts is not None else 0
        if not (count if mixed else self.layers - count):
            return ()
        rows = [*self._attention_linears(), *(self._shared_linears() if mixed else self._mlp_linears())]
        biases = self.family.biases
        return tuple(Linear(*row, bias=row[0].rpartition(".")[2] in biases) for row in rows)

    def _attention_linears(self) -> list[tuple[str, int, int, str]]:
        h, q, kv = self.hidden, self.queries, self.keys
        if self.latent is not None:
            return [(f"self_attn.{row[0]}", *row[1:]) for row in self.latent.linears(h, self.heads)]
        if self.model_type == "gpt_neox":
            return [("attention.query_key_value", h, q + 2 * kv, "attention"), ("attention.dense", q, h, "heads")]
        heads = {"qkv_proj": q + 2 * kv} if self.family.joined else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        rows = [(f"self_attn.{name}", h, width, "attention") for name, width in heads.items()]
        return [*rows, ("self_attn.o_proj", q, h, "heads")]

    def _mlp_linears(self) -> list[tuple[str, int, int, str]]:
        h, i = self.hidden, self.intermediate
        if self.model_type == "gpt_neox":
            return [("mlp.dense_h_to_4h", h, i, "mlp"), ("mlp.dense_4h_to_h", i, h, "product")]
        if self.family.joined:
            return [("mlp.gate_up_proj", h, 2 * i, "mlp"), ("mlp.down_proj", i, h, "product")]
        return gated_linears("mlp", h, i)

    def _shared_linears(self) -> list[tuple[str, int, int, str]]:
        experts = self.experts
        if experts is None or not experts.shared:
            return []
        gate = [(experts.family.shared_gate, self.hidden, 1, "mlp")] if experts.family.shared_gate else []
        return [*gated_linears(experts.family.shared, self.hidden, experts.shared), *gate]

    @property
    def linear_weights(self) -> int:
        """Elements of the matrices of the linear layers of all decoder layers."""
        return sum(linear.weights for layer in range(self.layers) for linear in self.linears_of(layer))

    @property
    def expert_weights(self) -> int:
        """Elements of the matrices of all experts that tokens are routed to."""
        return 0 if self.experts is None else len(self.experts.layers) * self.experts.weights

    @property
    def active_weights(self) -> int:
        """Elements of the matrices of all decoder layers that compute a token."""
        active = 0 if self.experts is None else len(self.experts.layers) * self.experts.active
        return self.linear_weights + active

    @property
    def unquantized(self) -> int:
        """Parameters that stay in 16 or 32 bits: embedding, output matrix, norms, biases, routers."""
        embeddings = self.hidden * self.vocabulary * (1 if self.tied else 2)
        family, latent = self.family, self.latent
        a_norm = self.hidden * (2 if family.layer_norm else 1)
        in_heads = 2 * self.head_dim if family.head_norms else 0
        in_heads += self.queries + self.keys if family.wide_norms else 0
        in_heads += self.heads if family.sinks else 0
        in_heads += latent.query_rank + latent.rank if latent is not None else 0
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        routed = 0 if self.experts is None else len(self.experts.layers) * self.experts.unquantized
        return embeddings + a_norm + self.layers * (family.norms * a_norm + in_heads + biases) + routed

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_weights + self.expert_weights + self.unquantized

    @property
    def active_parameters(self) -> int:
        """The parameters that compute a token: of a layer's experts those that it is routed to."""
        return self.parameters - self.linear_weights - self.expert_weights + self.active_weights

    def full_names(self, layer: int) -> dict[str, Linear]:
        """Returns the linear layers of a decoder layer by their names in the model."""
        prefix = "gpt_neox" if self.model_type == "gpt_neox" else "model"
        return {f"{prefix}.layers.{layer}.{linear.name}": linear for linear in self.linears_of(layer)}


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
        experts=read_experts(settings, where),
        latent=read_latent(settings, where),
    )


def gated_linears(module: str, hidden: int, intermediate: int) -> list[tuple[str, int, int, str]]:
    """Returns the linear layers of a gated feed-forward layer: name, inputs, outputs and what they read."""
    rows = [(f"{module}.{name}", hidden, intermediate, "mlp") for name in ("gate_proj", "up_proj")]
    product = "product" if module == "mlp" else "shared product"
    return [*rows, (f"{module}.down_proj", intermediate, hidden, product)]
