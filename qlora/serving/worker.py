"""The thread that answers: an engine for each model that is asked, which take turns over the one model in memory."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from qlora.evaluation.answer_stream import Stream
from qlora.generation.engine import Engine, Request, Score
from qlora.generation.sampling import Sampler
from qlora.serving.served_model import ServedModel
from qlora.text import brief_text

log = logging.getLogger(__name__)

ENDING = "the server is ending"
CONTINUED = 8
"""Tokens of a prompt that are decoded with what continues it."""


class Part(NamedTuple):
    """What has come of an answer since the last part."""

    text: str = ""
    tokens: tuple[tuple[int, Score], ...] = ()
    """Its tokens with their scores, where these were asked for."""
    length: int = 0
    """How many tokens the answer has so far, an end token included."""
    finish: str | None = None
    """`stop` or `length`: this is the last part."""
    error: str | None = None
    """Why no more will come."""


@dataclass(eq=False)
class Job:
    """An answer that is asked for. `send` is called in the thread that answers."""

    model: ServedModel
    prompt: list[int]
    sampler: Sampler
    send: Callable[[Part], None]
    is_chat: bool = False
    stops: tuple[str, ...] = ()
    likeliest: int | None = None
    request: Request | None = None
    stream: Stream | None = None
    unsent: list[str] = field(default_factory=list)
    """The text that no part has brought yet."""

    def open(self, engine: Engine) -> None:
        """Hands the prompt to an engine."""
        encoder = self.model.encoder
        self.request = engine.add(self, self.prompt, sampler=self.sampler, likeliest=self.likeliest)
        # A conversation ends where the next question begins, as in `task=chat`; a text is continued as the model likes.
        continued = () if self.is_chat else self.prompt[-CONTINUED:]
        stop_text = encoder.writer.stop_text if self.is_chat else ""
        self.stream = Stream(
            encoder.base, self.model.end_ids, stop_text, self.unsent.append, stops=self.stops, continues=continued
        )

    def advance(self) -> Part | None:
        """Returns what is new; None: nothing that can be sent yet."""
        request, stream = self.request, self.stream
        assert request is not None
        assert stream is not None
        told = len(stream.ids)
        stream.take(request.answer[told:])
        finish = None
        if stream.stops or request.is_done:
            finish = stream.close().finish
        scored = tuple(zip(request.answer[told:], request.scores[told:], strict=True)) if request.scores else ()
        if not (self.unsent or scored or finish is not None):
            return None
        text = "".join(self.unsent)
        self.unsent.clear()
        return Part(text, scored, len(request.answer), finish)


class Worker:
    """Answers jobs in a thread of its own, which alone touches the model."""

    def __init__(
        self, build_engine: Callable[[], Engine], serving: Callable[[], AbstractContextManager[None]],
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        """`serving` is the context in which engines answer, entered once."""
        self.build_engine, self.serving, self.autocast = build_engine, serving, autocast
        self.engines: dict[str, Engine] = {}
        self.jobs: set[Job] = set()
        self.answers, self.tokens = 0, 0
        self.failure: str | None = None
        """Why the thread has ended by itself."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Queues a job."""
        self._inbox.put(partial(self._open, job))
        if self._closing:  # perhaps nobody looks into the inbox any more
            job.send(Part(error=ENDING))

    def cancel(self, job: Job) -> None:
        """Gives up a job: its slot is free from the next step on. One that has ended is left alone."""
        self._inbox.put(partial(self._close, job))

    def stop(self) -> None:
        """Ends the thread after the step that it is in; jobs that are left are told so."""
        self._closing = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        reason = ENDING
        try:
            with self.serving():
                while not self._closing:
                    self._listen()
                    for name, engine in list(self.engines.items()):
                        if engine.is_busy:
                            self._step(name, engine)
        except Exception as error:
            log.error("the thread that answers has ended: %s", _describe(error))
            log.debug("where it ended", exc_info=True)
            reason = self.failure = f"the model cannot answer any more: {_describe(error)}"
        finally:
            self._closing = True
            self._fail(list(self.jobs), reason)
            while not self._inbox.empty():
                self._inbox.get()()
            self._fail(list(self.jobs), reason)

    def _listen(self) -> None:
        """Does what was asked from other threads; waits for it while no engine has anything to do."""
        is_idle = not any(engine.is_busy for engine in self.engines.values())
        while True:
            try:
                ask = self._inbox.get(block=is_idle)
            except queue.Empty:
                return
            ask()
            is_idle = False

    def _open(self, job: Job) -> None:
        name = job.model.name
        self.jobs.add(job)
        if self._closing:
            return
        if name not in self.engines:
            self.engines[name] = self.build_engine()
        job.open(self.engines[name])

    def _close(self, job: Job) -> None:
        if job in self.jobs:
            self.jobs.remove(job)
            if job.request is not None:
                with torch.inference_mode():  # another row may move to its slot
                    self.engines[job.model.name].cancel(job.request)

    def _step(self, name: str, engine: Engine) -> None:
        """Makes a step of one engine and sends what came of it."""
        try:
            with next(iter(self._jobs_of(engine))).model.switched(), torch.inference_mode(), self.autocast():
                ended = engine.step()
            for request in [*engine.active, *ended]:
                if (part := request.key.advance()) is None:
                    continue
                if part.finish is not None:
                    self._close(request.key)
                    self.answers, self.tokens = self.answers + 1, self.tokens + part.length
                request.key.send(part)
        except Exception as error:  # of this model alone
            log.error("the answers of %s were lost: %s", name, _describe(error))
            log.debug("where they were lost", exc_info=True)
            self._fail([job for job in self.jobs if job.model.name == name], f"the model failed: {_describe(error)}")
            del self.engines[name]

    def _jobs_of(self, engine: Engine) -> list[Job]:
        return [request.key for request in (*engine.active, *engine.waiting)]

    def _fail(self, jobs: list[Job], reason: str) -> None:
        for job in jobs:
            self.jobs.discard(job)
            job.send(Part(error=reason))


def _describe(error: Exception) -> str:
    return brief_text(f"{type(error).__name__}: {error}")
