"""Answers many prompts at once: rows that end make room for others.

On a GPU the host is a step ahead: it asks for the next step of all rows, and then looks at the tokens of the one
before. A row that has ended meanwhile computes one token in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora.generation.sampling import Sampler, choose_each
from qlora.generation.slot_model import SlotModel
from qlora.generation.transfer import Download, upload

PREFILL, PREFILL_ON_GPU = 2048, 8192
"""Most tokens of prompts that are read in one pass, unless one prompt alone has more."""
TOGETHER = 4
"""Prompts are read once this fraction of the slots is free, 1 / 4, or for all that are left."""


class Score(NamedTuple):
    """How likely the model found a token, before anything that `generation` does to its probabilities."""

    logprob: float
    likeliest: list[tuple[int, float]]
    """The likeliest tokens there, with their log-probabilities."""


@dataclass(eq=False)  # two rows may ask the same
class Request:
    """A prompt and its answer so far."""

    key: Any
    prompt: list[int]
    room: int
    """Most tokens of the answer."""
    sampler: Sampler
    uniforms: np.ndarray
    """A random number for each token of the answer; none where nothing is sampled."""
    likeliest: int | None = None
    """How many of the likeliest tokens are scored beside each token of the answer; None: no token is scored."""
    answer: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    """Those of the answer's tokens."""
    is_ended: bool = False
    """Whether the last token of the answer ends it."""
    asked: int = 0
    """How many tokens the model was asked for: those of the answer, and those on their way."""

    @property
    def length(self) -> int:
        """The tokens in its slot: the last one that was asked for is not read yet."""
        return len(self.prompt) + self.asked - 1

    @property
    def is_done(self) -> bool:
        """Whether no token follows."""
        return self.is_ended or len(self.answer) >= self.room


@dataclass(frozen=True)
class _Flight:
    """The tokens of a pass, on their way to the host."""

    requests: list[Request]
    download: Download
    """Tokens, int64 [rows]; of the scored rows their log-probabilities, the likeliest tokens, and those of these."""
    scored: list[int]
    """The indices of the rows that are scored."""


