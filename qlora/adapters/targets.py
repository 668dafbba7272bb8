"""Finds what an adapter is put on: linear layers, the experts of a mixture, its routers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from torch import nn
from transformers import PreTrainedModel

from qlora.config.schema import LoraConfig, LoraExperts
from qlora.errors import ConfigError, did_you_mean
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.experts.names import SHARED
from qlora.models.decoder import EXPERTS, ROUTER, linear_modules, read_decoder
from qlora.models.experts_per_token import experts_per_token
from qlora.models.read_weights import weights_read
from qlora.quantization.method import method_of
from qlora.upstream.peft import calls_layer, names_of_experts
from qlora.upstream.transformers_model import decoder_of

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""How projections of experts are called in the files of models and in the commands of other tools."""
LAYER = re.compile(r".*\.\d+\.")


@dataclass
class Targets:
    """What PEFT is to adapt."""

    modules: list[str]
    """Linear layers, by names or last parts of names."""
    parameters: list[str] = field(default_factory=list)
    """Tensors of experts and routers, by names or ends of names."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The ranks of those of `parameters` that have another than the rest."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """The ranks of those of `modules` that have one of their own."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """As `rank_pattern`, for alpha."""

    def alphas(self, config: LoraConfig) -> dict[str, float]:
        """Returns the alphas other than `config.alpha`; those of `ranks` scale as the other layers are scaled."""
        power = 0.5 if config.use_rslora else 1
        scaled = {name: config.alpha * math.pow(rank / config.r, power) for name, rank in self.ranks.items()}
        return {**self.alpha_pattern, **scaled}


def find_targets(config: LoraConfig, model: PreTrainedModel) -> Targets:
    """Returns what a fresh adapter is put on; raises `ConfigError` for what the model does not have."""
    experts, is_all_linear = config.experts, config.target_modules == ["all-linear"]
    modules = find_target_modules(config.target_modules, model)
    shared = [name for name in linear_modules(model) if SHARED.search(f"{name}.")]
    if is_all_linear and experts is LoraExperts.none:
        modules = [name for name in modules if name not in shared]
    elif not is_all_linear and experts in (LoraExperts.all, LoraExperts.shared):
        modules = sorted({*_full_names(modules, model), *shared})
    modules = choose_layers(config, modules, model)
    names = _full_names(modules, model)
    targets = Targets(
        modules,
        rank_pattern=read_pattern("rank_pattern", config.rank_pattern, names, model),
        alpha_pattern=read_pattern("alpha_pattern", config.alpha_pattern, names, model),
    )
    routed = _routed(model)
    if experts in (LoraExperts.all, LoraExperts.shared):
        _check_has_experts(experts, model, routed=bool(routed), shared=bool(shared))
    is_meant = is_all_linear and config.experts_unsupported_reason() is None
    if routed and (experts is LoraExperts.all or (experts is LoraExperts.auto and is_meant)):
        rank = config.expert_r or max(1, config.r // experts_per_token(model.config.get_text_config().to_dict()))
        targets.parameters += routed
        targets.ranks = dict.fromkeys(routed, rank)
    elif config.expert_r is not None:
        raise ConfigError(
            f"lora.expert_r={config.expert_r} is the rank of adapters on routed experts, and this run puts none on "
            "them; set lora.experts=all, or leave lora.expert_r out"
        )
    if config.router:
        _add_routers(targets, model)
    return targets


def choose_layers(config: LoraConfig, modules: list[str], model: PreTrainedModel) -> list[str]:
    """Returns those of the modules that `lora.layers` and `lora.exclude` leave."""
    if config.layers is None and not config.exclude:
        return modules
    chosen = _full_names(modules, model)
    if config.layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        if beyond := [index for index in config.layers if index >= count]:
            raise ConfigError(
                f"lora.layers {beyond}: the model has {count} decoder layers, 0 to {count - 1}; name some of them"
            )
        chosen = [name for name in chosen if _layer_index(name) in config.layers]
    for pattern in config.exclude:
        excluded = _matches(pattern, chosen, "lora.exclude")
        if not excluded:
            kinds = sorted({last_name(name) for name in chosen})
            raise ConfigError(
                f"lora.exclude [{pattern!r}] matches no layer with an adapter{did_you_mean(pattern, kinds)}; "
                f"these are {kinds}"
            )
        chosen = [name for name in chosen if name not in excluded]
    if not chosen:
        raise ConfigError("lora.layers and lora.exclude leave no layer to adapt; name fewer in lora.exclude")
    return chosen


def read_pattern(key: str, pattern: Mapping[str, Any], names: list[str], model: PreTrainedModel) -> dict[str, Any]:
    """Returns a pattern that PEFT reads as `lora` means it, however the saved config orders its keys."""
    values: dict[str, Any] = {}
    matched: dict[str, str] = {}
    for name, value in pattern.items():
        layers = _matches(name, names, f"lora.{key}")
        kinds = sorted({last_name(layer) for layer in names})
        if not layers:
            raise ConfigError(
                f"lora.{key} [{name!r}] matches no layer with an adapter{did_you_mean(name, kinds)}; these are {kinds}"
            )
        if twice := next((layer for layer in layers if layer in matched), None):
            raise ConfigError(
                f"lora.{key}: {name!r} and {matched[twice]!r} both match {twice}; make them match different layers"
            )
        if taken := names_of_experts({last_name(layer) for layer in layers}, model):
            raise ConfigError(
                f"lora.{key} [{name!r}]: PEFT takes {sorted(taken)} for experts of this {model.config.model_type}, "
                f"which it gives no such value; leave these layers out of lora.{key}"
            )
        matched |= dict.fromkeys(layers, name)
        is_ending = all(layer == name or layer.endswith(f".{name}") for layer in layers)
        values |= {name: value} if is_ending else dict.fromkeys(layers, value)
    return values


def _layer_index(name: str) -> int | None:
    """Returns the number of the decoder layer in a module's name."""
    return int(match[1]) if (match := re.search(r"\.(\d+)\.", name)) else None


