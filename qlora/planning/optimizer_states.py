"""What each optimizer stores for a parameter."""

from __future__ import annotations

from dataclasses import dataclass

PAGED_FROM, EIGHT_BIT_FROM = 100_000, 4096
"""Elements from which bitsandbytes pages a state, and stores it in 8 bits."""


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer stores its state."""

    states: int
    """Numbers a parameter."""
    bits: int = 32
    paged: bool = False
    parameter_dtype: bool = False
    """Whether states have the parameters' dtype (torch's optimizers) instead of float32."""
    scratch: int = 0
    """Copies of all parameters while a step is taken."""


OPTIMIZERS = {
    "adamw_torch": Optimizer(2, parameter_dtype=True, scratch=1),
    "adamw_torch_fused": Optimizer(2, parameter_dtype=True),
    "sgd": Optimizer(0),
    "adagrad": Optimizer(1, parameter_dtype=True),
    **{name: Optimizer(2, bits=8) for name in ("adamw_bnb_8bit", "adamw_8bit")},
    "paged_adamw_32bit": Optimizer(2, paged=True),
    "paged_adamw_8bit": Optimizer(2, bits=8, paged=True),
    "lion_32bit": Optimizer(1),
    "lion_8bit": Optimizer(1, bits=8),
    "paged_lion_32bit": Optimizer(1, paged=True),
    "paged_lion_8bit": Optimizer(1, bits=8, paged=True),
    **{name: Optimizer(1) for name in ("rmsprop_bnb", "rmsprop_bnb_32bit")},
    "rmsprop_bnb_8bit": Optimizer(1, bits=8),
}
"""By transformers' names; those that are missing store something of another form."""
