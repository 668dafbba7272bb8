"""How base and adapter become one model: the group `merge`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from qlora.config.schema.quantization import ComputeDtype
from qlora.errors import require
from qlora.text import parse_size

MergeBase = StrEnum("MergeBase", "dequantized original")
"""The weights that an adapter is added to."""


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """How `task=merge` makes one model of base and adapter."""

    base: MergeBase = MISSING
    """Add the adapter to the `dequantized` weights it was trained on, or to the `original` 16-bit ones."""
    dtype: ComputeDtype = ComputeDtype.auto
    """The precision of the merged weights; `auto`: the one that the run computes in."""
    max_shard_size: str = "5GB"
    """The largest file of weights."""
    prompts: int = 16
    """Prompts of the data's held-out rows on which the merged model is compared with the adapter on its quantized
    base; each is cut to 256 tokens."""
    max_kl: float | None = None
    """The largest mean KL divergence, in nats a token, that is accepted; unset: 0.001 for `dequantized` (with 8 bits
    0.01: they round the activations too), 0.1 for `original`, whose weights are not those that were trained on, and
    never less than twice what computing in 16 bits does to the adapter on its base itself."""

    def __post_init__(self) -> None:
        require(self.prompts > 0, "merge.prompts", "be positive", self.prompts)
        limit = self.max_kl
        require(limit is None or 0 < limit < math.inf, "merge.max_kl", "be positive and finite, or null", limit)
        require(parse_size(self.max_shard_size) is not None, "merge.max_shard_size", "be a size such as 5GB",
                self.max_shard_size)  # fmt: skip