def _check_has_experts(experts: LoraExperts, model: PreTrainedModel, *, routed: bool, shared: bool) -> None:
    """Raises `ConfigError` where a model lacks the experts that are asked for."""
    kind, kinds = model.config.model_type, {matrix.kind for matrix in read_decoder(model).matrices}
    if (experts is LoraExperts.all and routed) or (experts is LoraExperts.shared and shared):
        return
    if experts is LoraExperts.shared and routed:
        reason, remedy = f"this {kind} has no shared experts", "set lora.experts=all or none"
    elif EXPERTS in kinds:
        reason = f"this {kind} computes its experts by code of its own, which no adapter reaches"
        remedy = "set lora.experts=none" + (" or shared" if shared else "")
    else:
        reason, remedy = f"this {kind} is dense: it has no experts", "leave lora.experts out"
    raise ConfigError(f"lora.experts={experts.value}: {reason}; {remedy}")


def _routed(model: PreTrainedModel) -> list[str]:
    """Returns the tensors of routed experts that text runs through, by the ends of their names where these suffice."""
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    every = {
        f"{name}.{projection}"
        for name, experts in find_experts(model).items()
        for projection in ExpertsLayout.of(experts).projections
    }
    return _ends_of_names((name for name in every if not prefix or name.startswith(f"{prefix}.")), model)


