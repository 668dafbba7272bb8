"""A cheaper launch of Triton's kernels: `cheap_launch` is put above `triton.jit`, and the kernel is called as ever.

Triton makes a key of all arguments and options to look up what it has compiled, and the launch converts each tensor;
together they take the host several times as long as telling the driver. Here the key is a tuple of what Triton may
specialise a kernel for on NVIDIA's GPUs: the dtypes and alignments of tensors, and of a number whether it is 1, a
multiple of 16, and how many bits it needs. What Triton compiled is launched as its own tutorials do it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
"""Triton's kernels know of an address, and of a number, whether it is a multiple of this."""


def cheap_launch(kernel: Any) -> Any:
    """Returns a kernel with a cheaper launch; its compile-time constants come last, and are given by name.

    The interpreter compiles nothing, and for AMD's GPUs a kernel is specialised for the sizes of tensors, too.
    """
    return _Kernel(kernel) if isinstance(kernel, JITFunction) and torch.version.hip is None else kernel


def cdiv(number: int, divisor: int) -> int:
    """As `triton.cdiv`, which a kernel may call too, and which takes the host 2 us."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """As `triton.next_power_of_2`, in the same way."""
    return 1 << (number - 1).bit_length()


class _Kernel:
    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Tensor | int | None, **options: Any) -> None:
        key: list[Any] = [driver.active.get_current_device(), *options, *options.values()]
        values: list[int | None] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                key += argument.dtype, address % ALIGNMENT == 0
                values.append(address)
            else:
                key += (None,) if argument is None else (argument % ALIGNMENT == 0, argument == 1, argument >> 31)
                values.append(argument)
        compiled = self._compiled.get(tuple(key))
        if compiled is None:
            self._compiled[tuple(key)] = self.kernel[grid](*arguments, **options)
        else:  # it has a place for each constant, whose value is compiled into it
            constants = (None,) * (len(self.kernel.arg_names) - len(values))
            compiled[(*grid, 1, 1)[:3]](*values, *constants)
