"""The load of a mixture's experts and the balancing loss of its routers, as training logs them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora.experts.layout import find_experts
from qlora.step.layers import find_layers
from qlora.training.routing import RoutingMeter, build_routing_meter
from tests.models.bases import build

IDS = torch.arange(100, 132).view(2, 16)
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_the_balancing_loss_is_that_of_transformers_and_padding_does_not_count(kind: str) -> None:
    model = build(kind).train()
    meter = build_routing_meter(model)
    assert meter is not None
    meter.begin({"attention_mask": MASK})
    expected = model(input_ids=IDS, attention_mask=MASK, labels=IDS, output_router_logits=True).aux_loss
    meter.add()
    metrics = meter.since_last_log(same, 1)
    assert metrics["router_aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
    k, experts = model.config.num_experts_per_tok, 4
    assert metrics["expert_tokens_mean"] == pytest.approx(int(MASK.sum()) * k / experts)
    assert metrics["expert_tokens_mean"] <= metrics["expert_tokens_max"] <= int(MASK.sum())
    assert meter.since_last_log(same, 1) == {}


def test_layers_that_compute_again_count_once_and_micro_batches_add_up() -> None:
    model = build("qwen3_moe").train()
    meter = RoutingMeter(model)

    def learn(times: int) -> dict[str, float]:
        for _ in range(times):
            meter.begin({"attention_mask": MASK})
            model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
            meter.add()
        return meter.since_last_log(same, times)

    once = learn(1)
    assert learn(3) == pytest.approx(once)
    for reentrant in (True, False):
        for layer in find_layers(model):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
        assert learn(1) == once


def test_an_expert_without_tokens_is_idle_and_evaluations_do_not_count() -> None:
    model = build("deepseek_v3").train()  # one layer of experts, without a balancing loss
    meter = RoutingMeter(model)
    (experts,) = find_experts(model).values()
    meter.begin({})
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1]])
    experts(torch.zeros(3, 64), chosen, torch.ones(3, 2))
    meter.add()
    assert meter.since_last_log(same, 3) == {
        "expert_tokens_mean": 0.5, "expert_tokens_max": 1.0, "expert_idle_share": 0.25,
    }  # fmt: skip
    model.eval()(input_ids=IDS)
    meter.add()
    assert meter.since_last_log(same, 1) == {}
    assert build_routing_meter(build("llama")) is None
