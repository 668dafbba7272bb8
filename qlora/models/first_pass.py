"""Runs the bare base on a few tokens, so that its faults are not blamed on the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, __version__

from qlora.errors import ConfigError, DataError, UserError
from qlora.models.nonfinite import first_nonfinite_module
from qlora.models.outputs import plain_ids
from qlora.runtime.device import Placement


@torch.no_grad()
def try_base(model: PreTrainedModel, key: str, placement: Placement) -> None:
    """Raises a `UserError` if a forward pass fails or gives numbers that are NaN; `key` names the model.

    It runs in the precision of training. A lack of memory is raised as it is.
    """
    ids = plain_ids(model)

    def forward() -> Any:
        with placement.autocast():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    try:
        logits = forward().logits
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{key}: transformers {__version__} cannot run this {model.config.model_type} ({_first_line(error)}); its "
            "config.json does not fit, or that version has a fault: try another revision of the model"
        ) from error
    if bool(torch.isnan(logits).any() | torch.isposinf(logits).any()):
        raise explain_nonfinite(model, key, placement, forward, "its logits are")


def explain_nonfinite(
    model: PreTrainedModel, key: str, placement: Placement, forward: Callable[[], Any], what: str
) -> UserError:
    """Returns the error for a base whose weights are finite and whose results in `forward` are not."""
    module = first_nonfinite_module(model, forward)
    where = f", first those of its module {module}" if module else ""
    dtype = str(placement.compute_dtype).removeprefix("torch.")
    kind: type[UserError] = DataError
    if placement.compute_dtype is torch.float16:
        kind = ConfigError
        remedy = "computing in float16 overflows, most likely; set quantization.compute_dtype=bf16 or fp32"
    else:
        remedy = f"its weights are finite, so its config.json does not fit them, or {dtype} is too narrow; choose " \
                 "another base, or quantization.compute_dtype=fp32"  # fmt: skip
    return kind(f"{key}: {what} NaN or infinite before anything is trained{where}: {remedy}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
