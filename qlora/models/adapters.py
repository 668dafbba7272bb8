"""Adds, counts, saves and loads LoRA adapters."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import Linear4bit
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora.errors import ConfigError, did_you_mean
from qlora.models.files import check_safetensors
from qlora.schema import LoraConfig, LoraInit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterCount:
    """Counts of parameters; a 4-bit weight counts as the parameters it stands for."""

    trainable: int
    total: int
    base: int
    by_dtype: dict[str, int]

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / self.total:.2%})"


def add_lora(
    config: LoraConfig,
    model: PreTrainedModel,
    *,
    base_folder: str,
    new_token_ids: list[int],
    batches: Iterable[dict[str, torch.Tensor]],
) -> PeftModel:
    """Attaches a fresh adapter; its weights are drawn from torch's current seed and kept in float32.

    `base_folder` holds the 16-bit weights (read by LoftQ), `batches` yields training batches (read by EVA).
    Raises `ConfigError` for target modules that match nothing.
    """
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias=config.bias.value,
        target_modules=find_target_modules(config.target_modules, model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=_PEFT_INIT[config.init],
        trainable_token_indices=_rows_to_train(model, new_token_ids),
    )
    try:
        adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=config.init is LoraInit.eva)
    except ValueError as error:
        if "target_modules" not in str(error):
            raise
        raise ConfigError(f"lora.target_modules={config.target_modules}: {error}") from error
    if config.init is LoraInit.loftq:
        correct_quantization(adapted, original_weights(base_folder, model.base_model_prefix))
    elif config.init is LoraInit.eva:
        initialize_lora_eva_weights(adapted, dataloader=batches, show_progress_bar=False)
    return adapted


def _rows_to_train(model: PreTrainedModel, new_token_ids: list[int]) -> dict[str, list[int]] | None:
    """Returns the rows of new tokens by matrix: of the embedding and, where it is a matrix of its own, the output."""
    if not new_token_ids:
        return None
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding] if output is None or output.weight is embedding.weight else [embedding, output]
    names = [name for name, module in model.named_modules() if any(module is matrix for matrix in matrices)]
    return {name: sorted(set(new_token_ids)) for name in names}


# LoftQ as PEFT inits it would replace the base weights; `correct_quantization` leaves them alone.
_PEFT_INIT: dict[LoraInit, Any] = {
    LoraInit.default: True,
    LoraInit.gaussian: "gaussian",
    LoraInit.orthogonal: "orthogonal",
    LoraInit.pissa: "pissa",
    LoraInit.olora: "olora",
    LoraInit.loftq: True,
    LoraInit.eva: "eva",
}
REWRITES_BASE = (LoraInit.pissa, LoraInit.olora)


@torch.no_grad()
def correct_quantization(model: PeftModel, original: Callable[[str], torch.Tensor]) -> None:
    """Sets each adapter to the best rank-r correction of its layer's 4-bit error (LoftQ, arXiv 2310.08659).

    One step on the given quantized base, which stays as it is. `original` returns a layer's 16-bit weight by name.
    PEFT's own version runs on CUDA and XPU only, and forgets that the adapter's output is scaled.
    """
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, Linear4bit):
            continue
        quantized = dequantize_module_weight(module.get_base_layer()).float()
        error = original(f"{name}.weight").to(quantized) - quantized
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        for adapter, rank in module.r.items():
            root = s[:rank].sqrt()
            module.lora_A[adapter].weight.copy_(root[:, None] * v[:rank])
            module.lora_B[adapter].weight.copy_(u[:, :rank] * root / module.scaling[adapter])


def original_weights(place: str, prefix: str) -> Callable[[str], torch.Tensor]:
    """Returns a function from a weight's name to its tensor in the safetensors files of a folder or cached hub id."""
    if not Path(place).is_dir():
        place = snapshot_download(place, local_files_only=True, allow_patterns="*.safetensors")
    files = {}
    for path in sorted(Path(place).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    if not files:
        raise ConfigError(f"lora.init=loftq reads the 16-bit weights, but {place} has no *.safetensors")

    def read(name: str) -> torch.Tensor:
        key = name if name in files else name.removeprefix(f"{prefix}.")
        with safe_open(files[key], framework="pt") as file:
            return file.get_tensor(key)

    return read


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Returns the full names of all linear layers but the output layer, found by class."""
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]


def find_target_modules(wanted: list[str], model: PreTrainedModel) -> str | list[str]:
    """Turns `lora.target_modules` into what PEFT takes; each name or pattern must match a linear layer."""
    names = linear_modules(model)
    if not names:
        raise ConfigError(f"lora.target_modules: {model.config.model_type} has no linear layer; use lora=none")
    if wanted == ["all-linear"]:
        return "all-linear"
    kinds = sorted({name.rpartition(".")[2] for name in names})
    found: dict[str, list[str]] = {pattern: _matches(pattern, names) for pattern in wanted}
    if missing := [pattern for pattern, matched in found.items() if not matched]:
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; "
            f"the model has {kinds}, or use all-linear"
        )
    if all(pattern in kinds for pattern in wanted):
        return wanted
    return sorted({name for matched in found.values() for name in matched})


def _matches(pattern: str, names: list[str]) -> list[str]:
    plain = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    if plain:
        return plain
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {pattern!r} is no regular expression: {error}") from error


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Counts trainable and all parameters; shared matrices count once."""
    by_dtype: Counter[str] = Counter()
    trainable = total = base = 0
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count, dtype = state.shape.numel(), state.quant_type
        else:
            count, dtype = parameter.numel(), str(parameter.dtype).removeprefix("torch.")
        by_dtype[dtype] += count
        total += count
        base += 0 if "lora_" in name else count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total, base, dict(by_dtype))


