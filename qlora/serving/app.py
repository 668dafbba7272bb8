"""The endpoint: what is asked by HTTP goes to the thread that answers, and comes back as it is made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlora.errors import did_you_mean
from qlora.serving.access import Access
from qlora.serving.answers import DONE, Form, event
from qlora.serving.asked import Asked, read_chat, read_completion, read_messages
from qlora.serving.fields import Fields
from qlora.serving.refusal import Refusal
from qlora.serving.served_model import ServedModel
from qlora.serving.worker import Job, Part, Worker
from qlora.text import brief_text

log = logging.getLogger(__name__)

LARGEST = 16 * 2**20
"""Bytes of a request."""


@dataclass
class Service:
    """The models by their names, the first one being what `adapter` names, and what answers for them."""

    models: dict[str, ServedModel]
    worker: Worker
    most: int
    """The requests that are answered or wait at the same time; more are refused."""
    started: int = field(default_factory=lambda: int(time.time()))
    asked: int = 0
    """The requests that are answered or wait."""

    def find(self, name: str) -> ServedModel:
        """Returns the model of a name; raises `Refusal` with all names."""
        if name not in self.models:
            raise Refusal(
                f"there is no model {name[:100]!r} here{did_you_mean(name[:100], self.models)}; there are "
                f"{', '.join(self.models)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self.models[name]

    def answer(self, asked: Asked, model: ServedModel, prompt: list[int]) -> Answering:
        """Has an answer made; raises `Refusal` where no more can wait."""
        if self.asked >= self.most:
            raise Refusal(f"{self.asked:,} requests wait already; try again later", status=429, code="queue_full")
        if not self.worker.is_running:
            raise Refusal("the server is ending", status=503)
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Part]()

        def send(part: Part) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(parts.put_nowait, part)

        job = Job(
            model, prompt, model.sampler(asked, prompt, secrets.randbits(63)), send, asked.is_chat, asked.stops,
            asked.likeliest,
        )  # fmt: skip
        self.asked += 1
        self.worker.submit(job)
        return Answering(self, job, parts)


class Answering:
    """An answer that is being made, until it is released."""

    def __init__(self, service: Service, job: Job, parts: asyncio.Queue[Part]) -> None:
        self.service, self.job, self._parts = service, job, parts

    async def parts(self) -> AsyncIterator[Part]:
        """Yields the parts as they come; raises `Refusal` where no more will."""
        while True:
            part = await self._parts.get()
            if part.error is not None:
                is_ending = not self.service.worker.is_running
                raise Refusal(part.error, status=503 if is_ending else 500, code="no_answer")
            yield part
            if part.finish is not None:
                return

    async def all_parts(self) -> list[Part]:
        """Returns all parts."""
        return [part async for part in self.parts()]

    def release(self) -> None:
        """Gives up what is left of the answer, so that its slot is free."""
        self.service.asked -= 1
        self.service.worker.cancel(self.job)


class Events(StreamingResponse):
    """An answer as a stream of events; where the client hangs up, its slot is free."""

    def __init__(self, form: Form, answering: Answering) -> None:
        super().__init__(_events(form, answering), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})  # fmt: skip
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.release()


async def _events(form: Form, answering: Answering) -> AsyncIterator[bytes]:
    try:
        for chunk in form.opening():
            yield event(chunk)
        async for part in answering.parts():
            yield event(form.chunk(part))
            if part.finish is not None:
                for chunk in form.closing(part):
                    yield event(chunk)
        yield DONE
    except Refusal as refusal:
        yield event(refusal.body)


def build_app(service: Service, token: str | None) -> Starlette:
    """Returns the endpoint."""

    async def answer(request: Request, read: Callable[[bytes], Asked]) -> Response:
        asked = read(await read_body(request))
        model = service.find(asked.model)
        prompt = model.prompt(asked)
        form = Form(asked, model.encoder.base, len(prompt))
        answering = service.answer(asked, model, prompt)
        if asked.streams:
            return Events(form, answering)
        try:
            return _json(form.whole(await _unless_gone(request, answering.all_parts())))
        finally:
            answering.release()

    async def chat(request: Request) -> Response:
        return await answer(request, read_chat)

    async def completion(request: Request) -> Response:
        return await answer(request, read_completion)

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_card(service, model) for model in service.models.values()]})

    async def model(request: Request) -> Response:
        return _json(_card(service, service.find(request.path_params["name"])))

    async def tokenize(request: Request) -> Response:
        return _json(_tokenize(service, await read_body(request)))

    async def health(request: Request) -> Response:
        is_running = service.worker.is_running
        return _json({"status": "ok" if is_running else "ending"}, 200 if is_running else 503)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name}", model, methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    handlers: Any = {Refusal: _refuse, HTTPException: _refuse_address, Exception: _fail, ClientDisconnect: _gone}
    return Starlette(routes=routes, middleware=[Middleware(Access, token=token)], exception_handlers=handlers)


async def read_body(request: Request) -> bytes:
    """Returns the body of a request; raises `Refusal` for one that is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            raise Refusal(f"the body is longer than {LARGEST:,} bytes", status=413, code="too_large")
    return bytes(body)


async def _unless_gone(request: Request, work: Awaitable[list[Part]]) -> list[Part]:
    """Returns what work returns; raises `ClientDisconnect` as soon as the client has hung up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    """Returns the tokens of a conversation or of a text, as vLLM and llama.cpp take and tell them."""
    fields = Fields(body)
    name = fields.text("model")
    model = service.find(name) if name is not None else next(iter(service.models.values()))
    if "messages" in fields.left:
        ids = model.encode_chat(read_messages(fields))
        fields.take("add_special_tokens", "false: the template writes them", lambda value: value is False)
    else:
        text = fields.text("prompt")
        text = fields.text("content") if text is None else text
        if text is None:
            raise Refusal("messages or prompt is missing: what to make tokens of", param="prompt")
        begins = fields.flag("add_special_tokens", fields.flag("add_special", default=True))
        ids = model.encode_text(text, begins=begins)
    fields.close()
    return {"tokens": ids, "count": len(ids), "max_model_len": model.limits.context}


def _card(service: Service, model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": service.started, "owned_by": "qlora",
            "max_model_len": model.limits.context}  # fmt: skip


def _json(data: Any, status: int = 200) -> Response:
    return Response(json.dumps(data), status, media_type="application/json")


async def _refuse(request: Request, refusal: Refusal) -> Response:
    return _json(refusal.body, refusal.status)


async def _refuse_address(request: Request, error: HTTPException) -> Response:
    reason = f"{request.method} {request.url.path[:100]} is not served here"
    return _json(Refusal(reason, status=error.status_code, code="unknown_url").body, error.status_code)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _fail(request: Request, error: Exception) -> Response:
    log.error("%s failed (%s)", request.url.path, brief_text(f"{type(error).__name__}: {error}"))
    log.debug("where it failed", exc_info=error)
    return _json(Refusal(f"the server failed ({type(error).__name__})", status=500).body, 500)
