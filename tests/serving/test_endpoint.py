"""`task=serve` as clients see it: the `openai` package, and whoever writes HTTP by hand."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig
from qlora.errors import UserError
from qlora.generation.sampling import Sampler
from qlora.run import Run
from qlora.serving.worker import Job, Part
from qlora.tasks import build_job
from qlora.tasks.serve import Endpoint, serving

openai = pytest.importorskip("openai", reason="the package openai is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

EXACT = ["quantization=fp32", "generation.max_new_tokens=16"]
QUESTION = [{"role": "user", "content": "What is the opposite of brave?"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of the embedded model whose adapters answer otherwise than their base and than each other."""
    first = tmp_path_factory.mktemp("runs") / "mine"
    skipped = ["task.evaluate=false", "task.predict=false", "trainer.eval_steps=null", "data.max_train_samples=16"]
    steps = ["trainer.max_steps=1", "trainer.warmup_steps=0", "trainer.lr_scheduler_kwargs.num_decay_steps=1"]
    Run(compose([*EXACT, *steps, *skipped, "lora.r=8"]), first).execute()
    runs = {"mine": first, "other": first.with_name("other")}
    shutil.copytree(first, runs["other"])
    for seed, folder in enumerate(runs.values()):
        file = folder / "adapter/adapter_model.safetensors"
        weights, generator = load_file(file), torch.Generator().manual_seed(seed)
        for name in weights:
            if "lora_B" in name:
                weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.15
        save_file(weights, file, metadata={"format": "pt"})
    return runs


@pytest.fixture(scope="module")
def endpoint(runs: dict[str, Path]) -> Iterator[Endpoint]:
    with started(runs, "serve.slots=4") as endpoint:
        yield endpoint


def started(runs: dict[str, Path], *overrides: str) -> Any:
    chosen = [f"adapter={runs['mine']}", f"serve.adapters={{other: {runs['other']}}}", "serve.port=0", *overrides]
    return serving(build_job(compose(["task=serve", *chosen]), runs["mine"].with_name("nothing")))


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Any:
    return openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=60)


def said(client: Any, model: str, messages: Any = QUESTION, **options: Any) -> str:
    answer = client.chat.completions.create(model=model, messages=messages, **options)
    return answer.choices[0].message.content


def test_each_name_answers_for_itself(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["mine", "other", "base"]
    assert client.models.retrieve("other").id == "other"
    answers = {name: said(client, name) for name in ("mine", "other", "base")}
    assert len({*answers.values()}) == 3


def test_fifty_requests_at_once_are_answered_as_predict_answers(
    client: Any, endpoint: Endpoint, runs: dict[str, Path]
) -> None:
    expected: dict[str, list[dict[str, Any]]] = {}
    for name, folder in runs.items():
        session = build_job(compose(["task=predict", f"adapter={folder}"]), folder.with_name("predicted")).session
        expected[name] = session.measurer.predict(session.load_trained(), 25)
    ids = session.data.eval["prompt_ids"][:25]
    asked = [(name, index) for index in range(25) for name in runs]

    def ask(name: str, index: int) -> Any:
        return client.completions.create(model=name, prompt=ids[index])

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, *zip(*asked, strict=True)))
    for (name, index), answer in zip(asked, answers, strict=True):
        record, choice = expected[name][index], answer.choices[0]
        assert (choice.text.strip(), choice.finish_reason) == (record["prediction"], record["finish"])
        assert answer.usage.prompt_tokens == record["prompt_tokens"]
    assert len({answer.choices[0].text for answer in answers}) > 10
    assert not endpoint.service.asked


