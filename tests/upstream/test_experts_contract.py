"""What mixtures of experts rely on in transformers and torch without a public promise."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, log_conversion_errors
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora.quantization.bnb4.loading import ExpertsIn4Bits
from qlora.upstream import torch_experts, transformers_models, transformers_quantizer
from qlora.upstream.transformers_experts import (
    experts_implementation,
    gate_is_interleaved,
    has_post_norm,
    is_experts,
    register_experts,
    set_experts_implementation,
)
from qlora.upstream.transformers_quantizer import merges_matrices
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


def test_the_loader_asks_a_quantizer_for_experts_and_hands_converters_what_the_files_hold() -> None:
    for function, names in (
        (HfQuantizer.param_needs_quantization, ["self", "model", "param_name", "kwargs"]),
        (Bnb4BitHfQuantizer.get_quantize_ops, ["self"]),
        (
            WeightConverter.convert,
            ["self", "layer_name", "model", "config", "hf_quantizer", "loading_info"],
        ),
        (log_conversion_errors, ["first_target_key", "loading_info", "extras", "op"]),
        (get_module_from_name, ["module", "tensor_name"]),
    ):
        assert list(inspect.signature(function).parameters) == names
    assert AUTO_QUANTIZER_MAPPING[transformers_quantizer.NAME] is Bnb4BitHfQuantizer
    assert {"weight", *(f"weight.{name}" for name in transformers_quantizer.STATISTICS)} == set(
        Bnb4BitHfQuantizer.serialized_names["weight"]
    )
    loader = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "deepcopy(pattern_to_converter[source_pattern])" in loader
    assert 'getattr(op, "hf_quantizer", None)' in inspect.getsource(HfQuantizer.get_new_dtype)


def test_most_mixtures_are_merged_in_one_way(model: PreTrainedModel) -> None:
    merges = [transform for transform in get_model_conversion_mapping(model) if merges_matrices(transform)]
    assert [transform.target_patterns for transform in merges] == [
        ["mlp.experts.gate_up_proj"],
        ["mlp.experts.down_proj"],
    ]
    names = transformers_models.TensorNames(model)
    matrix = names.find_matrix("model.layers.1.mlp.experts.3.up_proj.weight")
    assert matrix == transformers_models.SavedMatrix("model.layers.1.mlp.experts.gate_up_proj", 1, 2, 3)
    assert names.find_matrix("model.layers.1.self_attn.q_proj.weight") is None


def test_the_quantizer_is_ours_inside_the_block_alone() -> None:
    loading: transformers_quantizer.ExpertsLoading = ExpertsIn4Bits("nf4", True, True)
    with transformers_quantizer.quantizing_experts(loading):
        assert AUTO_QUANTIZER_MAPPING[transformers_quantizer.NAME] is not Bnb4BitHfQuantizer
    assert AUTO_QUANTIZER_MAPPING[transformers_quantizer.NAME] is Bnb4BitHfQuantizer
