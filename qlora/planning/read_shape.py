"""Reads the shape of a model from its settings: by a table for the architectures that are planned without torch, else
from transformers' own model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qlora.errors import DataError
from qlora.planning.built_shape import build_shape
from qlora.planning.families import FAMILIES, Family
from qlora.planning.mixture import Experts, Latent, read_experts, read_latent
from qlora.planning.model_shape import Layer, Linear, Mixer, Shape, gated_linears
from qlora.text import brief

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_shape(
    settings: Mapping[str, Any], where: str, cache: Path | None = None, options: Collection[str] | None = None
) -> Shape:
    """Returns the shape that `model.architecture` or a `config.json` describes; `where` names it in errors.

    An architecture that is not in the table of families is built by transformers without its weights, which imports
    torch; `cache` is a folder that keeps what was read of it, and `options` are those of `model.architecture`, where
    one that the model type does not have raises `ConfigError`. Raises `DataError` for settings that describe no model,
    and for a size that is missing.
    """
    text = settings.get("text_config")
    settings = text if isinstance(text, Mapping) else settings
    kind = str(settings.get("model_type"))
    if kind not in FAMILIES:
        return build_shape(settings, where, cache, options)
    if missing := [name for name in SIZES if settings.get(name) is None]:
        raise DataError(f"{where}: {missing[0]} is missing, so the model's size is unknown; give it as a number")
    for name in (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = settings.get(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (value is None or is_size):
            raise DataError(f"{where}: {name} must be a positive whole number, got {brief(value)}")
    return _Table(kind, settings, where).shape()


class _Table:
    """What the table of families makes of settings."""

    def __init__(self, kind: str, settings: Mapping[str, Any], where: str) -> None:
        self.kind, self.settings, self.family = kind, settings, FAMILIES[kind]
        self.hidden, self.intermediate, self.layers, self.heads, self.vocabulary = (int(settings[n]) for n in SIZES)
        self.key_value_heads: int = settings.get("num_key_value_heads") or self.heads
        self.head_dim: int = settings.get("head_dim") or self.family.head_dim or self.hidden // self.heads
        self.experts: Experts | None = read_experts(settings, where)
        self.latent: Latent | None = read_latent(settings, where)

    def shape(self) -> Shape:
        tied = self.settings.get("tie_word_embeddings")
        is_tied = self.family.tied if tied is None else bool(tied)
        layers = [
            self._layer(window_of(self.settings, self.family, index), mixed=self._is_mixed(index))
            for index in range(self.layers)
        ]
        kinds = tuple(dict.fromkeys(layers))
        return Shape(
            model_type=self.kind,
            hidden=self.hidden,
            intermediate=self.intermediate,
            layers=self.layers,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            vocabulary=self.vocabulary,
            tied=is_tied,
            context=self.settings.get("max_position_embeddings") or 2048,
            family=self.family,
            kinds=kinds,
            order=tuple(kinds.index(layer) for layer in layers),
            unquantized=self._unquantized(layers, is_tied=is_tied),
            experts=self.experts,
        )

    def _is_mixed(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers

    @property
    def _queries(self) -> int:
        latent = self.latent
        return self.heads * (latent.plain + latent.rotated if latent is not None else self.head_dim)

    @property
    def _keys(self) -> int:
        return self._queries if self.latent is not None else self.key_value_heads * self.head_dim

    def _layer(self, window: int | None, *, mixed: bool) -> Layer:
        prefix = "gpt_neox" if self.kind == "gpt_neox" else "model"
        rows = [*self._attention_linears(), *(self._shared_linears() if mixed else self._mlp_linears())]
        linears = tuple(
            Linear(*row, bias=row[0].rpartition(".")[2] in self.family.biases, path=f"{prefix}.layers.{{}}.{row[0]}")
            for row in rows
        )
        shared = self.experts.shared if self.experts is not None else 0
        feed_forward = shared if mixed else self.intermediate
        return Layer(linears, (self._mixer(window),), self._norms(), feed_forward, mixed)

    def _mixer(self, window: int | None) -> Mixer:
        queries, keys, latent = self._queries, self._keys, self.latent
        values, kept = self.heads * self.head_dim, 2 * queries + 2 * keys
        if latent is not None:  # values are kept with the keys that they were computed with
            values = self.heads * latent.values
            kept = queries + keys + self.heads * (latent.plain + latent.values) + values
        return Mixer(queries, keys, values, self.heads, kept, window)

    def _norms(self) -> tuple[tuple[int, int], ...]:
        norms = [(self.hidden, 1)] * self.family.norms
        if self.family.head_norms:
            norms += [(self._queries, self.heads), (self._keys, self.key_value_heads)]
        if self.family.wide_norms:
            norms += [(self._queries, 1), (self._keys, 1)]
        if self.latent is not None:
            norms += [(rank, 1) for rank in (self.latent.rank, self.latent.query_rank) if rank]
        return tuple(norms)

    def _attention_linears(self) -> list[tuple[str, int, int, str]]:
        h, q, kv = self.hidden, self._queries, self._keys
        if self.latent is not None:
            return [(f"self_attn.{row[0]}", *row[1:]) for row in self.latent.linears(h, self.heads)]
        if self.kind == "gpt_neox":
            return [("attention.query_key_value", h, q + 2 * kv, "attention"), ("attention.dense", q, h, "heads")]
        heads = {"qkv_proj": q + 2 * kv} if self.family.joined else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        rows = [(f"self_attn.{name}", h, width, "attention") for name, width in heads.items()]
        return [*rows, ("self_attn.o_proj", q, h, "heads")]

    def _mlp_linears(self) -> list[tuple[str, int, int, str]]:
        h, i = self.hidden, self.intermediate
        if self.kind == "gpt_neox":
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

    def _unquantized(self, layers: list[Layer], *, is_tied: bool) -> int:
        """Returns the parameters of embeddings, norms, biases, sinks and routers."""
        family = self.family
        embeddings = self.hidden * self.vocabulary * (1 if is_tied else 2)
        a_norm = self.hidden * (2 if family.layer_norm else 1)
        in_heads = 2 * self.head_dim if family.head_norms else 0
        in_heads += self._queries + self._keys if family.wide_norms else 0
        in_heads += self.heads if family.sinks else 0
        in_heads += self.latent.query_rank + self.latent.rank if self.latent is not None else 0
        biases = sum(linear.outputs for layer in layers for linear in layer.linears if linear.bias)
        routed = 0 if self.experts is None else len(self.experts.layers) * self.experts.unquantized
        return embeddings + a_norm + self.layers * (family.norms * a_norm + in_heads) + biases + routed


def window_of(settings: Mapping[str, Any], family: Family, layer: int) -> int | None:
    """Returns how many tokens a layer looks back at most; None: all of them."""
    window = settings.get("sliding_window", family.window)
    if not window or settings.get("use_sliding_window") is False:
        return None
    if isinstance(types := settings.get("layer_types"), list) and layer < len(types):
        return window if types[layer] == "sliding_attention" else None
    if "use_sliding_window" in settings and family.window_from is not None:
        is_late = layer >= settings.get("max_window_layers", 28)
        if is_late is not family.window_from:
            return None
    every = settings.get("sliding_window_pattern") or settings.get("_sliding_window_pattern") or family.full_every
    return None if every and (layer + 1) % every == 0 else window
