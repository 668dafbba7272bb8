"""Refuses secrets in config values, whether typed or brought in by an interpolation."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config import trust
from qlora.config.fields import known_keys
from qlora.errors import ConfigError, UserError
from qlora.secrets import find_secret, hide, is_secret_variable

STORAGE = "hydra.sweeper.storage"
"""The only key that may refer to a secret, by its variable; only the code that opens the study resolves it."""

DATA_PATH = re.compile(r"data\.(?:path|eval_path|mix\.[^.]+(?:\.path)?)|data")
"""The keys that may be an address of rows, which a variable may hold in their place."""

FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^\s,:{}]+)")


def refuse_secrets(values: Iterable[tuple[str, Any]]) -> None:
    """Raises `ConfigError` for a token, key or password in a value; the message names the key and not the value."""
    for key, value in values:
        if isinstance(value, str) and (kind := find_secret(value)) is not None:
            raise _holds_secret(hide(key), kind)


def _holds_secret(key: str, kind: str) -> ConfigError:
    name = key.lstrip(".+")
    if name == STORAGE:
        return ConfigError(
            f"{name} holds {kind}, which would stand in the command and in the folders of all jobs; put the whole URL "
            f"into a variable of the environment and give its name: '{STORAGE}=${{oc.env:NAME}}'"
        )
    if DATA_PATH.fullmatch(name):
        return ConfigError(
            f"{name} holds {kind}; configs are stored, printed and sent to trackers. Put the whole address into a "
            f"variable of the environment and name it: {name}=env://NAME"
        )
    return ConfigError(
        f"{name} holds {kind}; configs are stored, printed and sent to trackers. Put it into the environment, where "
        "the libraries read it (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD ...)"
    )


def storage_variable(text: str | None) -> str | None:
    """Returns the environment variable that a storage's URL names with `${oc.env:NAME}`; None: it names none."""
    match = re.fullmatch(r"\$\{\s*oc\.env\s*:\s*(\w+)\s*\}", text or "")
    return match[1] if match else None


def refuse_resolved_secrets(composed: DictConfig, *, printed: bool) -> None:
    """Raises `ConfigError` for a secret in any node, Hydra's own included, or that an interpolation brings there.

    `printed`: the config is to be shown as it is resolved.
    """
    nodes = list(leaves(OmegaConf.to_container(composed, resolve=False), ""))
    refuse_secrets([*nodes, *_names(nodes)])
    copies = (".hydra.overrides.", ".hydra.job.override_dirname")  # of what was typed
    referring = [(key.lstrip("."), text) for key, text in nodes
                 if isinstance(text, str) and "${" in text and not key.startswith(copies)]  # fmt: skip
    referring.sort(key=lambda leaf: leaf[0].startswith("hydra."))  # which takes most from the others
    for key, text in referring:  # first the keys that name a variable, then those that refer to them
        if key == STORAGE and (name := storage_variable(text)) is not None:
            if printed and is_secret_variable(name):
                raise ConfigError(f"{STORAGE} holds the value of {name}, which --resolve would print; leave it out")
            continue
        for name in FROM_ENVIRONMENT.findall(text):
            if is_secret_variable(name):
                raise _holds_secret(key, f"the value of {name}")
    for key, text in referring:
        if key == STORAGE and storage_variable(text) is not None:
            continue
        value = None
        # What Hydra knows later, such as the run's folder, cannot be resolved yet.
        with contextlib.suppress(OmegaConfBaseException, UserError, ValueError), trust.fixed_resolvers():
            value = OmegaConf.select(composed, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        resolved = [(name, str(leaf)) for name, leaf in leaves(value, f".{key}")]  # a password may be of digits alone
        refuse_secrets([*resolved, *_names(resolved)])


def _names(leaves: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields the keys that users name, such as those of `data.columns`, as values too."""
    for key, _ in leaves:
        if (name := key.lstrip(".")) not in known_keys() and not name.startswith("hydra."):
            yield name, name


def leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{key}.{name}")
    else:
        yield key, node
