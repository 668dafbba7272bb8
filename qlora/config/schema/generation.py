"""How answers are generated: the group `generation`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum

from qlora.errors import ConfigError, require

NEW_TOKENS = 256
"""Tokens of the longest answer where nothing else is asked for and the model's context holds them."""


class Loop(Enum):
    """What decodes answers token by token."""

    auto = "auto"
    slots = "slots"
    transformers = "transformers"


ROWS, GPU_ROWS = 16, 64
"""Prompts at a time where nothing is asked for, and those by slots on a GPU."""
Weights = Enum("Weights", {"auto": "auto", "4bit": "4bit", "16bit": "16bit"})
"""In what a 4-bit base computes answers."""


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How answers are generated, in the names of `transformers.GenerationConfig`."""

    batch_size: int | None = None
    """Prompts at a time, the longest first; fewer by slots where half of the free memory does not hold their keys and
    values, which is said of a number that was asked for. Null: 16, and by slots on a GPU 64."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null: 256, or what the longest prompt leaves of the model's context if that is less."""
    min_new_tokens: int | None = None
    """Shortest answer in tokens."""
    do_sample: bool = False
    """Sample tokens at random; false: greedy or beam search."""
    num_beams: int = 1
    """Beams of the beam search; 1: none."""
    num_beam_groups: int = 1
    """Groups of diverse beam search; above 1 runs transformers' community code (`model.trust_remote_code`)."""
    penalty_alpha: float | None = None
    """Contrastive search; runs transformers' community code (`model.trust_remote_code`)."""
    use_cache: bool = True
    """Reuse keys and values of earlier tokens."""
    loop: Loop = Loop.auto
    """What decodes answers: `slots`, where each row has a place of its own without padding, and a row that ends makes
    room for the next; `transformers`, its `generate`, by padded batches; `auto`: slots on a CPU and on CUDA, where they
    serve the model and the options. Slots answer a row as if it were alone; padding rounds otherwise in 16 bits."""
    weights: Weights = Weights.auto
    """How slots compute with a 4-bit base: `16bit` decodes it once, to the precision of computation and for the time of
    the answers (the same values; 13 GB for 7 billion parameters), `4bit` for each token; `auto`: once where half of the
    memory that is free holds it, on CUDA with the experts of a mixture. The adapter stays apart."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability."""
    typical_p: float = 1.0
    """Locally typical sampling (arXiv 2202.00666)."""
    diversity_penalty: float = 0.0
    """How much groups of beams avoid each other's tokens."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that have occurred already less likely."""
    length_penalty: float = 1.0
    """Above 0 favours longer beams."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice; 0: no rule."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens is None or self.max_new_tokens > 0, "generation.max_new_tokens",
                "be positive or null", self.max_new_tokens)  # fmt: skip
        require(self.batch_size is None or self.batch_size > 0, "generation.batch_size", "be positive or null",
                self.batch_size)  # fmt: skip
        for name in ("num_beams", "num_beam_groups", "temperature"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"generation.{name}", "be positive", value)
        for name in ("top_k", "no_repeat_ngram_size", "diversity_penalty"):
            require(getattr(self, name) >= 0, f"generation.{name}", "not be negative", getattr(self, name))
        for name in ("top_p", "typical_p"):
            require(0 < getattr(self, name) <= 1, f"generation.{name}", "be in (0, 1]", getattr(self, name))
        penalty, alpha = self.repetition_penalty, self.penalty_alpha
        require(0 < penalty < math.inf, "generation.repetition_penalty", "be positive", penalty)
        require(alpha is None or alpha >= 0, "generation.penalty_alpha", "not be negative", alpha)
        low = self.min_new_tokens
        require(low is None or 0 <= low <= self.new_tokens, "generation.min_new_tokens", "be null or lie between 0 "
                "and generation.max_new_tokens", low)  # fmt: skip
        require(self.num_beams % self.num_beam_groups == 0, "generation.num_beam_groups", "divide generation.num_beams",
                self.num_beam_groups)  # fmt: skip
        self._check_read()

    @property
    def rows(self) -> int:
        """Prompts at a time, where slots on a GPU take no more."""
        return self.batch_size or ROWS

    @property
    def new_tokens(self) -> int:
        """The longest answer in tokens, where the model's context does not shorten the default."""
        return self.max_new_tokens if self.max_new_tokens is not None else NEW_TOKENS

    def _check_read(self) -> None:
        """Refuses a value that the chosen search does not read."""
        sampling = (self.do_sample, "when sampling", "generation.do_sample=true")
        read = {
            **dict.fromkeys(("temperature", "top_p", "typical_p"), sampling),
            "top_k": (self.do_sample or bool(self.penalty_alpha), *sampling[1:]),
            "length_penalty": (self.num_beams > 1, "by beam search", "generation.num_beams=4"),
            "diversity_penalty": (self.num_beam_groups > 1, "by groups of beams", "generation.num_beam_groups=2"),
        }
        unset = {item.name: item.default for item in fields(self)}
        for name, (is_read, reader, remedy) in read.items():
            value = getattr(self, name)
            if value != unset[name] and not is_read:
                raise ConfigError(
                    f"generation.{name}={value:g} is read {reader} only; set {remedy} too, or leave it out "
                    f"(generation.{name}={unset[name]:g})"
                )
