"""The code that a config may name: a function as `module:function`, a class as `_target_`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qlora.config.registries.installed import installed_names
from qlora.errors import ConfigError

FUNCTION_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The user's own function, as `module:function`."""

CALLBACK_GROUP = "qlora.callbacks"
"""The entry points by which an installed package adds trainer callbacks."""

CALLBACK_PACKAGES = ("qlora", "transformers")
"""The packages whose trainer callbacks a config may name; `trusted` adds the user's own."""

OWN_FUNCTIONS = (
    *("qlora.demo.instructions:train_rows", "qlora.demo.instructions:eval_rows"),
    *("qlora.demo.instructions:preference_rows", "qlora.demo.instructions:preference_eval_rows"),
    *(f"qlora.data.formats.as_chat:from_{rows}" for rows in ("alpaca", "alpaca_prompt", "input_output", "any", "pair")),
)
"""The functions that a config may name by itself: the embedded data, and rows of other formats as chats."""


def check_trusted(key: str, name: str, trusted: Sequence[str]) -> None:
    """Raises `ConfigError` unless the code that a config names is of a package that is trusted."""
    package = re.split(r"[.:]", name)[0]
    if package not in trusted:
        added = [name for name in trusted if name not in CALLBACK_PACKAGES]
        raise ConfigError(
            f"{key}={name}: code of the package {package!r} would run, which is not trusted; if you know what it does, "
            f"add trusted=[{','.join([*added, package])}] to the command line"
        )


def check_plain(key: str, value: Any) -> None:
    """Raises `ConfigError` unless an argument of what a config names is a plain value, which names no code itself."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str) or re.fullmatch(r"_\w+_", name):
                raise ConfigError(
                    f"{key}.{name}={item}: an argument is a plain value and names no code, whatever trusted=[...] "
                    "holds; take it out"
                )
            check_plain(f"{key}.{name}", item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plain(f"{key}[{index}]", item)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ConfigError(f"{key} must be a plain value, a list or a mapping, got {value!r}")


def is_installed_callback(target: str) -> bool:
    """Returns whether a `_target_` is the name by which an installed package adds a trainer callback."""
    return "." not in target and target in installed_names(CALLBACK_GROUP)
