"""Lists the matrices of a base's decoder: which are quantized, which have adapters, which belong to experts."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from qlora.config.schema import ExpertsBits, QuantizationConfig
from qlora.errors import ConfigError
from qlora.experts.layout import Placeholder, find_experts
from qlora.models.outputs import on_output, plain_ids
from qlora.models.read_weights import describe_quantization
from qlora.quantization.method import (
    QuantizationMethod,
    method_of,
    quantization_key,
    quantizes_experts,
    set_method,
)
from qlora.runtime.device import Placement
from qlora.text import format_bytes
from qlora.upstream.transformers_model import decoder_of

MOST_UNQUANTIZED = 0.5
"""The largest share of the decoder's weights that a base may keep in more bits than were asked for."""
EXPERTS, ROUTER = "experts", "router"
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.|$)")
ADAPTER_PARTS = re.compile(r"\.(lora_\w+|token_adapter|modules_to_save)(\.|$)")
OF_ARCHITECTURES = ("transformers.models.", "transformers_modules.")
"""Where the code of architectures is, the library's and that of the hub."""
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Matrix:
    """A weight of two or more dimensions that the decoder multiplies with."""

    name: str
    kind: str
    """`experts`, `router`, or the last part of its module's name, such as `q_proj`."""
    count: int
    """Its elements before quantization."""
    dtype: torch.dtype
    is_quantized: bool
    is_adapted: bool


@dataclass(frozen=True)
class Decoder:
    """The matrices of a base's decoder; embeddings and the output layer are not among them."""

    matrices: list[Matrix] = field(default_factory=list)
    beside: int = 0
    """Numbers of the base in other parts than the decoder and its output layer, such as a tower for pictures."""

    @property
    def unquantized(self) -> dict[str, float]:
        """The share of the weights that is not quantized, by kind, the largest first."""
        return self._shares(matrix for matrix in self.matrices if not matrix.is_quantized)

    @property
    def unadapted(self) -> dict[str, float]:
        """The share of the weights without an adapter, by kind, the largest first."""
        return self._shares(matrix for matrix in self.matrices if not matrix.is_adapted)

    def _shares(self, chosen: Iterator[Matrix]) -> dict[str, float]:
        counts = Counter[str]()
        for matrix in chosen:
            counts[matrix.kind] += matrix.count
        total = sum(matrix.count for matrix in self.matrices)
        return {kind: count / total for kind, count in counts.most_common()}

    def describe_unquantized(self) -> str | None:
        """Says which share of the weights is not quantized, and in which precision it is; None: all are quantized."""
        shares = self.unquantized
        if not shares:
            return None
        dtypes = sorted(
            {str(matrix.dtype).removeprefix("torch.") for matrix in self.matrices if not matrix.is_quantized}
        )
        fraction, kinds = _percent(sum(shares.values())), ", ".join(shares)
        return f"{fraction} of the decoder's weights are in {' and '.join(dtypes)} ({kinds})"

    def describe_unadapted(self) -> str | None:
        """Says which kinds of weights have no adapter, and their shares; None: all have one."""
        shares = self.unadapted
        if not shares:
            return None
        (first, fraction), *rest = shares.items()
        kinds = [f"{first} ({_percent(fraction)} of the decoder's weights)"]
        kinds += [f"{kind} ({_percent(fraction)})" for kind, fraction in rest]
        return ", ".join(kinds) + ("; the router is frozen" if ROUTER in shares else "")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction >= 0.001 else "less than 0.1 %"


