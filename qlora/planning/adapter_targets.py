"""What adapters are put on, by the shape of a model: its linear layers, and the experts of a mixture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from qlora.config.schema import LoraConfig, LoraExperts
from qlora.errors import ConfigError, did_you_mean
from qlora.experts.names import SHARED
from qlora.planning.model_shape import Linear, Shape


def find_targets(
    shape: Shape, requested: list[str], experts: LoraExperts = LoraExperts.auto
) -> tuple[frozenset[str], ...]:
    """Returns for each decoder layer the names of the linear layers that `lora.target_modules` gives an adapter.

    `experts` says whether the experts that compute every token are among them. Raises `ConfigError` for a name or
    pattern that matches none.
    """
    layers = [
        {name: linear for name, linear in shape.full_names(layer).items() if linear.is_adapted}
        for layer in range(shape.layers)
    ]
    shared = frozenset(linear.name for linear in shape.linears if SHARED.search(linear.name))
    if requested == ["all-linear"]:
        left_out = shared if experts is LoraExperts.none else frozenset()
        return tuple(frozenset(linear.name for linear in names.values()) - left_out for names in layers)
    matches = [{pattern: _matches(pattern, names) for pattern in requested} for names in layers]
    if missing := [pattern for pattern in requested if not any(layer[pattern] for layer in matches)]:
        kinds = sorted({linear.name.rpartition(".")[2] for linear in shape.linears if linear.is_adapted})
        raise ConfigError(
            f"lora.target_modules {missing} match no linear layer{did_you_mean(missing[0], kinds)}; the model has "
            f"{kinds}, or use all-linear"
        )
    added = shared if experts in (LoraExperts.all, LoraExperts.shared) else frozenset()
    present = [frozenset(linear.name for linear in names.values()) for names in layers]
    return tuple(
        frozenset().union(*layer.values()) | (added & names) for layer, names in zip(matches, present, strict=True)
    )


def choose_targets(shape: Shape, lora: LoraConfig) -> tuple[frozenset[str], ...]:
    """Returns what `find_targets` does, without what `lora.layers` and `lora.exclude` leave out."""
    targets = find_targets(shape, lora.target_modules, lora.experts)
    if lora.layers is not None:
        if beyond := [index for index in lora.layers if index >= shape.layers]:
            raise ConfigError(
                f"lora.layers {beyond}: the model has {shape.layers} decoder layers, 0 to {shape.layers - 1}; name "
                "some of them"
            )
        targets = tuple(names if index in lora.layers else frozenset() for index, names in enumerate(targets))
    for pattern in lora.exclude:
        excluded = _matched(shape, targets, pattern, "exclude")
        targets = tuple(names - left_out for names, left_out in zip(targets, excluded, strict=True))
    if not any(targets):
        raise ConfigError("lora.layers and lora.exclude leave no layer to adapt; name fewer in lora.exclude")
    return targets


def find_ranks(
    shape: Shape, targets: tuple[frozenset[str], ...], pattern: Mapping[str, int]
) -> tuple[frozenset[tuple[str, int]], ...]:
    """Returns for each decoder layer the linear layers to which `lora.rank_pattern` gives a rank, with it."""
    if not pattern:
        return ()
    matches = {name: _matched(shape, targets, name, "rank_pattern") for name in pattern}
    for layer, (first, other) in itertools.product(range(shape.layers), itertools.combinations(pattern, 2)):
        if twice := matches[first][layer] & matches[other][layer]:
            raise ConfigError(
                f"lora.rank_pattern: {first!r} and {other!r} both match {min(twice)} of layer {layer}; make them match "
                "different layers"
            )
    return tuple(
        frozenset((name, rank) for key, rank in pattern.items() for name in matches[key][layer])
        for layer in range(shape.layers)
    )


def adapter_rank(lora: LoraConfig) -> int:
    """Returns the rank by which the plan counts an adapter; a kind without one has 1."""
    return lora.r if lora.other_kind is None or lora.other_kind.has_rank else 1


def _matched(shape: Shape, targets: tuple[frozenset[str], ...], pattern: str, key: str) -> tuple[frozenset[str], ...]:
    """Returns for each decoder layer the targets that a name or pattern of `lora` means; raises where there is none."""
    matched = tuple(
        _matches(
            pattern, {name: linear for name, linear in shape.full_names(layer).items() if linear.name in names}, key
        )
        for layer, names in enumerate(targets)
    )
    if not any(matched):
        kinds = sorted({name.rpartition(".")[2] for names in targets for name in names})
        raise ConfigError(
            f"lora.{key} [{pattern!r}] matches no layer with an adapter{did_you_mean(pattern, kinds)}; these are "
            f"{kinds}"
        )
    return matched


def find_expert_rank(shape: Shape, lora: LoraConfig) -> int:
    """Returns the rank of the adapters on the experts that tokens are routed to; 0: they get none.

    Raises `ConfigError` for experts that the model does not have.
    """
    if shape.experts is None or (lora.experts is LoraExperts.shared and not shape.experts.shared):
        if lora.experts in (LoraExperts.all, LoraExperts.shared):
            reason = "is dense: it has no experts" if shape.experts is None else "has no shared experts"
            remedy = "leave lora.experts out" if shape.experts is None else "set lora.experts=all or none"
            raise ConfigError(f"lora.experts={lora.experts.value}: this {shape.model_type} {reason}; {remedy}")
        return 0
    is_meant = lora.target_modules == ["all-linear"] and lora.experts_unsupported_reason() is None
    if lora.experts is LoraExperts.all or (lora.experts is LoraExperts.auto and is_meant):
        return lora.expert_r or max(1, lora.r // shape.experts.per_token)
    return 0


def _matches(pattern: str, names: Mapping[str, Linear], key: str = "target_modules") -> frozenset[str]:
    plain = {linear.name for name, linear in names.items() if name == pattern or name.endswith(f".{pattern}")}
    try:
        return frozenset(plain or {linear.name for name, linear in names.items() if re.fullmatch(pattern, name)})
    except re.error as error:
        raise ConfigError(f"lora.{key}: {pattern!r} is not a regular expression: {error}") from error
