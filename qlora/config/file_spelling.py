"""A file of options must mean what it looks like: values that YAML reads as something else are refused.

YAML would read `0123456` as 42798 and `2024-01-02` as a date; the error names the file, the line and the key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from qlora.config.fields import SHAPES, SWEPT, KeyPath, dotted, shape_in_words, split_key, type_at
from qlora.config.options import ANYWHERE, takes_one_option
from qlora.config.override_spelling import is_text, is_whole, keep_spelling, whole_number
from qlora.errors import ConfigError
from qlora.upstream.hydra import FileSource, reading_files_with
from qlora.upstream.omegaconf import get_yaml_loader

OTHER_BASES = {
    re.compile(r"[+-]?0[0-7_]*[0-7][0-7_]*"): "an octal number",
    re.compile(r"[+-]?0[xX][0-9a-fA-F_]+"): "a hexadecimal number",
    re.compile(r"[+-]?0b[01_]+"): "a binary number",
    re.compile(r"[+-]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"): "a number to the base of 60",
}

KINDS = {"int": "a number", "float": "a number", "bool": "a boolean", "timestamp": "a date", "null": "null"}
"""YAML's tags, in words."""


@dataclass(frozen=True)
class _Scalar:
    """A value in a file, with the key that it sets."""

    path: KeyPath
    node: yaml.ScalarNode
    is_key: bool = False
    """Whether it is a key of the mapping at `path`, and no value."""


class SpelledSource(FileSource):
    """Hydra's reader of YAML files, which refuses a value that YAML reads as something else than it looks like."""

    shipped: Path
    """The folder with our own options, which a test checks instead."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Returns what Hydra reads, whole numbers such as `1e3` made whole; raises `ConfigError` with file and line."""
        result = super().load_config(config_path)
        file = self.file_of(config_path)
        result.header = self.read_header(file)
        if not file.is_relative_to(self.shipped):
            read_spellings(file, config_path, result)
        return result


@contextmanager
def reading_spellings(shipped: Path) -> Iterator[None]:
    """Lets Hydra read files by `SpelledSource` inside the block."""
    SpelledSource.shipped = shipped
    with reading_files_with(SpelledSource):
        yield


class _Loader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's loader, which also recognises the dates that other readers of YAML see."""


_Loader.yaml_implicit_resolvers = {
    first: [*resolvers, *(resolver for resolver in yaml.SafeLoader.yaml_implicit_resolvers.get(first, [])
                          if resolver[0].endswith(":timestamp"))]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}  # fmt: skip


def read_spellings(file: Path, config_path: str, result: ConfigResult) -> None:
    """Checks the spelling of every value in a file of options, and makes numbers such as `1e3` whole in `result`."""
    with file.open(encoding="utf-8-sig") as stream:
        root = yaml.compose(stream, Loader=_Loader)
    group = config_path.removesuffix(".yaml").rpartition("/")[0]
    _check_head(file, group, result.header.get("package"))
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file} must hold keys and values such as `seed: 1`, got {_as_written(root)}")
    if root is None or not isinstance(result.config, DictConfig):
        return
    package = result.header.get("package") or group.replace("/", ".")
    top = () if package == "_global_" or group in ANYWHERE else split_key(package)
    for key_node, value in root.value:
        if key_node.value == "defaults" and isinstance(value, yaml.SequenceNode):
            _check_defaults(file, group, value)
    body = yaml.MappingNode(root.tag, [pair for pair in root.value if pair[0].value != "defaults"])
    _check_shape(file, body, top)
    for scalar in _scalars(body, top):
        if (number := _check(file, scalar)) is not None:
            _make_whole(result.config, scalar.path[len(top) :], number)
    if not top and "from" in result.config:  # no field of a Python class can be called so
        result.config["source"] = result.config.pop("from")
    _spell_sweeps(result.config, top)


def _check_head(file: Path, group: str, package: str | None) -> None:
    """Raises `ConfigError` for a file that sets keys of all groups without saying so in its first line."""
    if package is not None or not group or group in ANYWHERE:
        return
    if type_at((group.partition("/")[0],)) is None:
        raise ConfigError(
            f"{file}: an option of {group} sets keys of all groups; put `# @package _global_` into its first line"
        )


def _check_shape(file: Path, node: yaml.Node, path: KeyPath) -> None:
    """Raises `ConfigError` for a list or a mapping in place of the other, for a key with dots, and for null as text."""
    hint = type_at(path)
    if path and path[0] != "hydra":  # whose own types say what a run has, and `params` what is swept
        _check_kind(file, node, path, hint)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_shape(file, item, (*path, f"[{index}]"))
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = "source" if not path and key_node.value == "from" else key_node.value
        if key_node.tag.endswith(":merge") or not isinstance(name, str):
            continue
        first, dot, rest = name.partition(".")
        if dot and (not path or dataclasses.is_dataclass(hint)) and type_at((*path, first)) is not None:
            raise ConfigError(
                f"{_at(file, key_node)}: {name} is written as one key; nest it: "
                f"{first}: {{{rest.replace('.', ': {')}: VALUE{'}' * rest.count('.')}}}"
            )
        _check_shape(file, value, (*path, name))


def _at(file: Path, node: yaml.Node) -> str:
    """Returns the file and line of a node; the node that an `@package` puts around a file has no line."""
    return f"{file}, line {node.start_mark.line + 1}" if node.start_mark is not None else str(file)


