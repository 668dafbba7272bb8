"""`task=serve`: answers over HTTP as OpenAI's API does, until Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora.config.paths import short_path
from qlora.config.schema import Config
from qlora.errors import RunError
from qlora.runtime import console
from qlora.runtime.needs import Needs
from qlora.runtime.task_result import TaskResult
from qlora.serving.server import HttpServer, check_packages, listen, read_token
from qlora.tasks.protocol import TaskJob
from qlora.tasks.used import differs_line
from qlora.text import plural

if TYPE_CHECKING:  # which import torch and Starlette
    from socket import socket

    from qlora.serving.app import Service
    from qlora.tasks.served_models import Chosen

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def needs(config: Config) -> Needs:
    """Returns what an endpoint needs; it reads no rows and writes no folder."""
    # Each adapter has the end token of its own template, so that the base is loaded without any of them.
    return Needs(torch=True, base=True, folder=False, caches=True)


def run(job: TaskJob) -> TaskResult:
    """Answers until a signal ends it; what cannot be served is said before weights are read."""
    with serving(job) as endpoint, signals() as ended:
        console.say(f"serving {', '.join(endpoint.service.models)} on {endpoint.url}; Ctrl-C ends it")
        while not ended.wait(0.2):
            if (reason := endpoint.service.worker.failure) is not None:
                raise RunError(f"task=serve: {reason}; start it again")
        console.say("ending")
    answers, tokens = endpoint.service.worker.answers, endpoint.service.worker.tokens
    console.say(f"{plural(answers, 'answer')} of {plural(tokens, 'token')}")
    return TaskResult("serve", {"serve_answers": answers, "serve_tokens": tokens}, {"endpoint": endpoint.url})


class Endpoint:
    """What answers, and where."""

    def __init__(self, service: Service, server: HttpServer) -> None:
        self.service, self.server, self.url = service, server, server.url


@contextmanager
def serving(job: TaskJob) -> Iterator[Endpoint]:
    """Answers in the block, in threads of their own."""
    check_packages()
    token = read_token(job.config.serve)
    with listen(job.config.serve) as taken:  # before anything is loaded: a port in use is known at once
        service = _build_service(job)
        server = _build_server(service, token, taken)
        service.worker.start()
        server.start()
        try:
            yield Endpoint(service, server)
        finally:
            service.worker.stop()
            server.stop()


@contextmanager
def signals() -> Iterator[threading.Event]:
    """Yields what Ctrl-C and SIGTERM set in the block."""
    ended = threading.Event()
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in SIGNALS}
    try:
        yield ended
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _build_server(service: Service, token: str | None, taken: socket) -> HttpServer:
    from qlora.serving.app import build_app

    return HttpServer(build_app(service, token), taken)


def _build_service(job: TaskJob) -> Service:
    from qlora.serving.app import Service
    from qlora.serving.capacity import check_answers, choose_context, plan_capacity
    from qlora.tasks.served_models import choose_models, load_models

    session, config = job.session, job.config.serve
    check_answers(job.config.generation)
    context = choose_context(config, session.context)
    chosen = choose_models(session)
    model, served = load_models(chosen, context)
    slots = _slots(job)
    capacity = plan_capacity(config, slots, model, models=len(served), context=context)
    _say_start(
        job, model, chosen, f"{capacity.slots} of {context:,} tokens for each model; {config.queue:,} requests may wait"
    )
    if capacity.note is not None:
        console.say(capacity.note)
    worker = _build_worker(slots, model, capacity.slots, context)
    return Service({one.name: one for one in served}, worker, capacity.slots + config.queue)


def _slots(job: TaskJob) -> Any:
    from qlora.generation.answering import Slots

    placement = job.session.placement
    return Slots(job.config.generation, placement.device, placement.compute_dtype, placement.autocast)


def _build_worker(slots: Any, model: Any, count: int, context: int) -> Any:
    from contextlib import ExitStack

    import torch

    from qlora.evaluation.measure import evaluation_mode
    from qlora.generation.engine import Engine
    from qlora.generation.sampling import Sampler
    from qlora.serving.worker import Worker

    @contextmanager
    def answering() -> Iterator[None]:
        with ExitStack() as stack:
            if slots.device.type == "cuda":
                stack.enter_context(torch.cuda.device(slots.device))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(slots.serving(model))
            yield

    def build_engine() -> Engine:
        return Engine(model, Sampler(slots.config, []), slots=count, length=context)

    build: Callable[[], Engine] = build_engine
    return Worker(build, answering, slots.autocast)


def _say_start(job: TaskJob, model: Any, chosen: Chosen, slots: str) -> None:
    """Prints the start screen, and what other servers need."""
    from qlora.models.model_files import locate
    from qlora.serving.production import production_lines

    session = job.session
    lines = session.describe(model).lines
    del lines["folder"]
    full = session.trained[1]
    named = {name: short_path(folder) for name, folder in chosen.adapters.items()}
    named |= {chosen.name: short_path(full)} if full is not None and chosen.name is not None else {}
    lines["adapter"] = ", ".join(f"{name} ({folder})" for name, folder in named.items()) or "none: the untuned base"
    lines["template"] = session.chat_encoder.writer.template.name
    lines["slots"] = slots
    console.start_screen(list((lines | differs_line(job)).items()))
    if session.has_random_weights:
        return
    commands = production_lines(locate(job.config.model.name), chosen.adapters, full)
    if not commands:
        console.say("for production merge the adapter (qlora merge RUN), and serve the folder with vLLM or SGLang")
        return
    console.say("for production, by vLLM or SGLang on a GPU:")
    for command in commands:
        console.say_command(command)
