"""How the schema annotates what Hydra cannot express, and how a message writes a value."""

from __future__ import annotations

from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

HOLDS = "holds"
"""In a field's metadata: the type of a value that Hydra cannot express, which is then annotated `Any`."""

MAPPINGS = {
    "trainer.optim_args": "{momentum: 0.9}",
    "trainer.lr_scheduler_kwargs": "{num_decay_steps: 100}",
    "loss.options": "{smoothing: 0.1}",
    "lora.options": "{d_initial: 0.1}",
    "lora.rank_pattern": "{down_proj: 16}",
    "lora.alpha_pattern": "{down_proj: 32}",
    "model.rope_scaling": "{rope_type: yarn, factor: 4}",
    "serve.adapters": "{poet: outputs/runs/poet}",
    "model.architecture.options": "{linear_num_value_heads: 16}",
}
"""An example of the mapping that a key takes, where one says more than `{a: 1}`."""

SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Any: "any value",
}
"""Types of single values, in words."""

SHAPES = {list: "a list such as [a,b]", dict: "a mapping such as {a: 1}"}
"""Types that hold other values, in words."""


def type_in_words(hint: Any) -> str:
    """Says what a field takes whose annotation is a type of `SCALARS` or `SHAPES`, maybe `| None`."""
    kind = next((kind for kind in get_args(hint) if NoneType in get_args(hint) and kind is not NoneType), hint)
    text = SCALARS.get(kind) or SHAPES[get_origin(kind)]
    return f"{text} or null" if NoneType in get_args(hint) else text


def written(value: object) -> str:
    """Returns a value as the command line writes it."""
    if isinstance(value, Enum):
        return str(value.value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
