"""The parts of a base with an adapter that a merge needs, copied out of the loaded model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora.adapters.kinds import WeightChange, kind_of, weight_change
from qlora.config.registries.adapter_kinds import AdapterKind, Change
from qlora.errors import DataError
from qlora.experts.forward import ADAPTERS
from qlora.experts.layout import ExpertsLayout, find_experts, stored_experts
from qlora.quantization.method import QuantizationMethod, method_of
from qlora.upstream.peft import base_of, is_of_adapter

ADAPTER = "default"  # the name that PEFT gives to the adapter it loads
WRAPPERS = re.compile(r"\.(base_layer|token_adapter|original_module)(?=\.|$)")
LORA = re.compile(r"(.+)\.lora_(?:A\.weight|B\.weight|magnitude_vector)")
TOKEN_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
INSTEAD = "serve the adapter on its base instead"


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to a linear layer: `scaling` B A is added; with DoRA each row then gets its magnitude."""

    a: Tensor
    """Float32 [r, in]."""
    b: Tensor
    """Float32 [out, r]."""
    scaling: float
    magnitude: Tensor | None = None
    """Float32 [out]; None: no DoRA."""

    def add_to(self, weight: Tensor) -> Tensor:
        """Returns the merged weight, float32 [out, in], where `weight` is."""
        merged = weight.float() + self.scaling * (self.b.to(weight.device) @ self.a.to(weight.device))
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.to(merged) / torch.linalg.norm(merged, dim=1))[:, None]


@dataclass(frozen=True)
class ExpertsLowRank:
    """What an adapter does to a projection of all experts of a layer."""

    a: Tensor
    """Float32 [experts, r, in]."""
    b: Tensor
    """Float32 [experts, out, r]."""
    scaling: float

    def add_to(self, weight: Tensor, expert: int, rows: slice) -> Tensor:
        """Returns the merged rows of an expert's projection, float32 [out, in], where `weight` is."""
        a, b = self.a[expert].to(weight.device), self.b[expert, rows].to(weight.device)
        return weight.float() + self.scaling * (b @ a)


