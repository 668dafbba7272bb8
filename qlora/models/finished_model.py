"""A fully finetuned model that a run has saved."""

from __future__ import annotations

from pathlib import Path

from qlora.config.schema import QuantizationConfig
from qlora.errors import ConfigError
from qlora.quantization.method import find_method
from qlora.runtime.atomic_files import read_json


def check_not_rounded(folder: Path, quantization: QuantizationConfig) -> None:
    """Raises `ConfigError` if loading a finished model would quantize it without being asked to."""
    method = find_method(quantization)
    if method.is_quantized:
        saved = read_json(folder / "config.json")
        dtype = saved.get("dtype") or saved.get("torch_dtype")
        kind = method.data_type(quantization)
        raise ConfigError(
            f"adapter={folder} is a whole model in {dtype}, which quantization={kind} would round again; use "
            "quantization=none or quantization=fp32, or give it as model.name with adapter=none to quantize it on "
            "purpose"
        )
