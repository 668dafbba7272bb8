"""What loading, adapters and quantization rely on in other libraries without a public promise.

A failure names what a new version changed. Compare the body with the module named in the table, adapt that, and then
add the version's hash.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo

from qlora.upstream.accelerate_models import forward_attribute

PARAMETERS: list[tuple[Callable[..., Any], list[str]]] = [
    (PreTrainedModel._init_weights, ["self", "module"]),
    (PreTrainedModel._get_dtype_plan, ["self", "dtype"]),
    (get_model_conversion_mapping, ["model", "key_mapping", "hf_quantizer", "add_legacy"]),
    (
        rename_source_key,
        ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict", "reverse"],
    ),
    (_check_lora_target_modules_mamba, ["peft_config", "model", "target_name"]),
    (convert_peft_config_for_transformers, ["peft_config", "model", "conversions"]),
    (Optimizer8bit.prefetch_state, ["self", "p"]),
    (Optimizer8bit.update_step, ["self", "group", "p", "gindex", "pindex"]),
]

BODIES: list[tuple[Callable[..., Any], str, str, dict[str, str]]] = [
    (
        PreTrainedModel._initialize_weights,
        "qlora.models.random_weights does the same, one module at a time",
        transformers.__version__,
        {"5.23.0": "f61be38943fe7fffcfe069df9910ad72b19f493580accd73c23fef20bcf79277"},
    ),
    (
        PreTrainedModel.initialize_weights,
        "qlora.models.random_weights asks the same models for a module's rules",
        transformers.__version__,
        {"5.23.0": "f5ae092097705aa2d60c608e68098bf79526bdf60245fbad5aa88fa09d06cbb8"},
    ),
    (
        Linear4bit.forward,
        "qlora.upstream.bitsandbytes.disable_repacking switches a branch of it off",
        bitsandbytes.__version__,
        {"0.50.2": "d52cf63457717cc718ca0a449dad0967171e679be90d5d2adcafe2e8a141093d"},
    ),
    (
        Linear8bitLt.forward,
        "qlora.quantization.bnb8.layers.exact_products computes in its place",
        bitsandbytes.__version__,
        {"0.50.2": "d3f4146d34e7100027694d30fa36bac6c8691c244f865a15ff55e3c462b12665"},
    ),
    (
        ParamWrapper.forward,
        "qlora.upstream.peft.ExpertsWrapper calls the wrapped module alone",
        peft.__version__,
        {"0.21.2": "704fb56e52604110a6d4c497d21b3c76f7195a572570e8ce20a016ae587a7069"},
    ),
    (
        ParamWrapper.update_layer,
        "qlora.upstream.peft.ExpertsWrapper reorders the B matrix that it makes",
        peft.__version__,
        {"0.21.2": "e3f049039b047d5744cbb9dd5382fe59af3b8a38bf9d47a53a70758f13d770e8"},
    ),
    (
        ParamWrapper.get_delta_weight,
        "qlora.upstream.peft.ExpertsWrapper returns the same from the reordered matrix",
        peft.__version__,
        {"0.21.2": "ef052a65fb6c1ad126c59e14285cf86a17ed1dde1c54489bb4cb54d9fedfbcee"},
    ),
    (
        BaseTuner._inject_parameters,
        "PEFT nests its wrappers as qlora.adapters.load counts them, and knows them by the name of their class",
        peft.__version__,
        {"0.21.2": "10d38624f40b5393187364ccca4b882e6d560d6c4b518c877bd50775c0e2cd13"},
    ),
]


@pytest.mark.parametrize(("function", "names"), PARAMETERS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_a_private_function_has_the_parameters_that_are_passed(function: Callable[..., Any], names: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == names


@pytest.mark.parametrize(
    ("function", "reason", "version", "known"), BODIES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_a_body_that_is_done_again_here_is_a_known_one(
    function: Callable[..., Any], reason: str, version: str, known: dict[str, str]
) -> None:
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    assert digest in known.values(), f"{function.__qualname__} of {version} is another than in {list(known)}: {reason}"


def test_transformers_reports_what_it_could_not_convert() -> None:
    assert "conversion_errors" in LoadStateDictInfo.__dataclass_fields__
    assert "loading_info" in inspect.getsource(PreTrainedModel.from_pretrained)


def test_a_missing_file_of_the_hub_can_be_told_from_a_hub_that_is_away() -> None:
    assert "_raise_exceptions_for_missing_entries" in inspect.getsource(inspect.getmodule(cached_file))


def test_a_config_says_its_attention_and_its_commit() -> None:
    config = transformers.LlamaConfig(attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert "_commit_hash" in inspect.getsource(transformers.PretrainedConfig)


def test_an_optimizer_waits_by_functions_that_are_looked_up_in_each_step() -> None:
    assert {"sync_gpu", "prefetch_state", "update_step"} <= set(Optimizer8bit.step.__wrapped__.__code__.co_names)


def test_four_bit_layers_have_the_switch_that_stops_repacking() -> None:
    assert hasattr(Linear4bit(64, 64, bias=False), "support_avx512bf16_for_cpu")


def test_quantized_parameters_have_the_attributes_that_are_read() -> None:
    weight = Params4bit(torch.ones(64, 64), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    state = weight.quant_state
    assert isinstance(state, QuantState)
    assert state.nested
    assert {"absmax", "shape", "code", "blocksize", "quant_type", "offset", "state2"} <= vars(state).keys()
    assert {"absmax", "code", "blocksize"} <= vars(state.state2).keys()
    assert {"CB", "SCB"} <= set(inspect.signature(Int8Params.__new__).parameters)


def test_accelerate_keeps_a_hooked_forward_where_it_is_replaced() -> None:
    layer = torch.nn.Linear(2, 2)
    assert forward_attribute(layer) == "forward"
    assert forward_attribute(add_hook_to_module(layer, ModelHook())) == "_old_forward"


def test_torch_says_what_a_cpu_multiplies_and_lets_inductor_be_deterministic() -> None:
    import torch._inductor.config

    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)
    assert isinstance(torch._inductor.config.deterministic, bool)


def test_peft_looks_the_conversion_of_a_config_up_where_it_adapts_a_model() -> None:
    source = inspect.getsource(BaseTuner.inject_adapter)
    assert "from peft.utils.transformers_weight_conversion import" in source
    assert "convert_peft_config_for_transformers(" in source
