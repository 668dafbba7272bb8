"""How rotary positions can be stretched (`model.rope_scaling`), by transformers' names; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.errors import ConfigError, did_you_mean
from qlora.text import brief, plural

KEY = "model.rope_scaling"
TYPE = "rope_type"
FACTOR, ORIGINAL, PARTIAL = "factor", "original_max_position_embeddings", "partial_rotary_factor"
NO_ROPE = frozenset(
    [
        "biogpt",
        "bloom",
        "codegen",
        "ctrl",
        "falcon_mamba",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "jamba",
        "mamba",
        "mamba2",
        "mpt",
        "nemotron_h",
        "openai-gpt",
        "opt",
        "rwkv",
        "xglm",
        "xlnet",
        "xlstm",
    ]
)
"""Model types whose positions are not rotary, or not as transformers stretches them."""


@dataclass(frozen=True)
class RopeType:
    """What a kind of scaling reads."""

    needs: tuple[str, ...] = (FACTOR,)
    takes: tuple[str, ...] = ()
    reads: tuple[str, ...] = field(default=("rope_theta", PARTIAL))
    """What is kept of the model's own where it is not given."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters but the type."""
        return (*self.needs, *self.takes, *self.reads)


ROPE_TYPES = {
    "linear": RopeType(),
    "dynamic": RopeType(),
    "yarn": RopeType(
        takes=(ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": RopeType(needs=("short_factor", "long_factor", ORIGINAL), takes=(FACTOR, "attention_factor")),
    "llama3": RopeType(needs=(FACTOR, ORIGINAL, "low_freq_factor", "high_freq_factor")),
}
"""By `rope_type`."""


def check_rope_scaling(scaling: Any) -> None:
    """Raises `ConfigError` unless `model.rope_scaling` is a kind of scaling with parameters that it has."""
    example = "{rope_type: yarn, factor: 4}"
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{KEY} must be a mapping such as {example} or null, got {brief(scaling)}")
    if (kind := scaling.get(TYPE)) is None:
        raise ConfigError(f"{KEY}.{TYPE} is missing; choose one of {', '.join(ROPE_TYPES)}, e.g. {KEY}={example}")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        name = kind if isinstance(kind, str) else brief(kind)
        raise ConfigError(
            f"{KEY}.{TYPE}={name} is unknown{did_you_mean(str(kind), ROPE_TYPES)}; choose one of "
            f"{', '.join(ROPE_TYPES)}, or leave {KEY} out: then the model's own is kept"
        )
    known = ROPE_TYPES[kind]
    for name, value in scaling.items():
        if name == TYPE:
            continue
        if name not in known.parameters:
            raise ConfigError(
                f"{KEY}.{name} is no parameter of {TYPE}={kind}{did_you_mean(str(name), known.parameters)}; it has "
                f"{', '.join(known.parameters)}"
            )
        if rule := _broken_rule(name, value):
            raise ConfigError(f"{KEY}.{name} must {rule}, got {brief(value)}")
    if missing := [name for name in known.needs if name not in scaling]:
        raise ConfigError(f"{KEY}.{missing[0]} is missing, which {TYPE}={kind} needs; give it as a number")
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    if fast <= slow:
        raise ConfigError(f"{KEY}.beta_fast={fast:g} must be more than beta_slow={slow:g}; leave both out for 32 and 1")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ConfigError(
            f"{KEY}.high_freq_factor={scaling['high_freq_factor']:g} must be more than "
            f"low_freq_factor={scaling['low_freq_factor']:g}; swap them"
        )


def _broken_rule(name: str, value: Any) -> str | None:
    """Returns what a parameter must be; None: it is that."""
    if name == "truncate":
        return None if isinstance(value, bool) else "be true or false"
    if name in ("short_factor", "long_factor"):
        is_list = isinstance(value, list) and bool(value) and all(map(_is_positive, value))
        return None if is_list else "be a list of positive numbers, one for each pair of a head's numbers"
    if name == ORIGINAL:
        return None if isinstance(value, int) and _is_positive(value) else "be a positive whole number of tokens"
    if name == FACTOR:
        return None if _is_positive(value) and value >= 1 else "be a number of at least 1"
    if name == PARTIAL:
        return None if _is_positive(value) and value <= 1 else "be above 0 and at most 1"
    return None if _is_positive(value) else "be a positive number"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def scaled_context(scaling: Mapping[str, Any], context: int | None) -> int | None:
    """Returns the most tokens that a model reads with a scaling; `context` is what it reads without."""
    original = scaling.get(ORIGINAL, context)
    return context if original is None else max(int(original * scaling.get(FACTOR, 1)), context or 0)


def check_has_rope(scaling: Any, model_type: str, *, has_rope: bool) -> None:
    """Raises `ConfigError` for a scaling of a model without rotary positions."""
    if scaling is not None and not has_rope:
        raise ConfigError(
            f"{KEY} stretches rotary positions, and {model_type} has none; leave it out, or choose a model that has "
            "them, such as llama, mistral, qwen3 or gemma3"
        )


def check_rotated(scaling: Mapping[str, Any], model_type: str, head_dim: int, partial: float | None) -> None:
    """Raises `ConfigError` for a scaling of more or fewer numbers than a model rotates.

    `partial` is the fraction of a head that it rotates; None: it always rotates the whole.
    """
    if partial is None and scaling.get(PARTIAL, 1) != 1:
        raise ConfigError(f"{KEY}.{PARTIAL}={scaling[PARTIAL]:g}: {model_type} rotates whole heads; leave it out")
    pairs = int(head_dim * scaling.get(PARTIAL, partial or 1)) // 2
    for name in ("short_factor", "long_factor"):
        if name in scaling and len(scaling[name]) != pairs:
            raise ConfigError(
                f"{KEY}.{name} has {plural(len(scaling[name]), 'number')}, and this {model_type} rotates {pairs} pairs "
                "of each head's numbers; give one for each pair"
            )


def check_positions(max_length: int, context: int, model: str, *, has_rope: bool, is_scaled: bool) -> None:
    """Raises `ConfigError` for rows that are to be longer than what a model reads (`context`)."""
    if max_length <= context:
        return
    ways = f"data.max_length={context}"
    if has_rope and is_scaled:
        ways = f"raise {KEY}.{FACTOR}, or set {ways}"
    elif has_rope:
        factor = -(-max_length // context)
        ways = f"set {KEY}='{{{TYPE}: yarn, {FACTOR}: {factor}}}', which stretches them, or {ways}"
    else:
        ways = f"set {ways}, or choose a model that reads more"
    stretched = f" with {KEY}" if is_scaled else ""
    raise ConfigError(f"data.max_length={max_length}: {model} knows {context:,} positions{stretched}; {ways}")
