"""A model that answers one prompt at a time, and shows its answer as it comes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora.adapters import adapter_off
from qlora.config.schema import GenerationConfig
from qlora.data.batching.row_encoder import RowEncoder
from qlora.evaluation.generation import (
    build_settings,
    community_code,
    cut_at,
    end_token_ids,
    left_pad,
    own_settings_aside,
    spelled_ends,
)
from qlora.evaluation.measure import evaluation_mode
from qlora.generation.answering import Slots
from qlora.generation.engine import Engine
from qlora.generation.linears import decoded_linears
from qlora.generation.sampling import Sampler
from qlora.generation.slot_model import serving
from qlora.upstream.transformers import decode, generate


class Reply(NamedTuple):
    """An answer: its text, its tokens, and whether it came to its end, to the limit, or to Ctrl-C."""

    text: str
    tokens: int
    finish: str
    """`stop`, `length` or `interrupted`."""


class Stream(BaseStreamer):
    """Takes an answer's tokens as they come and shows their text, but for an end that the next token may change."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], stop_text: str, show: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.end_ids, self.show = tokenizer, end_ids, show
        self.stop_texts = [*spelled_ends(end_ids, tokenizer), *([stop_text] if stop_text else [])]
        self.ids: list[int] = []
        self.printed = ""
        self._spoken = ""
        self._asked = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the tokens of a step; the first call brings the prompt."""
        if self._asked:
            self.take(value.flatten().tolist())
        self._asked = True

    def end(self) -> None:
        """Does nothing: `close` shows the rest, after an interruption too."""

    def take(self, ids: list[int]) -> None:
        """Adds tokens and shows what they settle."""
        self.ids += ids[: next((index + 1 for index, token in enumerate(ids) if token in self.end_ids), None)]
        self._spoken = decode(self.tokenizer, self.ids, skip_special_tokens=True)
        settled = self.text.rstrip("\ufffd")  # half a character
        begun = max((_overlap(settled, stop) for stop in self.stop_texts), default=0)
        self._show(settled[: len(settled) - begun].rstrip())

    def close(self, *, interrupted: bool = False) -> Reply:
        """Shows the rest and returns the answer."""
        self._show(self.text)
        tokens = len(self.ids) - self._ended
        return Reply(self.text, tokens, "interrupted" if interrupted else "stop" if self.stops else "length")

    def _show(self, text: str) -> None:
        if len(text) > len(self.printed):
            self.show(text[len(self.printed) :])
            self.printed = text

    @property
    def text(self) -> str:
        """What was said, up to the text of an end token, or to the one that opens the next question."""
        return cut_at(self._spoken, self.stop_texts).strip()

    @property
    def stops(self) -> bool:
        """Whether the answer has come to its end."""
        return self._ended or any(stop in self._spoken for stop in self.stop_texts)

    @property
    def _ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.end_ids


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
        if slots.are_decoded(self.model):
            stack = contextlib.ExitStack()
            stack.enter_context(decoded_linears(self.model, self.dtype))
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
            with switch, evaluation_mode(self.model), serving(self.model, self.dtype, decoded=False):  # decoded above
                while engine.is_busy and not stream.stops:
                    with torch.inference_mode(), self.autocast():
                        engine.step()
                    stream.take(request.answer[len(stream.ids) :])
        except KeyboardInterrupt:
            return stream.close(interrupted=True)
        return stream.close()


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text may begin `stop`."""
    return next((size for size in range(len(stop), 0, -1) if text.endswith(stop[:size])), 0)


def _stops(stream: Stream) -> Callable[..., torch.Tensor]:
    def stopped(input_ids: torch.Tensor, scores: Any, **unread: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stream.stops, device=input_ids.device)

    return stopped
