"""What optimizers keep of the tensors that they train; `task=plan` counts it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAGED_FROM, EIGHT_BIT_FROM = 100_000, 4096
"""Elements from which bitsandbytes pages a state, and from which states are stored in few bits."""


@dataclass(frozen=True)
class Trained:
    """A trained tensor."""

    shape: tuple[int, ...]
    is_matrix: bool = True
    """Whether it is a matrix of a linear layer or of an adapter, or those of all experts."""

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


Arguments = Mapping[str, Any]
Numbers = Callable[[Trained, Arguments], int]
"""How many numbers are kept of a tensor, by `trainer.optim_args`."""


@dataclass(frozen=True)
class States:
    """States in the dtype of the parameters, as torch's optimizers keep them."""

    numbers: Numbers
    scratch: int = 0
    """Copies of all parameters while a step is taken."""
    one_tensor: int = 0
    """Copies of the tensor that is updated, in optimizers that take one after the other."""

    def bytes_of(self, tensor: Trained, width: int, arguments: Arguments) -> tuple[int, int]:
        """Returns the bytes that are kept of a tensor whose numbers take `width`: fixed, and paged."""
        return width * self.numbers(tensor, arguments), 0

    is_in_parameter_dtype = True
    """Whether the optimizer is torch's: an update that may be undone needs a copy of all parameters."""


@dataclass(frozen=True)
class Float32States(States):
    """States in 32 bits, whatever the parameters' dtype."""

    def bytes_of(self, tensor: Trained, width: int, arguments: Arguments) -> tuple[int, int]:
        """Returns the bytes that are kept of a tensor: fixed, and paged."""
        return 4 * self.numbers(tensor, arguments), 0


@dataclass(frozen=True)
class BitsandbytesStates(States):
    """States in 32 bits, or in 8 with a scale for each block of 256; paged ones may wait in the host's memory."""

    bits: int = 32
    paged: bool = False
    is_in_parameter_dtype = False

    def bytes_of(self, tensor: Trained, width: int, arguments: Arguments) -> tuple[int, int]:
        """Returns the bytes that are kept of a tensor: fixed, and paged."""
        numbers = self.numbers(tensor, arguments)
        is_rounded = self.bits == 8 and tensor.size >= EIGHT_BIT_FROM
        states = numbers * (1 if is_rounded else 4)
        scales = numbers // tensor.size * 4 * math.ceil(tensor.size / 256) if is_rounded else 0
        if self.paged and tensor.size >= PAGED_FROM:
            return scales, states
        return states + scales, 0


@dataclass(frozen=True)
class TorchaoStates(States):
    """States in 8 or 4 bits by blocks, each state with a codebook of its own."""

    bits: int = 8

    def bytes_of(self, tensor: Trained, width: int, arguments: Arguments) -> tuple[int, int]:
        """Returns the bytes that are kept of a tensor: fixed, and paged."""
        numbers, block = self.numbers(tensor, arguments), arguments.get("block_size", 256)
        if tensor.size < EIGHT_BIT_FROM or tensor.size % block:
            return width * numbers, 0
        states = numbers // tensor.size
        return numbers * self.bits // 8 + states * (4 * tensor.size // block + 4 * 2**self.bits), 0


def per_parameter(count: int) -> Numbers:
    """Returns the rule of an optimizer that keeps a count of numbers for each parameter."""
    return lambda tensor, arguments: count * tensor.size


def of_sgd(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of SGD, which keeps an average where it has a momentum."""
    return tensor.size if arguments.get("momentum") else 0


def of_rmsprop(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of RMSprop: squares, and what its arguments ask for."""
    return tensor.size * (1 + bool(arguments.get("momentum")) + bool(arguments.get("centered")))


def of_adafactor(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of Adafactor: for a matrix the sums of its rows and of its columns."""
    return _factored(tensor.shape)


def of_lorafa(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of LoRA-FA: those of AdamW, and the inverse of A A^T beside each B."""
    return 2 * tensor.size + (tensor.shape[0] ** 2 if tensor.is_matrix else 0)


def of_muon(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of Muon: one for each of a matrix, two, as AdamW, for others."""
    return tensor.size * (1 if tensor.is_matrix else 2)


def is_projected(tensor: Trained, rank: int) -> bool:
    """Returns whether GaLore and APOLLO project the gradient of a tensor: of matrices that are larger than the rank."""
    return tensor.is_matrix and len(tensor.shape) == 2 and min(tensor.shape) > rank


def of_galore(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of GaLore's AdamW: two averages of the projected gradient, and the projection."""
    if not is_projected(tensor, rank := arguments.get("rank", RANK)):
        return 2 * tensor.size
    projected, projection = _projection(tensor.shape, rank, arguments.get("proj_type", "std"))
    return 2 * math.prod(projected) + projection


def of_galore_adafactor(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of GaLore's Adafactor: sums of the projected gradient, and the projection."""
    if not is_projected(tensor, rank := arguments.get("rank", RANK)):
        return _factored(tensor.shape)
    projected, projection = _projection(tensor.shape, rank, arguments.get("proj_type", "std"))
    return _factored(projected) + projection


def of_apollo(tensor: Trained, arguments: Arguments) -> int:
    """Returns the numbers of APOLLO's AdamW: those of GaLore's."""
    return of_galore(tensor, {"rank": arguments.get("rank", RANK)})


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) == 1:
        return shape[0]
    *stack, rows, columns = shape
    return math.prod(stack) * (rows + columns)


RANK = 128
"""The rank of GaLore and APOLLO where none is set."""


def _projection(shape: tuple[int, ...], rank: int, kind: str) -> tuple[tuple[int, int], int]:
    """Returns the shape of a projected gradient, and how many numbers its projection has."""
    rows, columns = shape
    if kind == "full":
        return (rank, rank), rank * (rows + columns)
    if kind == "std":
        kind = "right" if rows >= columns else "left"
    elif kind == "reverse_std":
        kind = "left" if rows >= columns else "right"
    return ((rows, rank), rank * columns) if kind == "right" else ((rank, columns), rank * rows)


@dataclass(frozen=True)
class KahanStates(States):
    """States with a further number for each parameter of 16 bits: what rounding has lost of it."""

    def bytes_of(self, tensor: Trained, width: int, arguments: Arguments) -> tuple[int, int]:
        """Returns the bytes that are kept of a tensor: fixed, and paged."""
        is_summed = width == 2 and arguments.get("kahan_sum", True)
        return width * (self.numbers(tensor, arguments) + tensor.size * is_summed), 0
