"""What Hydra, OmegaConf and the YAML reader report, as one sentence with the way out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    KeyValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)
from yaml import MarkedYAMLError

from qlora.config.fields import SHAPES, config_keys, field_type, in_words, is_enum, known_keys
from qlora.config.foreign_names import known_value
from qlora.config.meant_values import meant_value
from qlora.config.options import CONF_DIR, option_names
from qlora.config.search_path import KEY as SEARCH_PATH
from qlora.config.suggestions import nearest_keys, unknown_key, unknown_option
from qlora.errors import ConfigError, UserError, did_you_mean, mean, suggest

SEVERAL = re.compile(r"[\s,;]+(?=[A-Za-z_][\w.]*=)")
"""What people write between two overrides instead of blanks alone."""
QUOTES = "'\""
LIST = re.compile(r"'?\[([^\[{]+)\]'?")
"""A list as OmegaConf or Python spells it."""


def explain(error: Exception, config_dir: Path | str | None = None) -> UserError:
    """Turns what Hydra, OmegaConf or the YAML reader reports into one clear sentence with the way out."""
    chain = _chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return link
        if isinstance(link, MarkedYAMLError):
            return ConfigError(describe_yaml(link))
        if isinstance(link, UnicodeDecodeError):
            return ConfigError(f"{_not_utf8(config_dir)} is not UTF-8 text; save it as UTF-8")
        if isinstance(link, OverrideParseException):
            return _broken_override(link)
    # Hydra has one class for several mistakes, and says in its text alone which one it is, and in which file.
    text = "\n".join(str(link) for link in chain)
    if late := re.search(r"In '([^']+)': Overriding hydra.searchpath", text):
        return ConfigError(
            f"{SEARCH_PATH} is set in {_file_of(late[1], config_dir)}, where it comes too late; give it on the command "
            f"line: '{SEARCH_PATH}=[FOLDER]'"
        )
    where = _where(text, config_dir)
    missing = _first(chain, MissingConfigException)
    if missing is not None and "/" in str(missing.missing_cfg_file):
        group, _, name = str(missing.missing_cfg_file).rpartition("/")
        return unknown_option(group, name, missing.options or option_names(group), where)
    if several := re.search(r"Multiple values for ([\w./-]+)", text):
        group = several[1].rstrip(".")
        return ConfigError(
            f"{group} is chosen twice{where}; where it has an option already, write {group}=OPTION on the command line "
            f"without a +, or `override /{group}: OPTION` in a file's defaults"
        )
    return _explain_node(chain, text, where)


def _explain_node(chain: list[BaseException], text: str, where: str) -> ConfigError:
    """Returns the error for a key or a value that OmegaConf refuses."""
    inner = next((link for link in chain if isinstance(link, OmegaConfBaseException) and link.full_key), None)
    key = str(inner.full_key) if inner is not None else _key_of(text)
    if (unset := _first(chain, MissingMandatoryValue)) is not None:
        return ConfigError(
            f"{unset.full_key} is not set by the option that was chosen for it; a file of its group begins without "
            "`# @package _group_`, which Hydra no longer knows"
        )
    unknown = _first(chain, ConfigKeyError, ConfigAttributeError)
    if key and (unknown is not None or re.search(r"Could not (?:override|append)", text)):
        return _no_place_for(key, where)
    if (unsupported := _first(chain, UnsupportedInterpolationType)) is not None:
        name = (re.search(r"Unsupported interpolation type '?([\w.]*)", str(unsupported)) or ["", "?"])[1]
        return ConfigError(
            f"{key}{where}: ${{{name}:...}} calls no function that a config may call; those are oc.env, oc.select and "
            "the others of OmegaConf, hydra and now"
        )
    if (dangling := _first(chain, InterpolationKeyError)) is not None:
        name = (re.search(r"Interpolation key '([^']*)'", str(dangling)) or ["", "?"])[1]
        return ConfigError(f"{key}{where} refers to ${{{name}}}, but there is no such key{mean(nearest_keys(name))}")
    if (strange := _first(chain, KeyValidationError)) is not None:
        owner = key.removesuffix(f".{strange.key}")
        return ConfigError(
            f"{owner}{where}: the key {strange.key} is not a text; give the entries in a file, with "
            "quotes around this key"
        )
    if key or _first(chain, ValidationError) is not None:
        return _wrong_type(key, text, where)
    return ConfigError(f"{first_line(text)}{where}")


def _first(chain: list[BaseException], *kinds: type[BaseException]) -> Any:
    """Returns the first error of these kinds; None: there is none."""
    return next((link for link in chain if isinstance(link, kinds)), None)


def _where(text: str, config_dir: Path | str | None) -> str:
    """Returns " in FILE" for a file of options that Hydra names; "" for its own, and for the root."""
    match = re.search(r"In '([^']+)'|Error merging '([^']+)'", text)
    name = match[1] or match[2] if match else "config"
    return "" if name.endswith("config") else f" in {_file_of(name, config_dir)}"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def describe_yaml(error: MarkedYAMLError) -> str:
    """Returns what is wrong in a YAML file, with its name and line."""
    mark = error.problem_mark or error.context_mark
    position = f"{mark.name}, line {mark.line + 1}" if mark is not None else "a config file"
    remedy = "; indent with spaces" if "\\t" in str(error.problem) else ""
    return f"{position}: this is not valid YAML: {error.problem}{remedy}"


def _broken_override(error: OverrideParseException) -> ConfigError:
    if "=" not in error.override:
        return ConfigError(f"{error.override!r} is not an option; options are written KEY=VALUE, e.g. lora.r=16")
    if (fixed := _without_slip(error.override)) is not None:
        return ConfigError(f"{error.override!r} cannot be read; write {fixed}")
    said = first_line(str(error.__cause__ or error.message)).partition(" expecting ")[0]
    reason = "" if "Exception" in said or "Error parsing" in said else f": {said}"
    return ConfigError(
        f"{error.override!r} cannot be read{reason}; put quotes around a value with special characters, "
        "e.g. 'data.path=\"my rows (1).jsonl\"'"
    )


def _without_slip(text: str) -> str | None:
    """Returns an override that cannot be read as it was probably meant; None: that is not known."""
    if len(parts := SEVERAL.split(text)) > 1:
        return " ".join(parts)
    key, _, value = text.partition("=")
    if ":" in key:
        return f"{key.replace(':', '.')}={value.strip(QUOTES)}"
    if items := re.fullmatch(r"\(([^\[\](){}=]+)\)|\[([^\[\](){}=]+)", value):
        return f"{key}=[{(items[1] or items[2]).replace(' ', '')}]"
    if re.fullmatch(r"[^\s,;=]+(;[^\s,;=]+)+", value):
        return f"-m {key}={value.replace(';', ',')}"
    if value.startswith("=") and (bare := value.lstrip("= ")):
        return f"{key}={bare}"
    if re.fullmatch(r"[^\[{(,]+(,[^\[{(,]+)*,", value):
        return f"{'-m ' if ',' in value[:-1] else ''}{key}={value[:-1]}"
    if items := re.fullmatch(r"\{([^:{}]+,[^:{}]+)\}", value):
        return f"-m {key}={items[1].replace(' ', '')}"
    return None


def below_null(overrides: Sequence[str]) -> ConfigError:
    """Returns the error for a key below one that is null, which OmegaConf reports without naming either."""
    text = next((text for text in overrides if text.lstrip("+~").startswith("hydra.")), "an override").lstrip("+~")
    key = text.partition("=")[0]
    if key.startswith("hydra.sweeper.params."):
        remedy = f"name the key itself with its values, e.g. -m {key.removeprefix('hydra.sweeper.params.')}=A,B"
    else:
        remedy = "leave it out"
    return ConfigError(f"{key} cannot be set: {key.rpartition('.')[0] or 'what holds it'} is null here; {remedy}")


def _file_of(name: str, config_dir: Path | str | None) -> str:
    """Returns the path of the YAML file that Hydra calls `name`, as far as it can be found."""
    for folder in (CONF_DIR, *([Path(config_dir)] if config_dir is not None else [])):
        if (file := folder / f"{name}.yaml").is_file():
            return str(file)
    return f"{name}.yaml"


def _not_utf8(config_dir: Path | str | None) -> str:
    for file in sorted(Path(config_dir).rglob("*.yaml")) if config_dir is not None else []:
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(file)
    return "a config file"


def _key_of(text: str) -> str:
    match = re.search(r"Could not (?:override|append)(?: to)?(?: config group)? '([^'@]+)", text)
    return match[1] if match else ""


def _no_place_for(key: str, where: str) -> ConfigError:
    if key.startswith("hydra."):
        return _unknown_hydra_key(key, where)
    if key in known_keys():
        return ConfigError(f"{key}{where} cannot be set here: what holds it is null, or another package is meant")
    return unknown_key(key, where)


def _unknown_hydra_key(key: str, where: str) -> ConfigError:
    """Returns the error for a key of Hydra's own, e.g. of a sweeper that was not chosen."""
    owner, _, name = key.rpartition(".")
    group = owner.removeprefix("hydra.")
    options = ConfigStore.instance().repo["hydra"].get(group, {})
    keys = {Path(option).stem: list(node.node or {}) for option, node in options.items()}
    if owners := [option for option, names in keys.items() if name in names]:
        return ConfigError(f"{key}{where} is a key of hydra/{group}={' and '.join(sorted(owners))}; choose that too")
    known = dict.fromkeys(other for names in keys.values() for other in names if not other.startswith("_"))
    near = [f"{owner}.{other}" for other in suggest(name, known)]
    return ConfigError(f"unknown key {key!r}{where}{mean(near)}; see `qlora --hydra-help`")