def _check_kind(file: Path, node: yaml.Node, path: KeyPath, hint: Any) -> None:
    is_null = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")
    is_later = isinstance(node, yaml.ScalarNode) and ("${" in node.value or node.value == "???")
    owner = type_at(path[:-1])
    needed = None
    if is_null and get_origin(owner) in SHAPES and get_args(owner)[-1] is str:
        needed = "a text"
    elif not (is_null or is_later) and get_origin(hint) in SHAPES:
        node_kind = {yaml.SequenceNode: list, yaml.MappingNode: dict}.get(type(node))
        needed = shape_in_words(hint, dotted(path)) if node_kind is not get_origin(hint) else None
    if needed is not None:
        where = f"{_at(file, node)}: {dotted(path)}"
        raise ConfigError(f"{where} must be {needed}, got {_as_written(node)}")


def _as_written(node: yaml.Node) -> str:
    """Returns a value of a file on one line, as YAML writes it."""
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_as_written, node.value))}]"
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{_as_written(key)}: {_as_written(value)}' for key, value in node.value)}}}"
    return str(node.value) or "null"


def _scalars(node: yaml.Node, path: KeyPath) -> Iterator[_Scalar]:
    if isinstance(node, yaml.ScalarNode):
        yield _Scalar(path, node)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _scalars(item, (*path, f"[{index}]"))
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            if key_node.tag.endswith(":merge"):
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _scalars(merged, path)
                continue
            if isinstance(key_node, yaml.ScalarNode):
                yield _Scalar(path, key_node, is_key=True)
                name = "source" if not path and key_node.value == "from" else key_node.value
                yield from _scalars(value, (*path, name))


def _check(file: Path, scalar: _Scalar) -> int | None:
    """Returns the whole number that a field gets in place of `1e3`; raises `ConfigError` for a wrong spelling."""
    node, tag = scalar.node, scalar.node.tag.rpartition(":")[2]
    if node.style is not None or tag not in KINDS or not node.value:
        return None
    where = f"{_at(file, node)}: {dotted(scalar.path)}"
    hint = type_at(scalar.path)
    if scalar.is_key:
        if get_origin(hint) is dict:
            raise ConfigError(f"{where}: {_made(node, tag)}, and a key is a text; {_quotes(node)}")
        return None
    if is_text(hint) and tag != "null":
        raise ConfigError(f"{where} must be a text, and {_made(node, tag)}; {_quotes(node)}")
    if isinstance(hint, type) and issubclass(hint, Enum) and tag != "null":
        raise ConfigError(f"{where} must be one of {', '.join(hint.__members__)}, and {_made(node, tag)}")
    if tag in ("int", "float") and (base := _other_base(node.value)) is not None:
        value = _value_of(node)
        raise ConfigError(
            f"{where}: YAML reads {node.value} as {base} ({value}); write decimal digits, or put quotes around a text"
        )
    return whole_number(node.value) if is_whole(hint) and tag == "float" else None


def _made(node: yaml.ScalarNode, tag: str) -> str:
    value = _value_of(node)
    said = str(value).lower() if isinstance(value, bool) else value
    return f"YAML reads {node.value} as {KINDS[tag]}" + (f" ({said})" if str(said) != node.value else "")


def _quotes(node: yaml.ScalarNode) -> str:
    return f'put quotes around it: "{node.value}"'


def _value_of(node: yaml.ScalarNode) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    finally:
        loader.dispose()


def _other_base(text: str) -> str | None:
    return next((name for pattern, name in OTHER_BASES.items() if pattern.fullmatch(text)), None)


def _make_whole(config: DictConfig, path: KeyPath, number: int) -> None:
    """Sets a whole number in place of a float, unless the file itself overrides it (`<<: *base`)."""
    node: Any = config
    for name in path[:-1]:
        node = node[int(name[1:-1]) if name.startswith("[") else name]
    last = int(path[-1][1:-1]) if path[-1].startswith("[") else path[-1]
    if isinstance(node[last], float) and node[last] == number:
        node[last] = number


def _spell_sweeps(config: DictConfig, top: KeyPath) -> None:
    """Quotes the texts among the values that a file sweeps."""
    if top != SWEPT[: len(top)]:
        return
    params = OmegaConf.select(config, ".".join(SWEPT[len(top) :])) if top != SWEPT else config
    for key, values in params.items() if isinstance(params, DictConfig) else ():
        if isinstance(key, str) and isinstance(values, str):
            params[key] = keep_spelling([f"{key}={values}"])[0].partition("=")[2]


def _check_defaults(file: Path, parent: str, entries: yaml.SequenceNode) -> None:
    """Raises `ConfigError` for an entry of a defaults list that names no option, several, or another package."""
    pairs = (pair for entry in entries.value if isinstance(entry, yaml.MappingNode) for pair in entry.value)
    overridden = dict[str, int]()
    for key_node, option in pairs:
        name, _, package = key_node.value.split()[-1].partition("@")
        group: str = name.lstrip("/") if name.startswith("/") or not parent else f"{parent}/{name}"
        where = f"{_at(file, key_node)}: {group}"
        if package and package != group.replace("/", "."):
            raise ConfigError(
                f"{where}@{package}: an option stays in its group; leave the @{package} out, and write "
                f"`# @package {package}` at the top of the file that belongs elsewhere"
            )
        if key_node.value.split()[0] == "override":  # Hydra takes the last of them
            if group in overridden:
                raise ConfigError(
                    f"{where} is overridden in line {overridden[group]} already, and one option would be lost; leave "
                    "one of the two lines out"
                )
            overridden[group] = key_node.start_mark.line + 1
        if isinstance(option, yaml.SequenceNode) and takes_one_option(group, SpelledSource.shipped):
            raise ConfigError(f"{where} takes one option, and this is a list; name one of them")
        for node in option.value if isinstance(option, yaml.SequenceNode) else [option]:
            tag = node.tag.rpartition(":")[2]
            if isinstance(node, yaml.ScalarNode) and node.style is None and tag in KINDS and tag != "null":
                raise ConfigError(f"{where} must be the name of an option, and {_made(node, tag)}; {_quotes(node)}")
