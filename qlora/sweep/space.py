"""The space of a search, written in Hydra's sweep grammar: `choice(8,16)`, `tag(log,interval(1e-5,1e-3))`, ..."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import OverrideParseException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from qlora.config.messages import explain
from qlora.config.override_spelling import keep_spelling
from qlora.config.overrides import open_entries
from qlora.config.sweep_values import is_logarithmic, swept_values
from qlora.errors import ConfigError, did_you_mean

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Condition:
    """A parameter is tried only while its parent has one of these values."""

    parent: str
    values: tuple[str, ...]
    """As an override writes them."""


@dataclass(frozen=True)
class Parameter:
    """A searched key."""

    name: str
    key: str
    """The name as overrides write it, with the plus signs of a key to add."""
    distribution: Distribution
    values: tuple[Any, ...] | None
    """All values; None: there are infinitely many."""
    condition: Condition | None = None

    def suggest(self, trial: optuna.Trial) -> Any:
        """Returns the value that the sampler proposes."""
        match self.distribution:
            case FloatDistribution() as space:
                return trial.suggest_float(self.name, space.low, space.high, step=space.step, log=space.log)
            case IntDistribution() as space:
                return trial.suggest_int(self.name, space.low, space.high, step=space.step, log=space.log)
            case CategoricalDistribution() as space:
                return trial.suggest_categorical(self.name, space.choices)

    def text(self, value: Any) -> str:
        """Returns a value as an override writes it; the same number is read back."""
        if isinstance(self.distribution, CategoricalDistribution):
            return "null" if value is None else str(value)
        if self.values is not None:  # the sampler computes 0.1 + 2 * 0.1
            value = min(self.values, key=lambda exact: abs(exact - value))
        return repr(value)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The extreme values; of a choice all values."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices
        return (self.distribution.low, self.distribution.high)


@dataclass(frozen=True)
class Space:
    """Searched keys, each after the one that it depends on, and the overrides that all trials have."""

    fixed: list[str]
    parameters: list[Parameter]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Returns the values that the sampler proposes for a trial."""
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._applies(parameter, chosen):
                chosen[parameter.name] = parameter.suggest(trial)
        return chosen

    def overrides(self, values: Mapping[str, Any]) -> list[str]:
        """Returns the overrides that set the searched keys."""
        chosen = [parameter for parameter in self.parameters if parameter.name in values]
        return [f"{parameter.key}={parameter.text(values[parameter.name])}" for parameter in chosen]

    def points(self) -> Iterator[dict[str, Any]]:
        """Yields every combination; raises `ConfigError` if a parameter has infinitely many values."""
        for parameter in self.parameters:
            if parameter.values is None:
                raise ConfigError(
                    f"hydra.sweeper.sampler=grid: {parameter.name} is an interval of real numbers, which has no grid; "
                    "list its values, write a range with a step, or choose another sampler"
                )
        yield from self._points({}, self.parameters)

    def _points(self, chosen: dict[str, Any], left: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
        if not left:
            yield chosen
            return
        parameter, *others = left
        if not self._applies(parameter, chosen):
            yield from self._points(chosen, others)
            return
        for value in parameter.values or ():
            yield from self._points({**chosen, parameter.name: value}, others)

    def examples(self) -> Iterator[dict[str, Any]]:
        """Yields points that together hold the extreme values of every parameter, one varied at a time."""
        for parameter in self.parameters:
            needed = self._needed(parameter)
            for value in parameter.ends:
                yield self._complete({**needed, parameter.name: value})

    def _needed(self, parameter: Parameter) -> dict[str, Any]:
        """Returns the values of others under which a parameter is tried."""
        if parameter.condition is None:
            return {}
        parent, allowed = self._find(parameter.condition.parent), parameter.condition.values
        value = next(value for value in parent.values or () if parent.text(value) in allowed)
        return {**self._needed(parent), parent.name: value}

    def _complete(self, given: dict[str, Any]) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name in given:
                chosen[parameter.name] = given[parameter.name]
            elif self._applies(parameter, chosen):
                chosen[parameter.name] = parameter.ends[0]
        return chosen

    def _applies(self, parameter: Parameter, chosen: Mapping[str, Any]) -> bool:
        condition = parameter.condition
        if condition is None:
            return True
        parent = condition.parent
        return parent in chosen and self._find(parent).text(chosen[parent]) in condition.values

    def _find(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)


def build_space(
    overrides: Sequence[str], params: Mapping[str, str], conditions: Mapping[str, str], loader: ConfigLoader
) -> Space:
    """Reads the command line's `overrides` and a file's `params`; the former come before the latter.

    Raises `ConfigError` for an empty space, impossible ends, or a condition on a key without values.
    """
    given = {override.key_or_group: override for override in _parse(overrides, loader)}
    from_file = _parse(open_entries([f"{key}={value}" for key, value in params.items()]), loader)
    merged = {override.key_or_group: override for override in from_file} | given
    searched = [name for name, override in merged.items()
                if override.is_sweep_override() or (name in conditions and name not in given)]  # fmt: skip
    parameters = {name: build_parameter(merged[name]) for name in searched}
    fixed = {name: override for name, override in merged.items() if name not in parameters}
    for name, text in conditions.items():
        if name in parameters:
            condition = _read_condition(name, text, loader)
            _check_parent(name, condition, parameters, fixed)
            parameters[name] = replace(parameters[name], condition=condition)
        elif name not in fixed:
            raise ConfigError(
                f"hydra.sweeper.conditions: {name} is not searched{did_you_mean(name, parameters)}; give its values in "
                "hydra.sweeper.params or on the command line"
            )
    settled = _settle(parameters, {name: _texts(override)[0] for name, override in fixed.items()})
    if not settled:
        raise ConfigError(
            "hydra/sweeper=optuna: there is nothing to search; give a key several values, e.g. "
            "'trainer.learning_rate=tag(log,interval(5e-5,5e-3))'"
        )
    return Space([override.input_line or "" for override in fixed.values()], settled)


def _parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    try:
        return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise explain(error) from error


def _texts(override: Override) -> list[str]:
    """Returns the values of an override as it writes them."""
    swept = override.is_sweep_override()
    return list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]


