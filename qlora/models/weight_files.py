"""Reads a model's weight files one tensor at a time, under the names that they have in the loaded model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.hub import get_checkpoint_shard_files

from qlora.config.schema import ModelConfig
from qlora.experts.layout import ExpertsLayout, find_experts
from qlora.models.model_files import INDEX, SINGLE, is_local, locate, weight_files
from qlora.models.tokenizer import hub_error
from qlora.upstream.transformers_models import TensorNames, find_hub_file


def fetch_weights(config: ModelConfig) -> list[Path] | None:
    """Returns the files of a base's weights, downloaded if they are not here; None: they are no safetensors."""
    source = locate(config.name)
    if is_local(source):
        return weight_files(Path(source))
    options = {"revision": config.revision or "main", "cache_dir": config.cache_dir}
    try:
        for name in (SINGLE, INDEX):
            if (file := find_hub_file(source, name, **options)) is not None:
                if name == INDEX:
                    get_checkpoint_shard_files(source, str(file), **options)
                return weight_files(file.parent)
    except (OSError, ValueError) as error:
        raise hub_error("model.name", source, error, gated=config.gated) from error
    return None


def local_files(source: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Returns the folder of a model's files: `source` itself, or the hub library's cache of what was downloaded."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(source, revision=revision, cache_dir=cache_dir, local_files_only=True))


class Tensors(Protocol):
    """A base's weights as they are before quantization, by their names in its files."""

    def __iter__(self) -> Iterator[str]: ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""

    def __contains__(self, name: object) -> bool: ...

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""


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

    def __contains__(self, name: object) -> bool:
        """Returns whether the files hold a tensor of this name."""
        return name in self._files

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""
        return [name for name in self._files if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU; the rest of its file stays on the disk."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""
        with safe_open(self._files[name], framework="pt") as file:
            return torch.Size(file.get_slice(name).get_shape())


class ModelNames:
    """Finds the parameter that a tensor in a file is loaded into, by transformers' own rules."""

    def __init__(self, config: Any, *, trust_remote_code: bool = False) -> None:
        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.tensors: dict[str, Tensor] = model.state_dict()
        self.count = sum(parameter.numel() for parameter in model.parameters())
        names = TensorNames(model)
        self.find, self.find_matrix, self.is_converted = names.find, names.find_matrix, names.is_converted
        self.experts = {name: ExpertsLayout.of(module) for name, module in find_experts(model).items()}
