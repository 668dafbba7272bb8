"""The shapes of the JSON files in model, tokenizer and adapter folders, and where a value does not fit one."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from qlora.text import brief

Shape = type | None | tuple[Any, ...] | list[Any] | dict[str, Any]
"""A type of JSON, alternatives as a tuple, `[SHAPE]` a list of one shape, `{NAME: SHAPE}` an object.

The name `*` stands for all others; a name that is missing is no mistake; `object` is any value.
"""

TOKEN: Shape = (None, str, {"content": str})
TOKENS: Shape = (None, [TOKEN], {"*": TOKEN})
SPECIAL: dict[str, Shape] = {
    **{f"{role}_token": TOKEN for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": TOKENS,
}
TOKEN_ID: Shape = (None, int)
TOKEN_IDS: Shape = (None, int, [int])
IDS: dict[str, Shape] = {"bos_token_id": TOKEN_ID, "eos_token_id": TOKEN_IDS, "pad_token_id": TOKEN_ID}
SIZES = (  # in some models a list with one for each layer
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
)
MODEL: dict[str, Shape] = {
    **IDS,
    "model_type": str,
    "architectures": (None, [str]),
    "auto_map": (None, {"*": (None, str, [(None, str)])}),
    "quantization_config": (None, {"*": object}),
    "dtype": (None, str, {"*": object}),
    "torch_dtype": (None, str, {"*": object}),
    "transformers_version": (None, str),
    "rope_parameters": (None, {"*": object}),
    "rope_scaling": (None, {"*": object}),
    "rope_theta": (None, float),
    **dict.fromkeys(SIZES, (None, int, [(None, int)])),
}
MODEL_FILES = ("config.json", "generation_config.json")
TOKENIZER_JSON = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.json",
)
SHAPES: dict[str, Shape] = {
    "config.json": {**MODEL, "text_config": (None, MODEL)},
    "generation_config.json": {
        **IDS,
        **dict.fromkeys(("do_sample", "use_cache"), (None, bool)),
        **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "top_k"), (None, int)),
        **dict.fromkeys(("temperature", "top_p", "repetition_penalty", "length_penalty"), (None, float)),
    },
    "tokenizer_config.json": {
        **SPECIAL,
        "added_tokens_decoder": (None, {"*": {"content": str}}),
        "chat_template": (None, str, {"*": str}, [{"name": str, "template": str}]),
        "tokenizer_class": (None, str),
        "model_max_length": (None, float),
        "auto_map": (None, {"*": object}, [object]),
        "sp_model_kwargs": (None, {"*": object}),
    },
    "special_tokens_map.json": SPECIAL,
    "added_tokens.json": {"*": int},
    "vocab.json": {"*": int},
    "tokenizer.json": {
        "added_tokens": [{"id": int, "content": str}],
        "model": {"type": (None, str), "vocab": ({"*": int}, [object]), "merges": (None, [object])},
        **{name: (None, {"*": object}) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")},
        **{name: (None, {"*": object}) for name in ("truncation", "padding")},
    },
    "model.safetensors.index.json": {"metadata": (None, {"*": object}), "weight_map": {"*": str}},
    "adapter_config.json": {
        "peft_type": str,
        "task_type": (None, str),
        "init_lora_weights": (None, bool, str),
        "base_model_name_or_path": (None, str),
        "revision": (None, str),
        "r": (None, int),
        "lora_alpha": (None, float),
        "lora_dropout": (None, float),
        "bias": (None, str),
        "target_modules": (None, str, [str]),
        "exclude_modules": (None, str, [str]),
        "modules_to_save": (None, [str]),
        "rank_pattern": (None, {"*": int}),
        "alpha_pattern": (None, {"*": float}),
        "layers_to_transform": (None, int, [int]),
        "layers_pattern": (None, str, [str]),
        "target_parameters": (None, [str]),
        "trainable_token_indices": (None, [int], {"*": [int]}),
        "auto_mapping": (None, {"*": object}),
        "alora_invocation_tokens": (None, [int]),
        "layer_replication": (None, [[int]]),
        "qalora_group_size": (None, int),
        "use_qalora": (None, bool),
        **dict.fromkeys(("fan_in_fan_out", "inference_mode", "lora_bias", "use_dora", "use_rslora"), (None, bool)),
        **{name: (None, {"*": object}) for name in ("loftq_config", "megatron_config", "eva_config", "corda_config")},
    },
    "base.json": {
        "name": str,
        "revision": (None, str),
        "fingerprint": (None, str),
        "random": (None, {"*": object}),
    },
}
"""What a file must look like, by its name; what is not declared may be anything that the library accepts."""

NEEDED = {
    "model.safetensors.index.json": ("weight_map",),
    "adapter_config.json": ("peft_type",),
    "base.json": ("name",),
}
"""Entries that a file must have."""

KINDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null"}
MAX_INT = 2**63 - 1


def find_difference(value: Any, shape: Shape, name: str = "") -> str | None:
    """Returns where a value does not fit a shape, as "vocab_size must be a whole number, got 'x'"; None: it fits."""
    if shape is object:
        return None
    if isinstance(shape, tuple):
        reasons = [find_difference(value, option, name) for option in shape]
        if None in reasons:
            return None
        # An alternative of the right type has the more precise reason.
        inner = [reason for option, reason in zip(shape, reasons, strict=True) if _is_kind(value, option)]
        return inner[0] if inner else _refuse(name, shape, value)
    if isinstance(shape, dict) and isinstance(value, dict):
        rest = shape.get("*", object)
        if not shape.keys() - {"*"} and _are_plain(value.values(), rest):
            return None
        items = (
            (f"{name}.{entry}" if name else entry, inner, shape.get(entry, rest)) for entry, inner in value.items()
        )
    elif isinstance(shape, list) and isinstance(value, list):
        if _are_plain(value, shape[0]):
            return None
        items = ((f"{name}[{index}]", inner, shape[0]) for index, inner in enumerate(value))
    else:
        return None if _is_scalar(value, shape) else _refuse(name, shape, value)
    return next(filter(None, (find_difference(inner, kind, where) for where, inner, kind in items)), None)


def _are_plain(values: Collection[Any], shape: Shape) -> bool:
    """Returns whether all of many values are of one plain type, such as the ids of a vocabulary."""
    if shape is int:
        return all(type(value) is int and abs(value) <= MAX_INT for value in values)
    return shape is object or (shape is str and all(type(value) is str for value in values))


def _is_kind(value: Any, shape: Shape) -> bool:
    return isinstance(value, type(shape)) if isinstance(shape, list | dict) else False


def _is_scalar(value: Any, shape: Shape) -> bool:
    """Returns whether a value is of a plain type, and in the range of 64-bit numbers."""
    if shape is None or shape is bool:
        return value is None if shape is None else isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if shape is int:
        return isinstance(value, int) and abs(value) <= MAX_INT
    if shape is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return shape is str and isinstance(value, str)


def _refuse(name: str, shape: Shape, value: Any) -> str:
    options = shape if isinstance(shape, tuple) else (shape,)
    kinds = dict.fromkeys(_name_kind(option) for option in sorted(options, key=lambda option: option is None))
    return f"{brief(name, 80) if len(name) > 80 else name or 'it'} must be {' or '.join(kinds)}, got {brief(value)}"


def _name_kind(shape: Shape) -> str:
    if isinstance(shape, list | dict):
        return "a list" if isinstance(shape, list) else "an object"
    assert not isinstance(shape, tuple)
    return KINDS[shape]