def build_parameter(override: Override) -> Parameter:
    """Returns the parameter that an override of several values describes; raises `ConfigError` for impossible ends."""
    text, name, key = override.input_line, override.key_or_group, override.get_key_element()
    swept_values(override)  # refuses an empty one
    value, log = override.value(), is_logarithmic(override)
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None
        assert high is not None
        if isinstance(low, int) and isinstance(high, int):
            return Parameter(name, key, IntDistribution(low, high, log=log), tuple(range(low, high + 1)))
        return Parameter(name, key, FloatDistribution(low, high, log=log), None)
    if isinstance(value, RangeSweep):
        return _build_range(override, value, log=log)
    if log:
        raise ConfigError(f"{text}: a list of values has no scale; leave tag(log,...) out")
    elements = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    choices: list[Any] = [element if _is_plain(element) else written
               for element, written in zip(elements, _texts(override), strict=True)]  # fmt: skip
    choices = list(dict.fromkeys(choices))
    return Parameter(name, key, CategoricalDistribution(choices), tuple(choices))


def _is_plain(element: Any) -> bool:
    return element is None or (isinstance(element, bool | int | float) and math.isfinite(element))


def _build_range(override: Override, swept: RangeSweep, *, log: bool) -> Parameter:
    name, key, step = override.key_or_group, override.get_key_element(), abs(swept.step)
    values: list[Any] = sorted(swept.range())
    low, high = values[0], values[-1]
    whole = all(isinstance(value, int) for value in values)
    if log and not (whole and low > 0 and step == 1):
        raise ConfigError(
            f"{override.input_line}: a range has a logarithmic scale only for whole numbers above 0 in steps of 1; use "
            "tag(log,interval(LOW,HIGH))"
        )
    if whole:
        return Parameter(name, key, IntDistribution(low, high, log=log, step=int(step)), tuple(values))
    return Parameter(name, key, FloatDistribution(low, high, step=float(step)), tuple(values))


def _read_condition(name: str, text: str, loader: ConfigLoader) -> Condition:
    override = _parse(keep_spelling([text]), loader)[0] if "=" in text else None
    if override is None or override.is_interval_sweep():
        raise ConfigError(
            f"hydra.sweeper.conditions: {name} must hold an override such as lora=loraplus, or one of several values "
            f"such as lora=loraplus,dora, got {text!r}"
        )
    return Condition(override.key_or_group, tuple(_texts(override)))


def _check_parent(
    name: str, condition: Condition, parameters: Mapping[str, Parameter], fixed: Mapping[str, Override]
) -> None:
    parent, key = condition.parent, f"hydra.sweeper.conditions: {name} depends on {condition.parent}"
    if parent in parameters:
        known = [parameters[parent].text(value) for value in parameters[parent].values or ()]
        if strange := [value for value in condition.values if value not in known]:
            tried = f"it tries {', '.join(known)}" if known else "it samples real numbers"
            raise ConfigError(f"{key}={strange[0]}, which the search never tries; {tried}")
    elif parent not in fixed:
        raise ConfigError(f"{key}, which is neither searched nor set; give it values too")


def _settle(parameters: Mapping[str, Parameter], fixed: Mapping[str, str]) -> list[Parameter]:
    """Orders parameters, parents first; one whose parent is fixed is kept without its condition, or dropped."""
    ordered: dict[str, Parameter] = {}
    left = dict(parameters)
    while left:
        ready = [item for item in left.values() if item.condition is None or item.condition.parent not in left]
        if not ready:
            raise ConfigError(f"hydra.sweeper.conditions: {' and '.join(left)} depend on each other, so none is tried")
        for parameter in ready:
            del left[parameter.name]
            if parameter.condition is None or parameter.condition.parent in ordered:
                ordered[parameter.name] = parameter
            elif fixed.get(parameter.condition.parent) in parameter.condition.values:
                ordered[parameter.name] = replace(parameter, condition=None)
    return list(ordered.values())
