"""Who may name code: the person at the command line, and no file.

Trust is read from the overrides alone. `checked_loader` holds every file, and what Hydra made of them, against it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import hydra
from hydra.core.override_parser.types import Override, QuotedString

from qlora.errors import ConfigError, ResourceError
from qlora.upstream.omegaconf import only_resolvers

TESTED_HYDRA = "1.3.8"
"""The version of Hydra whose ways to run code are closed here; another version may have others."""

VARIABLE = "QLORA_TRUSTED"
"""The environment variable that lists the names of `trusted`, and `model.trust_remote_code`, separated by commas."""

REMOTE_CODE = "model.trust_remote_code"

RESOLVERS = ("oc.*", "hydra", "now", "python_version", "qlora.*")
"""The functions that a config's `${NAME:...}` may call: OmegaConf's, Hydra's and ours."""


@dataclass(frozen=True)
class Trust:
    """What the overrides of a command trust."""

    names: tuple[str, ...] = ()
    """Packages, and full keys that a file may set in spite of the rule."""
    remote_code: bool = False

    def covers(self, key: str) -> bool:
        """Returns whether a file may set `key`: the command trusts it, or what holds it."""
        return any("." in name and (key == name or key.startswith((f"{name}.", f"{name}["))) for name in self.names)


def check_version() -> None:
    """Raises `ResourceError` for another version of Hydra than the tested one."""
    if hydra.__version__ != TESTED_HYDRA:
        raise ResourceError(
            f"hydra-core {hydra.__version__} is installed, and what a config may name is tested with {TESTED_HYDRA}: "
            f"pip install hydra-core=={TESTED_HYDRA}"
        )


def add_environment(overrides: Sequence[str], parsed: Sequence[Override]) -> list[str]:
    """Returns overrides with those of QLORA_TRUSTED beside them; a second call changes nothing."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    packages = [name for name in names if name != REMOTE_CODE]
    given = {override.key_or_group: override for override in parsed}
    added_overrides, typed = list(overrides), given.get("trusted")
    if packages and not (typed is not None and typed.is_sweep_override()):
        known = list(_texts(typed.value())) if typed is not None else []
        if added := [name for name in packages if name not in known]:
            added_overrides.append(f"trusted={json.dumps([*known, *added], ensure_ascii=False)}")
    if REMOTE_CODE in names and REMOTE_CODE not in given:
        added_overrides.append(f"{REMOTE_CODE}=true")
    return added_overrides


def read_trust(parsed: Sequence[Override]) -> Trust:
    """Returns what overrides trust; raises `ConfigError` for an interpolation in one of them."""
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


@contextmanager
def fixed_resolvers() -> Iterator[None]:
    """Hides the functions that others registered for `${NAME:...}` inside the block."""
    with only_resolvers(lambda name: any(fnmatchcase(name, pattern) for pattern in RESOLVERS)):
        yield
