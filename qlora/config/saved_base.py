"""`quantization=stored`: the quantization that the files of a base have, read from its `config.json`.

Composing a config puts what was read in its place, so that a run's own config says how its base was quantized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qlora.config.registries.quantization_methods import AUTO, DECODED, KEPT, METHODS
from qlora.config.schema.quantization import INT8_THRESHOLD
from qlora.errors import ConfigError
from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline

STORED = "stored"
"""The value of `quantization.method` until it is read."""
READ = ("bits", "quant_type", "double_quant", "int8_threshold")
"""The fields of the group that are read."""
FILE = "config.json"
OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What `config.json` calls the number of experts."""


def read_stored(composed: DictConfig, overrides: Sequence[Override]) -> None:
    """Sets the fields of `quantization` that are to be read from the base; does nothing for another quantization.

    Raises `ConfigError` for a base that is not quantized, by a way that is not known, or that is not here.
    """
    if OmegaConf.select(composed, "quantization.method", throw_on_missing=False) != STORED:
        return
    typed = [override.input_line for override in overrides if override.key_or_group in _keys()]
    if typed:
        raise ConfigError(
            f"{typed[0]} and quantization=stored exclude each other: the files of the base say it; leave one of them "
            "out"
        )
    model = composed.model
    if model.weights == "random" or str(getattr(model.weights, "value", "")) == "random":
        raise ConfigError(
            "quantization=stored reads how the files of a base are quantized, and model.weights=random has none; "
            "choose quantization=nf4 or another"
        )
    for name, value in _settings(_read_config(model), f"model.name={model.name}").items():
        composed.quantization[name] = value


def _keys() -> set[str]:
    return {f"quantization.{name}" for name in READ}


def _settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns the fields of `quantization` for what a `config.json` says."""
    text = config.get("text_config")
    saved = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not isinstance(saved, dict):
        raise ConfigError(
            f"quantization=stored: the files of {key} are not quantized (its {FILE} has no quantization_config); "
            "choose quantization=nf4 or another, or quantization=none for 16 bits"
        )
    if saved.get("load_in_4bit"):
        kind, double = saved.get("bnb_4bit_quant_type", "nf4"), bool(saved.get("bnb_4bit_use_double_quant"))
        return {"method": AUTO, "bits": 4, "quant_type": kind, "double_quant": double}
    if saved.get("load_in_8bit"):
        threshold = saved.get("llm_int8_threshold", INT8_THRESHOLD)
        return {"method": AUTO, "bits": 8, "int8_threshold": threshold}
    inner = text if isinstance(text, dict) else config
    if (
        saved.get("quant_method") in KEPT
        and saved.get("bits") in METHODS["packed"].bits
        and not any(map(inner.get, OF_EXPERTS))
    ):
        return {"method": "packed", "bits": saved["bits"]}
    if saved.get("quant_method") in DECODED:
        return {"method": AUTO, "bits": 16}
    raise ConfigError(
        f"quantization=stored: {key} is quantized by {saved.get('quant_method', 'an unknown method')}, which is not "
        f"decoded here (as bitsandbytes, {', '.join(DECODED)} are); give the original 16-bit weights, with "
        "quantization=nf4 or another"
    )


def _read_config(model: DictConfig) -> Mapping[str, Any]:
    """Returns the `config.json` of a base: of a folder, of what was downloaded, or from the hub."""
    key, folder = f"model.name={model.name}", Path(str(model.name)).expanduser()
    if model.name == "tiny":  # the embedded one
        folder = Path(__file__).parent.parent / "demo" / "model"
    if folder.is_dir():
        path = folder / FILE
    else:
        from huggingface_hub import hf_hub_download  # slow to import

        read_cache_without_network()
        try:
            path = Path(
                hf_hub_download(str(model.name), FILE, revision=model.revision or "main", cache_dir=model.cache_dir)
            )
        except (OSError, ValueError) as error:
            reason = (why_offline() or str(error)).strip().splitlines()[0].rstrip(".")
            raise ConfigError(
                f"quantization=stored: the {FILE} of {key} says how it is quantized, and is not available ({reason}); "
                "download it first, or name the quantization"
            ) from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"quantization=stored: {path} cannot be read; correct it, or name the quantization"
        ) from error
    return config if isinstance(config, dict) else {}
