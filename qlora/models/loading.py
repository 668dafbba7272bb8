"""Loads a base model frozen, quantized as the config says, and checks it before anything is trained."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, __version__

from qlora.config.schema import ExpertsBits, ModelConfig, QuantizationConfig
from qlora.errors import ConfigError, DataError, ResourceError, UserError
from qlora.experts.forward import use_experts
from qlora.models.decoder import build_empty, build_skeleton, check_is_quantized, describe_full_experts
from qlora.models.first_pass import try_base
from qlora.models.json_files import library_reads, unreadable
from qlora.models.load_report import load_complete
from qlora.models.model_config import CONFIG, hub_options
from qlora.models.model_files import locate, only_safetensors
from qlora.models.nonfinite import QuantizationWatch, find_nonfinite, first_in_forward
from qlora.models.outputs import switch_cache
from qlora.models.random_weights import RandomWeights
from qlora.models.read_weights import describe_quantization
from qlora.models.saved_quantization import (
    check_decoded,
    decoded_method,
    decoding,
    decoding_options,
    saved_settings,
    without_quantization,
)
from qlora.models.tokenizer import hub_error
from qlora.quantization.method import QuantizationMethod, find_method, set_method
from qlora.runtime.device import Placement, planned_dtype
from qlora.upstream.transformers_model import attention_of
from qlora.upstream.transformers_models import dtype_plan

log = logging.getLogger(__name__)

SDPA = "sdpa"
"""The name of torch's attention in transformers."""


def build_random_base(
    config: ModelConfig, quantization: QuantizationConfig, weights: RandomWeights, store: torch.device | None = None
) -> PreTrainedModel:
    """Returns a base with random weights, on the device `store` if given, as `load_base` returns a pretrained one."""
    method = find_method(quantization)
    model = weights.build(method, quantization, store=store, **_attention(config))
    return _as_base(model, method, config, quantization, weights.placement)


def load_base(
    config: ModelConfig,
    quantization: QuantizationConfig,
    *,
    placement: Placement,
    model_config: Any,
    folder: Path | None = None,
    tried: bool = True,
) -> PreTrainedModel:
    """Loads the base model frozen, on the device of `placement`, quantized as `quantization` says.

    `folder` overrides `config.name` (a fully finetuned model); `tried` runs a few tokens, which takes long where a base
    for several devices lies in the host's memory. Raises `ConfigError` or `DataError` for a base that cannot be loaded
    this way, whose files lack tensors, or whose weights are not finite.
    """
    key = f"adapter={folder}" if folder else f"model.name={config.name}"
    source = str(folder) if folder else locate(config.name)
    method = find_method(quantization)
    saved, decoded = saved_settings(model_config), decoded_method(model_config, method)
    options: dict[str, Any] = {} if folder else hub_options(config)
    if config.rope_scaling is not None and not folder:  # a finetuned model has it in its own config
        options["config"] = copy.deepcopy(model_config)
    description = _describe(config, quantization, method, model_config, placement) if saved is None or decoded else None
    if decoded is not None:
        check_decoded(model_config, decoded, key)
        log.info("%s is quantized by %s, which is decoded tensor by tensor while it loads", key, decoded)
        saved, options = None, options | decoding_options(model_config, decoded, description)
    elif saved is not None:
        method.check_saved(quantization, saved, f"model.name={config.name}")
    elif description is not None:
        options["quantization_config"] = description
    with QuantizationWatch(method) as watch:
        with method.loading(quantization, decoded), decoding(model_config, decoded, method, key):
            model = _read(source, key, config, placement, method, options)
        if saved is None:
            with torch.no_grad():
                method.convert(model, quantization, placement)
    if saved is not None:
        _cast_unquantized(model, method, placement.param_dtype)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in devices or ("cpu" in devices and placement.device.type != "cpu"):
        raise _too_large(config)
    _check_finite(model, method, key, watch.spoiled)
    model = _as_base(model, method, config, quantization, placement)
    if tried:
        with method.exact_products(model, key):
            try_base(model, key, placement)
    return model


def _describe(
    config: ModelConfig,
    quantization: QuantizationConfig,
    method: QuantizationMethod,
    model_config: Any,
    placement: Placement,
) -> Any | None:
    """Returns transformers' description of the quantized base; None: it is loaded unquantized."""
    if method.library_config(quantization, placement) is None:
        return None
    plain = without_quantization(model_config)
    with library_reads(f"model.name={config.name}", CONFIG):
        skeleton = build_skeleton(plain, placement, trust_remote_code=config.trust_remote_code)
    return describe_quantization(method, quantization, placement, skeleton)


