"""Who may name code: the person at the command line, and nobody's file.

Whatever Hydra composes for this project passes `CheckedLoader`: a file may set what is free in a file, trust is read
from the overrides alone, and what Hydra itself would call is looked up among the plugins that are installed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import hydra
from hydra._internal import hydra as hydra_main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from qlora.config.schema import check_plain, check_trusted
from qlora.errors import ConfigError, UserError
from qlora.secrets import hide
from qlora.text import brief_text

TESTED_HYDRA = "1.3.8"
"""The version whose ways to code are closed here; another one may have others."""
VARIABLE = "QLORA_TRUSTED"
"""The environment variable that holds what `trusted` does, and `model.trust_remote_code`, between commas."""
REMOTE_CODE = "model.trust_remote_code"

PLUGINS = ("launcher", "sweeper")
"""What Hydra builds of an installed package; an option of these groups names its class."""
OURS = ("hydra_plugins.qlora_sweep.", "hydra._internal.")
"""Where the classes of plugins lie whose keys are plain, but for these."""
COMMANDS = ("setup", "additional_parameters", "ray")
"""Keys of our launchers that run what they hold, or hand it to somebody who may."""
LOGGING = ("job_logging", "hydra_logging")
CALLED = (*LOGGING, "callbacks")
"""Of Hydra's node what is called, or names what is."""
CODE_KEYS = ("_target_", "()", "class", "factory")
"""The keys by which Hydra and Python's logging call what their value names."""
LOGGING_CODE = (
    *("logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    *(
        "colorlog.ColoredFormatter",
        "rich.logging.RichHandler",
        "qlora.runtime.console.OwnLines",
        "qlora.runtime.console.LogFile",
    ),
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
RESOLVERS = ("oc.*", "hydra", "now", "python_version", "qlora.folder", "qlora.job_name")
"""The functions that a config's `${NAME:...}` may call: OmegaConf's, Hydra's and ours."""

FREE = (
    *("mode", "verbose", "job.chdir", "job.config.*"),
    "callbacks.*",  # each of a package that is trusted
    *(
        f"{node}.{key}"
        for node in LOGGING
        for key in (
            *("version", "disable_existing_loggers", "root", "root.level", "root.handlers*"),
            *("loggers.*.level", "loggers.*.propagate", "loggers.*.handlers*"),
            *(f"formatters.*.{name}" for name in ("format", "datefmt", "style")),
            *(f"handlers.*.{name}" for name in ("level", "formatter", "filters*", "stream")),
        )
    ),
)
"""What of Hydra's own node a file may set: nothing that is run, and no place outside the run's folder to log to."""
FREE_TEXTS = (
    *("partition", "qos", "comment", "constraint", "exclude", "gres", "mem_per_gpu", "mem_per_cpu", "account", "name"),
)
"""The texts that a file may give the launcher of another package; its numbers are free. Others may be commands."""


@dataclass(frozen=True)
class Trust:
    """What the overrides of a command trust."""

    names: tuple[str, ...] = ()
    """Packages, and full keys that a file may set all the same."""
    remote_code: bool = False

    def covers(self, key: str) -> bool:
        """Returns whether a file may set `key`, of which the command names this or what holds it."""
        return any("." in name and (key == name or key.startswith((f"{name}.", f"{name}["))) for name in self.names)


def check_version() -> None:
    """Raises `ConfigError` for another Hydra than the one whose ways to code are closed."""
    if hydra.__version__ != TESTED_HYDRA:
        raise ConfigError(
            f"hydra-core {hydra.__version__} is installed, and what a config may name is tested with {TESTED_HYDRA}: "
            f"pip install hydra-core=={TESTED_HYDRA}"
        )


def add_environment(overrides: Sequence[str], parsed: Sequence[Override]) -> list[str]:
    """Returns overrides with what QLORA_TRUSTED says beside them; to do so again changes nothing."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    packages = [name for name in names if name != REMOTE_CODE]
    given = {override.key_or_group: override for override in parsed}
    words, typed = list(overrides), given.get("trusted")
    if packages and not (typed is not None and typed.is_sweep_override()):
        known = list(_texts(typed.value())) if typed is not None else []
        if added := [name for name in packages if name not in known]:
            words.append(f"trusted={json.dumps([*known, *added], ensure_ascii=False)}")
    if REMOTE_CODE in names and REMOTE_CODE not in given:
        words.append(f"{REMOTE_CODE}=true")
    return words


def read_trust(parsed: Sequence[Override]) -> Trust:
    """Returns what overrides trust; raises `ConfigError` where one leaves that to an interpolation."""
    names: list[str] = []
    remote_code = False
    for override in parsed:
        key = override.key_or_group
        if key not in ("trusted", REMOTE_CODE) or override.is_delete():
            continue
        values = list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]
        if any("${" in text for value in values for text in _texts(value)):
            raise ConfigError(f"{override.input_line}: write what you trust itself, not a ${{...}}")
        if key == "trusted":
            names = [text for value in values for text in _texts(value)]
        else:
            remote_code = any(str(_plain(value)).lower() in ("true", "yes", "on", "1") for value in values)
    return Trust(tuple(names), remote_code)


def _texts(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        yield from _texts(item) if isinstance(item, list) else [str(_plain(item))]


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


# What Hydra loads


class CheckedLoader(ConfigLoaderImpl):
    """Hydra's composer, which refuses files that name code; other projects' configs it composes as ever."""

    shipped: Path
    """The folder with our own options, by which a config is known to be ours."""
    trust = Trust()

    def _load_configuration_impl(self, config_name: Any, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        if not self._is_ours():
            return super()._load_configuration_impl(config_name, overrides, *args, **kwargs)
        with fixed_resolvers():
            self.trust = read_trust(self.parser.parse_overrides(overrides))
            composed = super()._load_configuration_impl(config_name, overrides, *args, **kwargs)
            check_composed(composed, self.trust)
        return composed

    @property
    def parser(self) -> Any:
        """Hydra's reader of overrides."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        return OverridesParser.create(config_loader=self)

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        if self._is_ours() and {"", ".", ".."} & {*default.config_path.split("/")}:
            raise ConfigError(
                f"{brief_text(default.config_path)} names an option outside the folders of options; write GROUP/NAME, "
                "and add its folder with --config-dir FOLDER"
            )
        loaded = super()._load_single_config(default, repo)
        if self._is_ours() and not self._is_installed(loaded):
            where = f"{loaded.path.removeprefix('file://')}/{default.config_path.removesuffix('.yaml')}.yaml"
            check_file(where, loaded.config, default.package or "", self.trust)
        return loaded

    def _is_ours(self) -> bool:
        return any(str(item.path) == f"file://{self.shipped}" or str(item.path) == str(self.shipped)
                   for item in self.config_search_path.get_path())  # fmt: skip

    def _is_installed(self, loaded: ConfigResult) -> bool:
        """Returns whether an option is shipped, or registered by a package that is installed."""
        return loaded.path == f"file://{self.shipped}" or loaded.path.startswith(
            ("structured://", "pkg://hydra.", "pkg://hydra_plugins.")
        )


def install(shipped: Path) -> None:
    """Lets Hydra compose by `CheckedLoader`; `shipped` is the folder with our own options."""
    CheckedLoader.shipped = shipped
    hydra_main.ConfigLoaderImpl = CheckedLoader  # type: ignore[misc]


def check_file(file: str, config: Any, package: str, trust: Trust) -> None:
    """Raises `ConfigError` if a file sets a key that is the command line's."""
    tree: Any = OmegaConf.to_container(config, resolve=False)
    own_defaults = f"{package}.defaults" if package else "defaults"
    for key, value in _leaves(tree):
        if key == own_defaults or key.startswith(f"{own_defaults}["):
            continue
        first = re.split(r"[.\[]", key)[0]
        # What is no list of texts is refused as such, where the config is read.
        if re.fullmatch(r"trusted(\[\d+\])?", key) and value not in (None, "???"):
            names = tree["trusted"] if isinstance(tree.get("trusted"), list) else [value]
            raise _refusal(file, "trusted", value, "whom a config trusts", f"trusted=[{','.join(map(str, names))}]")
        if key in (REMOTE_CODE, "model") and value not in (None, False, "???") and not trust.covers(key):
            raise _refusal(file, key, value, "whether a model's own code runs", f"{REMOTE_CODE}=true")
        if first == "hydra" and not trust.covers(key):
            _check_hydra_key(file, key, value, trust)


def _check_hydra_key(file: str, key: str, value: Any, trust: Trust) -> None:
    name = key.removeprefix("hydra.")
    if name.startswith("sweeper.params."):
        _check_param(file, name.removeprefix("sweeper.params."))
    elif name.startswith(("sweeper.params", *CALLED)) and isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{file} sets {key} ({brief_text(hide(value))}), which is looked at before a ${{...}} in it has a value; "
            "write the value itself, or give it on the command line"
        )
    elif name.startswith(LOGGING) and name.rpartition(".")[2] in CODE_KEYS:
        if value not in LOGGING_CODE:
            check_trusted(key, str(value), trust.names)
    elif not _is_free(name, value):
        plain = re.sub(r"[^\w.-].*", "", key).rstrip(".")
        raise _refusal(file, key, value, "what Hydra runs or writes", f"{plain}=VALUE, or trusted=[{plain}],")