def test_a_conversation_is_asked_with_the_tokens_of_training(
    client: Any, endpoint: Endpoint, runs: dict[str, Path]
) -> None:
    session = build_job(compose(["task=predict", f"adapter={runs['other']}"]), runs["other"]).session
    rows = [json.loads(line) for line in Path("qlora/demo/data/eval.jsonl").read_text().splitlines()]
    index = next(index for index, row in enumerate(rows) if not row["input"])
    messages = [{"role": "user", "content": rows[index]["instruction"]}]
    ids = next(ids for ids, asked in zip(session.data.eval["prompt_ids"], session.data.eval["prompt"], strict=True)
               if rows[index]["instruction"] in asked)  # fmt: skip
    told = post(endpoint, "/tokenize", {"model": "other", "messages": messages})[1]
    assert told == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    answer = client.completions.create(model="other", prompt=ids).choices[0].text
    assert said(client, "other", messages) == answer.strip()


@pytest.mark.parametrize("model", ["mine", "base"])
def test_a_stream_brings_the_same_text_in_parts(client: Any, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    *chunks, last = stream
    assert not last.choices
    whole = client.chat.completions.create(model=model, messages=QUESTION, logprobs=True)
    assert last.usage == whole.usage
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    scored = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    told = [entry.token for logprobs in scored for entry in logprobs.content]
    assert told == [entry.token for entry in whole.choices[0].logprobs.content]


def test_a_text_is_continued_with_the_blanks_that_are_its_own(client: Any) -> None:
    whole = client.completions.create(model="mine", prompt="Once upon", max_tokens=8)
    chunks = list(client.completions.create(model="mine", prompt="Once upon", max_tokens=8, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert whole.choices[0].text[0].isspace() or not whole.choices[0].text[0].isalnum()
    assert whole.usage.completion_tokens <= 8


def test_an_answer_ends_before_a_stop(client: Any) -> None:
    whole = client.completions.create(model="mine", prompt="Once upon", max_tokens=16).choices[0].text
    stop = whole[5:8]
    for options in ({"stop": stop}, {"stop": ["never said", stop]}):
        answer = client.completions.create(model="mine", prompt="Once upon", max_tokens=16, **options).choices[0]
        assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    stream = client.completions.create(model="mine", prompt="Once upon", max_tokens=16, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[: whole.index(stop)]


def test_log_probabilities_are_those_of_the_model(client: Any, endpoint: Endpoint) -> None:
    answer = client.completions.create(model="mine", prompt=[5, 6, 7], max_tokens=4, logprobs=3).choices[0]
    logprobs = answer.logprobs
    assert "".join(logprobs.tokens) == answer.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:index])) for index in range(4)]
    assert [top[token] for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)] == (
        logprobs.token_logprobs
    )
    assert all(value == max(top.values()) for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs,
                                                                strict=True))  # fmt: skip
    many = client.completions.create(
        model="mine", prompt=[5, 6, 7], max_tokens=1, logprobs=100, extra_body={"return_tokens_as_token_ids": True}
    )
    top = many.choices[0].logprobs.top_logprobs[0]
    assert len(top) == 100
    assert all(name.startswith("token_id:") for name in top)
    hot = client.completions.create(model="mine", prompt=[5, 6, 7], max_tokens=1, logprobs=1, temperature=2, seed=1)
    token, value = hot.choices[0].logprobs.tokens[0], hot.choices[0].logprobs.token_logprobs[0]
    assert value <= logprobs.token_logprobs[0] + 1e-5, token  # before the temperature


def test_samples_follow_from_their_seed_whatever_is_answered_beside_them(client: Any) -> None:
    def sample(seed: int | None, model: str = "mine") -> str:
        return client.completions.create(
            model=model, prompt="Once upon", max_tokens=12, temperature=1.5, top_p=0.95, seed=seed
        ).choices[0].text  # fmt: skip

    alone = sample(7)
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(sample, [7, 8, None, 7, 9, None, 7]))
    assert [together[0], together[3], together[6]] == [alone] * 3
    assert len({*together}) == 5
    greedy = said(client, "mine", temperature=0, top_p=0.3, seed=5)
    assert greedy == said(client, "mine") == said(client, "mine", temperature=0.9, extra_body={"top_k": 1})
    assert sample(-1) == sample(-1)


