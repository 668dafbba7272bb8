"""What is served is compared with what was trained: the group `verify`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora.errors import require

ENGINES = ("transformers", "llama-cpp")
"""The engines that run in this process."""


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """How `task=verify` asks the engine that will serve, and how near it must be to the adapter on its base."""

    engine: str = "transformers"
    """`transformers` (a folder), `llama-cpp` (a GGUF file, by the package `xllamacpp`), or the address of a server that
    speaks OpenAI's protocol, e.g. `http://localhost:8000/v1`: vLLM, SGLang, llama.cpp, Ollama."""
    path: str | None = None
    """What the engine loads: a folder of a merged model or a GGUF file; unset: the newest that `task=merge` or
    `task=export` wrote of the same weights."""
    lora: str | None = None
    """A GGUF file of an adapter that `engine=llama-cpp` adds to the base in `path`."""
    model: str | None = None
    """The name by which a server knows the model; unset: the only one that it lists."""
    prompts: int = 16
    """Held-out rows whose next-token probabilities are compared, each at up to 8 positions."""
    chats: int = 50
    """Chats, made of held-out rows, whose tokens are compared one by one."""
    top: int = 50
    """How many of the likeliest tokens a server is asked for; over those it returns the divergence is computed."""
    max_kl: float | None = None
    """The largest mean KL divergence, in nats a token, that is accepted; unset: 0.001 in 16 bits, 0.01 for q8_0, 0.2
    for q4_k_m, 0.1 for an adapter beside a base, 0.05 for a server, whose precision is not known."""

    def __post_init__(self) -> None:
        is_known = self.engine in ENGINES or self.engine.startswith(("http://", "https://"))
        require(is_known, "verify.engine", "be transformers, llama-cpp or an http:// address", self.engine)
        for name in ("prompts", "chats", "top"):
            require(getattr(self, name) > 0, f"verify.{name}", "be positive", getattr(self, name))
        limit = self.max_kl
        require(limit is None or 0 < limit < math.inf, "verify.max_kl", "be positive and finite, or null", limit)
