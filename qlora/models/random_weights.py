"""Initialises a base of any shape from a seed, one module at a time: no more than one exists in full precision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from qlora.config.schema import MIXTURE_FIELDS, ModelConfig, QuantizationConfig
from qlora.experts.host import choose_waiting
from qlora.models.read_weights import describe_quantization
from qlora.quantization.method import QuantizationMethod, quantizes_experts
from qlora.runtime.device import DTYPES, Placement, planned_dtype
from qlora.upstream.transformers_experts import is_experts
from qlora.upstream.transformers_layers import LayersQuantizer, QuantizedLinear
from qlora.upstream.transformers_models import dtype_plan, init_weights


class RandomWeights:
    """The weights that a seed gives a model of a shape; each module's depend on the seed and its name alone.

    The model's own rules initialise them, on the device and in the dtype of `placement`, which decide them too. They
    are read like a `Checkpoint`.
    """

    def __init__(self, model_config: Any, *, placement: Placement, seed: int) -> None:
        self.placement, self.seed = placement, seed
        self._config = model_config
        self._skeleton = self._empty()
        self._modules = dict(self._skeleton.named_modules())
        self._tied = set(self._skeleton.all_tied_weights_keys)
        self._plan = dtype_plan(self._skeleton, placement.param_dtype)

    def __iter__(self) -> Iterator[str]:
        """Yields the names that the tensors would have in a file."""
        return (name for name in self._skeleton.state_dict() if name not in self._tied)

    def __contains__(self, name: object) -> bool:
        """Returns whether a file would hold a tensor of this name."""
        return name in set(self)

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""
        return [name for name in self if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""
        module, _, key = name.rpartition(".")
        return self._initialise(module)[key].detach().cpu()

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without initialising it."""
        return torch.Size(self._skeleton.get_parameter_or_buffer(name).shape)

    def build(
        self,
        method: QuantizationMethod,
        quantization: QuantizationConfig,
        *,
        store: torch.device | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Returns the model, quantized by `method`.

        It is initialised and quantized on the device of `placement`, and kept there or on `store`. `options` are those
        of transformers' `from_config`, e.g. `attn_implementation`.
        """
        model = self._empty(**options)
        if quantizes_experts(method, quantization):
            choose_waiting(model)
        description = describe_quantization(method, quantization, self.placement, model)
        quantizer = None if description is None else AutoHfQuantizer.from_config(description, pre_quantized=False)
        if quantizer is not None:
            quantizer.preprocess_model(model, device_map={"": self.placement.device})
        layers, target = method.layer_classes(), store or self.placement.device
        for name, chosen in list(model.named_modules()):
            module, initialised = chosen, self._initialise(name)
            if isinstance(quantizer, LayersQuantizer) and isinstance(module, QuantizedLinear):
                module = quantizer.replace(model, name, initialised.pop("weight"))
                module.to(target)
            for key, tensor in initialised.items():
                is_quantized = key == "weight" and isinstance(module, layers)
                parameter = _quantize(method, module, tensor) if is_quantized else tensor
                setattr(module, key, _move(parameter, self.placement.device if is_experts(module) else target))
            if is_experts(module):
                if quantizes_experts(method, quantization):
                    method.quantize_experts(module, quantization)
                module.to(target)
        model.tie_weights()
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
        else:
            with torch.no_grad():
                method.convert(model, quantization, self.placement)
        return model.eval()

    def _empty(self, **options: Any) -> PreTrainedModel:
        """Returns the model without storage; initialising what is on the meta device costs nothing and does nothing."""
        with torch.device("meta"):
            config = copy.deepcopy(self._config)
            return AutoModelForCausalLM.from_config(config, dtype=self.placement.param_dtype, **options)

    @torch.no_grad()
    def _initialise(self, name: str) -> dict[str, Tensor]:
        """Returns the parameters and buffers of one module, without those of its children, by their names in it.

        The modules around it are asked too, for they may change what it starts from: GPT-2's blocks scale their output
        layers. All but this module is on the meta device meanwhile.
        """
        module, device = self._modules[name], self.placement.device
        empty = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        empty = [(key, tensor) for key, tensor in empty if f"{name}.{key}".lstrip(".") not in self._tied]
        if not empty:
            return {}
        for key, tensor in empty:
            dtype = planned_dtype(self._plan, f"{name}.{key}", tensor.dtype)
            full = torch.empty_like(tensor, dtype=dtype, device=device)
            setattr(module, key, nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full)
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=_rng(device)):
            torch.manual_seed(_seed(self.seed, name))
            for outer, model in self._around(name):
                init_weights(model, outer)
        initialised = {key: getattr(module, key) for key, _ in empty}
        for key, tensor in empty:
            setattr(module, key, tensor)
        return initialised

    def _around(self, name: str) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
        """Yields a module and those it lies in, from the inside out, each with the nearest model around it."""
        parts = name.split(".") if name else []
        chain = [self._modules[".".join(parts[:count])] for count in range(len(parts), -1, -1)]
        for index, module in enumerate(chain):
            yield module, next(outer for outer in chain[index:] if isinstance(outer, PreTrainedModel))


def random_base_settings(config: ModelConfig, placement: Placement, seed: int) -> dict[str, Any]:
    """Returns the settings that decide a base with random weights, by the full keys of the config.

    The kind of device is one, for each has its own random numbers, and so is the dtype that they are generated in.
    """
    assert config.architecture is not None
    described = asdict(config.architecture)
    options = {f"model.architecture.options.{name}": value for name, value in described.pop("options").items()}
    shape = {
        f"model.architecture.{name}": value
        for name, value in described.items()
        if value is not None or name not in MIXTURE_FIELDS  # bases of older runs had no word on experts
    }
    dtype = next(name.value for name, dtype in DTYPES.items() if dtype is placement.param_dtype)
    machine = {"seed": seed, "device": placement.device.type, "quantization.compute_dtype": dtype}
    return {"model.weights": config.weights.value} | machine | shape | options


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _rng(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor, or the parameter that it is, on another device."""
    if getattr(tensor, "quant_state", None) is not None:
        return tensor.to(device)  # with its scales
    tensor.data = tensor.data.to(device)
    return tensor


def _quantize(method: QuantizationMethod, layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns a weight as its layer keeps it; that of a `Conv1D` (GPT-2) is [in, out] until then."""
    return method.quantize(layer, weight.T if getattr(layer, "source_cls", None) is Conv1D else weight)