def test_two_hundred_requests_at_once_wait_and_none_is_lost(client: Any, endpoint: Endpoint) -> None:
    with ThreadPoolExecutor(200) as pool:
        asked = [[3 + number % 90, 4] for number in range(200)]
        answers = list(pool.map(lambda ids: client.completions.create(model="other", prompt=ids, max_tokens=2), asked))
    assert all(answer.usage.completion_tokens <= 2 for answer in answers)
    assert len({answer.id for answer in answers}) == 200
    assert not endpoint.service.asked


def hang_up(endpoint: Endpoint, *, stream: bool) -> None:
    body = json.dumps({"model": "mine", "prompt": [5, 6, 7], "max_tokens": 500, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", endpoint.server.port)) as connection:
        connection.sendall(head + body)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        else:
            until(lambda: endpoint.service.worker.jobs)


def until(happens: Any) -> None:
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(endpoint: Endpoint, client: Any, stream: bool) -> None:
    worker = endpoint.service.worker
    told, ends = worker.answers, endpoint.service.models["mine"].end_ids
    kept = [*ends]
    ends.clear()  # each answer would be a long one
    for _ in range(5):  # one more than there are slots
        hang_up(endpoint, stream=stream)
    until(lambda: not worker.jobs and not endpoint.service.asked)
    assert worker.answers == told
    assert not any(engine.active or engine.waiting for engine in worker.engines.values())
    ends += kept
    assert said(client, "mine")


def test_a_row_that_is_given_up_leaves_the_others_as_they_are(endpoint: Endpoint) -> None:
    worker, model = endpoint.service.worker, endpoint.service.models["mine"]
    sampler = Sampler(GenerationConfig(max_new_tokens=40), [])

    def begun(prompt: list[int], parts: list[Part], tokens: int) -> Job:
        job = Job(model, prompt, sampler, parts.append)
        worker.submit(job)
        until(lambda: job.request is not None and len(job.request.answer) >= tokens)
        return job

    def ended(parts: list[Part]) -> str:
        until(lambda: parts and parts[-1].finish)
        return "".join(part.text for part in parts)

    alone, beside = list[Part](), list[Part]()
    begun([8, 9], alone, 1)
    expected = ended(alone)
    first = begun([5, 6, 7], [], 1)
    begun([8, 9], beside, 3)
    worker.cancel(first)  # and the other row moves to its slot
    assert ended(beside) == expected
    assert worker.failure is None


def post(endpoint: Endpoint, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data if method == "POST" else None, headers)
    answer = connection.getresponse()
    status, told = answer.status, json.loads(answer.read())
    connection.close()
    return status, told


WRONG: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", b"{", 400, "the body is no JSON"),
    ("/v1/completions", b"[" * 100_000, 400, "the body is no JSON"),
    ("/v1/completions", b'{"model": "mine", "prompt": [5], "temperature": NaN}', 400, "NaN is not a number in JSON"),
    ("/v1/completions", b"[1]", 400, "the body must be a JSON object"),
    ("/v1/completions", b"\xff", 400, "the body is no JSON"),
    ("/v1/completions", {"prompt": "a"}, 400, "model is missing"),
    ("/v1/completions", {"model": "mine"}, 400, "prompt is missing"),
    ("/v1/completions", {"model": "mine", "prompt": []}, 400, "the prompt has no token"),
    ("/v1/completions", {"model": "mine", "prompt": [10**6]}, 400, "a token that the model has no embedding for"),
    ("/v1/completions", {"model": "mine", "prompt": [-1]}, 400, "a token that the model has no embedding for"),
    ("/v1/completions", {"model": "mine", "prompt": ["a", "b"]}, 400, "prompt holds 2 prompts; send one a request"),
    ("/v1/completions", {"model": "mine", "prompt": "\ud800"}, 400, "prompt must be a text or a list of token ids"),
    ("/v1/completions", {"model": "mini", "prompt": "a"}, 404,
     "there is no model 'mini' here (did you mean mine?); there are mine, other, base"),
    ("/v1/completions", {"model": "mine", "prompt": [5] * 512}, 400,
     "the prompt of 512 tokens does not fit into the context of 512 tokens with an answer"),
    ("/v1/completions", {"model": "mine", "prompt": [5] * 500, "max_tokens": 13}, 400,
     "the prompt of 500 tokens and the answer of up to 13 do not fit into the context of 512 tokens"),
    ("/v1/chat/completions", {"model": "mine", "messages": "hello"}, 400, "messages must be a list of messages"),
    ("/v1/chat/completions", {"model": "mine", "messages": [{"role": "king", "content": "a"}]}, 400,
     "messages[0].role must be one of system, developer, user, assistant, got 'king'"),
    ("/v1/chat/completions", {"model": "mine", "messages": [{"role": "user", "content": 7}]}, 400,
     "messages[0].content must be a text, or a list of parts of type text"),
    ("/tokenize", {"model": "mine"}, 400, "messages or prompt is missing"),
    ("/v1/embeddings", {"model": "mine"}, 404, "POST /v1/embeddings is not served here"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "sentence"), WRONG)
def test_a_bad_request_is_told_what_is_wrong(
    endpoint: Endpoint, path: str, body: Any, status: int, sentence: str
) -> None:
    told, answer = post(endpoint, path, body)
    assert (told, [*answer["error"]]) == (status, ["message", "type", "param", "code"])
    assert sentence in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_a_body_without_end_is_not_read(endpoint: Endpoint) -> None:
    status, answer = post(endpoint, "/v1/completions", b" " * (16 * 2**20 + 1))
    assert (status, answer["error"]["code"]) == (413, "too_large")


def test_who_asks_by_another_name_or_from_a_web_page_is_refused(endpoint: Endpoint) -> None:
    assert post(endpoint, "/v1/models", b"", "GET", Host="evil.example")[0] == 421
    assert post(endpoint, "/v1/models", b"", "GET", Origin="https://evil.example")[0] == 403
    assert post(endpoint, "/v1/models", b"", "GET", Origin="http://localhost:3000")[0] == 200
    assert post(endpoint, "/v1/models", b"", "DELETE")[0] == 405
    assert post(endpoint, "/health", b"", "GET") == (200, {"status": "ok"})


def test_texts_are_made_tokens_of_as_vllm_and_llama_cpp_ask(endpoint: Endpoint) -> None:
    ids = post(endpoint, "/tokenize", {"model": "base", "prompt": "Once upon </s>"})[1]["tokens"]
    assert post(endpoint, "/tokenize", {"content": "Once upon </s>", "add_special": True})[1]["tokens"] == ids
    assert post(endpoint, "/tokenize", {"content": "Once upon </s>", "add_special": False})[1]["tokens"] == ids[1:]
    encoder = endpoint.service.models["base"].encoder
    assert ids[:1] == encoder.bos
    assert encoder.eos not in ids  # what a text spells is text


def test_a_model_that_fails_loses_its_answers_and_no_other_does(
    client: Any, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    said(client, "other")
    monkeypatch.setattr(endpoint.service.worker.engines["other"], "step", fail)
    with pytest.raises(openai.InternalServerError, match="the model failed: OutOfMemoryError: no room"):
        said(client, "other")
    assert said(client, "mine")
    assert said(client, "other")  # by an engine of its own
    assert not endpoint.service.asked


def test_a_full_queue_says_so_and_what_is_stopped_is_told(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "correct horse battery staple"
    monkeypatch.setenv("QLORA_SERVE_TOKEN", token)
    with started(runs, "serve.slots=1", "serve.queue=1", "serve.context=64") as endpoint:
        assert post(endpoint, "/v1/models", b"", "GET")[0] == 401
        assert post(endpoint, "/v1/models", b"", "GET", Authorization=f"Bearer {token[:-1]}")[0] == 401
        assert post(endpoint, "/health", b"", "GET")[0] == 200
        client = openai.OpenAI(base_url=endpoint.url, api_key=token, max_retries=0, timeout=20)
        alone, worker, held = said(client, "mine"), endpoint.service.worker, list[Any]()
        with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patched:
            patched.setattr(worker, "submit", held.append)
            waiting = [pool.submit(said, client, "mine") for _ in range(2)]
            until(lambda: len(held) == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests wait already; try again later"):
                said(client, "mine")
            patched.undo()
            for job in held:
                worker.submit(job)
            assert [answer.result(timeout=20) for answer in waiting] == [alone] * 2
        worker.stop()
        assert post(endpoint, "/health", b"", "GET")[0] == 503
        with pytest.raises(openai.InternalServerError, match="the server is ending"):
            said(client, "mine")


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    shutil.copytree(folder, to)
    file = to / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return to


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("serve.adapters={a: nowhere}", "serve.adapters.a=nowhere: no such folder"),
        ("serve.adapters={a: {empty}}", "serve.adapters.a={empty} holds no adapter; give the folder of an adapter or"),
        ("serve.adapters={mine: {other}}", "two adapters are named 'mine'; give the first another name with serve.na"),
        ("serve.adapters={a: {biased}}", "serve.adapters.a={biased}/adapter trains biases, so that it cannot share it"),
        ("serve.adapters={a: {whole}}", "serve.adapters.a={whole}/adapter trains whole modules, so that it cannot sha"),
        ("serve.context=513", "serve.context=513 is more than the model's context of 512 tokens; set it to 512 at mo"),
        ("generation.num_beams=2", "task=serve answers by slots, which have no place for generation.num_beams; leave"),
        ("serve.name=other adapter=none", "serve.name=other names what adapter= trained, and this is the base; leave"),
        ("serve.adapters={a: {foreign}}", "serve.adapters.a={foreign} "),
    ],
)
def test_what_cannot_be_served_is_said_before_weights_are_read(
    runs: dict[str, Path], tmp_path: Path, overrides: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.models.loading.load_base", None)
    folders = {name: tmp_path / name for name in ("empty", "biased", "whole", "foreign")} | runs
    folders["empty"].mkdir()
    changed(runs["other"], folders["biased"], bias="all")
    changed(runs["other"], folders["whole"], modules_to_save=["lm_head"])
    base = changed(runs["other"], folders["foreign"]) / "adapter/base.json"
    base.write_text(base.read_text().replace("weights-1:", "weights-1:0"))
    for name, folder in folders.items():
        overrides, sentence = (
            overrides.replace(f"{{{name}}}", str(folder)),
            sentence.replace(f"{{{name}}}", str(folder)),
        )
    is_base = overrides.endswith(" adapter=none")
    chosen = overrides.split() if is_base else [f"adapter={runs['mine']}", overrides]
    job = build_job(compose(["task=serve", "serve.port=0", *chosen]), tmp_path / "nothing")
    with pytest.raises(UserError) as error, serving(job):
        pass
    assert str(error.value).startswith(sentence)


def test_adapters_are_served_beside_a_base_that_no_run_names(runs: dict[str, Path]) -> None:
    adapters = ", ".join(f"{name}: {folder / 'adapter'}" for name, folder in runs.items())
    overrides = ["adapter=none", "model=tiny", *EXACT, f"serve.adapters={{{adapters}}}", "serve.port=0"]
    with serving(build_job(compose(["task=serve", *overrides]), runs["mine"].with_name("nothing"))) as endpoint:
        client = openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=20)
        assert [model.id for model in client.models.list()] == ["mine", "other", "base"]
        assert len({said(client, name) for name in ("mine", "other", "base")}) == 3
