"""Reads what others wrote: JSON files of model, tokenizer and adapter folders, against the shapes declared here.

What does not fit is one sentence with the file and what in it is wrong. Libraries read these files, too, and raise
whatever comes of an odd value: `library_reads` makes the same sentence of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError, UserError
from qlora.text import brief, brief_text

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

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character that JSON writes in two."""
WORDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null"}
LARGEST = 2**63 - 1


def read_object(path: Path, key: str) -> dict[str, Any]:
    """Returns the object in a JSON file, which has the shape declared for its name.

    Raises `ConfigError` that begins with `key`, such as `model.name=FOLDER`, and names the file.
    """
    fault: str | None
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        fault = find_fault(value, SHAPES[path.name])
        if fault is None and HALF.search(text) and not _is_unicode(value):
            fault = "it holds half a character (a lone surrogate)"
        if fault is None and (missing := [name for name in NEEDED.get(path.name, ()) if name not in value]):
            fault = f"{missing[0]} is missing"
    except UnicodeDecodeError:
        fault = "it is no UTF-8 text"
    except RecursionError:
        fault = "it is nested too deeply"
    except OSError as error:
        fault = f"it cannot be read ({error.strerror})"
    except ValueError as error:
        fault = f"no JSON: {error}"
    if fault is not None:
        raise ConfigError(f"{key}: {path.name} is damaged ({fault}); {_remedy(key)}")
    assert isinstance(value, dict)
    return value


def check_files(folder: Path, names: Iterable[str], key: str) -> None:
    """Raises `ConfigError` if one of the JSON files of a folder, as far as they are there, lacks its shape."""
    for name in names:
        if (folder / name).exists():
            read_object(folder / name, key)


def find_fault(value: Any, shape: Shape, name: str = "") -> str | None:
    """Says in words where a value of JSON lacks a shape, e.g. "vocab_size must be a whole number, got 'x'"."""
    if shape is object:
        return None
    if isinstance(shape, tuple):
        faults = [find_fault(value, option, name) for option in shape]
        if None in faults:
            return None
        # An alternative of the right type tells what in it is wrong.
        inner = [fault for option, fault in zip(shape, faults, strict=True) if _is_kind(value, option)]
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
    return next(filter(None, (find_fault(inner, kind, where) for where, inner, kind in items)), None)


def _are_plain(values: Collection[Any], shape: Shape) -> bool:
    """Returns whether all of many values are of one plain type, such as the ids of a vocabulary."""
    if shape is int:
        return all(type(value) is int and abs(value) <= LARGEST for value in values)
    return shape is object or (shape is str and all(type(value) is str for value in values))


def _is_kind(value: Any, shape: Shape) -> bool:
    return isinstance(value, type(shape)) if isinstance(shape, list | dict) else False


def _is_scalar(value: Any, shape: Shape) -> bool:
    """Returns whether a value is of a plain type, and one that can be computed with: finite, of 63 bits."""
    if shape is None or shape is bool:
        return value is None if shape is None else isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if shape is int:
        return isinstance(value, int) and abs(value) <= LARGEST
    if shape is float:
        return isinstance(value, int | float) and abs(value) < math.inf
    return shape is str and isinstance(value, str)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(name: str, shape: Shape, value: Any) -> str:
    options = shape if isinstance(shape, tuple) else (shape,)
    words = dict.fromkeys(_in_words(option) for option in sorted(options, key=lambda option: option is None))
    return f"{brief(name, 80) if len(name) > 80 else name or 'it'} must be {' or '.join(words)}, got {brief(value)}"


def _in_words(shape: Shape) -> str:
    if isinstance(shape, list | dict):
        return "a list" if isinstance(shape, list) else "an object"
    assert not isinstance(shape, tuple)
    return WORDS[shape]


@contextmanager
def library_reads(key: str, what: str | Callable[[], str]) -> Iterator[None]:
    """Makes one sentence of whatever a library raises in the block while it reads files of a foreign folder.

    `key` names the folder, e.g. `model.name=FOLDER`, and `what` the file, or finds it. A mistake that is told already,
    a full memory and an interruption pass.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, which is not imported here
            raise
        raise unreadable(key, what, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise unreadable(key, what, error) from None


def unreadable(key: str, what: str | Callable[[], str], error: BaseException) -> ConfigError:
    """Returns the error for files that a library fails on."""
    name = what if isinstance(what, str) else what()
    said = brief_text(str(error))
    reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return ConfigError(f"{key}: {name} cannot be used ({reason}); {_remedy(key)}")


def _remedy(key: str) -> str:
    return "copy the adapter again" if key.startswith("adapter=") else "correct it, or download or copy it again"
