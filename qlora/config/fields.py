"""What a key holds: its type, whether it may be null, and how a message describes it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from qlora.config.schema import HOLDS, MAPPINGS, Config
from qlora.config.schema.values import SCALARS, SHAPES

KeyPath = tuple[str, ...]
"""A full key, level by level; a name in a mapping may itself hold dots, and `[0]` is an element of a list."""

SWEPT = ("hydra", "sweeper", "params")
"""Where a file lists what to sweep: keys, and their values as the command line writes them."""


def type_at(path: KeyPath) -> Any:
    """Returns the annotation of a key without its `| None`, inside lists and mappings too; None: it is not known."""
    if path[: len(SWEPT)] == SWEPT and len(path) > len(SWEPT):
        return type_at(split_key(".".join(path[len(SWEPT) :])))
    if path[:1] == ("hydra",):
        if path[1:2] in (("sweeper",), ("launcher",)) and len(path) > 2:
            return _type_of_plugin(path[1], path[2:])
        return _descend(HydraConf, path[1:])
    return _descend(Config, path)


def split_key(key: str) -> KeyPath:
    """Returns the levels of a key as the command line writes it: `model.new_tokens[0]`."""
    return tuple(re.findall(r"\[[^\]]*\]|[^.\[]+", key))


def _descend(node: Any, path: KeyPath) -> Any:
    for name in path:
        steps = (_step(option, name) for option in _alternatives(node))
        node = next((hint for hint in steps if hint is not None), None)
    options = [option for option in _alternatives(node) if option is not NoneType]
    return options[0] if len(options) == 1 else node


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def _step(hint: Any, name: str) -> Any:
    if get_origin(hint) in (list, dict):
        return get_args(hint)[-1]
    return field_types(hint).get(name) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _type_of_plugin(group: str, path: KeyPath) -> Any:
    """Returns the type of a key of a sweeper or launcher, whichever has it."""
    Plugins.instance()  # they bring their dataclasses along
    for option in ConfigStore.instance().repo["hydra"].get(group, {}).values():
        owner = OmegaConf.get_type(option.node) if OmegaConf.is_config(option.node) else None
        if dataclasses.is_dataclass(owner) and (hint := _descend(owner, path)) is not None:
            return hint
    return None


@functools.cache
def field_types(owner: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass by field, or the type in a field's metadata that Hydra cannot express."""
    hints = get_type_hints(owner)
    return hints | {item.name: item.metadata[HOLDS] for item in dataclasses.fields(owner) if HOLDS in item.metadata}


def dotted(path: KeyPath) -> str:
    """Returns a key as people write it."""
    names = ["from", *path[1:]] if path[:1] == ("source",) else list(path)
    return ".".join(names).replace(".[", "[")


def shape_in_words(hint: Any, key: str) -> str:
    """Says what a field that holds other values takes: "a list such as [a,b]"."""
    return f"a mapping such as {MAPPINGS[key]}" if key in MAPPINGS else SHAPES[get_origin(hint)]


# Free mappings among Hydra's own keys.
HYDRA_MAPPINGS = (
    *(f"hydra.sweeper.{name}" for name in ("params", "conditions", "sampler_kwargs", "pruner_kwargs")),
    *(f"hydra.launcher.{name}" for name in ("additional_parameters", "ray.init", "ray.remote")),
)


def field_type(key: str) -> Any:
    """Returns the annotation of the field `key`, a single type without its `| None`; None: there is no such field."""
    node: Any = Config
    for name in key.split("."):
        hint = _hints(node).get(name)
        inner = [part for part in get_args(hint) if part is not NoneType]
        node = inner[0] if NoneType in get_args(hint) and len(inner) == 1 else hint
    return node


def _hints(schema: Any) -> dict[str, Any]:
    return field_types(schema) if isinstance(schema, type) and dataclasses.is_dataclass(schema) else {}


def may_be_null(key: str) -> bool:
    """Returns whether the field `key` takes null."""
    owner = field_type(key.rpartition(".")[0]) if "." in key else Config
    return NoneType in get_args(_hints(owner).get(key.rpartition(".")[2]))


def in_words(key: str) -> str:
    """Says what the field `key` holds: "a whole number or null", "one of nf4, fp4"."""
    hint = field_type(key)
    if is_enum(hint):
        text = f"one of {', '.join(hint.__members__)}"
    elif dataclasses.is_dataclass(hint):
        text = "a mapping of fields"
    else:
        either = "a text or a list of texts" if get_origin(hint) is UnionType else "valid"
        text = SCALARS.get(hint) or (shape_in_words(hint, key) if get_origin(hint) in SHAPES else either)
    return f"{text} or null" if may_be_null(key) else text


def is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def config_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Yields the full names of all fields: `lora.r`, `model.architecture.hidden_size`, ..."""
    for name, hint in _hints(schema).items():
        yield f"{prefix}{name}"
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                yield from config_keys(inner, f"{prefix}{name}.")


@functools.cache
def known_keys() -> frozenset[str]:
    return frozenset(config_keys())


def key_exists(key: str, keys: frozenset[str]) -> bool:
    """Returns whether `key` is a field, an element of a list field, or inside a field that holds a free mapping."""
    return key in keys or key.partition("[")[0] in keys or in_mapping(key, keys)


def in_free_mapping(key: str, keys: frozenset[str]) -> bool:
    return in_mapping(key, keys) or key.startswith(HYDRA_MAPPINGS)


def in_mapping(key: str, keys: frozenset[str]) -> bool:
    parents = [key[: match.start()] for match in re.finditer(r"\.", key)]
    return any(parent in keys and get_origin(field_type(parent)) is dict for parent in parents)
