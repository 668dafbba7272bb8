"""The licence of a model, as the card in its own folder or repository says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qlora.config.schema import ModelConfig, Weights
from qlora.models.model_files import is_local, locate
from qlora.upstream.transformers_models import find_hub_file

CARD = "README.md"
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", re.DOTALL)
LONGEST = 200
"""Characters of a licence's name; more is none."""


def read_license(config: ModelConfig) -> str | None:
    """Returns the licence of a base: what the config says, else what its card does; None: neither says any."""
    if config.license is not None or config.weights is Weights.random:
        return config.license
    source = locate(config.name)
    if is_local(source):
        return license_of(Path(source) / CARD)
    try:
        file = find_hub_file(source, CARD, revision=config.revision or "main", cache_dir=config.cache_dir)
    except (OSError, ValueError):  # the hub cannot be reached, and the card is not in its cache
        return None
    return None if file is None else license_of(file)


def license_of(card: Path) -> str | None:
    """Returns the licence in the front matter of a card; None: there is no card, or it names none."""
    try:
        match = FRONT_MATTER.match(card.read_text(encoding="utf-8-sig"))
        front = yaml.safe_load(match[1]) if match is not None else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(front, dict):
        return None
    name = _text(front.get("license"))
    return (_text(front.get("license_name")) or name) if name == "other" else name


def _text(value: Any) -> str | None:
    """Returns a value as a licence's name; of several the first."""
    value = value[0] if isinstance(value, list) and value else value
    return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= LONGEST else None
