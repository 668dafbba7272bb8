"""transformers' config object of a base, read from its `config.json` or built from `model.architecture`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from qlora.config.registries.rope_scaling import (
    ORIGINAL,
    PARTIAL,
    ROPE_TYPES,
    TYPE,
    check_has_rope,
    check_rotated,
)
from qlora.config.schema import ModelConfig, described_settings
from qlora.errors import ConfigError, describe_fault, did_you_mean
from qlora.models.causal import check_is_causal
from qlora.models.json_files import library_reads
from qlora.models.model_files import check_model_folder, is_local, locate
from qlora.models.tokenizer import hub_error
from qlora.upstream.huggingface_hub import read_cache_without_network

CONFIG = "config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_model_config(config: ModelConfig) -> Any:
    """Returns transformers' config object of the base model; reads or downloads `config.json` only.

    Raises `DataError` unless it describes a decoder-only causal language model.
    """
    folder = locate(config.name)
    if is_local(folder):
        check_model_folder(Path(folder), tokenizer=config.tokenizer is None)
    else:
        read_cache_without_network()
    key = f"model.name={config.name}"
    with library_reads(key, CONFIG):
        try:
            model_config = AutoConfig.from_pretrained(folder, **hub_options(config))
        except (OSError, ValueError) as error:
            raise hub_error("model.name", folder, error, gated=config.gated) from error
        check_is_causal(model_config, key)
    scale_rope(model_config, config.rope_scaling)
    return model_config


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the options of `from_pretrained` that say what is read from the hub, and whether its code runs."""
    return {
        "revision": config.revision or "main",
        "cache_dir": config.cache_dir,
        "trust_remote_code": config.trust_remote_code,
    }


def build_model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns transformers' config object for `model.weights=random`, with the tokenizer's special ids.

    Raises `ConfigError` for a field of `model.architecture` that the model type does not have.
    """
    assert config.architecture is not None
    shape = described_settings(config.architecture)
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
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    if shape.get("sliding_window") is not None and "use_sliding_window" in defaults:  # Qwen: off, and above some layers
        shape = {"use_sliding_window": True, "max_window_layers": 0} | shape
    if "intermediate_size" in defaults and "intermediate_size" not in shape:
        raise ConfigError(
            f"model.architecture.intermediate_size is missing, the width of the feed-forward layer of {model_type}; "
            "give it as a number"
        )
    model_config = _build(model_type, shape, ids, is_new=bool(config.architecture.options))
    check_settings(model_config, shape, config.architecture.options)
    if rope_theta is not None:
        _set_rope_theta(model_config, rope_theta)
    scale_rope(model_config, config.rope_scaling)
    return model_config


def _build(model_type: str, shape: dict[str, Any], ids: dict[str, Any], *, is_new: bool) -> Any:
    """Returns transformers' config object; `is_new`: the model is built, too, for settings that nothing else checks."""
    try:
        model_config = AutoConfig.for_model(model_type, **shape, **ids)
        if is_new:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(model_config)
    except Exception as error:  # whatever a model's own code raises for values that do not fit each other
        raise ConfigError(
            f"model.architecture: transformers builds no {model_type} of these settings ({describe_fault(error)}); "
            "correct them"
        ) from error
    return model_config


def check_settings(model_config: Any, shape: dict[str, Any], options: Collection[str]) -> None:
    """Raises `ConfigError` for a setting of `shape` that a model type does not have, which its config class took all
    the same; `options` are those of `model.architecture.options`."""
    model_type = model_config.model_type
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    for name, value in shape.items():
        is_known = name in defaults or name in model_config.attribute_map
        is_known |= name == "head_dim" and not is_known and _decides_sizes(model_config, name)
        is_kept = is_known and _saved(model_config, name) == value
        if not is_kept and not _is_converted(model_config, model_type, shape, name):
            where = "options." if name in options else ""
            near = did_you_mean(name, defaults) if name in options else ""
            raise ConfigError(
                f"model.architecture.{where}{name}={value}: {model_type} has no such setting{near}; leave it out or "
                "set it to null"
            )


def _saved(model_config: Any, name: str) -> Any:
    """Returns a setting; one that layers may have a value of their own for (Gemma 4) has no attribute that is read."""
    name = model_config.attribute_map.get(name, name)
    settings = model_config.to_dict()
    return settings[name] if name in settings else getattr(model_config, name)


def _is_converted(model_config: Any, model_type: str, shape: dict[str, Any], name: str) -> bool:
    """Returns whether the config class makes other settings of one that it does not keep (Gemma 4's global heads)."""
    without = AutoConfig.for_model(model_type, **{other: value for other, value in shape.items() if other != name})
    kept, others = model_config.to_dict(), without.to_dict()
    return name not in kept and any(kept.get(key) != value for key, value in others.items() if key not in IDS)


def _decides_sizes(model_config: Any, name: str) -> bool:
    """Returns whether a number that its config class does not declare decides sizes: `head_dim` in Qwen's mixtures.

    Other models take it too, and read it for a part of what it means, or not at all.
    """
    sizes = []
    for factor in (1, 2):
        changed = copy.deepcopy(model_config)
        setattr(changed, name, factor * getattr(changed, name))
        with torch.device("meta"):
            sizes.append([weight.shape for weight in AutoModelForCausalLM.from_config(changed).parameters()])
    return sizes[0] != sizes[1]


def has_rope(model_config: Any) -> bool:
    """Returns whether a model has rotary positions."""
    text = model_config.get_text_config()
    kind = getattr(text, "position_embedding_type", None) or "rope"
    return bool(getattr(text, "rope_parameters", None)) and kind in ("rope", "rotary") and not getattr(text, "alibi", 0)


def scale_rope(model_config: Any, scaling: Mapping[str, Any] | None) -> None:
    """Stretches the rotary positions of a model as `model.rope_scaling` says; None: they stay.

    In models with two kinds of layers (Gemma 3) those that look at all tokens are stretched. Raises `ConfigError` where
    there are none.
    """
    check_has_rope(scaling, model_config.model_type, has_rope=has_rope(model_config))
    if scaling is None:
        return
    text = model_config.get_text_config()
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    check_rotated(scaling, model_config.model_type, head_dim, rope.get(PARTIAL))
    kept = {name: rope[name] for name in ROPE_TYPES[scaling[TYPE]].reads if name in rope}
    rope.clear()
    rope.update(kept | dict(scaling))
    if ORIGINAL in ROPE_TYPES[scaling[TYPE]].parameters:
        rope.setdefault(ORIGINAL, text.max_position_embeddings)


def _set_rope_theta(config: Any, theta: float) -> None:
    """Sets the base of the rotary embedding, in global attention where a model has two kinds (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:
        raise ConfigError(
            f"model.architecture.rope_theta={theta:g}: {config.model_type} has no rotary embedding; set it to null"
        )
    rope["rope_theta"] = theta
