"""The files of a base whose experts are stored in MXFP4, read as the 16-bit files that they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora.models.weight_files import Tensors
from qlora.quantization.mxfp4 import BLOCKS, SCALES, decode


class DecodedTensors:
    """Tensors of which those in MXFP4 are decoded when they are read, [experts, in, out] as gpt-oss keeps them."""

    def __init__(self, saved: Tensors) -> None:
        self._saved = saved
        self._decoded = {name.removesuffix(BLOCKS) for name in saved if name.endswith(BLOCKS)}

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the 16-bit files, in the order of the saved ones."""
        for name in self._saved:
            plain = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if plain not in self._decoded:
                yield name
            elif name.endswith(BLOCKS):
                yield plain

    def __contains__(self, name: object) -> bool:
        """Returns whether the 16-bit files would hold a tensor of this name."""
        return name in self._decoded or (name in self._saved and name in self.names(""))

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""
        return [name for name in self if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU, in bf16 where it is decoded, which holds its numbers exactly."""
        if name not in self._decoded:
            return self._saved.read(name)
        blocks, scales = (self._saved.read(name + ending) for ending in (BLOCKS, SCALES))
        return decode(blocks, scales, torch.bfloat16).transpose(1, 2)

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""
        if name not in self._decoded:
            return self._saved.shape(name)
        experts, rows, groups, width = self._saved.shape(name + BLOCKS)
        return torch.Size([experts, groups * width * 2, rows])