def read_decoder(model: PreTrainedModel) -> Decoder:
    """Returns the matrices of a base, with or without an adapter on it; it may lie on the meta device."""
    method = method_of(model)
    decoder, output = decoder_of(model), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    parts = {*output.modules()} if output is not None else set()  # a trained copy lies beside the base's
    owners = {name: module for name, module in model.named_modules() if module not in parts}
    weights: list[tuple[str, nn.Module, nn.Parameter]] = []
    beside = 0
    for name, weight in model.named_parameters():
        owner = owners.get(name.rpartition(".")[0])
        if owner is None or ADAPTER_PARTS.search(name):
            continue
        if prefix and not name.startswith(f"{prefix}."):
            beside += _shape(method, weight, owner).numel()
        elif len(_shape(method, weight, owner)) >= 2 and not isinstance(owner, nn.Embedding):
            weights.append((name, owner, weight))
    kinds = _kinds(method, weights)
    adapted = {
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }
    matrices = [
        Matrix(
            name,
            kinds[name],
            _shape(method, weight, owner).numel(),
            weight.dtype,
            isinstance(weight, Placeholder) or _is_quantized(method, owner),
            any(name.startswith(f"{wrapper}.") for wrapper in _above(name) & adapted),
        )
        for name, owner, weight in weights
    ]
    return Decoder(matrices, beside)


def _above(name: str) -> set[str]:
    """Returns the names of the modules that a parameter lies in."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def _is_quantized(method: QuantizationMethod, owner: Any) -> bool:
    return isinstance(owner, method.layer_classes())


def _shape(method: QuantizationMethod, weight: nn.Parameter, owner: nn.Module) -> torch.Size:
    """Returns a weight's shape before quantization."""
    layer: Any = owner
    if _is_quantized(method, owner) and weight is not layer.bias:
        return torch.Size([layer.out_features, layer.in_features])
    return weight.shape


def _kinds(method: QuantizationMethod, weights: list[tuple[str, nn.Module, nn.Parameter]]) -> dict[str, str]:
    """Returns the kind of each weight by its name.

    Experts are the weights of a module that holds them in one tensor, [experts, out, in]; the router is a matrix
    beside it with a row for each expert.
    """
    counts: dict[str, int] = {}
    for name, owner, weight in weights:
        if weight.dim() == 3 and min(weight.shape) > 1 and not isinstance(owner, nn.Conv1d):
            counts[_plain_path(name)] = weight.shape[0]
    around = {path.rpartition(".")[0]: count for path, count in counts.items()}
    kinds = {}
    for name, owner, weight in weights:
        path = _plain_path(name)
        kinds[name] = path.rpartition(".")[2]
        if path in counts:
            kinds[name] = EXPERTS
        elif any(_shape(method, weight, owner)[0] == around[above] for above in _above(name) & around.keys()):
            kinds[name] = ROUTER
    return kinds


def _plain_path(name: str) -> str:
    """Returns the name of the module that a parameter lies in, without the wrappers of an adapter."""
    return WRAPPED.sub("", name.rpartition(".")[0])


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Returns the full names of the linear layers that text runs through, but for the output layer, found by class.

    On the meta device, where nothing runs, those of towers for pictures are among them.
    """
    output, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D, *method_of(model).layer_classes())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not output and _maps_rows(module)
    ]
    if model.device.type == "meta" or not _has_other_parts(model, names):
        return names
    called = _kinds_in_text(model)
    return [name for name in names if INDEX.sub("*", name) in called]


@torch.no_grad()
def _maps_rows(layer: Any) -> bool:
    """Returns whether a linear layer maps each input to an output, as an adapter on it does.

    Architectures have classes of their own; that of DeepSeek V4 maps groups of heads by a block of the weight each.
    """
    if not type(layer).__module__.startswith(OF_ARCHITECTURES):
        return True
    inputs, outputs = layer.weight.shape[::-1] if isinstance(layer, nn.Linear) else layer.weight.shape
    try:
        output = layer(layer.weight.new_zeros(1, inputs))
    except Exception:  # of code of any architecture
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, outputs)


def _has_other_parts(model: PreTrainedModel, linear: list[str]) -> bool:
    """Returns whether a model may have layers that text does not run through, such as a tower for pictures."""
    decoder = decoder_of(model)
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    inside = f"{prefix}." if prefix else ""
    towers = [name for name in models if name and not f"{inside}.".startswith(f"{name}.")]
    return bool(towers) or any(not name.startswith(inside) for name in linear)


@torch.no_grad()
def _kinds_in_text(model: PreTrainedModel) -> set[str]:
    """Returns the modules that a forward pass of text calls, by their names without the numbers of layers.

    A layer or an expert that a few tokens do not call counts by those of its kind.
    """
    kinds = {module: INDEX.sub("*", name) for name, module in model.named_modules()}
    called = set[str]()
    ids, is_16_bit = plain_ids(model), model.dtype is not torch.float32
    with (
        on_output(model, lambda module, _: called.add(kinds[module])),
        torch.autocast(ids.device.type, model.dtype if is_16_bit else torch.bfloat16, enabled=is_16_bit),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return called


def build_skeleton(model_config: Any, placement: Placement, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns a model without storage, as it is before it is quantized."""
    with torch.device("meta"):
        config = copy.deepcopy(model_config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=placement.param_dtype, trust_remote_code=trust_remote_code
        )
    return model