def _check_param(file: str, name: str) -> None:
    """Raises `ConfigError` for a swept key that would be trust, or Hydra's own."""
    key = name.partition("=")[0].strip().lstrip("+~").partition("@")[0]
    if re.split(r"[.\[/]", key)[0] in ("hydra", "trusted") or key == REMOTE_CODE:
        raise ConfigError(
            f"{file} sweeps {key}, which is the command line's alone; if you know what it does, give it there"
        )


def _refusal(file: str, key: str, value: Any, what: str, remedy: str) -> ConfigError:
    shown = brief_text(hide(str(value)))
    return ConfigError(
        f"{file} sets {key} ({shown}), and {what} is said on the command line alone; if you know what it does, take it "
        f"out of the file and add {remedy} there"
    )


def _is_free(name: str, value: Any) -> bool:
    """Returns whether a file may set `hydra.NAME`."""
    group, _, key = name.partition(".")
    if group not in PLUGINS:
        return any(fnmatchcase(name, pattern) for pattern in FREE)
    is_one_line = isinstance(value, str) and "\n" not in value and "${" not in value
    if isinstance(value, str) and group == "launcher" and not is_one_line:  # a script is made of some of them
        return False
    if key == "_target_" or (_is_declared_by_us(group, key) and "_target_" not in key):
        return True  # a class that is not a plugin's is refused as a value
    if isinstance(value, str):
        return is_one_line and (key in FREE_TEXTS or (key, value) == ("ray.init.address", "auto"))
    return "[" not in key and (value is None or isinstance(value, bool | int | float))


