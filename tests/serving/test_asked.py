"""What is read of a request: known fields by their types, and no field that would be left out without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.config.schema import GenerationConfig
from qlora.serving.asked import Asked, Sampling, read_chat, read_completion
from qlora.serving.fields import ONLY, UNREAD
from qlora.serving.refusal import Refusal
from qlora.serving.served_model import _chosen as chosen

USER = [{"role": "user", "content": "a"}]


def chat(**fields: Any) -> Asked:
    return read_chat(json.dumps({"model": "m", "messages": USER, **fields}).encode())


def completion(**fields: Any) -> Asked:
    return read_completion(json.dumps({"model": "m", "prompt": "a", **fields}).encode())


def test_a_request_holds_what_was_sent() -> None:
    asked = chat(temperature=0, top_p=0.5, seed=-3, stop="x", max_completion_tokens=4, logprobs=True, top_logprobs=2)
    assert (asked.sampling, asked.stops) == (Sampling(0, 0.5, None, -3), ("x",))
    assert (asked.max_tokens, asked.likeliest, asked.messages, asked.is_chat) == (4, 2, USER, True)
    assert chat(logprobs=True).likeliest == 0
    assert chat().likeliest is None
    assert completion(prompt=[[1, 2]]).prompt == [1, 2]
    assert completion(stop=["a", "b"], stream=True, stream_options={"include_usage": True}).reports_usage


def test_a_conversation_has_openais_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "me"}])
    assert asked.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab", "name": "me"}]


@pytest.mark.parametrize("name", [*UNREAD, *ONLY])
def test_fields_that_change_nothing_are_taken(name: str) -> None:
    for value in ONLY.get(name, ("x",)):
        assert chat(**{name: value}) == chat()
    assert chat(**{name: None}) == chat()


REFUSED: dict[str, dict[str, Any]] = {
    "n=2 is not served here; leave it out, or send 1": {"n": 2},
    "n=True is not served here": {"n": True},
    "frequency_penalty=0.5 is not served here; leave it out, or send 0": {"frequency_penalty": 0.5},
    "logit_bias={'5': 1} is not served here": {"logit_bias": {"5": 1}},
    "tools=[{'type': 'function'}] is not served here": {"tools": [{"type": "function"}]},
    "response_format={'type': 'json_object'} is not served here": {"response_format": {"type": "json_object"}},
    "there is no field 'temprature' here (did you mean temperature?)": {"temprature": 1},
    "temperature must be a number from 0 on, got True": {"temperature": True},
    "temperature must be a number from 0 on, got -1": {"temperature": -1},
    "top_p must be a number above 0, up to 1, got 0": {"top_p": 0},
    "top_p must be a number above 0, up to 1, got 1.5": {"top_p": 1.5},
    "top_k must be a whole number from -1 on, got 2.5": {"top_k": 2.5},
    "seed must be a whole number, got 'a'": {"seed": "a"},
    "max_tokens must be a whole number from 1 on, got 0": {"max_tokens": 0},
    "max_tokens and max_completion_tokens differ": {"max_tokens": 1, "max_completion_tokens": 2},
    "stop must be a text or a list of up to 16 texts, none empty, got ''": {"stop": ""},
    "stop must be a text or a list of up to 16 texts": {"stop": ["a"] * 17},
    "stream must be true or false, got 1": {"stream": 1},
    "stream_options needs stream=true": {"stream_options": {"include_usage": True}},
    "stream_options takes include_usage": {"stream": True, "stream_options": {"include": True}},
    "top_logprobs needs logprobs=true": {"top_logprobs": 2},
    "top_logprobs must be a whole number from 0 to 100, got 101": {"logprobs": True, "top_logprobs": 101},
    "model must be a text, got 5": {"model": 5},
    "messages must be a list of messages, got []": {"messages": []},
    "messages[0] must be an object with role and content, got 'a'": {"messages": ["a"]},
    "messages[0].tool_calls is not served here": {"messages": [{**USER[0], "tool_calls": [1]}]},
    "the last message must be the user's, not of assistant": {
        "messages": [*USER, {"role": "assistant", "content": "b"}]
    },
    "messages[0].content must be a text": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_served_is_refused_with_a_sentence(sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(**REFUSED[sentence])
    assert refused.value.message.startswith(sentence)
    assert refused.value.status == 400


def test_completions_take_a_number_of_logprobs() -> None:
    assert completion(logprobs=5).likeliest == 5
    with pytest.raises(Refusal, match="logprobs must be a whole number from 0 to 100, got True"):
        completion(logprobs=True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Sampling(), (False, 1.0, 50, 1.0)),
        (Sampling(temperature=0, top_p=0.5), (False, 1.0, 50, 1.0)),
        (Sampling(top_p=1), (False, 1.0, 50, 1.0)),
        (Sampling(temperature=0.7), (True, 0.7, 0, 1.0)),
        (Sampling(top_p=0.9), (True, 1.0, 0, 0.9)),
        (Sampling(temperature=1, top_k=5), (True, 1, 5, 1.0)),
    ],
)
def test_greedy_is_what_is_not_asked_otherwise(asked: Sampling, expected: tuple[Any, ...]) -> None:
    config = chosen(GenerationConfig(), asked)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == expected


def test_a_run_that_samples_is_asked_as_it_was_set() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, top_p=0.8, typical_p=0.9)
    assert chosen(config, Sampling()) == config
    assert chosen(config, Sampling(top_p=1)).top_p == 1
    assert chosen(config, Sampling(temperature=2)).top_k == 7
    assert not chosen(config, Sampling(temperature=0)).do_sample
