"""A base whose files are quantized: by what, and how transformers decodes what this project quantizes anew."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from qlora.models.decoded_files import DecodedTensors, DecodedWeights, decoded_slices
from qlora.models.weight_files import Tensors
from qlora.quantization import mxfp4
from qlora.quantization.method import QuantizationMethod
from qlora.quantization.saved_formats import FORMATS
from qlora.upstream.transformers_files import reading_files_as


def saved_settings(model_config: Any) -> dict[str, Any] | None:
    """Returns the `quantization_config` of a base; None: its files are not quantized."""
    saved = getattr(model_config, "quantization_config", None)
    return saved if saved is None or isinstance(saved, dict) else saved.to_dict()


def saved_method(model_config: Any) -> str | None:
    """Returns the `quant_method` of a base's files; None: they are not quantized, or do not say how."""
    saved = (saved_settings(model_config) or {}).get("quant_method")
    return None if saved is None else str(getattr(saved, "value", saved))


def decoded_method(model_config: Any, method: QuantizationMethod) -> str | None:
    """Returns what the files are quantized by if that is decoded while `method` loads a base; None: it is not."""
    name = saved_method(model_config)
    return name if name in method.decodes or name in FORMATS else None


def open_decoded(saved: Tensors, model_config: Any, key: str) -> Tensors:
    """Returns the tensors of a base's files as those of its 16-bit files."""
    name = saved_method(model_config)
    if name == mxfp4.NAME:
        return DecodedTensors(saved)
    if name in FORMATS:
        return DecodedWeights(saved, FORMATS[name], saved_settings(model_config) or {}, key)
    return saved


def decoding(model_config: Any, name: str | None, method: QuantizationMethod, key: str) -> AbstractContextManager[None]:
    """Inside, transformers loads a base whose files are quantized by `name` as if they had 16 bits.

    A method that keeps integers gets them beside.
    """
    if name not in FORMATS:  # MXFP4 is decoded by the method that loads it
        return nullcontext()
    settings = saved_settings(model_config) or {}
    return reading_files_as(
        partial(decoded_slices, form=FORMATS[name], settings=settings, key=key, keep=method.keep_codes)
    )


def check_decoded(model_config: Any, name: str, key: str) -> None:
    """Raises `ConfigError` for a variant of a known way to quantize that is not decoded."""
    if name in FORMATS:
        FORMATS[name].check(saved_settings(model_config) or {}, key)


def decoding_options(model_config: Any, name: str, description: Any | None) -> dict[str, Any]:
    """Returns the options of `from_pretrained` for a base that is saved by `name` and quantized as `description` says.

    None: it is not quantized. MXFP4 transformers decodes by itself then.
    """
    if description is None and name == mxfp4.NAME:
        from transformers.utils.quantization_config import Mxfp4Config

        return {"quantization_config": Mxfp4Config(dequantize=True)}
    described = {} if description is None else {"quantization_config": description}
    return {"config": without_quantization(model_config), **described}


def without_quantization(model_config: Any) -> Any:
    """Returns a config of the same model, stored in 16 bits."""
    config = copy.deepcopy(model_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
