"""Adapters of other kinds than LoRA, by what `qlora.config.registries.adapter_kinds` says of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from qlora.adapters.targets import find_targets, last_name
from qlora.adapters.whole_modules import find_modules_to_save, prepare_whole
from qlora.config.registries.adapter_kinds import KINDS, AdapterKind, Change
from qlora.config.schema import LoraConfig
from qlora.errors import ConfigError
from qlora.upstream.peft import names_of_experts, without_penalty

FRESH_LORA = (".lora_B.", 0.0)
"""As `AdapterKind.fresh`, of LoRA."""


def kind_of(model: PeftModel, name: str = "default") -> AdapterKind | None:
    """Returns the kind of a model's adapter; None: it is LoRA, or one that this project does not train."""
    return KINDS.get(PeftType(model.peft_config[name].peft_type).value.lower())


def fresh_tensors(model: PeftModel) -> tuple[str, float]:
    """Returns which tensors of an adapter begin as one number, and this number."""
    kind = kind_of(model)
    return FRESH_LORA if kind is None else kind.fresh


def add_other_kind(config: LoraConfig, model: PreTrainedModel) -> PeftModel:
    """Attaches a fresh adapter of another kind than LoRA; its weights come from torch's current seed.

    Raises `ConfigError` for targets that match nothing, and where PEFT has no such adapter for them.
    """
    kind = config.other_kind
    assert kind is not None
    targets = find_targets(config, model)
    assert not targets.parameters, "experts get no adapter of another kind"
    if taken := names_of_experts({last_name(name) for name in targets.modules}, model):
        raise ConfigError(
            f"lora.kind={config.kind}: PEFT takes {sorted(taken)} for experts of this {model.config.model_type}, on "
            f"which it has LoRA alone; leave them out: lora.exclude={sorted(taken)}".replace("'", "")
        )
    made = getattr(peft, kind.config)(
        task_type="CAUSAL_LM",
        target_modules=targets.modules,
        modules_to_save=find_modules_to_save(config, model, targets.modules),
        **kind.filled(config.options) | kind.arguments(config, targets.modules),
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Invalid `(oft_block_size|r)`"
            )  # the nearest that divides is taken
            adapted = without_penalty(get_peft_model(model, made))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"lora.kind={config.kind}: PEFT cannot adapt this {model.config.model_type} so "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); name other layers in lora.target_modules, or use "
            "lora=all-linear"
        ) from error
    prepare_whole(adapted, config.dtype)
    return adapted


@dataclass(frozen=True)
class WeightChange:
    """What an adapter of another kind than LoRA does to a linear layer."""

    change: Change
    read: Callable[[], Tensor]
    """Computes the matrix that is added or turns the inputs, or the vector that scales, of a weight [out, in]."""

    def add_to(self, weight: Tensor) -> Tensor:
        """Returns the merged weight, float32 [out, in], where `weight` is."""
        effect = self.read().detach().float().to(weight.device)
        if self.change is Change.added:
            return weight.float() + effect
        return weight.float() @ effect.T if self.change is Change.turned else weight.float() * effect


def weight_change(kind: AdapterKind, layer: BaseTunerLayer, name: str = "default") -> WeightChange:
    """Returns what an adapter does to its layer, without a reference to the layer's weight."""
    adapter: Any = copy.copy(layer)
    parts = {key: module for key, module in cast(Any, layer)._modules.items() if key != "base_layer"}
    adapter.__dict__ = {**adapter.__dict__, "_modules": parts}
    if kind.change is Change.scaled:
        return WeightChange(kind.change, lambda: adapter.ia3_l[name])
    if hasattr(adapter, "lora_E"):  # PEFT's 4-bit layer does not compute the product
        return WeightChange(kind.change, lambda: _singular_product(adapter, name))
    is_turned = kind.change is Change.added and getattr(adapter, "fan_in_fan_out", False)
    return WeightChange(
        kind.change, lambda: adapter.get_delta_weight(name).T if is_turned else adapter.get_delta_weight(name)
    )


def _singular_product(layer: Any, name: str) -> Tensor:
    """Returns what AdaLoRA adds to a weight, float32 [out, in]."""
    a, e, b = (tensors[name].float() for tensors in (layer.lora_A, layer.lora_E, layer.lora_B))
    scale = layer.scaling[name] / (float(layer.ranknum[name]) + 1e-5)
    return torch.as_tensor(scale * (b @ (a * e)))
