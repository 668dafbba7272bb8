"""`model.rope_scaling`: what it takes, and what a model and its rows must be for it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora.config.compose import compose
from qlora.config.registries.rope_scaling import NO_ROPE, ROPE_TYPES, scaled_context
from qlora.errors import UserError

YARN = "model.rope_scaling={rope_type: yarn, factor: 4}"
GIVEN: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.1, "beta_fast": 30,
             "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 1024,
                 "factor": 2.0, "attention_factor": 1.1},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
}  # fmt: skip
"""Every parameter of a type."""


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        compose(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_the_parameters_are_those_that_transformers_knows(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    assert kind in ROPE_INIT_FUNCTIONS
    known = ROPE_TYPES[kind]
    assert {*known.needs, *known.takes} == GIVEN[kind].keys()
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
    with caplog.at_level(logging.WARNING, "transformers"):
        LlamaConfig(**shape, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **GIVEN[kind]})
        assert not caplog.records
        for name in known.needs:
            rest = {other: value for other, value in GIVEN[kind].items() if other != name}
            if name == "original_max_position_embeddings":  # which transformers fills in, where it does not serve
                continue
            with pytest.raises(KeyError, match=name):
                LlamaConfig(**shape, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **rest})


def test_types_without_rotary_positions_are_known_as_such() -> None:
    for model_type in NO_ROPE:
        text = CONFIG_MAPPING[model_type]().get_text_config()
        assert not getattr(text, "rope_parameters", None), model_type


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ("{factor: 4}", "model.rope_scaling.rope_type is missing; choose one of linear, dynamic, yarn, longrope, "),
        ("{rope_type: yarm, factor: 4}", "is unknown (did you mean yarn?); choose one of linear, dynamic, yarn"),
        ("{rope_type: linear, factr: 4}", "model.rope_scaling.factr is no parameter of rope_type=linear (did you mea"),
        ("{rope_type: linear, factor: 4, beta_fast: 3}", "is no parameter of rope_type=linear; it has factor"),
        ("{rope_type: yarn}", "model.rope_scaling.factor is missing, which rope_type=yarn needs; give it as a number"),
        ("{rope_type: yarn, factor: 0.5}", "model.rope_scaling.factor must be a number of at least 1, got 0.5"),
        ("{rope_type: yarn, factor: four}", "model.rope_scaling.factor must be a number of at least 1, got 'four'"),
        ("{rope_type: yarn, factor: 4, truncate: 1}", "truncate must be true or false, got 1"),
        ("{rope_type: yarn, factor: 4, original_max_position_embeddings: 1.5}", "be a positive whole number of tokens"),
        ("{rope_type: yarn, factor: 4, beta_fast: 1, beta_slow: 2}", "beta_fast=1 must be more than beta_slow=2"),
        ("{rope_type: longrope, short_factor: 1, long_factor: [1], original_max_position_embeddings: 8}",
         "model.rope_scaling.short_factor must be a list of positive numbers"),
        ("{rope_type: yarn, factor: inf}", "model.rope_scaling.factor must be a number of at least 1, got inf"),
        ("{rope_type: yarn, factor: nan}", "model.rope_scaling.factor must be a number of at least 1, got nan"),
        ("{rope_type: yarn, factor: 4, beta_fast: inf}", "model.rope_scaling.beta_fast must be a positive number, got"),
        ("{rope_type: longrope, short_factor: [inf], long_factor: [1], original_max_position_embeddings: 8}",
         "model.rope_scaling.short_factor must be a list of positive numbers"),
        ("{rope_type: linear, factor: 4, partial_rotary_factor: 3}", "partial_rotary_factor must be above 0 and at"),
        ("{rope_type: [yarn], factor: 4}", "model.rope_scaling.rope_type=['yarn'] is unknown"),
        ("{rope_type: {a: 1}, factor: 4}", "model.rope_scaling.rope_type={'a': 1} is unknown; choose one of linear"),
        ("4", "model.rope_scaling must be a mapping such as {rope_type: yarn, factor: 4} or null, got 4"),
    ],
)  # fmt: skip
def test_what_it_is_not_is_said_in_one_sentence(scaling: str, said: str) -> None:
    assert said in refusal(f"model.rope_scaling={scaling}")


def test_positions_that_are_not_rotary_are_not_stretched() -> None:
    shape = ["model.weights=random", "model.architecture.model_type=opt"]
    assert refusal(YARN, *shape).startswith("model.rope_scaling stretches rotary positions, and opt has none; leave it")
    nope = "model.architecture.options={position_embedding_type: nope}"
    assert "and llama has none" in refusal(YARN, "model.weights=random", nope)


def test_rows_beyond_the_positions_of_a_model_need_a_scaling() -> None:
    said = refusal("data.max_length=2000")
    assert said == (
        "data.max_length=2000: tiny knows 512 positions; set model.rope_scaling='{rope_type: yarn, factor: 4}', which "
        "stretches them, or data.max_length=512"
    )
    assert compose([YARN, "data.max_length=2000"]).data.max_length == 2000
    assert "raise model.rope_scaling.factor, or set data.max_length=2048" in refusal(YARN, "data.max_length=2049")
    assert "knows 4,096 positions" in refusal("model=llama-2-7b", "data.max_length=10000")
    assert compose(["task=preview", "data.max_length=2000"])  # which counts rows, and warns
    unknown = ["model.name=someone/model", "data.max_length=2000"]  # whose shape the config does not know
    assert compose(unknown).data.max_length == 2000


def test_the_context_is_what_is_stretched() -> None:
    assert scaled_context({"rope_type": "linear", "factor": 4}, 2048) == 8192
    assert scaled_context({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 100}, 2048) == 2048
    assert scaled_context({"rope_type": "yarn", "factor": 2}, None) is None
