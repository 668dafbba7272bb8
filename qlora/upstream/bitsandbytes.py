"""Undocumented names of bitsandbytes that quantization needs, and what it declares no or wrong types for.

`tests/upstream` checks each name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit


def disable_repacking(model: torch.nn.Module) -> None:
    """Stops 4-bit layers from repacking their weights when a CPU with AVX512-BF16 evaluates.

    The repacked matmul has no gradient, so an evaluation before training would drop the gradients of every 4-bit layer
    without an error (bitsandbytes 0.50, `Linear4bit.forward`). There is no public switch.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quant_state(weight: torch.Tensor) -> QuantState:
    """Returns the quantization state of a 4-bit weight, which a sharded one carries, too."""
    return cast("Params4bit", weight).quant_state


def set_quant_state(weight: torch.Tensor, state: QuantState | None) -> None:
    """Gives a weight, or the shard of one, the state by which its 4-bit numbers are decoded."""
    cast("Params4bit", weight).quant_state = state


def quantize_on(parameter: Params4bit, device: torch.device) -> Params4bit:
    """Moves a parameter to a device and quantizes it there."""
    moved: Any = cast(Any, parameter).to(device)  # an overload of `to` declares `self` with a free type variable
    return cast("Params4bit", moved)
