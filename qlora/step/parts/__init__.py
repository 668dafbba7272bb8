"""The parts of the fast step, one module each; `qlora.config.registries.step_parts` names them in their order."""

from __future__ import annotations

from typing import Any

from qlora.config.registries.step_parts import GROUP, PARTS
from qlora.runtime.registry import load_named

METHODS = ("unsupported_reason", "prepare", "enter", "exit", "extra_bytes")


def find_part(name: str) -> Any:
    """Returns the class of a part: one of `PARTS`, of an entry point, or `module:Class`."""
    return load_named(name, PARTS, group=GROUP, key="trainer.step_parts", methods=METHODS)