def build_empty(
    model_config: Any,
    method: QuantizationMethod,
    quantization: QuantizationConfig,
    placement: Placement,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Returns a model without storage, with the layers that transformers quantizes in place."""
    model = build_skeleton(model_config, placement, trust_remote_code=trust_remote_code)
    description = describe_quantization(method, quantization, placement, model)
    assert description is not None, "only a base that transformers quantizes is built"
    AutoHfQuantizer.from_config(description, pre_quantized=False).preprocess_model(model, device_map={"": "cpu"})
    if quantizes_experts(method, quantization):
        for experts in find_experts(model).values():
            method.quantize_experts(experts, quantization)
    set_method(model, method)
    return model


def check_is_quantized(
    model: PreTrainedModel, method: QuantizationMethod, quantization: QuantizationConfig, name: str
) -> None:
    """Raises `ConfigError` unless most of a base's decoder is quantized, where that was asked for."""
    if not method.is_quantized:
        return
    decoder = read_decoder(model)
    key = quantization_key(quantization)
    if all(not matrix.is_quantized for matrix in decoder.matrices):
        layers = [model.get_submodule(name) for name in linear_modules(model)]
        if classes := sorted({type(layer).__name__ for layer in layers} - {"Linear", "Conv1D"}):
            raise ConfigError(
                f"{key}: the linear layers of {name} are of a class of their own "
                f"({', '.join(classes)}), which transformers does not quantize; use quantization=none"
            )
        raise ConfigError(f"{key}: {name} has no linear layers to quantize; use quantization=none")
    shares = decoder.unquantized
    if quantization.experts is ExpertsBits.none:
        shares.pop(EXPERTS, None)
    if sum(shares.values()) > MOST_UNQUANTIZED:
        raise ConfigError(
            f"{key}: of model.name={name} {decoder.describe_unquantized()}, because "
            + _why_unquantized(model, decoder, method)
        )


def _why_unquantized(model: PreTrainedModel, decoder: Decoder, method: QuantizationMethod) -> str:
    """Returns why most of a base is not quantized, and the ways out."""
    full = [matrix for matrix in decoder.matrices if matrix.kind == EXPERTS and not matrix.is_quantized]
    reason = f"{method.package or method.name} quantizes linear layers alone"
    if not full:
        return f"{reason}; use quantization=none (16 bits), or a base without such weights"
    in_full = f"quantization.experts=none, which keeps experts in 16 bits ({_size(full)})"
    if unsupported := method.experts_unsupported_reason():
        return f"{unsupported}; use quantization=nf4, or {in_full}"
    classes = sorted({type(model.get_submodule(matrix.name.rpartition(".")[0])).__name__ for matrix in full})
    return f"the class of its experts, {', '.join(classes)}, computes them in a way of its own; use {in_full}"


def describe_full_experts(model: PreTrainedModel) -> str | None:
    """Says which share of the weights are experts that are not quantized, and their bytes; None: there are none."""
    decoder = read_decoder(model)
    full = [matrix for matrix in decoder.matrices if matrix.kind == EXPERTS and not matrix.is_quantized]
    if not full:
        return None
    dtype = str(full[0].dtype).removeprefix("torch.")
    fraction = _percent(decoder.unquantized[EXPERTS])
    return f"{fraction} of the decoder's weights are experts in {dtype}, {_size(full)}"


def _size(matrices: list[Matrix]) -> str:
    return format_bytes(sum(matrix.count * matrix.dtype.itemsize for matrix in matrices))