@dataclass(frozen=True)
class Adapted:
    """The parts of a loaded base with its adapter: small tensors on the CPU, by the names of the plain base."""

    method: QuantizationMethod
    tied: dict[str, str]
    """Parameters that share the tensor of another one."""
    layers: dict[str, LowRank | WeightChange] = field(default_factory=dict)
    experts: dict[str, ExpertsLowRank] = field(default_factory=dict)
    """By the names of the parameters that hold a projection of all experts."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that were trained themselves, such as biases."""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Trained rows of an embedding or output matrix: indices and values."""
    rounded: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """The quantized layers of the base: each rounds a full weight [out, in] to what the layer computes with. Those of
    experts are named as their parameter, and round the matrix of one expert."""
    transposed: set[str] = field(default_factory=set)
    """Layers whose weight is [in, out] in the files (GPT-2)."""
    kept: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    """Shape and precision of what is not quantized; matrices that grew for `model.new_tokens` have their new shape."""


def split_adapter(model: PeftModel) -> Adapted:
    """Copies the tensors that merging needs out of a loaded model, so that the model can be released.

    Raises `DataError` for an adapter that no plain model can hold.
    """
    method, kind = method_of(model), kind_of(model, ADAPTER)
    base, peft_type = base_of(model), model.peft_config[ADAPTER].peft_type
    if peft_type != PeftType.LORA and kind is None:
        raise DataError(f"adapter: task=merge adds LoRA to a base, but this is PEFT's {peft_type}; {INSTEAD}")
    adapted = Adapted(method, tied=dict(base.all_tied_weights_keys))
    tuners: dict[str, LoraLayer] = {}
    tokens: dict[str, TrainableTokensWrapper] = {}
    experts = find_experts(base)
    for path, module in experts.items():
        _split_experts(adapted, path, module)
    for name, module in base.named_modules():
        plain = WRAPPERS.sub("", name)
        if plain in experts:  # wrapped by PEFT or not
            continue
        if kind is not None and isinstance(module, BaseTunerLayer):
            _split_other_kind(adapted, plain, module, kind)
        elif isinstance(module, LoraLayer):
            tuners[plain] = module
        elif isinstance(module, TrainableTokensWrapper):
            tokens[plain] = module
        elif isinstance(module, method.layer_classes()):
            adapted.rounded[plain] = method.rounding(module)
        if isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D:
            adapted.transposed.add(plain)
    for name, parameter in base.named_parameters():
        plain = WRAPPERS.sub("", name)
        if parameter.is_floating_point() and plain.removesuffix(".weight") not in adapted.rounded:
            adapted.kept[plain] = (parameter.shape, parameter.dtype)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    parts = {name.removeprefix("base_model.model."): tensor.detach().cpu() for name, tensor in saved.items()}
    for name, tensor in parts.items():
        plain = WRAPPERS.sub("", name)
        if kind is not None and is_of_adapter(name, model):
            continue
        if (match := LORA.fullmatch(name)) and match[1] in tuners:
            adapted.layers[match[1]] = _low_rank(match[1], tuners[match[1]], parts)
        elif match and WRAPPERS.sub("", match[1]) in experts:
            continue
        elif (match := TOKEN_ROWS.fullmatch(name)) and match[1] in tokens:
            indices = tokens[match[1]].token_adapter.token_indices[ADAPTER]
            adapted.rows[f"{match[1]}.weight"] = (torch.tensor(indices), tensor)
        elif plain in adapted.kept:
            adapted.replaced[plain] = tensor
        else:
            raise DataError(f"adapter: a plain model has no place for its {name}; {INSTEAD}")
    _check_tied(adapted)
    return adapted


def _split_other_kind(adapted: Adapted, name: str, layer: BaseTunerLayer, kind: AdapterKind) -> None:
    """Notes what an adapter of another kind than LoRA does to a layer: to its weight, and where it scales outputs, to
    its bias."""
    change = adapted.layers[name] = weight_change(kind, layer, ADAPTER)
    bias = getattr(layer.get_base_layer(), "bias", None)
    if kind.change is Change.scaled and bias is not None and (scale := change.read().detach()).shape[0] == len(bias):
        adapted.replaced[f"{name}.bias"] = (bias.detach().float() * scale.flatten().float()).to(bias.dtype).cpu()


def _split_experts(adapted: Adapted, path: str, experts: nn.Module) -> None:
    """Notes how the weights of a layer's experts are rounded, and what an adapter adds to them."""
    for projection, adapter in experts.__dict__.get(ADAPTERS, {}).items():
        a, b = (tensor.detach().float().cpu() for tensor in (adapter.a, adapter.b))
        adapted.experts[f"{path}.{projection}"] = ExpertsLowRank(a, b, adapter.scaling)
    if (store := stored_experts(experts)) is not None:
        held = (projection for projection in ExpertsLayout.of(experts).projections if store.holds(projection))
        adapted.rounded.update({f"{path}.{projection}": store.rounding() for projection in held})


def _low_rank(name: str, layer: LoraLayer, parts: dict[str, Tensor]) -> LowRank:
    variant = layer.lora_variant.get(ADAPTER)
    a, b = parts[f"{name}.lora_A.weight"], parts[f"{name}.lora_B.weight"]
    is_one_matrix = a.dim() == 2 and getattr(layer, "num_experts", 1) == 1
    if not is_one_matrix or not (variant is None or isinstance(variant, DoraLinearVariant)):
        raise DataError(f"adapter: a plain model has no place for its {type(variant or layer).__name__} on {name}; "
                          f"{INSTEAD}")  # fmt: skip
    magnitude = parts.get(f"{name}.lora_magnitude_vector")
    return LowRank(a.float(), b.float(), layer.scaling[ADAPTER], None if magnitude is None else magnitude.float())


def _check_tied(adapted: Adapted) -> None:
    """Raises `DataError` if an adapter changes one of two matrices that are the same."""
    changed = {*(f"{name}.weight" for name in adapted.layers), *adapted.replaced}
    for one, other in adapted.tied.items():
        if both := changed & {one, other}:
            raise DataError(
                f"adapter: it changes {both.pop()}, but in this base {one} and {other} are the same matrix, and a "
                f"merged model would change both; {INSTEAD}, or train one with lora.target_modules=all-linear"
            )
