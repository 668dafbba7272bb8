"""The files of a base that is saved quantized, read as the 16-bit files that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora.errors import DataError
from qlora.models.weight_files import Tensors
from qlora.quantization.mxfp4 import BLOCKS, SCALES, decode
from qlora.quantization.saved_formats import Codes, Format, Settings, find_parts
from qlora.upstream.transformers_files import read_slice

KeepCodes = Callable[[str, Codes], None]
"""What gets the name of a weight and its integers."""


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


class DecodedWeights:
    """Tensors of which those that a format quantizes are decoded when they are read, in float32."""

    def __init__(
        self, saved: Tensors, form: Format, settings: Settings, key: str, keep: KeepCodes | None = None
    ) -> None:
        """Raises `DataError` where the tensors of a weight are missing or do not fit each other; `key` names it all.

        `keep` gets the integers of each weight that is read, where there are some.
        """
        self._saved, self._form, self._settings, self._key, self._keep = saved, form, settings, key, keep
        self._weights, self._taken = find_parts(form, saved, key)

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the 16-bit files, in the order of the saved ones."""
        plain = {parts.names["main"]: name for name, parts in self._weights.items()}
        for name in self._saved:
            if name in plain:
                yield plain[name]
            elif name not in self._taken:
                yield name

    def __contains__(self, name: object) -> bool:
        """Returns whether the 16-bit files would hold a tensor of this name."""
        return name in self._weights or (name in self._saved and name not in self._taken)

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""
        return [name for name in self if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU, in float32 where it is decoded."""
        if (parts := self._weights.get(name)) is None:
            tensor = self._saved.read(name)
            if not tensor.dtype.itemsize > 1 and tensor.is_floating_point():
                raise DataError(
                    f"{self._key}: {name} is in 8-bit floats, and its files hold no scale for it; download or copy "
                    "the model again"
                )
            return tensor
        try:
            tensors = {part: self._saved.read(key) for part, key in parts.names.items()}
            if self._keep is not None and (codes := self._form.codes(tensors, self._settings)) is not None:
                self._keep(name, codes)
                return codes.decode()
            return self._form.decode(tensors, self._settings)
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(
                f"{self._key}: the tensors of {name} do not fit each other ({str(error).splitlines()[0]}); download "
                "or copy the model again"
            ) from error

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without decoding it."""
        if (parts := self._weights.get(name)) is None:
            return self._saved.shape(name)
        if "shape" in parts.names:
            return torch.Size(self._saved.read(parts.names["shape"]).tolist())
        return self._form.shape({part: self._saved.shape(key) for part, key in parts.names.items()}, self._settings)


class Slices:
    """The files as transformers opens them (`Tensors`)."""

    def __init__(self, slices: Mapping[str, Any]) -> None:
        self._slices = slices

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._slices)

    def __contains__(self, name: object) -> bool:
        """Returns whether there is a tensor of this name."""
        return name in self._slices

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""
        return [name for name in self if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""
        return read_slice(self._slices[name])

    def shape(self, name: str) -> torch.Size:
        """Returns a tensor's shape without reading it."""
        return torch.Size(self._slices[name].get_shape())


class LazyTensor:
    """What transformers reads like a slice of a file, when the tensor is needed."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: Any) -> Tensor:
        """Returns the tensor; transformers asks for all of it."""
        return self._tensors.read(self._name)[index]

    def get_shape(self) -> list[int]:
        """Returns the tensor's shape."""
        return list(self._tensors.shape(self._name))


def decoded_slices(
    slices: Mapping[str, Any], *, form: Format, settings: Settings, key: str, keep: KeepCodes | None = None
) -> dict[str, Any]:
    """Returns slices by the names of 16-bit files, whose quantized weights are decoded one by one."""
    weights = DecodedWeights(Slices(slices), form, settings, key, keep)
    return {name: LazyTensor(weights, name) for name in weights}
