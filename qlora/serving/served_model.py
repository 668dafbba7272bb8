"""The models that are served: the base and its adapters, each with the template and the end tokens of its training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel

from qlora.adapters import adapter_off
from qlora.config.schema import GenerationConfig
from qlora.data.batching.row_encoder import RowEncoder
from qlora.errors import UserError
from qlora.generation.sampling import Sampler
from qlora.serving.asked import Asked, Message, Sampling
from qlora.serving.refusal import Refusal


@dataclass(frozen=True)
class Limits:
    """What a model can read."""

    context: int
    """The most tokens of a prompt with its answer."""
    vocabulary: int
    """The tokens that the base has embeddings for."""


@dataclass(frozen=True)
class ServedModel:
    """A name that clients ask for, and what answers to it."""

    name: str
    encoder: RowEncoder
    end_ids: list[int]
    switched: Callable[[], AbstractContextManager[None]]
    """The context in which the loaded model is this one."""
    generation: GenerationConfig
    """What holds for a request that does not say otherwise."""
    limits: Limits

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Returns the tokens that ask for the next answer of a conversation, as training wrote them."""
        try:
            return self._checked(self.encoder.encode_prompt(messages), "messages")
        except UserError as error:
            raise Refusal(str(error), param="messages") from error

    def encode_text(self, text: str, *, begins: bool = True) -> list[int]:
        """Returns the tokens of a text, behind the begin token; what it spells becomes no special token."""
        return self._checked(self.encoder.encode_text(text, begins=begins), "prompt")

    def prompt(self, asked: Asked) -> list[int]:
        """Returns the tokens of what is asked; raises `Refusal` for those that leave no room for the answer."""
        if asked.messages is not None:
            ids = self.encode_chat(asked.messages)
        elif isinstance(asked.prompt, str):
            ids = self.encode_text(asked.prompt)
        else:
            ids = self._checked(list(asked.prompt or []), "prompt")
        param, context = "messages" if asked.is_chat else "prompt", self.limits.context
        if not ids:
            raise Refusal("the prompt has no token", param=param)
        if len(ids) + (asked.max_tokens or 1) > context:
            answer = f" and the answer of up to {asked.max_tokens:,}" if asked.max_tokens else ""
            raise Refusal(
                f"the prompt of {len(ids):,} tokens{answer} do{'' if answer else 'es'} not fit into the context of "
                f"{context:,} tokens{'' if answer else ' with an answer'}; shorten it"
                f"{' or ask for a smaller max_tokens' if answer else ''}, or start the server with a larger "
                "serve.context where the model has one",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        return ids

    def sampler(self, asked: Asked, prompt: list[int], seed: int) -> Sampler:
        """Returns what chooses the tokens of an answer; `seed` counts where the request brings none."""
        room = min(asked.max_tokens or self.generation.new_tokens, self.limits.context - len(prompt))
        low = min(self.generation.min_new_tokens or 0, room) or None
        config = replace(_chosen(self.generation, asked.sampling), max_new_tokens=room, min_new_tokens=low)
        given = asked.sampling.seed
        return Sampler(config, self.end_ids, (seed if given is None else given) % 2**64)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if any(not 0 <= token < self.limits.vocabulary for token in ids):
            raise Refusal(
                f"the prompt holds a token that the model has no embedding for; it has {self.limits.vocabulary:,}",
                param=param,
            )
        return ids


def _chosen(config: GenerationConfig, sampling: Sampling) -> GenerationConfig:
    """Returns the options of `generation` with those of a request; what neither says is left as the model says it."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    asks = (top_p is not None and top_p < 1) or bool(top_k)
    samples = temperature > 0 if temperature is not None else config.do_sample or asks
    unset = GenerationConfig()
    if not samples:
        plain = {name: getattr(unset, name) for name in ("temperature", "top_p", "top_k", "typical_p")}
        return replace(config, do_sample=False, **plain)
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    start = {} if config.do_sample else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    changes = start | {name: value for name, value in given.items() if value is not None}
    return replace(config, do_sample=True, **changes)


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """A context in which a model stays what it is."""
    yield


def switch_off(model: PeftModel) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context in which a model with adapters is its base."""
    return lambda: adapter_off(model)


def switch_to(model: PeftModel, adapter: str) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context in which one of a model's adapters is on."""

    @contextlib.contextmanager
    def switched() -> Iterator[None]:
        if model.active_adapter != adapter:
            model.set_adapter(adapter, inference_mode=True)
        yield

    return switched
