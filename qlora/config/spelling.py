"""What a value looked like when it was typed: a text keeps its spelling, and a file must not mean another number.

Hydra and YAML read values before any field is known, so `model.revision=1e5` would become `100000.0`, and `0123456` in
a file `42798`. Here the command line's words are put into quotes where their field is a text, and a file's are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from antlr4 import InputStream
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from qlora.config.schema import HOLDS, MAPPINGS, Config
from qlora.errors import ConfigError

KeyPath = tuple[str, ...]
"""A full key, level by level; a name in a mapping may itself hold dots, and `[0]` is an element of a list."""

SWEPT = ("hydra", "sweeper", "params")
"""Where a file lists what to sweep: keys, and their values as the command line writes them."""
MANY = ("callbacks",)
"""The groups of which a run may have several options at once."""
ANYWHERE = ("recipe",)
"""The groups whose files set keys of all groups, wherever their head says they belong."""

WHOLE = re.compile(r"[+-]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][+]?[0-9]+")
"""A number that an exponent may make whole."""
LARGEST_EXPONENT = 30
"""No field holds a larger whole number; digits of 10^1000000 are not written out."""
OTHER_BASES = {
    re.compile(r"[+-]?0[0-7_]*[0-7][0-7_]*"): "an octal number",
    re.compile(r"[+-]?0[xX][0-9a-fA-F_]+"): "a hexadecimal number",
    re.compile(r"[+-]?0b[01_]+"): "a binary number",
    re.compile(r"[+-]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"): "a number to the base of 60",
}
SHAPES = {list: "a list such as [a,b]", dict: "a mapping such as {a: 1}"}
"""What holds other values, in words."""
KINDS = {"int": "a number", "float": "a number", "bool": "a boolean", "timestamp": "a date", "null": "null"}
"""What a tag of YAML is called."""


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
        steps = (_step(option, name) for option in _options(node))
        node = next((hint for hint in steps if hint is not None), None)
    options = [option for option in _options(node) if option is not NoneType]
    return options[0] if len(options) == 1 else node


def _options(hint: Any) -> tuple[Any, ...]:
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
    """Returns the annotations of a dataclass by field; where Hydra cannot express a type, what the field says it is."""
    hints = get_type_hints(owner)
    return hints | {item.name: item.metadata[HOLDS] for item in dataclasses.fields(owner) if HOLDS in item.metadata}


def _is_text(hint: Any) -> bool:
    return str in _options(hint)


def _whole(text: str) -> int | None:
    """Returns what `1e3` or `1.5e3` is as a whole number; None: it is none, or is not written with an exponent."""
    if not WHOLE.fullmatch(text):
        return None
    number = Decimal(text.replace("_", ""))
    if abs(number.adjusted()) > LARGEST_EXPONENT or number != number.to_integral_value():
        return None
    return int(number)


# The command line


READ_EARLY = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL, OverrideLexer.NULL)
"""Words that Hydra reads as something else than text."""
CHOICE = re.compile(r"\A([^=]*=)\s*choice\s*\((.*)\)\s*\Z", re.DOTALL)
OPENING = (OverrideLexer.BRACKET_OPEN, OverrideLexer.BRACE_OPEN, OverrideLexer.POPEN)
CLOSING = (OverrideLexer.BRACKET_CLOSE, OverrideLexer.BRACE_CLOSE, OverrideLexer.PCLOSE)
NUMERIC = ("int", "float", "bool", "range", "interval")
"""Functions of Hydra's grammar whose arguments are numbers, whatever the field is."""


def keep_spelling(overrides: Sequence[str]) -> list[str]:
    """Returns overrides that mean what they look like: `name=1e5` becomes `name='1e5'`, `trainer.max_steps=1e3` 1000.

    All values of a sweep, of lists and of mappings are looked at; what needs no change stays as it is.
    """
    return [_keep_one(text) for text in overrides]


