"""Quantizes the linear layers of a base one by one while transformers loads it, by any function of a layer.

transformers' quantizers are one class a library; this one is for methods that it does not know, or no longer quantizes
by. A layer that is to be quantized becomes a `QuantizedLinear` first; as soon as its weight is read, what the function
makes of it takes its place, so that no more than one full weight exists at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "qlora-layers"


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantized, or will be as soon as it is read."""

    def forward(self, input: Tensor) -> Tensor:
        """Casts the input as autocast does for a full weight, which it does not see here."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return nn.functional.linear(input, self.weight, self.bias)


@register_quantization_config(NAME)
class LayersConfig(QuantizationConfigMixin):
    """How the layers of a base are quantized: the argument `quantization_config` of `from_pretrained`."""

    def __init__(
        self,
        takes: Callable[[int, int], bool],
        quantize: Callable[[nn.Linear], nn.Module],
        bytes_per_weight: float,
        **attributes: Any,
    ) -> None:
        """`takes` says whether a matrix [out, in] is quantized, `attributes` are what PEFT asks a quantizer for."""
        self.quant_method: Any = NAME
        self.takes, self.quantize, self.bytes_per_weight = takes, quantize, bytes_per_weight
        self.llm_int8_skip_modules: list[str] | None = None
        """The names of modules that stay as they are; None: transformers' own choice."""
        self.__dict__.update(attributes)

    def to_dict(self) -> dict[str, Any]:
        """Returns what a file may hold: the name alone."""
        return {"quant_method": NAME}


@register_quantizer(NAME)
class LayersQuantizer(HfQuantizer):
    """Has each layer quantized when its weight is read."""

    quantization_config: LayersConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        skipped = self.quantization_config.llm_int8_skip_modules
        skipped = get_keys_to_not_convert(model) if skipped is None else skipped
        for name, module in model.named_modules():
            is_skipped = any(f".{part}." in f".{name}." for part in skipped)
            if type(module) is nn.Linear and not is_skipped and self.quantization_config.takes(*module.weight.shape):
                module.__class__ = QuantizedLinear

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Leaves no description in the model's config: no file could hold it."""
        del model.config.quantization_config
        return model

    @property
    def quantized_element_size(self) -> float:
        """The bytes of a quantized weight."""
        return self.quantization_config.bytes_per_weight

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Says yes to the weights of the chosen layers."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """Returns what puts a quantized layer in the place of a chosen one."""
        return _Replace(self)

    def replace(self, model: Any, name: str, weight: Tensor) -> nn.Module:
        """Puts a quantized layer in the place of a chosen one, and returns it; its bias stays what it is.

        The function that quantizes finds the layer's name in `full_name`.
        """
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        vars(layer)["full_name"] = name
        with torch.no_grad():
            quantized = self.quantization_config.quantize(layer)
        if quantized is not layer:
            model.set_submodule(name, quantized)
        return quantized

    def is_serializable(self) -> bool:
        """Returns that the quantized weights are not written by transformers."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Returns that adapters are trained on the layers."""
        return True


class _Replace(ConversionOps):
    def __init__(self, quantizer: LayersQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> _Replace:
        return self

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        """Returns nothing that is left to set."""
        model, name, missing = kwargs["model"], kwargs["full_layer_name"], kwargs.get("missing_keys")
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        needed = model.get_parameter(name).shape
        if weight.shape != needed:
            raise ValueError(f"{tuple(weight.shape)}, and {tuple(needed)} is needed")
        quantized = self.quantizer.replace(model, name.rpartition(".")[0], weight)
        parameters: list[Any] = [parameter for key, parameter in quantized.named_parameters() if key != "bias"]
        for initialised in (cast(Any, quantized), *parameters):
            initialised._is_hf_initialized = True
        if missing is not None:
            missing.discard(name)
        return {}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("quantized layers are not written as they were loaded")
