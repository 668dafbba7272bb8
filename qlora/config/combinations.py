"""The jobs of a grid: a config for each combination of values, composed again only where a group changes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config import trust
from qlora.config.compose import compose_dict
from qlora.config.composed_trust import check_composed
from qlora.config.conversion import check_values, to_config, without_hydra
from qlora.config.fields import known_keys
from qlora.config.messages import explain
from qlora.config.options import group_names
from qlora.config.overrides import open_entries, parse_overrides, plain_value
from qlora.config.saved_config import config_to_dict, field_names, flatten, to_plain
from qlora.config.schema import Config
from qlora.config.secret_values import leaves, refuse_secrets
from qlora.config.sweep_values import swept_values
from qlora.upstream.hydra_run import with_overrides
from qlora.upstream.omegaconf import raw_node, raw_value

LATEST = 64
"""How many composed configs are kept: those of the latest choices of groups."""

MISSING_VALUE = "???"

DECIDE_MORE = ("adapter", "data.streaming", "model.name", "trainer.max_steps", "trainer.num_train_epochs")
"""Plain fields whose value decides those of others: the config is composed for each."""


@dataclass(frozen=True)
class Axis:
    """A key of a grid, and the overrides that set it to each of its values."""

    key: str
    overrides: tuple[str, ...]
    values: tuple[Any, ...] | None
    """What a plain field is set to; None: the config is composed for each of the overrides."""


class Combinations:
    """The jobs of a grid by the positions of their values; plain fields are set without composing again.

    `base` is a composed config in which no swept key is set, where the caller has it.
    """

    def __init__(
        self, overrides: Sequence[str], config_dir: Path | str | None = None, *, base: DictConfig | None = None
    ) -> None:
        parsed = parse_overrides(open_entries(overrides))
        axes = {override.get_key_element(): _read_axis(override) for override in parsed}
        self.axes = list(axes.values())
        self._first = tuple(axis.overrides[0] for axis in self.axes)
        self._base, self._config_dir = base, config_dir
        self._composed = functools.lru_cache(LATEST)(self._compose)

    @functools.cached_property
    def first_node(self) -> DictConfig:
        """The config of the first job as Hydra composes it, with its `hydra` node."""
        if self._base is None or not self._sets_fields_only(self._base):
            return compose_dict(self._first, self._config_dir)
        if not (fields := [axis.overrides[0] for axis in self.axes if axis.values is not None]):
            return self._base
        try:
            node = with_overrides(self._base, self._first, fields)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, self._config_dir) from error
        with trust.fixed_resolvers():
            check_composed(node, trust.read_trust(parse_overrides(self._first)))
        return node

    def _sets_fields_only(self, base: DictConfig) -> bool:
        """Returns whether the base becomes the config of each job when plain fields are set."""
        typed: Any = OmegaConf.to_container(
            base.hydra.overrides, resolve=False
        )  # as text: a variable may be unset here
        composed_of = {*typed["hydra"], *typed["task"]}
        return all(axis.values is not None or composed_of.issuperset(axis.overrides) for axis in self.axes)

    def _compose(self, overrides: tuple[str, ...]) -> _Composed:
        return _Composed(self.first_node if overrides == self._first else compose_dict(overrides, self._config_dir))

    def __len__(self) -> int:
        return math.prod(len(axis.overrides) for axis in self.axes)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(len(axis.overrides)) for axis in self.axes))

    def overrides(self, positions: Sequence[int]) -> list[str]:
        """Returns the overrides of one job."""
        return [axis.overrides[position] for axis, position in zip(self.axes, positions, strict=True)]

    def config(self, positions: Sequence[int]) -> Config:
        """Returns the config of one job; raises `ConfigError` where its values exclude each other."""
        located = list(zip(self.axes, positions, strict=True))
        chosen = tuple(axis.overrides[position if axis.values is None else 0] for axis, position in located)
        values = {axis.key: axis.values[position] for axis, position in located if axis.values is not None}
        return self._composed(chosen).with_values(values)

    def check(self) -> dict[str, Any]:
        """Returns the full keys with their values that no axis changes, having composed every value of each once.

        Raises `ConfigError` for a value that is refused beside the first of all other axes.
        """
        first = [0] * len(self.axes)
        config = self.config(first)
        shared = dict(flatten(config_to_dict(config)))
        for index, axis in enumerate(self.axes):
            for position in range(1, len(axis.overrides)):
                for key in _differences(config, self.config([*first[:index], position, *first[index + 1 :]])):
                    shared.pop(key, None)
        return shared


def _read_axis(override: Override) -> Axis:
    key, texts = override.get_key_element(), swept_values(override)
    if texts is None:
        return Axis(key, (override.input_line or "",), None)
    if not override.is_discrete_sweep() or not _is_plain_field(override):
        return Axis(key, tuple(f"{key}={text}" for text in texts), None)
    elements = list(override.sweep_iterator())  # a shuffled sweep has another order at each call
    values = tuple(plain_value(element) for element in elements)
    overrides = tuple(f"{key}={Transformer.encode(element)}" for element in elements)
    return Axis(key, overrides, None if any(isinstance(value, dict) for value in values) else values)


def _is_plain_field(override: Override) -> bool:
    key = override.key_or_group
    return override.type is OverrideType.CHANGE and key in known_keys() - {*group_names(), *DECIDE_MORE}


class _Composed:
    """A composed config whose plain fields are set again and again."""

    def __init__(self, composed: DictConfig) -> None:
        self._node = without_hydra(composed)
        self._config: Config | None = None
        texts = (value for _, value in leaves(OmegaConf.to_container(self._node, resolve=False), ""))
        self._refers = any(isinstance(text, str) and "${" in text for text in texts)
        """Whether a field takes its value from another."""

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """Returns the config with these values by full keys, always the same keys; as `to_config` checks them."""
        try:
            converted = {key: self._set(key, value) for key, value in values.items()}
            if self._config is None or self._refers or MISSING_VALUE in converted.values():
                self._config = to_config(self._node)
                return self._config
            refuse_secrets(leaves(dict(values), ""))
            for key, value in converted.items():
                check_values(value, tuple(key.split(".")))
            groups = {key.partition(".")[0] for key in values}
            groups |= {"trainer"} if "data" in groups else set()  # `Config` decides `keep=auto` by it
            return dataclasses.replace(self._config, **{group: self._build(group) for group in groups})
        except OmegaConfBaseException as error:
            raise explain(error) from error

    def _set(self, key: str, value: Any) -> Any:
        """Sets a field, and returns its value in the field's type."""
        *path, name = key.split(".")
        holder: Any = self._node
        for part in path:
            holder = holder[part]
        if not isinstance(holder, DictConfig):  # null
            OmegaConf.update(self._node, key, value)
            return value
        holder[name] = value
        return raw_value(raw_node(holder, name))

    def _build(self, group: str) -> Any:
        value = self._node[group]
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _differences(first: Config, other: Config) -> Iterator[str]:
    """Yields the full keys whose values differ."""
    for name in field_names(Config):
        values = getattr(first, name), getattr(other, name)
        if values[0] is not values[1] and values[0] != values[1]:
            left, right = (dict(flatten({name: to_plain(value)})) for value in values)
            yield from (key for key in {**left, **right} if left.get(key) != right.get(key))
