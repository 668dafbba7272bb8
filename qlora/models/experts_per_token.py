"""How many experts of a mixture compute a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token")
"""What `config.json` calls it, by architecture."""


def experts_per_token(settings: Mapping[str, Any]) -> int:
    """Returns how many experts compute a token, by the settings of a text model; 1 where they do not say.

    Of several numbers, for each layer its own, it is the largest.
    """
    value = next((settings[key] for key in KEYS if settings.get(key)), 1)
    return max(value) if isinstance(value, list) else int(value)