def save_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the drawn weights of an init that rewrites the base, so that the final adapter can be converted."""
    if not (folder / "adapter_config.json").exists():
        model.peft_config["default"].init_lora_weights, kept = (
            True,
            model.peft_config["default"].init_lora_weights,
        )
        model.save_pretrained(folder)
        model.peft_config["default"].init_lora_weights = kept


def save_adapter(
    model: PeftModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase, initial: Path | None = None
) -> None:
    """Saves the adapter for plain PEFT on the unchanged base, with its tokenizer, and checks what was written.

    `initial` (PiSSA, OLoRA) is the folder of the drawn weights; the saved adapter is the difference, of rank 2r.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(
        partial,
        path_initial_model_for_weight_conversion=str(initial) if initial else None,
        save_embedding_layers=False,  # PEFT would add whole embeddings that grew; the trained rows are saved anyway
    )
    tokenizer.save_pretrained(partial)
    verify_adapter(partial, model)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def verify_adapter(folder: Path, model: PeftModel) -> None:
    """Raises `RuntimeError` if a saved adapter lacks a layer or holds untrained (all-zero) B matrices."""
    layers = {name for name, _ in model.named_parameters() if ".lora_B." in name}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if ".lora_B." in key]  # noqa: SIM118 - no mapping
        zeros = [key for key in keys if not file.get_tensor(key).any()]
    if len(keys) != len(layers):
        raise RuntimeError(f"{folder}: the saved adapter has {len(keys)} of {len(layers)} layers")
    if len(zeros) == len(keys):
        raise RuntimeError(f"{folder}: all {len(keys)} B matrices of the saved adapter are zero: nothing was trained")


def load_adapter(model: PreTrainedModel, folder: Path, base_name: str) -> PeftModel:
    """Loads a saved adapter onto its base; raises `ConfigError` for one of another shape."""
    check_adapter_folder(folder)
    _check_new_tokens(model, folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        recorded = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise ConfigError(
            f"task.adapter={folder} does not fit model.name={base_name}: it was trained on {recorded}; give that base "
            f"as model.name ({str(error).strip().splitlines()[0][:200]})"
        ) from error
    return adapted


def _check_new_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Raises `ConfigError` if an adapter trained rows of new tokens that this base does not have."""
    trained = json.loads((folder / "adapter_config.json").read_text()).get("trainable_token_indices") or {}
    lists = trained.values() if isinstance(trained, dict) else [trained]
    last, rows = max((max(ids) for ids in lists), default=-1), model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        raise ConfigError(
            f"task.adapter={folder} trained the embedding of token {last}, but the base has {rows} tokens; set "
            "model.new_tokens as its training did (config.yaml of the run)"
        )


def check_adapter_folder(folder: Path) -> None:
    """Raises `ConfigError` unless `folder` holds a whole adapter."""
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"task.adapter={folder}: no adapter_config.json there; give an adapter's or a finished run's folder"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"task.adapter={folder}: adapter_model.safetensors is missing; copy the adapter again")
    check_safetensors(weights, "task.adapter")