def _read(
    source: str,
    key: str,
    config: ModelConfig,
    placement: Placement,
    method: QuantizationMethod,
    options: dict[str, Any],
) -> PreTrainedModel:
    """Loads a model by transformers, and turns a long message of the library into one sentence."""
    try:
        return load_complete(
            source,
            key=key,
            method=method,
            dtype=placement.param_dtype,
            use_safetensors=True,
            device_map=_device_map(config, placement),
            max_memory=_max_memory(config, placement),
            **_attention(config),
            **options,
        )
    except UserError:
        raise
    except OSError as error:
        if "safetensors" in str(error) and "does not appear to have" in str(error):
            raise only_safetensors(source, "other files") from error
        raise hub_error("model.name", source, error, gated=config.gated) from error
    except ImportError as error:
        raise ResourceError(f"{key}: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:
        if "dispatched on the CPU or the disk" in str(error):
            raise _too_large(config) from error
        raise _unreadable(key, error) from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(key, error) from error


def _unreadable(key: str, error: Exception) -> UserError:
    """Returns the error for a model that transformers fails on, mostly because of its `config.json`."""
    return unreadable(key, f"{CONFIG} or the weights, which transformers {__version__} builds a model by,", error)


def _check_finite(model: PreTrainedModel, method: QuantizationMethod, key: str, spoiled: list[Tensor]) -> None:
    """Raises `DataError` if a weight is NaN or infinite; the first that a forward pass uses is named."""
    names = find_nonfinite(model, method, spoiled)
    if names:
        raise DataError(
            f"{key}: {len(names)} of the base's weights hold{'s' if len(names) == 1 else ''} NaN or infinite numbers, "
            f"first {first_in_forward(model, names)}, so every loss is NaN; download or copy the model again, or "
            "choose another base"
        )


def check_quantization(
    config: ModelConfig, quantization: QuantizationConfig, model_config: Any, *, placement: Placement
) -> None:
    """Raises `ConfigError`, before any weight is read, for a base most of which would not be quantized."""
    method = find_method(quantization)
    if (saved := saved_settings(model_config)) is not None:
        if (decoded := decoded_method(model_config, method)) is None:
            method.check_saved(quantization, saved, f"model.name={config.name}")
            return
        check_decoded(model_config, decoded, f"model.name={config.name}")
        model_config = without_quantization(model_config)
    if method.library_config(quantization, placement) is not None:
        with library_reads(f"model.name={config.name}", CONFIG):
            empty = build_empty(
                model_config, method, quantization, placement, trust_remote_code=config.trust_remote_code
            )
        check_is_quantized(empty, method, quantization, config.name)
        if quantization.experts is ExpertsBits.none and (described := describe_full_experts(empty)) is not None:
            log.warning("quantization.experts=none: of model.name=%s %s", config.name, described)


def _too_large(config: ModelConfig) -> ResourceError:
    limit = f" within model.max_memory={config.max_memory} each" if config.max_memory else ""
    return ResourceError(
        f"model.device_map={config.device_map or 'auto'}: the GPUs do not hold the base{limit}, and layers in the "
        "host's memory or on disk cannot be trained on; raise model.max_memory, or use fewer bits (quantization=nf4) "
        "or more GPUs"
    )


def _as_base(
    model: PreTrainedModel,
    method: QuantizationMethod,
    config: ModelConfig,
    quantization: QuantizationConfig,
    placement: Placement,
) -> PreTrainedModel:
    """Returns the model frozen and checked, computing in the precision of `placement`."""
    _cap_scores(model, config)
    set_method(model, method)
    use_experts(model)
    check_is_quantized(model, method, quantization, config.name)
    method.prepare(model, placement.compute_dtype)
    model.requires_grad_(False)
    switch_cache(model, on=True)
    return model


def _cast_unquantized(model: PreTrainedModel, method: QuantizationMethod, dtype: torch.dtype) -> None:
    """Gives the parameters that are not quantized the dtype they have in other bases; transformers does not do it.

    A quantized weight is decoded to that dtype, too.
    """
    plan = dtype_plan(model, dtype)
    for name, parameter in model.named_parameters():
        if not method.set_decoded_dtype(parameter, dtype) and parameter.is_floating_point():
            parameter.data = parameter.data.to(planned_dtype(plan, name, dtype))


def _attention(config: ModelConfig) -> dict[str, str]:
    return {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}


def _cap_scores(model: PreTrainedModel, config: ModelConfig) -> None:
    """Gives a model with a soft cap on its attention's scores an attention that has it.

    `sdpa` leaves the cap out, and some releases of transformers choose it for Gemma 2 all the same.
    """
    if (
        not getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        or attention_of(model.config) != SDPA
    ):
        return
    if config.attn_implementation == SDPA:
        raise ConfigError(
            f"model.attn_implementation=sdpa leaves out the soft cap that {model.config.model_type} has on the scores "
            "of its attention; leave it out, or take model.attn_implementation=eager"
        )
    model.set_attn_implementation("eager")


def _device_map(config: ModelConfig, placement: Placement) -> Any:
    """Returns how accelerate places the layers; a limit (`max_memory`) is read with a map by name only."""
    if placement.device.type == "cpu" or not (config.device_map or config.max_memory):
        return {"": placement.device}
    return config.device_map or "auto"


def _max_memory(config: ModelConfig, placement: Placement) -> dict[int, str] | None:
    if config.max_memory is None or placement.device.type == "cpu":
        return None
    return dict.fromkeys(range(getattr(torch, placement.device.type).device_count()), config.max_memory)