def _keep_one(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not equals or key.startswith("~"):
        return text
    lexer = OverrideLexer(InputStream(text))
    lexer.removeErrorListeners()  # the parser says what is wrong
    tokens = [token for token in lexer.getAllTokens() if token.start > len(key)]
    name = key.lstrip("+").partition("@")[0]
    changed, end, holds_null = "", 0, False
    for token, level in _single_words(tokens, _Level(split_key("source" if name == "from" else name))):
        changed += text[end : token.start] + _spell(token.text, level)
        end = token.stop + 1
        holds_null |= token.type == OverrideLexer.NULL and level.function == "choice"
    changed += text[end:]
    # Hydra's functions take no null, and its lists of values do: `choice(null,1)` is `null,1`.
    return CHOICE.sub(r"\1\2", changed) if holds_null else changed


@dataclass
class _Level:
    """Where a value stands: at the top of an override, or inside a list, a mapping or the arguments of a function."""

    path: KeyPath
    kind: int | None = None
    """The token that opened it; None: the top."""
    function: str = ""
    key: str | None = None
    """In a mapping, the key of the value that comes."""
    is_named: bool = False
    """Whether the value that comes is an argument with a name, as `reverse=true`."""

    @property
    def awaits_key(self) -> bool:
        return self.kind == OverrideLexer.BRACE_OPEN and self.key is None

    @property
    def value_path(self) -> KeyPath:
        """The key that the value that comes belongs to."""
        if self.kind == OverrideLexer.BRACKET_OPEN:
            return (*self.path, "[]")
        return (*self.path, self.key) if self.key is not None else self.path


def _single_words(tokens: Sequence[Any], top: _Level) -> Iterator[tuple[Any, _Level]]:
    """Yields the tokens that Hydra reads early and that are a whole value, each with its level.

    Several tokens side by side (`2024-01-02`) are a text for Hydra, which keeps their spelling.
    """
    levels, run = [top], list[Any]()
    for token in [*tokens, None]:
        level, kind = levels[-1], token.type if token is not None else None
        if kind == OverrideLexer.COLON and level.awaits_key:
            level.key, run = "".join(word.text for word in run), []
            continue
        if kind not in (None, OverrideLexer.COMMA, OverrideLexer.EQUAL, *OPENING, *CLOSING):
            run += [token] if kind != OverrideLexer.WS else []
            continue
        if len(run) == 1 and run[0].type in READ_EARLY and not (level.awaits_key or level.is_named):
            yield run[0], level
        if kind in OPENING:
            levels.append(_Level(level.value_path, kind, function=run[0].text if run else level.function))
        elif kind in CLOSING and len(levels) > 1:
            levels.pop()
        elif kind == OverrideLexer.COMMA:
            level.key = None
        level.is_named, run = kind == OverrideLexer.EQUAL, []


def _spell(word: str, level: _Level) -> str:
    if word.lower() == "null":
        return word
    hint = type_at(level.value_path)
    if (_is_text(hint) or _is_choice(level)) and level.function not in NUMERIC:
        return f"'{word}'"
    number = _whole(word) if hint is int else None
    return word if number is None else str(number)


def _is_choice(level: _Level) -> bool:
    """Returns whether a value is the name of an option of a group: ours have a dataclass, others are not known here."""
    if len(level.path) != 1 or level.value_path not in (level.path, (*level.path, "[]")):
        return False
    hint = type_at(level.path)
    return hint is None or dataclasses.is_dataclass(hint) or level.path[0] in MANY


# Files


@dataclass(frozen=True)
class _Scalar:
    """A value in a file, with the key that it sets."""

    path: KeyPath
    node: yaml.ScalarNode
    is_key: bool = False
    """Whether it is itself the key of a mapping, of what `path` holds."""


class SpelledSource(FileConfigSource):
    """Hydra's reader of YAML files, which refuses what YAML reads otherwise than it looks."""

    shipped: Path
    """The folder with our own options, which a test looks through."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Returns what Hydra reads, whole numbers such as `1e3` made whole; raises `ConfigError` with file and line."""
        result = super().load_config(config_path)
        file = Path(self.path) / self._normalize_file_name(config_path)
        with file.open(encoding="utf-8-sig") as stream:  # Hydra's own reader sees no header behind a byte order mark
            result.header = self._get_header_dict(stream.read(512))
        if not file.is_relative_to(self.shipped):
            read_spellings(file, config_path, result)
        return result


@contextmanager
def reading_spellings(shipped: Path) -> Iterator[None]:
    """Lets Hydra read files by `SpelledSource` inside the block."""
    Plugins.instance()  # registers Hydra's own reader, once
    SpelledSource.shipped = shipped
    types = SourcesRegistry.instance().types
    before = types[SpelledSource.scheme()]
    types[SpelledSource.scheme()] = SpelledSource
    try:
        yield
    finally:
        types[SpelledSource.scheme()] = before


class _Loader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's loader, which leaves out that other readers of YAML see dates."""


_Loader.yaml_implicit_resolvers = {
    first: [*resolvers, *(resolver for resolver in yaml.SafeLoader.yaml_implicit_resolvers.get(first, [])
                          if resolver[0].endswith(":timestamp"))]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}  # fmt: skip


def read_spellings(file: Path, config_path: str, result: ConfigResult) -> None:
    """Checks the spelling of every value in a file of options, and makes numbers whole that are, in `result`."""
    with file.open(encoding="utf-8-sig") as stream:
        root = yaml.compose(stream, Loader=_Loader)
    group = config_path.removesuffix(".yaml").rpartition("/")[0]
    _check_head(file, group, result.header.get("package"))
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file} must hold keys and values such as `seed: 1`, got {_shown(root)}")
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
    """Raises `ConfigError` for a file whose keys are those of all groups, if its first line does not say so."""
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
    """Says where a node was written; the one that an `@package` makes around a file has no line."""
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
        raise ConfigError(f"{where} must be {needed}, got {_shown(node)}")


