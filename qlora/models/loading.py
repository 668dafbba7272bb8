"""Loads base models in 4, 8, 16 or 32 bits, or draws new ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)

from qlora.config.schema import ModelConfig, QuantizationConfig
from qlora.errors import ConfigError, UserError, did_you_mean
from qlora.models.causal import check_is_causal
from qlora.models.complete import load_complete
from qlora.models.decoder import build_empty, check_is_quantized
from qlora.models.finite import QuantizationWatch, find_nonfinite, first_in_forward
from qlora.models.first_pass import try_base
from qlora.models.json_files import library_reads, unreadable
from qlora.models.model_files import check_model_folder, is_local, locate, only_safetensors
from qlora.models.random_weights import RandomWeights
from qlora.models.tokenizer import hub_error
from qlora.runtime.device import Placement, planned_dtype

log = logging.getLogger(__name__)


CONFIG = "config.json"


def load_model_config(config: ModelConfig) -> Any:
    """Returns transformers' config object of the base model; reads or downloads `config.json` only.

    Raises `ConfigError` for what is no decoder-only causal language model.
    """
    place = locate(config.name)
    if is_local(place):
        check_model_folder(Path(place), tokenizer=config.tokenizer is None)
    key = f"model.name={config.name}"
    with library_reads(key, CONFIG):
        try:
            model_config = AutoConfig.from_pretrained(place, **_hub_options(config))
        except (OSError, ValueError) as error:
            raise hub_error("model.name", place, error, gated=config.gated) from error
        check_is_causal(model_config, key)
    return model_config


def draw_model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns transformers' config object for `model.weights=random`, with the tokenizer's special ids.

    Raises `ConfigError` for a field of `model.architecture` that the model type does not have.
    """
    assert config.architecture is not None
    shape = {key: value for key, value in asdict(config.architecture).items() if value is not None}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    if len(tokenizer) > shape["vocab_size"]:
        raise ConfigError(
            f"model.architecture.vocab_size={shape['vocab_size']} is too small for the tokenizer's "
            f"{len(tokenizer)} tokens; raise it or choose another model.tokenizer"
        )
    model_type, rope_theta = shape.pop("model_type"), shape.pop("rope_theta", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture.model_type={model_type!r} is unknown to transformers"
            f"{did_you_mean(model_type, CONFIG_MAPPING)}; give its name of the architecture, e.g. llama"
        )
    check_is_causal(CONFIG_MAPPING[model_type](), f"model.architecture.model_type={model_type}")
    own = CONFIG_MAPPING[model_type]().to_dict()
    if "sliding_window" in shape and "use_sliding_window" in own:  # Qwen: off, and above some layers only
        shape |= {"use_sliding_window": True, "max_window_layers": 0}
    drawn = AutoConfig.for_model(model_type, **shape, **ids)
    for name, value in shape.items():
        there = name in own or name in drawn.attribute_map
        if not there or getattr(drawn, name) != value:
            raise ConfigError(
                f"model.architecture.{name}={value}: {model_type} has no such setting; leave it out or set it to null"
            )
    if rope_theta is not None:
        _set_rope_theta(drawn, rope_theta)
    return drawn


def _set_rope_theta(config: Any, theta: float) -> None:
    """Sets the base of the rotary embedding, in global attention where a model has two kinds (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        raise ConfigError(
            f"model.architecture.rope_theta={theta:g}: {config.model_type} has no rotary embedding; set it to null"
        )
    rope["rope_theta"] = theta


def draw_base(
    config: ModelConfig, quantization: QuantizationConfig, weights: RandomWeights, store: torch.device | None = None
) -> PreTrainedModel:
    """Returns a base with drawn weights, on the device `store` if given, as `load_base` returns a stored one."""
    placement, options = weights.placement, _attention(config)
    bits = bitsandbytes_config(quantization, placement)
    return _as_base(weights.build(bits, store=store, **options), config, quantization, placement)


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
    for several devices lies in the host's memory. Raises `ConfigError` for a base that cannot be had in
    these bits, whose files lack tensors, or whose weights are not finite.
    """
    key = f"adapter={folder}" if folder else f"model.name={config.name}"
    place = str(folder) if folder else locate(config.name)
    stored = getattr(model_config, "quantization_config", None)
    options: dict[str, Any] = {} if folder else _hub_options(config)
    if stored is not None:
        _check_stored_quantization(config, quantization, stored)
    elif (bits := bitsandbytes_config(quantization, placement)) is not None:
        options["quantization_config"] = bits
    with QuantizationWatch() as watch:
        model = _read(place, key, config, placement, options)
    if stored is not None:
        _cast_unquantized(model, placement.weights)
    places = {str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and placement.device.type != "cpu"):
        raise _too_large(config)
    _check_finite(model, key, watch.spoiled)
    model = _as_base(model, config, quantization, placement)
    if tried:
        with decoded_8bit(model, key):
            try_base(model, key, placement)
    return model


