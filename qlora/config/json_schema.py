"""The config as a JSON schema (draft 2020-12) for editors: types, choices and meanings, read from the dataclasses."""

from __future__ import annotations

import dataclasses
import enum
import json
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from omegaconf import MISSING

from qlora.config import schema
from qlora.config.fields import field_types
from qlora.config.help import field_docs, group_meaning
from qlora.config.options import ANYWHERE, group_names
from qlora.config.saved_config import to_plain
from qlora.errors import ConfigError, did_you_mean

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
REFERENCE = {
    "description": "A value that another key has, as `${seed}`, or one that another file must set: `???`.",
    "type": "string",
    "pattern": r"\$\{.+\}|^\?\?\?$",
}
DEFAULTS = {
    "description": "The options that this file builds on, in their order; `_self_` is the file itself.",
    "type": "array",
    "items": {"type": ["string", "object"]},
}
HYDRA = {"description": "Keys of Hydra, see `qlora --hydra-help`.", "type": "object"}
WHOLE = ("experiment", "sweep", *ANYWHERE)
"""The groups whose files set keys of all groups."""


def print_schema(group: str | None = None) -> None:
    """Prints the schema of a whole config, or of the files of a group."""
    print(json.dumps(build_schema(group), indent=2, ensure_ascii=False))


def build_schema(group: str | None = None) -> dict[str, Any]:
    """Returns the schema of files with keys of all groups, such as an experiment, or of the files of one group.

    Raises `ConfigError` for a group that does not exist.
    """
    if group is not None and group not in group_names():
        near = did_you_mean(group, group_names())
        raise ConfigError(f"--schema {group}: there is no such group{near}; `qlora --schema` alone prints all keys")
    parts: dict[str, Any] = {"reference": REFERENCE}
    hint = schema.Config if group is None or group in WHOLE else field_types(schema.Config)[group]
    meaning = group_meaning(group) if group else schema.Config.__doc__
    body = _object(hint, parts) if dataclasses.is_dataclass(hint) else _describe(hint, parts)
    named = {"title": f"qlora {group}" if group else "qlora", "description": " ".join((meaning or "").split())}
    return {"$schema": DRAFT, **body, **named, "$defs": parts}


def _object(owner: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a dataclass; those that it holds are added to `parts`."""
    docs, properties = field_docs()[owner.__name__], dict[str, Any]()
    for item in dataclasses.fields(owner):
        described = _describe(field_types(owner)[item.name], parts)
        if "$ref" not in described:
            described = {"anyOf": [*described.pop("anyOf", [described]), {"$ref": "#/$defs/reference"}]}
        if docs[item.name]:
            described["description"] = docs[item.name]
        if (default := _default(item)) is not MISSING:
            described["default"] = default
        properties[item.name] = described
    in_file = {"defaults": DEFAULTS} | ({"hydra": HYDRA} if owner is schema.Config else {})
    meaning = " ".join((owner.__doc__ or "").split())
    return {
        "description": meaning,
        "type": "object",
        "properties": {**in_file, **properties},
        "additionalProperties": False,
    }


def _describe(hint: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a type."""
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [_describe(option, parts) for option in get_args(hint)]}
    if get_origin(hint) is list:
        return {"type": "array", "items": _describe(get_args(hint)[0], parts)}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _describe(get_args(hint)[1], parts)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [*hint.__members__]}
    if dataclasses.is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in parts:
            parts[name] = {}  # one that holds itself would find it
            parts[name] = _object(hint, parts)
        return {"$ref": f"#/$defs/{name}"}
    return {"type": SCALARS[hint]} if hint in SCALARS else {}


def _default(item: dataclasses.Field[Any]) -> Any:
    """Returns the default of a field as YAML holds it; `MISSING`: an option chooses it, or it is a group."""
    value = item.default_factory() if callable(item.default_factory) else item.default
    is_unset = value is dataclasses.MISSING or value == MISSING or dataclasses.is_dataclass(value)
    return MISSING if is_unset else to_plain(value)
