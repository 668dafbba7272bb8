"""How many tokens a model reads, and how long its rows may be: one place for preview, plan, start screen and training.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora.config.options import model_presets
from qlora.config.registries.rope_scaling import scaled_context
from qlora.config.schema import DataConfig, ModelConfig, Weights
from qlora.config.schema.data import ROW_LENGTH
from qlora.models.json_files import read_object
from qlora.models.model_files import EMBEDDED, is_local, locate

NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""What models call their context in `config.json`."""


def model_context(model: ModelConfig) -> int | None:
    """Returns the most tokens that a model reads, as its `config.json` or its preset says it.

    None: it names no limit, or lies on the hub and has no preset. Nothing is downloaded.
    """
    context = _own_context(model)
    return context if model.rope_scaling is None else scaled_context(model.rope_scaling, context)


def _own_context(model: ModelConfig) -> int | None:
    if model.weights is Weights.random or model.name in EMBEDDED:
        return model.architecture.max_position_embeddings if model.architecture is not None else None
    location = locate(model.name)
    if is_local(location):
        path = Path(location) / "config.json"
        return _named(read_object(path, f"model.name={model.name}")) if path.is_file() else None
    presets = (preset["architecture"] for preset in model_presets().values() if preset["name"] == model.name)
    return _named(next(presets, {}))


def _named(settings: Mapping[str, Any]) -> int | None:
    text = settings.get("text_config")
    settings = text if isinstance(text, Mapping) else settings
    return next((value for name in NAMES if isinstance(value := settings.get(name), int) and value > 0), None)


def fit_rows(data: DataConfig, context: int | None) -> DataConfig:
    """Returns a config of rows whose default length is no longer than what the model reads; packs stay as long."""
    if data.max_length != ROW_LENGTH or context is None or context >= ROW_LENGTH:
        return data
    return replace(data, max_length=context, pack_length=data.pack_width)


def describe_limit(data: DataConfig, name: str, context: int | None) -> str:
    """Says how long a row may be, and why; `name` is the model's."""
    fitted = fit_rows(data, context)
    if fitted.longest_row is None:
        return "none (data.max_length=null)"
    if fitted.max_length == fitted.longest_row:
        why = f"what {_short(name)} reads; data.max_length" if fitted is not data else "data.max_length"
    else:
        why = "data.source_max_len and data.target_max_len"
    return f"{fitted.longest_row:,} tokens a row ({why})"


def limit_warning(max_length: int, name: str, context: int | None) -> str | None:
    """Returns what a person must hear of rows that are longer than what the model reads; None: they are not."""
    if context is None or max_length <= context:
        return None
    return (
        f"the longest row has {max_length:,} tokens, and {_short(name)} reads {context:,}: it knows no positions "
        f"behind those; data.max_length={context} cuts rows there"
    )


def _short(name: str) -> str:
    """Returns a model's name; of a folder its last part."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name