class Engine:
    """Answers prompts with a model; use it inside `serving`, and each step inside `torch.inference_mode`."""

    def __init__(self, model: torch.nn.Module, sampler: Sampler, *, slots: int, length: int) -> None:
        """`length` is the most tokens of a prompt and its answer together.

        `sampler` chooses the tokens of requests that bring none of their own.
        """
        self.sampler, self.slots, self.length = sampler, slots, length
        self.model = SlotModel(model, slots=slots, length=length)
        self.ahead = int(self.model.is_ahead)
        """How many passes the model has been asked for before the tokens of the first are looked at, beside it."""
        self.prefill = PREFILL_ON_GPU if self.model.device.type == "cuda" else PREFILL
        """Most tokens of prompts in one pass; less once more did not fit."""
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        self._flights: deque[_Flight] = deque()
        self._last = torch.empty(0, dtype=torch.int64, device=self.model.device)

    def add(
        self, key: Any, prompt: list[int], *, row: int = 0, sampler: Sampler | None = None, likeliest: int | None = None
    ) -> Request:
        """Queues a prompt (token ids); `row` decides what is drawn for it."""
        sampler = sampler or self.sampler
        room = min(sampler.config.new_tokens, self.length - len(prompt))
        self.waiting.append(Request(key, prompt, room, sampler, sampler.uniforms(row), likeliest))
        return self.waiting[-1]

    @property
    def is_busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.waiting or self.active)

    def answers(self) -> Iterator[Request]:
        """Yields the requests as they end, until none is left."""
        while self.is_busy:
            yield from self.step()

    def step(self) -> list[Request]:
        """Reads prompts where slots are free, or decodes a token of each row; returns the requests that have ended."""
        if self._may_read:
            self._read()
        elif self._may_decode:
            logits = self.model.decode(self._last, [request.length for request in self.active])
            self._last = self._last[:0]
            self._take(self.active, logits)
        ahead = self.ahead if self._may_read or self._may_decode else 0
        while len(self._flights) > ahead:
            self._land(self._flights.popleft())
        return self._release()

    def cancel(self, request: Request) -> None:
        """Ends a request; its slot is free from the next step on."""
        request.room = len(request.answer)
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self._release()

    @property
    def _may_read(self) -> bool:
        """Whether prompts wait, and enough slots are free to be worth a pass in which the other rows wait."""
        free = self.slots - len(self.active)
        return bool(self.waiting) and free >= min(len(self.waiting), max(1, self.slots // TOGETHER))

    @property
    def _may_decode(self) -> bool:
        """Whether there are rows, and none that will have ended by its length."""
        return bool(self.active) and all(request.asked < request.room for request in self.active)

    def _read(self) -> None:
        begun: list[Request] = []
        tokens, free = 0, self.slots - len(self.active)
        while self.waiting and len(begun) < free:
            tokens += len(self.waiting[0].prompt)
            if begun and tokens > self.prefill:
                break
            begun.append(self.waiting.popleft())
        try:
            logits = self.model.read([request.prompt for request in begun], first=len(self.active))
        except torch.OutOfMemoryError:
            if len(begun) == 1:
                raise
            self.waiting.extendleft(reversed(begun))
            self.prefill = sum(len(request.prompt) for request in begun) // 2
            return
        self.active += begun
        self._take(begun, logits)

    def _take(self, requests: list[Request], logits: Tensor) -> None:
        """Chooses the next tokens of rows, and sends them to the host."""
        told = [request.asked for request in requests]
        samplers, uniforms = zip(*((request.sampler, request.uniforms) for request in requests), strict=True)
        tokens = choose_each(samplers, logits, told, uniforms)
        self._last = torch.cat([self._last, tokens]) if len(self._last) else tokens
        scored = [index for index, request in enumerate(requests) if request.likeliest is not None]
        most = max((request.likeliest or 0 for request in requests), default=0)
        scores = _score(logits, tokens, scored, most) if scored else []
        self._flights.append(_Flight(list(requests), Download(tokens, *scores), scored))
        for request in requests:
            request.asked += 1

    def _land(self, flight: _Flight) -> None:
        """Notes the tokens of a pass in the answers of the rows that had not ended before it."""
        tokens, *scores = (part.tolist() for part in flight.download.wait())
        of_row = dict(zip(flight.scored, zip(*scores, strict=True), strict=True)) if scores else {}
        for index, (request, token) in enumerate(zip(flight.requests, tokens, strict=True)):
            if request.is_done:
                continue
            request.answer.append(token)
            request.is_ended = token in request.sampler.end_ids
            if request.likeliest is not None:
                logprob, ids, values = of_row[index]
                likeliest = list(zip(ids, values, strict=True))[: request.likeliest]
                request.scores.append(Score(logprob, likeliest))

    def _release(self) -> list[Request]:
        """Takes out what has ended; the last rows move to the slots that become free."""
        done = [request for request in self.active if request.is_done]
        for request in done:
            index, last = self.active.index(request), len(self.active) - 1
            if index < last:
                self.model.cache.move(last, index, self.active[last].length)
                self.active[index], self._last[index] = self.active[last], self._last[last]
            self.active.pop()
            self._last = self._last[:last]
        return done


def _score(logits: Tensor, tokens: Tensor, rows: list[int], likeliest: int) -> list[Tensor]:
    """Returns of some rows of `logits` [rows, vocabulary] the log-probability of the token that was chosen.

    Behind it are the likeliest tokens, int64 [rows, likeliest], and their log-probabilities.
    """
    chosen = slice(None) if len(rows) == len(tokens) else upload(rows, logits.device)
    logprobs = logits[chosen].float().log_softmax(-1)
    values, ids = logprobs.topk(min(likeliest, logprobs.shape[-1]))
    return [logprobs.gather(1, tokens[chosen][:, None])[:, 0], ids, values]
