"""What the embedded model is for. Imports no torch."""

from __future__ import annotations

from qlora.config.schema import Config, Weights
from qlora.models.model_files import EMBEDDED

ROWS = "qlora.demo."
"""Where functions lie that return the rows of its world."""
SMALL = ("qwen2.5-0.5b-instruct", "qwen2.5-1.5b-instruct", "smollm2-360m")
"""Presets of small real models: ungated, and trained on a CPU or any GPU."""


def embedded_warning(config: Config) -> str | None:
    """Returns what a person must hear who trains the embedded model on rows of their own; None: that is not so."""
    if config.model.name not in EMBEDDED or config.model.weights is Weights.random:
        return None
    paths = [part.path for part in config.data.mix.values()] or [config.data.path]
    if all(path is not None and path.startswith(ROWS) for path in paths):
        return None
    first, *others = (f"model={name}" for name in SMALL)
    return (
        f"model={config.model.name} is the embedded demo model: it knows only the words of the demo's world and "
        f"learns next to nothing from other rows; for your own rows take a small real model: {first} "
        f"({', '.join(others)})"
    )
