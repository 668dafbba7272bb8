"""A model that answers one prompt at a time, and shows its answer as it comes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteriaList

from qlora.adapters import adapter_off
from qlora.config.schema import GenerationConfig
from qlora.data.batching.row_encoder import RowEncoder
from qlora.evaluation.answer_stream import Reply, Stream
from qlora.evaluation.generation import (
    build_settings,
    community_code,
    end_token_ids,
    left_pad,
    own_settings_aside,
)
from qlora.evaluation.measure import evaluation_mode
from qlora.generation.answering import Slots
from qlora.generation.engine import Engine
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import serving
from qlora.upstream.transformers import generate


@dataclass(frozen=True)
class ChatModel:
    """A model that answers one prompt at a time."""

    model: PreTrainedModel | PeftModel
    encoder: RowEncoder
    generation: GenerationConfig
    pad_token_id: int
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[None]]
    dtype: torch.dtype = torch.float32
    """What the model computes in."""

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be switched off."""
        return isinstance(self.model, PeftModel)

    @cached_property
    def context(self) -> int | None:
        """The most tokens that the model takes, prompt and answer together; None: it names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def room(self) -> int | None:
        """The longest prompt in tokens: what an answer of `generation.max_new_tokens` leaves, at least half."""
        if self.context is None:
            return None
        return max(self.context - self.generation.new_tokens, self.context // 2)

    def answer(self, prompt: list[int], show: Callable[[str], None], *, base: bool = False) -> Reply:
        """Returns the answer to a prompt (token ids) and shows it as it comes; Ctrl-C ends it early.

        `base` switches the adapter off. Beams are known at their end only, so what they find is shown at once.
        """
        config, model, tokenizer = self.generation, self.model, self.encoder.base
        stream = Stream(tokenizer, end_token_ids(model, tokenizer), self.encoder.writer.stop_text, show)
        settings = build_settings(config, pad_token_id=self.pad_token_id, end_ids=list(stream.end_ids))
        if self.context is not None:
            settings.max_new_tokens = min(config.new_tokens, self.context - len(prompt))
            settings.min_new_tokens = min(config.min_new_tokens or 0, settings.max_new_tokens) or None
        if self._slots is not None:
            return self._answer_in_slots(prompt, stream, settings, base=base)
        options: dict[str, Any] = community_code(config)
        as_it_comes = config.num_beams == 1 and not options
        if as_it_comes:
            options = {"streamer": stream, "stopping_criteria": StoppingCriteriaList([_stops(stream)])}
        inputs = left_pad([prompt], self.pad_token_id, self.device)
        try:
            switch = adapter_off(model) if base else contextlib.nullcontext()
            with switch, torch.inference_mode(), evaluation_mode(model), self.autocast(), own_settings_aside(model):
                output = generate(model, inputs, generation_config=settings, **options)
            if not as_it_comes:
                stream.take(output[0, len(prompt) :].tolist())
        except KeyboardInterrupt:
            return stream.close(interrupted=True)
        return stream.close()

    @cached_property
    def _slots(self) -> Slots | None:
        """What answers by slots, with weights that stay decoded as long as this model is there; None: nothing does."""
        slots = Slots(self.generation, self.device, self.dtype, self.autocast)
        with evaluation_mode(self.model):
            if slots.unsupported_reason(self.model) is not None:
                return None
        stack = contextlib.ExitStack()
        stack.enter_context(slots.matmuls(self.model))
        weakref.finalize(self, stack.close)
        return slots

    def _answer_in_slots(self, prompt: list[int], stream: Stream, settings: Any, *, base: bool) -> Reply:
        config = replace(
            self.generation, max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens
        )
        sampler = Sampler(config, list(stream.end_ids), seed=int(torch.randint(2**31, ())) if config.do_sample else 0)
        engine = Engine(self.model, sampler, slots=1, length=len(prompt) + config.new_tokens)
        request = engine.add(None, prompt)
        switch = adapter_off(self.model) if base else contextlib.nullcontext()
        try:
            with switch, evaluation_mode(self.model), serving(self.model):
                while engine.is_busy and not stream.stops:
                    with torch.inference_mode(), self.autocast():
                        engine.step()
                    stream.take(request.answer[len(stream.ids) :])
        except KeyboardInterrupt:
            return stream.close(interrupted=True)
        return stream.close()


def _stops(stream: Stream) -> Callable[..., torch.Tensor]:
    def stopped(input_ids: torch.Tensor, scores: Any, **unread: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stream.stops, device=input_ids.device)

    return stopped
