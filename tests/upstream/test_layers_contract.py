"""What `transformers_layers` and `transformers_files` use of transformers, which does not document it."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from qlora.upstream import transformers_files, transformers_layers


def test_the_loader_takes_tensors_by_name_and_gives_it_back() -> None:
    load = getattr(modeling_utils, transformers_files.LOADS)
    assert "state_dict" in inspect.signature(load).parameters
    source = inspect.getsource(modeling_utils.PreTrainedModel._load_pretrained_model)
    assert (
        f"{transformers_files.LOADS}(\n                model=model,\n                state_dict=merged_state_dict"
        in source
    )
    with transformers_files.reading_files_as(dict):
        assert getattr(modeling_utils, transformers_files.LOADS) is not load
    assert getattr(modeling_utils, transformers_files.LOADS) is load


def test_the_quantizer_is_found_by_the_name_of_its_config() -> None:
    config = transformers_layers.LayersConfig(lambda rows, columns: True, lambda layer: layer, 1.0)
    assert AUTO_QUANTIZER_MAPPING[transformers_layers.NAME] is transformers_layers.LayersQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[transformers_layers.NAME] is transformers_layers.LayersConfig
    assert isinstance(AutoHfQuantizer.from_config(config, pre_quantized=False), transformers_layers.LayersQuantizer)
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading",
                 "param_needs_quantization", "get_quantize_ops", "quantized_element_size"):  # fmt: skip
        assert hasattr(HfQuantizer, name), name


def test_a_chosen_layer_computes_in_the_precision_of_autocast() -> None:
    layer = nn.Linear(4, 4)
    layer.__class__ = transformers_layers.QuantizedLinear
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 4)).dtype is torch.bfloat16
