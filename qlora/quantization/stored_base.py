"""The storage metadata of a base that the memory and time plans need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredBase:
    """What plans of memory and time need to know of a base."""

    matrix_bytes: Callable[[int, int], int]
    """Bytes of a decoder's matrix [rows, columns], with scales and tables."""
    weight_bytes: float
    """Bytes that a matrix product reads of one weight."""
    unquantized_bytes: int
    """Bytes of a parameter that is not quantized."""
    is_quantized: bool = True
    decoding_bytes: float = 0.0
    """Bytes a weight that exist beside a decoded matrix while it is decoded."""
    keeps_input: bool = False
    """Whether a product keeps its input for the backward pass."""
    experts_bytes: Callable[[int, Sequence[tuple[int, int]]], int] | None = None
    """Bytes of a layer's experts: their number, and the sizes [rows, columns] of each one's matrices. None: experts
    are not quantized."""

    @property
    def is_fp32(self) -> bool:
        """Whether all weights are stored in 32 bits."""
        return not self.is_quantized and self.unquantized_bytes == 4
