"""Private names of torch that models and devices need, and a typed view of a layer; `tests/upstream` checks them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "cpu_computes_bf16", "deterministic_inductor", "tree_leaves", "weight_of"]
# `TorchDispatchMode` sees each operator that quantizes a weight; `tree_leaves` finds tensors in the output of a module.


def weight_of(layer: torch.nn.Module) -> torch.Tensor:
    """Returns the weight of a layer that has one; torch declares each attribute of a module as a tensor or a module."""
    return cast(torch.Tensor, layer.weight)


def cpu_computes_bf16() -> bool:
    """Returns whether this CPU multiplies bf16 matrices itself; torch asks for it in private alone."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def deterministic_inductor() -> AbstractContextManager[None]:
    """Inside, Inductor compiles without measuring kernels, whose choice would change from run to run."""
    patch: AbstractContextManager[None] = torch._inductor.config.patch(deterministic=True)
    return patch
