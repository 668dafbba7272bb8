"""What a preset says of a model leaves the config when `model.name` names another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qlora.config.schema import ModelConfig, Weights

FACTS = ("revision", "license", "gated", "architecture")
"""The fields of `model` that hold for one model alone."""


def read_preset(option: Any, folders: Iterable[Path]) -> dict[str, Any]:
    """Returns what the file of an option of `model` sets, the first of its name in these folders; {}: there is none."""
    file = next((path for folder in folders if (path := folder / "model" / f"{option}.yaml").is_file()), None)
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file is not None else None
    return {str(key): value for key, value in node.items()} if isinstance(node, dict) else {}


def is_another(composed: DictConfig, described: Mapping[str, Any]) -> bool:
    """Returns whether the base of a config is not the one that `described` names."""
    name = OmegaConf.select(composed, "model.name", throw_on_missing=False)
    return "name" in described and name is not None and name != described["name"]


def drop_facts(composed: DictConfig, described: Mapping[str, Any], overrides: Sequence[Override]) -> None:
    """Unsets what `described` says of another model, unless the command says the same.

    Random weights have a shape and no files, so theirs stays whatever they are called.
    """
    typed = [override.key_or_group for override in overrides]
    model, empty = composed.model, OmegaConf.structured(ModelConfig)
    for name in FACTS:
        said = any(key == f"model.{name}" or key.startswith(f"model.{name}.") for key in typed)
        shape = name == "architecture" and model.weights is Weights.random
        if name in described and not said and not shape and _is_unchanged(model, name, described[name]):
            model[name] = empty[name]


def _is_unchanged(model: DictConfig, name: str, value: Any) -> bool:
    if not isinstance(value, dict):
        return bool(model[name] == value)
    return model[name] is not None and all(model[name].get(key) == item for key, item in value.items())
