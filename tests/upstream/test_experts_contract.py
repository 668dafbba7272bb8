"""What mixtures of experts rely on in transformers and torch without a public promise."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora.upstream import torch_experts
from qlora.upstream.transformers_experts import (
    experts_implementation,
    gate_is_interleaved,
    has_post_norm,
    is_experts,
    register_experts,
    set_experts_implementation,
)
from tests.models.bases import build


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen3_moe")


def test_the_decorator_notes_the_layout_on_each_module(model: PreTrainedModel) -> None:
    modules = [module for module in model.modules() if is_experts(module)]
    assert [type(module) for module in modules] == [Qwen3MoeExperts] * 2
    assert {"has_gate", "has_bias", "is_transposed"} <= set(
        inspect.signature(moe.use_experts_implementation).parameters
    )
    assert not gate_is_interleaved(modules[0])
    assert not has_post_norm(modules[0])
    assert modules[0].has_gate is True
    assert modules[0].has_bias is modules[0].is_transposed is False
    assert callable(modules[0]._apply_gate)


def test_only_gpt_oss_alternates_the_rows_of_gate_and_up() -> None:
    experts = next(module for module in build("gpt_oss").modules() if is_experts(module))
    assert type(experts) is GptOssExperts
    assert gate_is_interleaved(experts)
    del experts.is_concatenated  # older versions do not note it
    assert gate_is_interleaved(experts)


def test_the_name_in_a_modules_config_chooses_what_computes_it(model: PreTrainedModel) -> None:
    parameters = ["self", "hidden_states", "top_k_index", "top_k_weights"]
    assert list(inspect.signature(moe.grouped_mm_experts_forward).parameters) == parameters
    register_experts("a test", lambda module, hidden, index, weights: hidden + 1)
    experts = next(module for module in model.modules() if is_experts(module))
    set_experts_implementation(experts, "a test")
    try:
        assert experts_implementation(experts) == "a test" == model.config._experts_implementation
        assert torch.equal(experts(torch.zeros(2, 64), None, None), torch.ones(2, 64))
    finally:
        set_experts_implementation(experts, "eager")
        del moe.ExpertsInterface._global_mapping["a test"]


def test_the_implementation_is_not_saved_with_a_config() -> None:
    config = Qwen3MoeConfig(experts_implementation="eager")
    assert not [name for name in config.to_dict() if "experts_implementation" in name]


@pytest.mark.parametrize("dtype", torch_experts.DTYPES)
def test_grouped_matmuls_take_what_they_are_said_to_take(dtype: torch.dtype) -> None:
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows, weights = torch.randn(5, 16).to(dtype), torch.randn(3, 8, 16).to(dtype).transpose(1, 2)
    assert torch_experts.takes_grouped_mm(rows, weights)
    output = torch_experts.grouped_mm_kernel(rows, weights, offsets)
    torch.testing.assert_close(output[2:], rows[2:] @ weights[2])
    assert not torch_experts.takes_grouped_mm(rows[:, 1:], weights[:, 1:])
    assert not torch_experts.takes_grouped_mm(rows[:1].expand(5, 16), weights)
    assert not torch_experts.takes_grouped_mm(rows.double(), weights.double())


def test_a_module_without_experts_is_none() -> None:
    assert not is_experts(nn.Linear(2, 2))