def _wrong_type(key: str, text: str, where: str) -> ConfigError:
    """Returns the error for a value that its field cannot hold: "KEY in FILE must be a whole number, got 'abc'"."""
    if not key and (match := re.search(r"not a subclass of (\w+)", text)):
        key = next((name for name in config_keys() if getattr(field_type(name), "__name__", "") == match[1]), "")
    value = _value_of(text)
    near = did_you_mean(value.strip("'"), field_type(key).__members__) if is_enum(field_type(key)) else ""
    typed = value.strip("'")
    if meant := known_value(key, typed) or (None if where else meant_value(key, typed)):
        near = f"; write {meant}"
    if not where and get_origin(field_type(key)) not in SHAPES and (items := LIST.fullmatch(value)):
        texts = items[1].replace("'", "").replace(" ", "")
        near = f"; one after the other: -m {key}={texts}"
    return ConfigError(f"{key}{where} must be {in_words(key)}, got {value}{near}")


def _value_of(text: str) -> str:
    """Returns the value that OmegaConf refused, from what it says."""
    if "is not Optional" in text:
        return "null"
    if said := re.search(r"[Vv]alue '(.*?)'(?: of type| is not|, expected)", text):
        return repr(said[1])
    if said := re.search(r"to string: '(.*)'|value: (.*)", text):
        return said[1] or said[2]
    if said := re.search(r"Error merging override [^=\s]+=(.*)", text):
        return said[1]
    said = re.search(r"(?:assign|assigned:) (\w+)", text)
    return {"int": "a number", "float": "a number", "str": "a text"}.get(said[1], said[1]) if said else "another type"


def first_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if "raised while composing config" not in line]
    line = re.sub(r"^In '[^']*': ", "", lines[0].strip()) if lines else ""
    return line.rstrip(".") or "invalid config"
