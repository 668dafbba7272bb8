"""The files of a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import safe_open

from qlora.errors import DataError
from qlora.models.json_files import library_reads, read_object
from qlora.models.model_files import check_safetensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def open_adapter(folder: Path) -> Any:
    """Opens the tensors of a saved adapter, a context manager."""
    return safe_open(folder / ADAPTER_WEIGHTS, framework="pt")


def check_adapter_folder(folder: Path, key: str = "adapter") -> dict[str, Any]:
    """Returns what `adapter_config.json` says; raises `DataError` unless `folder` holds a whole adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise DataError(f"{key}={folder}: no {ADAPTER_CONFIG} there; give an adapter's or a finished run's folder")
    settings = read_object(path, f"{key}={folder}")
    if settings.get("megatron_config"):  # PEFT imports the module that stands beside it
        raise DataError(
            f"{key}={folder}: {ADAPTER_CONFIG} is that of an adapter for Megatron (megatron_config), which names a "
            "module to import; give an adapter for transformers"
        )
    with library_reads(f"{key}={folder}", ADAPTER_CONFIG):
        PeftConfig.from_pretrained(str(folder))
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise DataError(f"{key}={folder}: {ADAPTER_WEIGHTS} is missing; copy the adapter again")
    check_safetensors(weights, key)
    return settings
