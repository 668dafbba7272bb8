"""How many requests are answered together, and which models are not served."""

from __future__ import annotations

import contextlib

import pytest
import torch

from qlora.config.schema import GenerationConfig, ServeConfig
from qlora.errors import ConfigError, ResourceError
from qlora.generation.answering import Slots
from qlora.serving import capacity
from qlora.serving.capacity import plan_capacity
from tests.models.bases import build

SLOTS = Slots(GenerationConfig(), torch.device("cpu"), torch.float32, contextlib.nullcontext)


def test_slots_are_as_many_as_the_memory_holds_keys_and_values_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").eval()
    config = model.config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    enough = plan_capacity(ServeConfig(slots=5), SLOTS, model, models=3, context=100)
    assert (enough.slots, enough.note) == (5, None)
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 2 * 2 * 300 * token)
    fewer = plan_capacity(ServeConfig(slots=5), SLOTS, model, models=3, context=100)
    assert fewer.slots == 2
    assert fewer.note is not None
    assert fewer.note.startswith("2 in place of 5 slots: keys and values of 100 tokens take ")
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 2 * 299 * token)
    with pytest.raises(ResourceError, match=r"are free; set a smaller serve\.context"):
        plan_capacity(ServeConfig(slots=5), SLOTS, model, models=3, context=100)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "mamba has layers of another kind (linear_attention)"),
        ("falcon", "falcon computes its attention in a way of its own"),
    ],
)
def test_a_model_that_slots_do_not_serve_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_capacity(ServeConfig(), SLOTS, build(kind).eval(), models=1, context=10)
    assert str(error.value).startswith(f"task=serve cannot answer with this model: {reason}; merge it and serve ")
