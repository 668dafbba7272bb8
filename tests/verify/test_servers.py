"""Servers of OpenAI's protocol are asked in every form in which they answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.errors import ResourceError
from qlora.models.tokenizer import load_tokenizer
from qlora.verify.comparison import Chat, compare, measure
from qlora.verify.engine import Continuation, Likely, Served
from qlora.verify.openai_server import OpenAIServer
from qlora.verify.reference import Ending, Probe


class Behaviour:
    """How a server answers; the model of `folder` does."""

    most = 1000
    names = "ids"
    """How it names tokens: `ids` as vLLM, `text` as the protocol, `none`: it returns no logprobs."""
    takes_ids = True
    tokenizes = True
    models = ("mine",)


@contextmanager
def serving(folder: Path, tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour) -> Iterator[str]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def reply(self, body: Any, code: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply({"data": [{"id": name} for name in behaviour.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize" and behaviour.tokenizes and "messages" in body:
                text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
                self.reply({"tokens": tokenizer(text, add_special_tokens=False)["input_ids"]})
            elif self.path == "/v1/chat/completions":
                text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
                count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
                self.reply({"usage": {"prompt_tokens": count}})
            elif self.path == "/v1/completions":
                self.complete(body)
            else:
                self.reply({"error": "not found"}, 404)

        @torch.no_grad()
        def complete(self, body: dict[str, Any]) -> None:
            if not behaviour.takes_ids:
                return self.reply({"error": "prompt must be a string"}, 400)
            if body["logprobs"] > behaviour.most:
                return self.reply({"error": f"logprobs must be at most {behaviour.most}"}, 400)
            values = torch.log_softmax(model(input_ids=torch.tensor([body["prompt"]])).logits[0, -1].float(), -1)
            top = torch.topk(values, body["logprobs"])
            named: dict[str, float] = {}
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                text = f"token_id:{index}" if behaviour.names == "ids" else tokenizer.decode([index])
                named[text] = float(torch.logaddexp(torch.tensor(named.get(text, -1e9)), torch.tensor(value)))
            logprobs = None if behaviour.names == "none" else {"top_logprobs": [named]}
            return self.reply({"choices": [{"text": "", "finish_reason": "length", "logprobs": logprobs}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(compose([]).model)
    tokenizer.chat_template = "<s>{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                         vocab_size=1570, max_position_embeddings=64)  # fmt: skip
    built = LlamaForCausalLM(config)
    torch.nn.init.normal_(built.lm_head.weight, std=0.5)
    built.save_pretrained(folder)
    return folder


@torch.no_grad()
def probes(folder: Path) -> list[Probe]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    prompts = [[1, 30, 40], [1, 99, 500, 7]]
    return [
        Probe(ids, torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1), None)
        for ids in prompts
    ]


@pytest.mark.parametrize(
    ("settings", "top", "asked"),
    [({}, 200, 200), ({"most": 20}, 200, 20), ({"most": 5}, 50, 5), ({"names": "text", "most": 2000}, 1570, 1570)],
    ids=["vLLM", "fewer", "fewest", "text"],
)
def test_the_same_model_behind_a_server_has_no_divergence(
    model: Path, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], top: int, asked: int
) -> None:
    behaviour = Behaviour()
    vars(behaviour).update(settings)
    with serving(model, tokenizer, behaviour) as url:
        engine = OpenAIServer(f"{url}/v1", tokenizer, top=top)
        divergence = measure(probes(model), [engine.next_tokens(probe.ids) for probe in probes(model)])
        assert engine.top == asked
    assert divergence.kl_mean < 1e-5
    assert divergence.top1_agreement == 1


def test_chats_are_compared_token_by_token_or_by_their_number(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "a b"}]
    expected = tokenizer("<s>a b</s>", add_special_tokens=False)["input_ids"]
    for tokenizes in (True, False):
        behaviour = Behaviour()
        behaviour.tokenizes = tokenizes
        with serving(model, tokenizer, behaviour) as url:
            given = OpenAIServer(url, tokenizer, top=5).chat_tokens(messages)
        assert given == (expected if tokenizes else len(expected))


def test_a_server_that_cannot_be_compared_is_named_with_the_reason(
    model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def said(name: str | None = None, **settings: Any) -> str:
        behaviour = Behaviour()
        vars(behaviour).update(settings)
        with serving(model, tokenizer, behaviour) as url, pytest.raises(ResourceError) as error:
            OpenAIServer(url, tokenizer, top=5, model=name).next_tokens([1, 2])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "the server returns no logprobs for /completions" in said(names="none")
    assert "the server refuses a prompt of token ids" in said(takes_ids=False)
    assert "the server has the models a, b; name one with verify.model=NAME" in said(models=("a", "b"))
    assert said("c", models=("a", "b")).startswith("verify.model=c: the server at")


class Toy:
    """An engine that answers with given distributions."""

    def __init__(self, answer: torch.Tensor, *, stops: bool = True, chat: list[int] | int = 3) -> None:
        self.served = Served("toy", "toy", "Q4_K - Medium")
        self.answer, self.stops, self.chat = answer, stops, chat

    def next_tokens(self, ids: Any) -> list[Likely]:
        return [Likely((index,), value) for index, value in enumerate(self.answer.tolist())]

    def chat_tokens(self, messages: Any) -> list[int] | int:
        return self.chat

    def continue_greedily(self, ids: Any, count: int) -> Continuation:
        return Continuation("" if self.stops else "more", self.stops)

    def close(self) -> None:
        pass


TRAINED, BASE = (torch.log_softmax(torch.tensor(values), 0) for values in ([4.0, 0.0, 0.0], [0.0, 0.0, 4.0]))


def causes(engine: Toy, max_kl: float | None = None) -> list[str]:
    verdict = compare(engine, [Probe([1], TRAINED, BASE)], [Chat([], [1, 2, 3])], [Ending([1], 2)], max_kl=max_kl,
                      show=str, on_progress=lambda count: None)  # fmt: skip
    return verdict.causes


def test_each_cause_is_found_by_its_own_sign() -> None:
    near = torch.log_softmax(torch.tensor([3.0, 0.2, 0.0]), 0)
    assert causes(Toy(TRAINED)) == []
    assert causes(Toy(near)) == [], "within the bound of 4 bits"
    assert ["quantization or rounding" in text for text in causes(Toy(near), max_kl=1e-4)] == [True]
    assert ["the adapter is ignored" in text for text in causes(Toy(BASE))] == [True]
    assert ["does not stop at the end token 2" in text for text in causes(Toy(TRAINED, stops=False))] == [True]
    wrong = causes(Toy(TRAINED, chat=[1, 9, 3]))
    assert ["token 2 is 9 at the engine and 2 in the training" in text for text in wrong] == [True]
    assert ["it has 5 tokens at the engine and 3 in" in text for text in causes(Toy(TRAINED, chat=5))] == [True]
    assert len(causes(Toy(BASE, stops=False, chat=7))) == 3
