"""Private names of torch that models and devices need; `tests/upstream` checks each."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "cpu_computes_bf16", "deterministic_inductor", "tree_leaves"]
# `TorchDispatchMode` sees each operator that quantizes a weight; `tree_leaves` finds tensors in the output of a module.


def cpu_computes_bf16() -> bool:
    """Returns whether this CPU multiplies bf16 matrices itself; torch asks for it in private alone."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def deterministic_inductor() -> AbstractContextManager[None]:
    """Inside, Inductor compiles without measuring kernels, whose choice would change from run to run."""
    patch: AbstractContextManager[None] = torch._inductor.config.patch(deterministic=True)
    return patch