def shape_in_words(hint: Any, key: str) -> str:
    """Says what a field that holds other values takes: "a list such as [a,b]"."""
    return f"a mapping such as {MAPPINGS[key]}" if key in MAPPINGS else SHAPES[get_origin(hint)]


def _shown(node: yaml.Node) -> str:
    """Returns a value of a file in one line, as it could be written there."""
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_shown, node.value))}]"
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{_shown(key)}: {_shown(value)}' for key, value in node.value)}}}"
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
    if _is_text(hint) and tag != "null":
        raise ConfigError(f"{where} must be a text, and {_made(node, tag)}; {_quotes(node)}")
    if isinstance(hint, type) and issubclass(hint, Enum) and tag != "null":
        raise ConfigError(f"{where} must be one of {', '.join(hint.__members__)}, and {_made(node, tag)}")
    if tag in ("int", "float") and (base := _other_base(node.value)) is not None:
        value = _value_of(node)
        raise ConfigError(
            f"{where}: YAML reads {node.value} as {base} ({value}); write decimal digits, or put quotes around a text"
        )
    return _whole(node.value) if hint is int and tag == "float" else None


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


def dotted(path: KeyPath) -> str:
    """Returns a key as people write it."""
    names = ["from", *path[1:]] if path[:1] == ("source",) else list(path)
    return ".".join(names).replace(".[", "[")


def _make_whole(config: DictConfig, path: KeyPath, number: int) -> None:
    """Sets a whole number in place of a float, unless the file itself has overridden it (`<<: *base`)."""
    node: Any = config
    for name in path[:-1]:
        node = node[int(name[1:-1]) if name.startswith("[") else name]
    last = int(path[-1][1:-1]) if path[-1].startswith("[") else path[-1]
    if isinstance(node[last], float) and node[last] == number:
        node[last] = number


def _spell_sweeps(config: DictConfig, top: KeyPath) -> None:
    """Puts quotes around the texts among the values that a file lists to be swept."""
    if top != SWEPT[: len(top)]:
        return
    params = OmegaConf.select(config, ".".join(SWEPT[len(top) :])) if top != SWEPT else config
    for key, values in params.items() if isinstance(params, DictConfig) else ():
        if isinstance(key, str) and isinstance(values, str):
            params[key] = keep_spelling([f"{key}={values}"])[0].partition("=")[2]


def _check_defaults(file: Path, parent: str, entries: yaml.SequenceNode) -> None:
    """Raises `ConfigError` for an entry of a defaults list that names no option, several, or another place."""
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


def takes_one_option(group: str, shipped: Path) -> bool:
    """Returns whether a run has one option of a group: of each of ours and of Hydra's, but for `callbacks`."""
    return group not in MANY and (group.startswith("hydra/") or (shipped / group).is_dir())