def _ends_of_names(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Returns the ends of parameters' names behind the number of a layer, or the names where others end so, too."""
    chosen = set(names)
    ends = {LAYER.sub("", name) for name in chosen}
    matched = {name for name, _ in model.named_parameters() if any(name.endswith(f".{end}") for end in ends)}
    return sorted(ends if matched == chosen else chosen)


def _add_routers(targets: Targets, model: PreTrainedModel) -> None:
    names = [matrix.name for matrix in read_decoder(model).matrices if matrix.kind == ROUTER]
    if not names:
        raise ConfigError(f"lora.router=true: this {model.config.model_type} has no routers; leave lora.router out")
    kinds = (nn.Linear, *method_of(model).layer_classes())
    linear = [name for name in names if type(model.get_submodule(name.rpartition(".")[0])) in kinds]
    if linear:
        targets.modules = sorted({*_full_names(targets.modules, model), *(name.rpartition(".")[0] for name in linear)})
    targets.parameters += _ends_of_names([name for name in names if name not in linear], model)


def move_taken(config: PeftLoraConfig, model: PreTrainedModel) -> None:
    """Makes the config of an adapter one that plain PEFT reads alike, once the layers are adapted.

    PEFT takes some names of linear layers for experts, such as those of shared experts (peft 0.21); as the `weight` of
    a layer among the parameters it adapts them all the same.
    """
    modules = {*(config.target_modules or ())}
    taken = names_of_experts({last_name(name) for name in modules}, model)
    moved = {name for name in modules if last_name(name) in taken}
    if moved or config.target_parameters:
        config.target_modules = sorted(modules - moved)
        config.target_parameters = sorted({*(config.target_parameters or ()), *(f"{name}.weight" for name in moved)})


def return_taken(config: PeftLoraConfig, model: PreTrainedModel) -> None:
    """Reverses `move_taken`, so that linear layers are adapted as such."""
    linear = [f".{name}.weight" for name in linear_modules(model)]
    parameters = {*(config.target_parameters or ())}
    if moved := {name for name in parameters if any(weight.endswith(f".{name}") for weight in linear)}:
        config.target_modules = sorted(
            {*(config.target_modules or ()), *(name.removesuffix(".weight") for name in moved)}
        )
        config.target_parameters = sorted(parameters - moved)


def _full_names(modules: list[str], model: PreTrainedModel) -> list[str]:
    """Returns the linear layers that names, or last parts of names, stand for."""
    return [name for name in linear_modules(model) if name in modules or last_name(name) in modules]


def find_target_modules(requested: list[str], model: PreTrainedModel) -> list[str]:
    """Turns `lora.target_modules` into what PEFT takes; each name or pattern must match a linear layer.

    Layers that text does not run through are left out, and with `all-linear` those that PEFT cannot adapt, too.
    """
    routers = {matrix.name.rpartition(".")[0] for matrix in read_decoder(model).matrices if matrix.kind == ROUTER}
    names = [name for name in linear_modules(model) if name not in routers]  # its output may be more than a tensor
    read = weights_read(model)
    uncalled = {name for name in names if read.get(name) or not calls_layer(last_name(name), model)}
    if requested == ["all-linear"]:
        chosen = [name for name in names if name not in uncalled]
        if not chosen:
            raise ConfigError(f"lora.target_modules: {model.config.model_type} has no linear layer; use lora=none")
        return chosen
    kinds = sorted({last_name(name) for name in names})
    matches: dict[str, list[str]] = {pattern: _matches(pattern, names) for pattern in requested}
    head = model.get_output_embeddings()
    output = next((last_name(name) for name, module in model.named_modules() if module is head), "")
    if output in [last_name(pattern) for pattern, matched in matches.items() if not matched]:
        raise ConfigError(
            f"lora.target_modules: {output} is the output layer, which cannot be a target here; leave it out: "
            "lora.target_modules=all-linear takes every other linear layer"
        )
    if missing := [pattern for pattern, matched in matches.items() if not matched]:
        if find_experts(model) and all(last_name(name) in EXPERT_NAMES for name in missing):
            raise ConfigError(
                f"lora.target_modules {missing}: in this {model.config.model_type} only experts have these names; "
                "leave them out, and set lora.experts=all to adapt the experts"
            )
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; "
            f"the model has {kinds}, or use all-linear"
        )
    chosen = sorted({name for matched in matches.values() for name in matched})
    if beyond := sorted({last_name(name) for name in uncalled.intersection(chosen)}):
        raise ConfigError(
            f"lora.target_modules {beyond}: the code of {model.config.model_type} reads the weight of such a layer "
            "without calling it, so an adapter on it would be ignored; leave it out, or use all-linear"
        )
    is_plain = all(pattern in kinds for pattern in requested) and len(chosen) == _count(requested, model)
    is_plain = is_plain and not names_of_experts(requested, model)
    return requested if is_plain else chosen


def last_name(name: str) -> str:
    """Returns the last part of a module's name, such as `q_proj`."""
    return name.rpartition(".")[2]


def _count(kinds: list[str], model: PreTrainedModel) -> int:
    """Returns how many modules PEFT matches by the last parts of their names."""
    return sum(last_name(name) in kinds for name, _ in model.named_modules())


def _matches(pattern: str, names: list[str], key: str = "lora.target_modules") -> list[str]:
    plain = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if plain:
        return plain
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {error}") from error
