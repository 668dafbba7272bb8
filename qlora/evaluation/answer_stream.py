"""The text of an answer as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from qlora.evaluation.generation import cut_at, spelled_ends
from qlora.upstream.transformers import decode


class Reply(NamedTuple):
    """An answer: its text, its tokens, and whether it came to its end, to the limit, or to Ctrl-C."""

    text: str
    tokens: int
    finish: str
    """`stop`, `length` or `interrupted`."""


class Stream(BaseStreamer):
    """Takes an answer's tokens as they come and shows their text, but for an end that the next token may change."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        stop_text: str,
        show: Callable[[str], None],
        *,
        stops: Sequence[str] = (),
        continues: Sequence[int] = (),
    ) -> None:
        """`stops` are further texts that end the answer.

        What continues a text, whose last tokens are given, keeps the blanks around it.
        """
        self.tokenizer, self.end_ids, self.show, self.continues = tokenizer, end_ids, show, [*continues]
        self.stop_texts = [*spelled_ends(end_ids, tokenizer), *([stop_text] if stop_text else []), *stops]
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
        self._spoken = self._decode(self.ids[:-1] if self._ended else self.ids)
        settled = self.text.rstrip("\ufffd")  # half a character
        begun = max((_overlap(settled, stop) for stop in self.stop_texts), default=0)
        settled = settled[: len(settled) - begun]
        self._show(settled if self.continues else settled.rstrip())

    def _decode(self, ids: list[int]) -> str:
        """Returns a text; some tokenizers leave out the blank before its first word, unless it continues another."""
        previous = decode(self.tokenizer, self.continues, skip_special_tokens=True) if self.continues else ""
        whole = decode(self.tokenizer, [*self.continues, *ids], skip_special_tokens=True)
        if whole.startswith(previous):
            return whole.removeprefix(previous)
        return decode(self.tokenizer, ids, skip_special_tokens=True)

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
        said = cut_at(self._spoken, self.stop_texts)
        return said if self.continues else said.strip()

    @property
    def stops(self) -> bool:
        """Whether the answer has come to its end."""
        return self._ended or any(stop in self._spoken for stop in self.stop_texts)

    @property
    def _ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.end_ids


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text may begin `stop`."""
    return next((size for size in range(len(stop), 0, -1) if text.endswith(stop[:size])), 0)
