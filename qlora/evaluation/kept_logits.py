"""Says whether a model can leave out the logits of tokens that nobody looks at."""

from __future__ import annotations

import inspect
from typing import Any


def takes_logits_to_keep(model: Any) -> bool:
    """Returns whether the forward method of a model, or of the one inside a PEFT model, takes `logits_to_keep`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
