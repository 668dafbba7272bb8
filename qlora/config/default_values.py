"""Defaults of our own options that depend on what else is chosen: on whose the data is, and on what is set."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qlora.config.options import CONF_DIR, group_names, is_own_data, option_names
from qlora.upstream.omegaconf import is_filled, raw_node, raw_value, set_value

LENGTHS = ("max_steps", "num_train_epochs")
"""The fields of `trainer` that say how long to train, of which one is set."""

OF_STREAMS = ("group_by_length", "eval_steps", "save_steps")
"""The fields of `trainer` whose defaults are others where rows are streamed."""


DECIDING = ("data", "head", "model")
"""The groups whose options decide those of others."""


def register() -> None:
    """Registers the functions of `${qlora.NAME:...}` that our options call; may be called many times."""
    OmegaConf.register_new_resolver("qlora.by_data", _by_data, replace=True)
    OmegaConf.register_new_resolver("qlora.by_head", _by_head, replace=True)
    OmegaConf.register_new_resolver("qlora.recipe", _recipe, replace=True)
    OmegaConf.register_new_resolver("qlora.default", _default, replace=True)
    OmegaConf.register_new_resolver("qlora.streamed", _streamed, replace=True)


@functools.cache
def default_options() -> dict[str, str]:
    """Returns which option of each group `config.yaml` chooses; of those that follow the data, that of its own data."""
    return default_options_beside({})


def default_options_beside(choices: Mapping[str, Any]) -> dict[str, str]:
    """Returns which option of each group `config.yaml` chooses beside these options of `DECIDING`."""
    register()
    chosen: dict[str, str] = {}
    for entry in OmegaConf.load(CONF_DIR / "config.yaml").defaults:
        if not isinstance(entry, str):
            chosen.update({str(key): str(raw_node(entry, key)) for key in entry})
    resolved = OmegaConf.create(chosen | {name: str(choices[name]) for name in DECIDING if choices.get(name)})
    return {key: str(resolved[key]) if key in group_names() else text for key, text in chosen.items()}


def settle(composed: DictConfig) -> None:
    """Writes the defaults of `trainer` that others decide into a composed config, in place of what computes them."""
    if not (OmegaConf.is_dict(raw_node(composed, "trainer")) and is_filled(composed.trainer)):
        return
    names = [*LENGTHS, *OF_STREAMS]
    values = {name: composed.trainer[name] for name in names if _is_default(raw_node(composed.trainer, name))}
    for name, value in values.items():
        set_value(composed.trainer, name, value)


def _by_data(option: str, local: str, other: str) -> str:
    """Returns what is chosen for the user's own rows, or for a data set of ours."""
    return local if is_own_data(option) else other


def _by_head(option: str) -> str:
    """Returns the loss of a head: that of its name."""
    return option if option in option_names("loss") else "sft"


def _recipe(model: str, data: str) -> str:
    """Returns the recipe of a model: of ours that hold numbers for the paper's data sets, the one for other rows."""
    on_own_rows = f"{model}_own"
    return on_own_rows if is_own_data(data) and on_own_rows in option_names("recipe") else model


def _default(value: Any, other: str, *, _parent_: DictConfig) -> Any:
    """Returns a default, or null where the field `other` beside it is set; of two defaults the steps stay."""
    node = raw_node(_parent_, other)
    if _is_default(node):
        return value if other == "num_train_epochs" else None
    return value if raw_value(node) in (None, "???") else None


def _streamed(value: Any, other: Any, *, _root_: DictConfig) -> Any:
    """Returns the first value where rows are streamed, else the second."""
    return value if OmegaConf.select(_root_, "data.streaming", default=False) else other


def _is_default(node: Any) -> bool:
    text = raw_value(node)
    return isinstance(text, str) and text.startswith(("${qlora.default:", "${qlora.streamed:"))
