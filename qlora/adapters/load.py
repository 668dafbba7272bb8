"""Loads a saved adapter onto its base, and refuses one of another base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora.adapters.adapter_files import ADAPTER_CONFIG, check_adapter_folder, open_adapter
from qlora.adapters.biases import copy_biases, keep_biases
from qlora.adapters.create import complete_adapter, freeze_a, store_in
from qlora.adapters.head import attach_head, read_head
from qlora.adapters.per_expert import check_per_expert
from qlora.adapters.targets import return_taken
from qlora.config.schema import LoraConfig
from qlora.errors import DataError
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.json_files import read_object
from qlora.text import brief_text
from qlora.upstream.peft import base_of, names_kept, rank_of, rename_experts, without_penalty
from qlora.upstream.torch_models import weight_of

LINEAR_PART = re.compile(r"base_model\.model\.(.+)\.lora_(A\.weight|B\.weight|magnitude_vector)")
EXPERTS = ".experts."
SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of adapters from when each expert was a few linear layers."""


def continue_adapter(config: LoraConfig, model: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """Loads a saved adapter onto its base to train it further, with the dropout and the dtype of `config`."""
    adapted = load_adapter(model, folder, base_name, key="lora.start", dropout=config.dropout)
    store_in(config.dtype, adapted)
    freeze_a(config, adapted)
    if config.per_expert:
        check_per_expert(adapted)
    return adapted


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    base_name: str,
    *,
    key: str = "adapter",
    dropout: float | None = None,
) -> PeftModel:
    """Loads a saved adapter, which `key` names, onto its base.

    With `dropout` it is to be trained. Raises `DataError` for one of another base and for one with gaps.
    """
    check_adapter_folder(folder, key)
    if (head := read_head(folder, key)) is not None and head.outputs:
        attach_head(model, head.outputs)
    settings = check_fit(model, folder, base_name, key)
    biases = copy_biases(model) if settings.get("bias", "none") != "none" else None
    try:
        peft_config: Any = PeftConfig.from_pretrained(str(folder))
        if isinstance(peft_config, PeftLoraConfig):
            rename_experts(peft_config, model)
            return_taken(peft_config, model)
        if dropout is not None and not peft_config.target_parameters:
            peft_config.lora_dropout = dropout
        with names_kept():
            adapted = PeftModel.from_pretrained(
                model, str(folder), config=peft_config, is_trainable=dropout is not None
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {brief_text(str(error))}"
        raise DataError(f"{_unfit(folder, base_name, key, settings)} ({reason})") from error
    check_whole(adapted, folder, key)
    if biases is not None:
        keep_biases(adapted, biases)
    if isinstance(peft_config, PeftLoraConfig):
        complete_adapter(adapted, dropout or 0.0)
    return without_penalty(adapted)


def check_fit(model: torch.nn.Module, folder: Path, base_name: str, key: str) -> dict[str, Any]:
    """Returns the settings of an adapter; raises `DataError` where the base has no place for one of its tensors."""
    settings = check_adapter_folder(folder, key)
    base: Any = base_of(model) if isinstance(model, PeftModel) else model
    _check_new_tokens(base, folder, key)
    if (difference := _find_difference(base, folder)) is not None:
        raise DataError(f"{_unfit(folder, base_name, key, settings)} ({difference})")
    return settings


def check_whole(model: PeftModel, folder: Path, key: str, name: str = "default") -> None:
    """Raises `DataError` where a folder lacks tensors of the adapter that was loaded from it under a name."""
    with open_adapter(folder) as file:
        saved = set(file.keys())
    expected = get_peft_model_state_dict(model, save_embedding_layers=False, adapter_name=name)
    is_renamed = any(map(SINGLE_EXPERT.search, saved))
    if missing := [name for name in expected if name not in saved and not (is_renamed and EXPERTS in name)]:
        recorded = read_object(folder / ADAPTER_CONFIG, f"{key}={folder}").get("base_model_name_or_path")
        raise DataError(
            f"{key}={folder} is incomplete: {len(missing)} of the {len(expected)} tensors that its {ADAPTER_CONFIG} "
            f"means on this base are missing, first {missing[0]}; copy the adapter again, or give the base it was "
            f"trained on ({recorded}) as model.name"
        )


def _unfit(folder: Path, base_name: str, key: str, settings: dict[str, Any]) -> str:
    recorded = settings.get("base_model_name_or_path")
    return (
        f"{key}={folder} does not fit model.name={base_name}: it was trained on {recorded}; give that base as "
        "model.name"
    )


def _find_difference(model: PreTrainedModel, folder: Path) -> str | None:
    """Says in words which tensor of an adapter is the first that the base has no place for; None: all fit."""
    modules, experts = dict(model.named_modules()), find_experts(model)
    with open_adapter(folder) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    of_experts = _shapes_on_experts(folder, experts)
    for name, shape in shapes.items():
        part = LINEAR_PART.fullmatch(name)
        if part is None or (
            experts and SINGLE_EXPERT.search(name)
        ):  # PEFT itself renames the experts of older adapters
            continue
        layer = modules.get(part[1].replace(".base_layer", ""))
        if layer is None:
            return f"its {name} belongs to a layer that this base does not have"
        needed = of_experts.get(name) or _needed_shape(layer, part[2], shape)
        if needed != shape:
            return f"its {name} is {_by(shape)}, and this base needs {_by(needed)}"
    return None


def _shapes_on_experts(folder: Path, experts: dict[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that an adapter's tensors on experts must have; PEFT nests the wrappers of one module."""
    shapes: dict[str, tuple[int, ...]] = {}
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, PeftLoraConfig):
        return {}
    for name, module in experts.items():
        layout = ExpertsLayout.of(module)
        wrapped = [
            (f"{name}.{parameter}", layout.projections[parameter])
            for parameter, _ in module.named_parameters(recurse=False)
            if parameter in layout.projections
            and any(f".{name}.{parameter}".endswith(f".{target}") for target in config.target_parameters or ())
        ]
        for depth, (parameter, (outputs, inputs)) in enumerate(reversed(wrapped)):
            rank = layout.count * rank_of(config, parameter)
            path = f"base_model.model.{name}{'.base_layer' * depth}"
            shapes[f"{path}.lora_A.weight"] = (rank, inputs)
            shapes[f"{path}.lora_B.weight"] = (outputs, rank)
    return shapes


def _needed_shape(layer: torch.nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a part of a linear layer's adapter must have, of the rank that it has."""
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
    elif hasattr(layer, "in_features"):
        inputs, outputs = layer.in_features, layer.out_features
    else:
        return shape
    return {"A.weight": (shape[0], inputs), "B.weight": (outputs, shape[-1])}.get(part, (outputs,))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_new_tokens(model: PreTrainedModel, folder: Path, key: str) -> None:
    """Raises `DataError` if an adapter trained rows of new tokens that this base does not have."""
    trained = read_object(folder / ADAPTER_CONFIG, f"{key}={folder}").get("trainable_token_indices") or {}
    lists = trained.values() if isinstance(trained, dict) else [trained]
    last, rows = (
        max((max(ids, default=-1) for ids in lists), default=-1),
        weight_of(model.get_input_embeddings()).shape[0],
    )
    if last >= rows:
        raise DataError(
            f"{key}={folder} trained the embedding of token {last}, but the base has {rows} tokens; set "
            "model.new_tokens as its training did (config.yaml of the run)"
        )
