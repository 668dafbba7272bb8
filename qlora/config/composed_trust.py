"""What a composed config may trust, and what of Hydra's own node may name code."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config.file_trust import CODE_KEYS, LOGGING, LOGGING_CODE, PLUGINS, key_leaves
from qlora.config.schema import check_plain, check_trusted
from qlora.config.trust import REMOTE_CODE, Trust
from qlora.errors import ConfigError, UserError
from qlora.upstream.omegaconf import raw_node

STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
"""The streams that a log may write to without trust."""


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
    """Raises `ConfigError` for trust that an interpolation brings in, such as `model: ${callbacks.x}`."""
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
        for key, value in key_leaves(_resolved(node, group), f"hydra.{group}"):
            if key == f"hydra.{group}._target_" and value not in plugins:
                raise ConfigError(
                    f"{key}={value} is not a {group} of Hydra or of an installed package, which trusted=[...] does not "
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
    for key, value in (*texts, *key_leaves(_resolved(node, "launcher"), "hydra.launcher")):
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
    for key, value in key_leaves(config, f"hydra.{name}"):
        if not isinstance(value, str):
            continue
        if key.rpartition(".")[2] in CODE_KEYS and value not in LOGGING_CODE:
            check_trusted(key, value.removeprefix("ext://"), trust.names)
        elif re.match(r"[a-z]+://", value) and value.partition("://")[0] in ("ext", "cfg") and value not in STREAMS:
            check_trusted(key, value.partition("://")[2], trust.names)


def _resolved(node: DictConfig, name: str) -> dict[str, Any]:
    """Returns a part of Hydra's node with its interpolations resolved, except those that only a job can resolve."""
    return _resolve(node[name]) if OmegaConf.is_dict(raw_node(node, name)) or node[name] is not None else {}


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
