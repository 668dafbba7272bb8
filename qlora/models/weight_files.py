"""Reads a model's weight files one tensor at a time, under the names that they have in the loaded model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import bitsandbytes.functional as bnb
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from qlora.config.schema import ModelConfig
from qlora.models.model_files import INDEX, SINGLE, is_local, locate, weight_files
from qlora.models.tokenizer import hub_error


def fetch_weights(config: ModelConfig) -> list[Path] | None:
    """Returns the files of a base's weights, downloaded if they are not here; None: they are no safetensors."""
    place = locate(config.name)
    if is_local(place):
        return weight_files(Path(place))
    options = {"revision": config.revision or "main", "cache_dir": config.cache_dir}
    try:
        for name in (SINGLE, INDEX):
            if (file := cached_file(place, name, _raise_exceptions_for_missing_entries=False, **options)) is not None:
                if name == INDEX:
                    get_checkpoint_shard_files(place, file, **options)
                return weight_files(Path(file).parent)
    except (OSError, ValueError) as error:
        raise hub_error("model.name", place, error, gated=config.gated) from error
    return None


def local_files(place: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Returns the folder of a model's files: `place` itself, or where the hub library keeps what was downloaded."""
    if Path(place).is_dir():
        return Path(place)
    return Path(snapshot_download(place, revision=revision, cache_dir=cache_dir, local_files_only=True))


class Tensors(Protocol):
    """A base's weights as they are before quantization, by their names in its files."""

    def __iter__(self) -> Iterator[str]: ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""

    def read_stored(self, name: str, device: torch.device) -> Tensor | None:
        """Returns a weight [out, in] that is stored in 4 or 8 bits in full; None for any other."""


class Checkpoint:
    """The tensors in a model folder, by their names in its files; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __iter__(self) -> Iterator[str]:
        """Yields the names, file by file."""
        return iter(sorted(self._files, key=lambda name: (self._files[name], name)))

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU; the rest of its file stays on the disk."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""
        with safe_open(self._files[name], framework="pt") as file:
            return torch.Size(file.get_slice(name).get_shape())

    def read_stored(self, name: str, device: torch.device) -> Tensor | None:
        """Returns a weight [out, in] that bitsandbytes stored in 4 or 8 bits in full; None for any other."""
        module = name.removesuffix("weight")
        statistics = {key: self.read(key).to(device) for key in self._files if key.startswith(f"{name}.")}
        if statistics:
            return bnb.dequantize_4bit(self.read(name).to(device), bnb.QuantState.from_dict(statistics, device))
        if f"{module}SCB" in self._files:
            return bnb.int8_vectorwise_dequant(self.read(name).to(device), self.read(f"{module}SCB").to(device))
        return None


class ModelNames:
    """Finds the parameter that a tensor in a file is loaded into, by transformers' own rules."""

    def __init__(self, config: Any, *, trust_remote_code: bool = False) -> None:
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        transforms = get_model_conversion_mapping(model)
        self.tensors: dict[str, Tensor] = model.state_dict()
        self.count = sum(parameter.numel() for parameter in model.parameters())
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix

    def find(self, name: str) -> str | None:
        """Returns the parameter's or buffer's name, or None for a tensor that loading leaves out."""
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            found, _ = rename_source_key(name, renamings, converters, self._prefix, self.tensors)
            if found in self.tensors:
                return str(found)
        return None

    def is_converted(self, name: str) -> bool:
        """Returns whether loading makes another tensor of this one, for example by joining experts."""
        _, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.tensors)
        return pattern is not None