def _read(place: str, key: str, config: ModelConfig, placement: Placement, options: dict[str, Any]) -> PreTrainedModel:
    """Loads a model by transformers, and says in one sentence what that says at length."""
    try:
        return load_complete(
            place,
            key=key,
            dtype=placement.weights,
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
            raise only_safetensors(place, "other files") from error
        raise hub_error("model.name", place, error, gated=config.gated) from error
    except ImportError as error:
        raise ConfigError(f"{key}: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:
        if "dispatched on the CPU or the disk" in str(error):
            raise _too_large(config) from error
        raise _unreadable(key, error) from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(key, error) from error


def _unreadable(key: str, error: Exception) -> ConfigError:
    """Returns the error for a model that transformers fails on: what its `config.json` says makes no sense, mostly."""
    return unreadable(key, f"{CONFIG} or the weights, which transformers {__version__} builds a model by,", error)


def _check_finite(model: PreTrainedModel, key: str, spoiled: list[Tensor]) -> None:
    """Raises `ConfigError` if a weight is NaN or infinite; the first that a forward pass uses is named."""
    names = find_nonfinite(model, spoiled)
    if names:
        raise ConfigError(
            f"{key}: {len(names)} of the base's weights hold{'s' if len(names) == 1 else ''} NaN or infinite numbers, "
            f"first {first_in_forward(model, names)}, so every loss is NaN; download or copy the model again, or "
            "choose another base"
        )


def check_quantization(
    config: ModelConfig, quantization: QuantizationConfig, model_config: Any, *, placement: Placement
) -> None:
    """Raises `ConfigError`, before any weight is read, for a base most of which would keep more bits."""
    if getattr(model_config, "quantization_config", None) is not None:
        return
    if (bits := bitsandbytes_config(quantization, placement)) is not None:
        with library_reads(f"model.name={config.name}", CONFIG):
            empty = build_empty(model_config, bits, trust_remote_code=config.trust_remote_code)
        check_is_quantized(empty, quantization, config.name)


def _too_large(config: ModelConfig) -> ConfigError:
    limit = f" within model.max_memory={config.max_memory} each" if config.max_memory else ""
    return ConfigError(
        f"model.device_map={config.device_map or 'auto'}: the GPUs do not hold the base{limit}, and layers in the "
        "host's memory or on disk cannot be trained on; raise model.max_memory, or use fewer bits (quantization=nf4) "
        "or more GPUs"
    )


def _as_base(
    model: PreTrainedModel, config: ModelConfig, quantization: QuantizationConfig, placement: Placement
) -> PreTrainedModel:
    """Returns the model frozen and checked, computing in the precision of `placement`."""
    check_is_quantized(model, quantization, config.name)
    keep_4bit_layout(model)
    set_compute_dtype(model, placement.compute)
    model.requires_grad_(False)
    model.config.use_cache = True
    return model


def bitsandbytes_config(quantization: QuantizationConfig, placement: Placement) -> BitsAndBytesConfig | None:
    """Returns transformers' description of a 4- or 8-bit base; None: the base has more bits."""
    if quantization.bits not in (4, 8):
        return None
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.int8_threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=placement.compute,
    )


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights when a CPU with AVX512-BF16 evaluates.

    The repacked product has no gradient, so an evaluation before training would drop the gradients of every 4-bit
    layer without an error (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _cast_unquantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives what is not quantized the dtype it is loaded in elsewhere: the library leaves a stored base's as it is.

    A 4-bit weight is decoded to that dtype, too.
    """
    plan = model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(planned_dtype(plan, name, dtype))


@contextmanager
def decoded_8bit(model: torch.nn.Module, key: str) -> Iterator[None]:
    """Lets 8-bit layers compute with decoded weights in the block: the first call of their own moves the weight.

    Raises `ConfigError` for a layer that reads more than [rows, tokens, features], which bitsandbytes cannot multiply
    (0.50).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}
    wide: list[str] = []

    def compute(name: str, layer: Linear8bitLt, x: Tensor) -> Tensor:
        if x.dim() > 3:
            wide.append(name)
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        weight = bnb.int8_vectorwise_dequant(layer.weight.data, scales).to(x.dtype)
        return torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))

    with ExitStack() as stack:
        for name, layer in layers.items():
            method = "_old_forward" if hasattr(layer, "_old_forward") else "forward"  # accelerate moves inputs first
            previous = {method: layer.__dict__[method]} if method in layer.__dict__ else {}
            stack.callback(layer.__dict__.update, previous)
            stack.callback(layer.__dict__.pop, method)
            layer.__dict__[method] = partial(compute, name, layer)
        yield
    if wide:
        raise ConfigError(
            f"quantization.bits=8: {key}: {wide[0]} reads more than rows of tokens, which bitsandbytes cannot multiply "
            "by 8-bit weights; use quantization=nf4 or quantization=none"
        )


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Makes 4-bit layers compute in `dtype`; a stored checkpoint would in the precision it was saved in."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def resize_embeddings(model: PreTrainedModel, new_token_ids: Sequence[int]) -> None:
    """Grows the embeddings for `model.new_tokens` if the matrix has no spare rows; new rows are the mean of the old.

    transformers would draw them around the mean, each time a model is loaded differently.
    """
    rows, needed = model.get_input_embeddings().weight.shape[0], max(new_token_ids, default=-1) + 1
    if needed <= rows:
        return
    model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = mean_row(layer.weight[:rows])
    model.requires_grad_(False)


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a matrix's rows, [columns], in its dtype: where the row of a new token starts."""
    return weight.float().mean(0).to(weight.dtype)


