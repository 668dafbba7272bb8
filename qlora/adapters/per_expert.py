"""An adapter whose experts have names of their own, as servers read them: `...experts.0.gate_proj.lora_A.weight`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qlora.adapters.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from qlora.adapters.experts import expert_wrappers
from qlora.adapters.targets import last_name
from qlora.errors import ConfigError
from qlora.experts.layout import ExpertsLayout
from qlora.runtime.atomic_files import write_folder
from qlora.upstream.peft import base_of
from qlora.upstream.transformers_models import matrices_of

ADAPTER = "default"
PREFIX = "base_model.model."


def save_per_expert(model: PeftModel, source: Path, folder: Path) -> None:
    """Writes a saved adapter with names for each expert's linear layers.

    Gate and up, which PEFT adapts as one tensor, both get its A; each gets its rows of B.
    """
    wrappers = expert_wrappers(model)
    names = {parameter: unit_names(base_of(model), parameter) for parameter in wrappers}
    tensors = dict(_tensors_beside(source, {parameter.rpartition(".")[0] for parameter in wrappers}))
    for parameter, wrapper in wrappers.items():
        a, b, _ = wrapper.matrices(ADAPTER)
        layout = ExpertsLayout.of(wrapper.get_base_layer())
        for unit, name in zip(layout.units_of(last_name(parameter)), names[parameter], strict=True):
            for expert in range(layout.count):
                path = PREFIX + name.replace("*", str(expert)).removesuffix(".weight")
                tensors[f"{path}.lora_A.weight"] = a[expert].detach().cpu().clone()
                tensors[f"{path}.lora_B.weight"] = b[expert, unit.rows].detach().cpu().contiguous()
    settings = _settings(json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8")), wrappers, names)

    def write(partial: Path) -> None:
        save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=2, sort_keys=True)
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")

    write_folder(folder, write)


def check_per_expert(model: PeftModel) -> None:
    """Raises `ConfigError` where an adapter cannot be written with names for each expert's layers."""
    wrappers = expert_wrappers(model)
    if not wrappers:
        raise ConfigError(
            "lora.per_expert=true names the adapters of routed experts, and this run puts none on them; set "
            "lora.experts=all, or leave lora.per_expert out"
        )
    for parameter in wrappers:
        unit_names(base_of(model), parameter)


def unit_names(base: PreTrainedModel, parameter: str) -> list[str]:
    """Returns the names in a base's files of what is joined in a tensor of experts, with `*` for the expert.

    Raises `ConfigError` where the files hold all experts in one tensor, too.
    """
    if names := matrices_of(base, parameter):
        return names
    raise ConfigError(
        f"lora.per_expert=true: the files of a {base.config.model_type} have no names for each expert's layers, so "
        "servers read none either; leave lora.per_expert out"
    )


def _tensors_beside(source: Path, experts: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a saved adapter that are not on experts."""
    with open_adapter(source) as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            module = name.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "")
            if module not in experts:
                yield name, file.get_tensor(name)


def _settings(settings: dict[str, Any], wrappers: Any, names: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the config of the adapter: its linear layers by the last parts of their names, and the experts' ranks."""
    kinds = {last_name(name.removesuffix(".weight")) for group in names.values() for name in group}
    linear = (name.removesuffix(".weight") for name in settings["target_parameters"] if name.endswith(".weight"))
    modules = {last_name(name) for name in settings["target_modules"] or ()} | set(map(last_name, linear)) | kinds
    pattern = rf".*\.experts\.\d+\.({'|'.join(sorted(map(re.escape, kinds)))})"
    (rank,) = {wrapper.r[ADAPTER] for wrapper in wrappers.values()}
    (alpha,) = {wrapper.lora_alpha[ADAPTER] for wrapper in wrappers.values()}
    return settings | {
        "target_modules": sorted(modules),
        "target_parameters": None,
        "rank_pattern": {pattern: rank},
        "alpha_pattern": {pattern: alpha},
    }
