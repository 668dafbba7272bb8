"""The base model: the group `model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qlora.config.registries.rope_scaling import check_rope_scaling
from qlora.config.schema.code_names import check_plain
from qlora.config.schema.values import HOLDS, MAPPINGS
from qlora.errors import ConfigError, require
from qlora.text import brief

Weights = StrEnum("Weights", "pretrained random")
"""Where the base weights come from."""


NULL_AS_ZERO = ("sliding_window", "q_lora_rank")
"""What `config.json` says by null where a model has none; here null leaves it to the model type."""


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """A model's shape in the names of transformers' config classes; what `model.weights=random` builds."""

    model_type: str = MISSING
    """transformers' name of the architecture, e.g. `llama`, `qwen3`, `gpt_neox`."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer; unset: the model type has none beside its experts."""
    num_hidden_layers: int = MISSING
    """Number of decoder layers."""
    num_attention_heads: int = MISSING
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); unset: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; unset: `hidden_size / num_attention_heads`."""
    vocab_size: int = MISSING
    """Rows of the embedding matrix."""
    max_position_embeddings: int = MISSING
    """Longest context, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the embedding and the output layer are one matrix."""
    rms_norm_eps: float | None = None
    """Floor of the norms' divisor; unset: the model type's own."""
    rope_theta: float | None = None
    """Base of the rotary position embedding; unset: the model type's own."""
    sliding_window: int | None = None
    """How many tokens attention looks back at most; unset: the model type's own; 0: all of them."""
    num_experts: int | None = None
    """Experts of a layer, as Qwen and OLMoE call them; what is unset of a mixture is the model type's own."""
    num_local_experts: int | None = None
    """The same, as Mixtral, gpt-oss and Granite call them; 0: Granite 4 has none."""
    n_routed_experts: int | None = None
    """The same, as DeepSeek calls them."""
    num_experts_per_tok: int | None = None
    """How many experts compute a token."""
    moe_intermediate_size: int | None = None
    """Width of an expert, where it is not `intermediate_size` (Qwen, DeepSeek)."""
    n_shared_experts: int | None = None
    """Experts beside those that compute every token (DeepSeek)."""
    shared_expert_intermediate_size: int | None = None
    """Width of the expert that computes every token (Qwen 2)."""
    first_k_dense_replace: int | None = None
    """How many layers, the first ones, have no experts (DeepSeek)."""
    decoder_sparse_step: int | None = None
    """One layer of how many has experts (Qwen)."""
    mlp_only_layers: list[int] | None = None
    """The layers that have none in spite of that, counted from 0 (Qwen)."""
    norm_topk_prob: bool | None = None
    """Whether the weights of a token's experts are scaled to a sum of 1 (Qwen, OLMoE, DeepSeek)."""
    n_group: int | None = None
    """Groups of experts, of which a token's are chosen first (DeepSeek)."""
    topk_group: int | None = None
    """How many of those groups a token may use (DeepSeek)."""
    q_lora_rank: int | None = None
    """Width that queries are compressed to (DeepSeek); 0: they are not."""
    kv_lora_rank: int | None = None
    """Width that keys and values are compressed to (DeepSeek)."""
    qk_nope_head_dim: int | None = None
    """Width of a query and of a key without positions (DeepSeek)."""
    qk_rope_head_dim: int | None = None
    """Width of a query and of a key that is rotated by position (DeepSeek)."""
    v_head_dim: int | None = None
    """Width of a value (DeepSeek)."""
    options: Any = field(default_factory=dict, metadata={HOLDS: dict[str, Any]})
    """Other settings of the model type by transformers' own names, e.g. `{linear_num_value_heads: 16}`."""

    def __post_init__(self) -> None:
        if not isinstance(self.options, dict):
            key = "model.architecture.options"
            given = "null" if self.options is None else brief(self.options)
            raise ConfigError(f"{key} must be a mapping such as {MAPPINGS[key]}, got {given}")
        check_plain("model.architecture.options", self.options)
        if twice := sorted({item.name for item in fields(self)} & self.options.keys()):
            raise ConfigError(
                f"model.architecture.options.{twice[0]} is a setting of model.architecture itself; write "
                f"model.architecture.{twice[0]}"
            )
        may_be_zero = (
            "first_k_dense_replace",
            "n_shared_experts",
            "num_local_experts",
            "q_lora_rank",
            "sliding_window",
        )
        for item in fields(self):
            value, key = getattr(self, item.name), f"model.architecture.{item.name}"
            if item.name == "options":
                continue
            if isinstance(value, list):
                require(min(value, default=0) >= 0, key, "have no negative number", value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                least = "not be negative" if item.name in may_be_zero else "be positive"
                require(value > 0 or (value == 0 and item.name in may_be_zero), key, least, value)


def described_settings(architecture: ArchitectureConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `model.architecture` says by transformers' names; what it leaves out is the model type's own."""
    values = dict(asdict(architecture) if isinstance(architecture, ArchitectureConfig) else architecture)
    options = values.pop("options", None) or {}
    described = {name: value for name, value in values.items() if value is not None} | options
    return described | dict.fromkeys(name for name in NULL_AS_ZERO if described.get(name) == 0)


_NAMES = [item.name for item in fields(ArchitectureConfig)]
MIXTURE_FIELDS = tuple(_NAMES[_NAMES.index("num_experts") : _NAMES.index("options")])
"""What `ArchitectureConfig` says of mixtures of experts alone."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model and how its files are found and placed."""

    name: str = MISSING
    """A hub id, a local folder, or `tiny` for the embedded model."""
    weights: Weights = Weights.pretrained
    """`pretrained` loads the weights; `random` initialises them from `seed` in the shape of `model.architecture`,
    quantized layer by layer (pretraining, or measuring speed and memory without a download)."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    cache_dir: str | None = None
    """Folder for downloaded files; unset: the hub library's own."""
    trust_remote_code: bool = False
    """Run Python code of the model's repository; given on the command line, or as
    `QLORA_TRUSTED=model.trust_remote_code` in the environment, and in no file. The access token of gated models is
    read from the environment (`HF_TOKEN`, or `hf auth login`), never from a config."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: a hub id, a local folder, or `tiny`, the embedded one, which random
    weights have where none is named: nothing is downloaded for them."""
    device_map: str | None = None
    """How accelerate spreads the layers: `auto`, `balanced`, `sequential`; unset: everything on one device."""
    max_memory: str | None = None
    """The most memory that the weights may take on each GPU, e.g. `40GiB` (the original's `--max_memory_MB`)."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2` or any other name that transformers knows; unset: its choice."""
    rope_scaling: Any = field(default=None, metadata={HOLDS: dict[str, Any] | None})
    """How rotary positions are stretched for rows that are longer than what the model reads, by transformers' names,
    e.g. `{rope_type: yarn, factor: 4}`; the types `linear`, `dynamic`, `yarn`, `longrope`, `llama3`
    (docs/long-contexts.md). It takes the place of what the model's own config says; unset: that is kept."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the vocabulary; their embedding rows are trained and saved with the adapter. Those in angle
    brackets are special: marks of a template, which decoded answers leave out."""
    license: str | None = None
    """The licence of the weights, for the model card; unset: the one that the model's own card names."""
    gated: bool = False
    """Whether the hub asks for an accepted licence and a token."""
    architecture: ArchitectureConfig | None = None
    """The shape of the model, as its own config file states it."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)
        if "/" in (self.attn_implementation or "") and not self.trust_remote_code:
            raise ConfigError(
                f"model.attn_implementation={self.attn_implementation}: this is code of a hub repository; set "
                "model.trust_remote_code=true to run it, and USE_HUB_KERNELS=YES in the environment"
            )
        if self.weights is Weights.pretrained:
            return
        if self.architecture is None:
            raise ConfigError(
                f"model.weights=random needs the shape of {self.name} in model.architecture; "
                "choose a preset with model=NAME or set model.architecture.* fields"
            )
        if self.device_map or self.max_memory:
            raise ConfigError(
                "model.weights=random initialises the base on one device; leave model.device_map and "
                "model.max_memory out"
            )
        self.tokenizer = self.tokenizer or "tiny"

    @property
    def known_architecture(self) -> ArchitectureConfig | None:
        """The shape of the model where the config states it; None: that of a model that is only named lies with it."""
        if self.architecture is None or self.weights is Weights.random:
            return self.architecture
        from qlora.config.options import model_presets  # which reads the schema

        stated = {field.name: getattr(self.architecture, field.name) for field in fields(self.architecture)}
        of_name = (preset["architecture"] for preset in model_presets().values() if preset["name"] == self.name)
        return self.architecture if stated in of_name else None
