"""A base whose files are quantized: by what, and how transformers decodes what this project quantizes anew."""

from __future__ import annotations

import copy
from typing import Any

from qlora.quantization import mxfp4
from qlora.quantization.method import QuantizationMethod


def saved_settings(model_config: Any) -> dict[str, Any] | None:
    """Returns the `quantization_config` of a base; None: its files are not quantized."""
    saved = getattr(model_config, "quantization_config", None)
    return saved if saved is None or isinstance(saved, dict) else saved.to_dict()


def saved_method(model_config: Any) -> str | None:
    """Returns the `quant_method` of a base's files; None: they are not quantized, or do not say how."""
    saved = (saved_settings(model_config) or {}).get("quant_method")
    return None if saved is None else str(getattr(saved, "value", saved))


def decoded_method(model_config: Any, method: QuantizationMethod) -> str | None:
    """Returns what the files are quantized by if `method` decodes that while it loads a base; None: it does not."""
    name = saved_method(model_config)
    return name if name in method.decodes else None


def is_mxfp4(model_config: Any) -> bool:
    """Returns whether a base's files hold its experts in MXFP4."""
    return saved_method(model_config) == mxfp4.NAME


def decoding_options(model_config: Any, description: Any | None) -> dict[str, Any]:
    """Returns the options of `from_pretrained` for a base in MXFP4 that is quantized as `description` says; None: not.

    Without one transformers decodes it by itself.
    """
    if description is None:
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {"config": without_quantization(model_config), "quantization_config": description}


def without_quantization(model_config: Any) -> Any:
    """Returns a config of the same model, stored in 16 bits."""
    config = copy.deepcopy(model_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
