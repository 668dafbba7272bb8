"""A config as YAML: written, and read back from the folder of a run or of another project."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from qlora.config import trust
from qlora.config.fields import field_types
from qlora.config.messages import describe_yaml, explain, first_line
from qlora.config.schema import Config
from qlora.config.secret_values import leaves, refuse_secrets
from qlora.errors import ConfigError, DamagedFile, DataError, UserError, describe_fault
from qlora.upstream.omegaconf import get_omega_conf_dumper, get_yaml_loader


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns plain nested dicts, lists and strings, as YAML and JSON hold them."""
    plain = to_plain(config)
    assert isinstance(plain, dict)
    return plain


def to_plain(value: Any) -> Any:
    # As OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True), in a hundredth of the time.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in field_names(type(value))}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def field_names(schema: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(schema))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields full keys and values of a nested config."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dump_config(config: Config) -> str:
    """Returns the config as YAML that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads what `dump_config` wrote; None where there is no such file. Raises `DamagedFile`."""
    plain = _read_stored(path)
    if plain is None:
        return None
    if not isinstance(plain, dict) or not plain:
        raise DamagedFile(path, "it holds no config")
    for name, hint in field_types(Config).items():
        if dataclasses.is_dataclass(hint) and not isinstance(plain.get(name, {}), dict):
            raise DamagedFile(path, f"{name} is not a group of keys")
    if not isinstance(plain.get("objective"), str | NoneType):
        raise DamagedFile(path, "objective is not a text")
    return {str(key): value for key, value in plain.items()}


def read_overrides(path: Path) -> list[str] | None:
    """Reads the overrides that Hydra saved; None where there is no such file. Raises `DamagedFile`."""
    overrides = _read_stored(path)
    if not isinstance(overrides, list | NoneType):
        raise DamagedFile(path, "it holds no list of overrides")
    return None if overrides is None else [str(word) for word in overrides]


def _read_stored(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        reason = describe_fault(error) if mark is None else f"line {mark.line + 1}: it is not valid YAML"
        raise DamagedFile(path, reason) from error


def as_text(tree: Any) -> Any:
    """Returns a tree whose texts OmegaConf reads as they are, `${` included."""
    if isinstance(tree, dict):
        return {key: as_text(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [as_text(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def restore_config(saved: dict[str, Any], file: Path | None = None) -> Config:
    """Returns the config that `read_config` read, of `file`, which errors name.

    A stored config is resolved: what looks like an interpolation is text, so that a foreign folder cannot read
    anything of this machine. Raises `ConfigError` for a secret in it, and for one of another version's schema.
    """
    try:
        refuse_secrets(leaves(saved, ""))
        with trust.fixed_resolvers():
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), as_text(saved)))
    except (UserError, OmegaConfBaseException) as error:
        told = explain(error) if isinstance(error, OmegaConfBaseException) else error
        raise (ConfigError(f"{file}: {told}") if file is not None else told) from error
    assert isinstance(config, Config)
    return config


def with_trust_of(config: Config, saved: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns what `read_config` read of `file`, trusting the code that `config` does.

    Raises `ConfigError` for one that trusts more: what is trusted is said on the command line alone.
    """
    names, model = saved.get("trusted") or [], saved.get("model")
    if not isinstance(names, list) or not isinstance(model, dict):
        raise DataError(f"{file}: trusted must be a list and model a mapping, as a run stores them; it is damaged")
    more = [str(name) for name in names if name not in config.trusted]
    lacking = [f"trusted=[{','.join([*config.trusted, *more])}]"] if more else []
    if model.get("trust_remote_code") and not config.model.trust_remote_code:
        lacking.append(f"{trust.REMOTE_CODE}=true")
    if lacking:
        raise ConfigError(
            f"{file} sets {' and '.join(lacking)}, and what is trusted is said on the command line alone; if you know "
            f"what it does, add {' '.join(lacking)} to this command"
        )
    return {**saved, "trusted": list(config.trusted)}


def write_yaml(tree: Any) -> str:
    """Returns a tree as YAML that OmegaConf reads back unchanged; texts such as `1e5` are quoted."""
    dumper = get_omega_conf_dumper()
    return str(yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000))


def read_yaml(path: Path) -> Any:
    """Returns what a YAML file of another project holds, its numbers read as OmegaConf does; interpolations stay text.

    Raises `DataError` for a file that is not YAML.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # whose name is in the marks of errors
            return yaml.load(file, Loader=get_yaml_loader())
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except MarkedYAMLError as error:
        raise DataError(describe_yaml(error)) from error
    except YAMLError as error:
        raise DataError(f"{path}: this is not valid YAML: {first_line(str(error))}") from error
