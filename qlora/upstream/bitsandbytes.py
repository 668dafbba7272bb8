"""Undocumented names of bitsandbytes that quantization needs; `tests/upstream` checks each."""

from __future__ import annotations

import torch


def disable_repacking(model: torch.nn.Module) -> None:
    """Stops 4-bit layers from repacking their weights when a CPU with AVX512-BF16 evaluates.

    The repacked matmul has no gradient, so an evaluation before training would drop the gradients of every 4-bit layer
    without an error (bitsandbytes 0.50, `Linear4bit.forward`). There is no public switch.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
