"""Private names of transformers that loading and building a model needs; `tests/upstream` checks each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the parameters that `from_pretrained` keeps in another dtype, as patterns (float32 of some experts).

    A base with random weights, and one that was saved quantized, is to have the dtypes of one that was loaded.
    """
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def init_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Initialises the parameters of one module by the rules of the model it belongs to.

    The public `init_weights` initialises all modules at once, which must exist in full precision then.
    """
    model._init_weights(module)


def commit_hash(model_config: Any) -> str | None:
    """Returns the commit of the hub that a config was read from."""
    commit: str | None = getattr(model_config, "_commit_hash", None)
    return commit


def attention_of(model: PreTrainedModel) -> str | None:
    """Returns the attention that a model computes with, e.g. `sdpa`; what the config asks for may be None."""
    implementation: str | None = model.config._attn_implementation
    return implementation
