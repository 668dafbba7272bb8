"""What a file may set, and what Hydra may call: no file names code by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from qlora.config.schema import check_trusted
from qlora.config.trust import REMOTE_CODE, Trust
from qlora.errors import ConfigError
from qlora.secrets import hide
from qlora.text import brief_text

PLUGINS = ("launcher", "sweeper")
"""The groups whose options name a class of an installed package, which Hydra builds."""

OURS = ("hydra_plugins.qlora_sweep.", "hydra._internal.")
"""The modules of plugins whose keys are plain values, except those of `COMMANDS`."""

COMMANDS = ("setup", "additional_parameters", "ray")
"""Keys of our launchers whose values are run, or passed to a program that may run them."""

LOGGING = ("job_logging", "hydra_logging")

CALLED = (*LOGGING, "callbacks")
"""The parts of Hydra's node whose values are called, or name what is called."""

CODE_KEYS = ("_target_", "()", "class", "factory")
"""The keys whose values Hydra and Python's logging import and call."""

LOGGING_CODE = (
    *("logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    *(
        "colorlog.ColoredFormatter",
        "rich.logging.RichHandler",
        "qlora.runtime.console.OwnLines",
        "qlora.runtime.console.LogFile",
    ),
)

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
"""The keys of Hydra's own node that a file may set: nothing that is run, and no log outside the run's folder."""

FREE_TEXTS = (
    *("partition", "qos", "comment", "constraint", "exclude", "gres", "mem_per_gpu", "mem_per_cpu", "account", "name"),
)
"""The texts that a file may set for the launcher of another package, whose other texts may be commands."""


def check_file(file: str, config: Any, package: str, trust: Trust) -> None:
    """Raises `ConfigError` if a file sets a key that only the command line may set."""
    tree: Any = OmegaConf.to_container(config, resolve=False)
    own_defaults = f"{package}.defaults" if package else "defaults"
    for key, value in key_leaves(tree):
        if key == own_defaults or key.startswith(f"{own_defaults}["):
            continue
        first = re.split(r"[.\[]", key)[0]
        # Anything but a list of texts is refused where the config is read.
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
    """Raises `ConfigError` for a swept key that grants trust, or that is Hydra's own."""
    key = name.partition("=")[0].strip().lstrip("+~").partition("@")[0]
    if re.split(r"[.\[/]", key)[0] in ("hydra", "trusted") or key == REMOTE_CODE:
        raise ConfigError(
            f"{file} sweeps {key}, which is the command line's alone; if you know what it does, give it there"
        )


def _refusal(file: str, key: str, value: Any, what: str, remedy: str) -> ConfigError:
    text = brief_text(hide(str(value)))
    return ConfigError(
        f"{file} sets {key} ({text}), and {what} is said on the command line alone; if you know what it does, take it "
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
    """Returns whether one of our launchers or sweepers, or of Hydra's own, declares a key whose values are plain."""
    first = re.split(r"[.\[]", key)[0]
    if group == "launcher" and first in COMMANDS:
        return False
    return any(
        first in option.node
        for option in ConfigStore.instance().repo["hydra"].get(group, {}).values()
        if OmegaConf.is_dict(option.node) and str(option.node.get("_target_")).startswith(OURS)
    )


def key_leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from key_leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from key_leaves(value, f"{key}[{index}]")
    else:
        yield key, node
