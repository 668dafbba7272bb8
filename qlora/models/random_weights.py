"""Draws a base of any shape from a seed, one module at a time: no more than one exists in full precision."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from qlora.config.schema import ModelConfig
from qlora.runtime.device import DTYPES, Placement, planned_dtype


class RandomWeights:
    """The weights that a seed gives a model of a shape; each module's depend on the seed and its name alone.

    They are drawn by the model's own rules, on the device and in the dtype of `placement`, which decide them too. It
    is read like a `Checkpoint`.
    """

    def __init__(self, model_config: Any, *, placement: Placement, seed: int) -> None:
        self.placement, self.seed = placement, seed
        self._config = model_config
        self._stencil = self._empty()
        self._modules = dict(self._stencil.named_modules())
        self._tied = set(self._stencil.all_tied_weights_keys)
        self._plan = self._stencil._get_dtype_plan(placement.weights)

    def __iter__(self) -> Iterator[str]:
        """Yields the names that the tensors would have in a file."""
        return (name for name in self._stencil.state_dict() if name not in self._tied)

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""
        module, _, key = name.rpartition(".")
        return self._draw(module)[key].detach().cpu()

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without drawing it."""
        return torch.Size(self._stencil.get_parameter_or_buffer(name).shape)

    def read_stored(self, name: str, device: torch.device) -> None:
        """Returns None: no weight is stored in 4 or 8 bits."""

    def build(
        self, bits: BitsAndBytesConfig | None, *, store: torch.device | None = None, **options: Any
    ) -> PreTrainedModel:
        """Returns the model, quantized as `bits` says, or in the dtype of `placement`.

        It is drawn and quantized on the device of `placement`, and kept there or on `store`. `options` are those of
        transformers' `from_config`, e.g. `attn_implementation`.
        """
        model = self._empty(**options)
        quantizer = None if bits is None else AutoHfQuantizer.from_config(bits, pre_quantized=False)
        if quantizer is not None:
            quantizer.preprocess_model(model, device_map={"": self.placement.device})
        for name, module in model.named_modules():
            for key, tensor in self._draw(name).items():
                made = _quantized(module, tensor) if key == "weight" else tensor
                setattr(module, key, _move(made, store or self.placement.device))
        model.tie_weights()
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.postprocess_model(model)
        return model.eval()

    def _empty(self, **options: Any) -> PreTrainedModel:
        """Returns the model without storage; initialising what is on the meta device costs nothing and does nothing."""
        with torch.device("meta"):
            config = copy.deepcopy(self._config)
            return AutoModelForCausalLM.from_config(config, dtype=self.placement.weights, **options)

    @torch.no_grad()
    def _draw(self, name: str) -> dict[str, Tensor]:
        """Returns the parameters and buffers of a module's own on the device, by their names in it.

        Those above it have a word too: GPT-2's blocks scale their output layers. All but this module is on the meta
        device meanwhile.
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
            for place, rules in self._above(name):
                rules._init_weights(place)
        drawn = {key: getattr(module, key) for key, _ in empty}
        for key, tensor in empty:
            setattr(module, key, tensor)
        return drawn

    def _above(self, name: str) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
        """Yields a module and those it lies in, from the inside out, each with the nearest model around it."""
        parts = name.split(".") if name else []
        chain = [self._modules[".".join(parts[:count])] for count in range(len(parts), -1, -1)]
        for place, module in enumerate(chain):
            yield module, next(above for above in chain[place:] if isinstance(above, PreTrainedModel))


def drawing_facts(config: ModelConfig, placement: Placement, seed: int) -> dict[str, Any]:
    """Returns all that decides a drawn base, by the full keys of the config.

    The kind of device does, for each has random numbers of its own, and so does the dtype that they are drawn in.
    """
    assert config.architecture is not None
    shape = {f"model.architecture.{name}": value for name, value in asdict(config.architecture).items()}
    dtype = next(name.value for name, dtype in DTYPES.items() if dtype is placement.weights)
    own = {"seed": seed, "device": placement.device.type, "quantization.compute_dtype": dtype}
    return {"model.weights": config.weights.value} | own | shape


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _rng(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor, or the parameter that it is, on another device."""
    if isinstance(tensor, Params4bit):
        return tensor.to(device)  # with its scales
    tensor.data = tensor.data.to(device)
    return tensor


def _quantized(module: nn.Module, weight: Tensor) -> Tensor:
    """Returns a weight as a layer of bitsandbytes stores it; any other module's as it is."""
    if not isinstance(module, Linear4bit | Linear8bitLt):
        return weight
    if module.source_cls is Conv1D:
        weight = weight.T
    if isinstance(module, Linear8bitLt):
        packed, scales, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
        return Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)
    return Params4bit(weight, requires_grad=False, **module.weight.__dict__).to(weight.device)