def add_end_token(model: PreTrainedModel, token_id: int | None) -> None:
    """Lets generation stop at a chat template's end-of-turn token too; it is saved with a full finetuning."""
    settings = model.generation_config
    if token_id is None or settings is None:
        return
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = sorted({token_id, *(token for token in known if token is not None)})


def _attention(config: ModelConfig) -> dict[str, str]:
    return {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    return {
        "revision": config.revision or "main",
        "cache_dir": config.cache_dir,
        "trust_remote_code": config.trust_remote_code,
    }


def _device_map(config: ModelConfig, placement: Placement) -> Any:
    """Returns how accelerate places the layers; a limit (`max_memory`) is read with a map by name only."""
    if placement.device.type == "cpu" or not (config.device_map or config.max_memory):
        return {"": placement.device}
    return config.device_map or "auto"


def _max_memory(config: ModelConfig, placement: Placement) -> dict[int, str] | None:
    if config.max_memory is None or placement.device.type == "cpu":
        return None
    return dict.fromkeys(range(getattr(torch, placement.device.type).device_count()), config.max_memory)


def _check_stored_quantization(config: ModelConfig, quantization: QuantizationConfig, stored: Any) -> None:
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None
    if bits is None:
        method = settings.get("quant_method", "an unknown method")
        raise ConfigError(
            f"model.name={config.name} is quantized by {method}; only bitsandbytes checkpoints can be trained here. "
            "Use the original 16-bit weights"
        )
    wanted = (quantization.bits, quantization.quant_type.value, quantization.double_quant)
    found = (
        bits,
        settings.get("bnb_4bit_quant_type", "nf4"),
        bool(settings.get("bnb_4bit_use_double_quant")),
    )
    if wanted[0] != bits or (bits == 4 and wanted != found):
        raise ConfigError(
            f"model.name={config.name} is stored in {_describe(*found)}, but the config asks for {_describe(*wanted)}; "
            f"set quantization.bits={found[0]}" + (f" quantization.quant_type={found[1]} quantization.double_quant="
            f"{str(found[2]).lower()}" if bits == 4 else "") + ", or use the original 16-bit weights"
        )  # fmt: skip


def _describe(bits: int, quant_type: str, double_quant: bool) -> str:
    return f"{bits} bits" + (f" ({quant_type}{', double-quantized' if double_quant else ''})" if bits == 4 else "")
