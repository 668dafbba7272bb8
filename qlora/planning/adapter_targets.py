"""What adapters are put on, by the shape of a model: its linear layers, and the experts of a mixture."""

from __future__ import annotations

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


def _matches(pattern: str, names: Mapping[str, Linear]) -> frozenset[str]:
    plain = {linear.name for name, linear in names.items() if name == pattern or name.endswith(f".{pattern}")}
    try:
        return frozenset(plain or {linear.name for name, linear in names.items() if re.fullmatch(pattern, name)})
    except re.error as error:
        raise ConfigError(f"lora.target_modules: {pattern!r} is not a regular expression: {error}") from error
