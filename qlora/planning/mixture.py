"""What a mixture of experts adds to a model's shape: its experts, and DeepSeek's compressed attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora.errors import DataError
from qlora.text import brief


@dataclass(frozen=True)
class MixtureFamily:
    """How an architecture names and builds its experts."""

    defaults: Mapping[str, Any]
    """transformers' defaults of the settings that are read here."""
    module: str = "mlp.experts"
    """The name of a layer's experts below the decoder layer."""
    shared: str = ""
    """The name of the experts that compute every token."""
    shared_gate: str = ""
    """The name of the linear layer that weighs their output, one number a token."""
    is_biased: bool = False
    """Whether experts and router have biases."""
    act_widths: int = 3
    """Widths of an expert that its activation keeps a row: the outputs of gate and up, and their product's factors."""


LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
MIXTURES = {
    "qwen3_moe": MixtureFamily(
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
    ),
    "qwen2_moe": MixtureFamily(
        {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "decoder_sparse_step": 1}
        | {"shared_expert_intermediate_size": 5632},
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
    ),
    "mixtral": MixtureFamily({"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": MixtureFamily({"num_local_experts": 128, "num_experts_per_tok": 4}, is_biased=True, act_widths=6),
    "granitemoe": MixtureFamily(
        {"num_local_experts": 8, "num_experts_per_tok": 2}, module="block_sparse_moe.experts"
    ),
    "olmoe": MixtureFamily({"num_experts": 64, "num_experts_per_tok": 8}),
    "deepseek_v2": MixtureFamily(
        {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "first_k_dense_replace": 0}
        | LATENT,
        shared="mlp.shared_experts",
    ),
    "deepseek_v3": MixtureFamily(
        {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3}
        | {"num_experts_per_tok": 8} | LATENT,
        shared="mlp.shared_experts",
    ),
}  # fmt: skip
"""By transformers' name of the model type."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How model types call the number of a layer's experts; some read several of these."""


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture's layers."""

    family: MixtureFamily = field(repr=False, compare=False)
    count: int
    """Of a layer."""
    per_token: int
    hidden: int
    intermediate: int
    """Width of an expert."""
    shared: int
    """Width of the feed-forward layer that computes every token beside them; 0: none."""
    layers: frozenset[int]
    """The decoder layers that have experts."""
    has_gate: bool = True

    @property
    def units(self) -> tuple[tuple[int, int], ...]:
        """The matrices [rows, columns] of one expert: gate, up and down; some have no gate."""
        first = (self.intermediate, self.hidden)
        return *([first, first] if self.has_gate else [first]), (self.hidden, self.intermediate)

    @property
    def weights(self) -> int:
        """Elements of the matrices of a layer."""
        return self.count * self.of_one

    @property
    def active(self) -> int:
        """Elements of the matrices of a layer that compute a token."""
        return self.per_token * self.of_one

    @cached_property
    def of_one(self) -> int:
        """Elements of the matrices of one expert."""
        return sum(rows * columns for rows, columns in self.units)

    @property
    def unquantized(self) -> int:
        """Parameters of a layer that are never quantized: the router, and biases."""
        biases = 1 + 2 * self.intermediate + self.hidden if self.family.is_biased else 0
        return self.count * (self.hidden + biases)

    def adapter(self, rank: int) -> Counter[int]:
        """Returns the sizes of the tensors of an adapter on a layer: A and B of gate and up, and of down."""
        first = (2 if self.has_gate else 1) * self.intermediate
        widths = (self.hidden, first, self.intermediate, self.hidden)
        return Counter([self.count * rank * width for width in widths])


@dataclass(frozen=True)
class Latent:
    """Attention whose queries, keys and values are compressed (DeepSeek)."""

    query_rank: int
    """0: queries are not."""
    rank: int
    """Of keys and values."""
    plain: int
    """Width of a head's query and key without positions."""
    rotated: int
    """Width of a head's query and key that is rotated by position."""
    values: int
    """Width of a head's value."""

    def linears(self, hidden: int, heads: int) -> list[tuple[str, int, int, str]]:
        """Returns the linear layers of attention: name, inputs, outputs and what they read."""
        queries = heads * (self.plain + self.rotated)
        rows = [("q_proj", hidden, queries, "attention")]
        if self.query_rank:
            rows = [("q_a_proj", hidden, self.query_rank, "attention"),
                    ("q_b_proj", self.query_rank, queries, "queries")]  # fmt: skip
        rows += [("kv_a_proj_with_mqa", hidden, self.rank + self.rotated, "attention"),
                 ("kv_b_proj", self.rank, heads * (self.plain + self.values), "latent"),
                 ("o_proj", heads * self.values, hidden, "values")]  # fmt: skip
        return rows


def read_experts(settings: Mapping[str, Any], where: str) -> Experts | None:
    """Returns the experts that a config describes; None: its model type has none.

    Raises `DataError` for a size that is missing or none.
    """
    kind = str(settings.get("model_type"))
    if (family := MIXTURES.get(kind)) is None:
        return None
    read = Settings({**family.defaults, **_joined(settings, family)}, where)
    layers = range(read.size("num_hidden_layers"))
    step, first = read.number("decoder_sparse_step", 1), read.number("first_k_dense_replace", 0)
    dense = settings.get("mlp_only_layers") or []
    width = "moe_intermediate_size" if "moe_intermediate_size" in family.defaults else "intermediate_size"
    intermediate = read.size(width)
    return Experts(
        family=family,
        count=read.size(next(name for name in COUNTS if name in family.defaults)),
        per_token=read.size("num_experts_per_tok"),
        hidden=read.size("hidden_size"),
        intermediate=intermediate,
        shared=_shared_width(read, family, intermediate),
        layers=frozenset(
            layer for layer in layers if layer >= first and (layer + 1) % max(step, 1) == 0 and layer not in dense
        ),
    )


def _shared_width(read: Settings, family: MixtureFamily, intermediate: int) -> int:
    if "shared_expert_intermediate_size" in family.defaults:
        return read.number("shared_expert_intermediate_size", 0)
    return intermediate * read.number("n_shared_experts", 0) if family.shared else 0


def read_latent(settings: Mapping[str, Any], where: str) -> Latent | None:
    """Returns the compressed attention that a config describes; None: its model type has none."""
    family = MIXTURES.get(str(settings.get("model_type")))
    if family is None or "kv_lora_rank" not in family.defaults:
        return None
    read = Settings({**family.defaults, **settings}, where)
    return Latent(
        query_rank=read.number("q_lora_rank", 0),
        rank=read.size("kv_lora_rank"),
        plain=read.size("qk_nope_head_dim"),
        rotated=read.size("qk_rope_head_dim"),
        values=read.size("v_head_dim"),
    )


def _joined(settings: Mapping[str, Any], family: MixtureFamily) -> dict[str, Any]:
    """Returns settings with the number of experts by the name that the family calls it."""
    name = next(name for name in COUNTS if name in family.defaults)
    values = [settings[other] for other in (name, *COUNTS) if settings.get(other) is not None]
    return {**settings, **({name: values[0]} if values else {})}


@dataclass(frozen=True)
class Settings:
    """The settings of a model, `where` they stand."""

    values: Mapping[str, Any]
    where: str

    def size(self, name: str) -> int:
        """Returns a number from 1 on; raises `DataError` for another value or none."""
        if self.values.get(name) is None:
            raise DataError(f"{self.where}: {name} is missing, so the model's size is unknown; give it as a number")
        return self._check(name, self.values[name], 1)

    def number(self, name: str, otherwise: int) -> int:
        """Returns a number from 0 on, `otherwise` where there is none."""
        value = self.values.get(name)
        return otherwise if value is None else self._check(name, value, 0)

    def _check(self, name: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            positive = "a positive whole number" if least else "a whole number that is not negative"
            raise DataError(f"{self.where}: {name} must be {positive}, got {brief(value)}")
        return value