def _is_declared_by_us(group: str, key: str) -> bool:
    """Returns whether the launchers or sweepers of ours, or those of Hydra itself, have a key that is plain."""
    first = re.split(r"[.\[]", key)[0]
    if group == "launcher" and first in COMMANDS:
        return False
    return any(
        first in option.node
        for option in ConfigStore.instance().repo["hydra"].get(group, {}).values()
        if OmegaConf.is_dict(option.node) and str(option.node.get("_target_")).startswith(OURS)
    )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, node


# What was composed


def check_composed(composed: DictConfig, trust: Trust) -> None:
    """Raises `ConfigError` if a composed config trusts what the command does not, or if Hydra's node names code."""
    _check_trust(composed, trust)
    _check_plugins(composed.hydra)
    _check_lines(composed.hydra, trust)
    for name, node in _resolved(composed.hydra, "callbacks").items():
        key = f"hydra.callbacks.{name}"
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise ConfigError(f"{key} must be a mapping with a _target_ (module.Class) and its arguments, got {node!r}")
        check_trusted(f"{key}._target_", node["_target_"], trust.names)
        check_plain(key, {name: value for name, value in node.items() if name != "_target_"})
    for node in LOGGING:
        _check_logging(composed.hydra, node, trust)


def _check_trust(composed: DictConfig, trust: Trust) -> None:
    """Raises `ConfigError` for trust that comes from elsewhere, such as `model: ${callbacks.x}`."""
    try:
        names = OmegaConf.select(composed, "trusted") or []
        remote_code = OmegaConf.select(composed, REMOTE_CODE)
    except OmegaConfBaseException:
        return  # said where the config is read
    if unknown := [name for name in names if isinstance(name, str) and name not in trust.names]:
        raise ConfigError(
            f"trusted={unknown}: whom a config trusts is said on the command line alone, as trusted=[...]"
        )
    if remote_code and not trust.remote_code and not trust.covers(REMOTE_CODE):
        raise ConfigError(f"{REMOTE_CODE}=true comes from a file, and it is the command line's alone; give it there")


