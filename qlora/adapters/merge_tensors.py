"""Adds an adapter to its base tensor by tensor: in memory are one file of the result and one layer, never a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from qlora.adapters.adapted import INSTEAD, Adapted
from qlora.adapters.merge_experts import ExpertsPart, find_experts_part
from qlora.config.schema import MergeBase
from qlora.errors import DataError
from qlora.experts.layout import Unit
from qlora.models.new_tokens import mean_row
from qlora.models.weight_files import ModelNames, Tensors
from qlora.runtime.device import Placement

log = logging.getLogger(__name__)

FILES = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model."""

    source: str
    """Its name in the base's files."""
    parameter: str | None
    """Its name in the loaded model; None: loading joins it with others, so it is copied as it is."""
    shape: torch.Size
    dtype: torch.dtype
    experts: ExpertsPart | None = None
    """What it holds of experts that are quantized or adapted."""

    @property
    def bytes(self) -> int:
        """Its size in the merged files."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass
class Merger:
    """Writes the model that a base's files and an adapter make."""

    tensors: Tensors
    names: ModelNames
    adapted: Adapted
    base: MergeBase
    dtype: torch.dtype
    placement: Placement
    errors: dict[str, float] = field(default_factory=dict)
    """What rounding changed in each quantized layer, as a share of its weight's norm; filled while writing."""

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The tensors to write, by the names they get, in the order of the base's files.

        Raises `DataError` if one that the adapter was trained on cannot be found.
        """
        parts: dict[str, Part] = {}
        loaded = {source: self.names.find(source) for source in self.tensors}
        written = set(loaded.values())
        for source, parameter in loaded.items():
            if self.adapted.method.is_statistic(source):
                continue
            if (experts := self._experts(source)) is not None:
                shape = experts.shape(self.tensors.shape(source))
                parts[source] = Part(source, None, shape, self.dtype, experts)
            elif self.names.is_converted(source):
                parts[source] = Part(source, None, self.tensors.shape(source), self.dtype)
            elif parameter is None:
                log.info("%s: loading the base leaves this tensor out, and so does merging", source)
            elif (twin := self.adapted.tied.get(parameter)) is None:
                parts[source] = self._part(source, parameter)
            elif twin not in written:  # of two tied matrices, readers look for the first
                written.add(twin)
                parts[twin] = self._part(source, twin)
        merged = {part.experts.parameter for part in parts.values() if part.experts is not None}
        self._check_complete({part.parameter for part in parts.values()} | merged)
        return parts

    def _experts(self, source: str) -> ExpertsPart | None:
        """Returns what a tensor holds of experts that are quantized or adapted."""
        part = find_experts_part(self.names, source)
        changed = self.adapted.experts.keys() | self.adapted.rounded.keys()
        return part if part is not None and part.parameter in changed else None

    def _part(self, source: str, parameter: str) -> Part:
        plain = self.names.tensors[parameter]
        if not plain.is_floating_point():
            return Part(source, parameter, plain.shape, plain.dtype)
        shape, dtype = self.adapted.kept.get(parameter, (plain.shape, self.placement.param_dtype))
        # What a model keeps in float32 whatever it is loaded in (the routers of some experts) stays float32.
        stays_fp32 = dtype is torch.float32 and self.placement.param_dtype is not torch.float32
        return Part(source, parameter, shape, dtype if stays_fp32 else self.dtype)

    def _check_complete(self, available: set[str | None]) -> None:
        rounded = self.adapted.rounded if self.base is MergeBase.dequantized else ()
        experts = {name for name in (*self.adapted.experts, *rounded) if name in self.names.tensors}
        layers = (f"{layer}.weight" for layer in (*self.adapted.layers, *rounded) if layer not in experts)
        for name in (*layers, *experts, *self.adapted.replaced, *self.adapted.rows):
            if name not in available:
                raise DataError(f"merge.base: no tensor in the files of the base holds {name} alone; {INSTEAD}")
        if self.base is MergeBase.original and any(map(self.adapted.method.is_statistic, self.tensors)):
            raise DataError(
                "merge.base=original: the base is saved in 4 or 8 bits only; use merge.base=dequantized, or give the "
                "16-bit weights as model.name"
            )

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(part.bytes for part in self.parts.values())

    @torch.no_grad()
    def write(self, folder: Path, *, max_shard_size: int, on_progress: Callable[[int], None]) -> None:
        """Writes safetensors files of up to `max_shard_size` bytes, and their index.

        `on_progress` is called with the number of tensors that are written.
        """
        empty = {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in self.parts.items()}
        split = split_torch_state_dict_into_shards(empty, filename_pattern=FILES, max_shard_size=max_shard_size)
        done = 0
        for file, names in split.filename_to_tensors.items():
            shard: dict[str, Tensor] = {}
            for name in names:
                shard[name] = self.tensor(self.parts[name])
                done += 1
                on_progress(done)
            save_file(shard, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            path = folder / (FILES.format(suffix="") + ".index.json")
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def tensor(self, part: Part) -> Tensor:
        """Returns a tensor of the merged model on the CPU; raises `DataError` where its dtype is too narrow."""
        value = self._value(part)
        written = value.to(part.dtype)
        if written.is_floating_point() and bool((written.isinf() & value.isfinite()).any()):
            dtype = str(part.dtype).removeprefix("torch.")
            raise DataError(f"merge.dtype: {part.source} holds numbers too large for {dtype}; use merge.dtype=bf16")
        return written.cpu().contiguous()

    def _value(self, part: Part) -> Tensor:
        name = part.parameter
        if part.experts is not None:
            return self._merge_experts(part, part.experts)
        if name in self.adapted.replaced:
            return self.adapted.replaced[name]
        layer = (name or "").removesuffix(".weight")
        if layer in self.adapted.layers or layer in self.adapted.rounded:
            return self._linear(part, layer)
        value = self._as_loaded(self.tensors.read(part.source), name)
        if name is not None and part.shape[:1] > value.shape[:1]:
            new = mean_row(value) if value.dim() > 1 else torch.zeros_like(value[:1])
            value = torch.cat([value, new.expand(part.shape[0] - value.shape[0], *value.shape[1:])])
        if name in self.adapted.rows:
            indices, rows = self.adapted.rows[name]
            value = value.index_copy(0, indices, rows.to(value))
        return value

    def _linear(self, part: Part, layer: str) -> Tensor:
        """Returns a layer's weight in float32, in the files' orientation."""
        is_transposed = layer in self.adapted.transposed
        weight, is_decoded = self._read(part, layer)
        if not is_decoded:
            weight = weight.T if is_transposed else weight
            weight = self._as_trained(weight, layer, part.parameter, layer)
        if layer in self.adapted.layers:
            weight = self.adapted.layers[layer].add_to(weight)
        return weight.float().T if is_transposed else weight.float()

    def _merge_experts(self, part: Part, experts: ExpertsPart) -> Tensor:
        """Returns a tensor with weights of experts in float32, in the files' orientation."""
        saved, is_decoded = self._read(part, experts.parameter)
        adapter = self.adapted.experts.get(experts.parameter)

        def merge(weight: Tensor, unit: Unit, expert: int) -> Tensor:
            if not is_decoded:
                layer = experts.parameter.rpartition(".")[0]
                label = f"{layer}.{expert}.{unit.name}_proj"
                weight = self._as_trained(weight, experts.parameter, experts.parameter, label)
            return (weight if adapter is None else adapter.add_to(weight, expert, unit.rows)).float()

        return experts.map(saved, merge)

    def _read(self, part: Part, name: str) -> tuple[Tensor, bool]:
        """Returns a weight of the files, and whether these hold it quantized, as layer `name` was trained on it."""
        device = self.placement.device
        if name in self.adapted.rounded:
            weight = self.adapted.method.read_saved(self.tensors, part.source, device)
            if weight is not None:
                return weight, True
        return self.tensors.read(part.source).to(device), False

    def _as_trained(self, weight: Tensor, name: str, parameter: str | None, label: str) -> Tensor:
        """Returns a weight [out, in] as layer `name` was trained on it; what quantization changed is noted."""
        if (rounding := self.adapted.rounded.get(name)) is None:
            return self._as_loaded(weight, parameter)
        rounded = rounding(weight.to(self.placement.param_dtype)).float()
        self.errors[label] = float((rounded - weight).norm() / weight.float().norm().clamp(min=1e-30))
        return rounded if self.base is MergeBase.dequantized else weight

    def _as_loaded(self, value: Tensor, name: str | None) -> Tensor:
        """Returns an unquantized tensor as the adapter saw it; `merge.base=original` takes it as it is in the file."""
        if self.base is MergeBase.original or not value.is_floating_point():
            return value
        _, dtype = self.adapted.kept.get(name or "", (None, self.placement.param_dtype))
        return value.to(dtype)