def _check_plugins(node: DictConfig) -> None:
    plugins = Plugins.instance().class_name_to_class
    for group in PLUGINS:
        for key, value in _leaves(_resolved(node, group), f"hydra.{group}"):
            if key == f"hydra.{group}._target_" and value not in plugins:
                raise ConfigError(
                    f"{key}={value} is no {group} of Hydra or of an installed package, which trusted=[...] does not "
                    f"change; choose one with hydra/{group}=NAME"
                )
            if key.rpartition(".")[2] == "_target_" and key != f"hydra.{group}._target_":
                raise ConfigError(
                    f"{key}={value}: an argument is a plain value and names no code, whatever trusted=[...] holds; "
                    "take it out"
                )


def _check_lines(node: DictConfig, trust: Trust) -> None:
    """Raises `ConfigError` for a text with line breaks among those that launchers write into the scripts of jobs."""
    texts = [(f"hydra.{key}", _select(node, key)) for key in ("job.name", "run.dir", "sweep.dir", "sweep.subdir")]
    for key, value in (*texts, *_leaves(_resolved(node, "launcher"), "hydra.launcher")):
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value) and not trust.covers(key):
            raise ConfigError(
                f"{key} holds a line break or another control character ({value[:60]!r}), which a launcher would write "
                "into a script; take it out"
            )


def _select(node: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(node, key)
    except (OmegaConfBaseException, UserError):
        return None  # known when a job runs, or said where the config is read


def _check_logging(node: DictConfig, name: str, trust: Trust) -> None:
    config = _resolved(node, name)
    if config and "root" not in config:
        raise ConfigError(
            f"hydra.{name} has no root, which Hydra reads; add root: {{level: INFO, handlers: [console]}}, or leave "
            f"hydra/{name}=qlora as it is"
        )
    for key, value in _leaves(config, f"hydra.{name}"):
        if not isinstance(value, str):
            continue
        if key.rpartition(".")[2] in CODE_KEYS and value not in LOGGING_CODE:
            check_trusted(key, value.removeprefix("ext://"), trust.names)
        elif re.match(r"[a-z]+://", value) and value.partition("://")[0] in ("ext", "cfg") and value not in STREAMS:
            check_trusted(key, value.partition("://")[2], trust.names)


def _resolved(node: DictConfig, name: str) -> dict[str, Any]:
    """Returns a part of Hydra's node with its interpolations resolved, but for those that a job alone can."""
    return _resolve(node[name]) if OmegaConf.is_dict(node._get_node(name)) or node[name] is not None else {}


def _resolve(node: Any) -> Any:
    if OmegaConf.is_dict(node):
        return {str(key): _resolve_item(node, key) for key in node}
    if OmegaConf.is_list(node):
        return [_resolve_item(node, index) for index in range(len(node))]
    return node


def _resolve_item(node: Any, key: Any) -> Any:
    try:
        return _resolve(node[key])
    except OmegaConfBaseException:
        return None  # known when a job runs


# Interpolations


@contextmanager
def fixed_resolvers() -> Iterator[None]:
    """Hides the functions that others registered for `${NAME:...}` inside the block."""
    before = BaseContainer._resolvers
    fixed = {name: resolver for name, resolver in before.items() if _is_fixed(name)}
    BaseContainer._resolvers = fixed
    try:
        yield
    finally:
        BaseContainer._resolvers = {**before, **fixed}


def _is_fixed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in RESOLVERS)
