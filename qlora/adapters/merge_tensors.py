"""Adds an adapter to its base tensor by tensor: in memory are one file of the result and one layer, never a model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qlora.config.schema import MergeBase
from qlora.errors import ConfigError
from qlora.models.loading import mean_row
from qlora.models.weight_files import ModelNames, Tensors
from qlora.runtime.device import Placement

log = logging.getLogger(__name__)

FILES = "model{suffix}.safetensors"
ADAPTER = "default"  # the name that PEFT gives to the adapter it loads
WRAPPERS = re.compile(r"\.(base_layer|token_adapter|original_module)(?=\.|$)")
LORA = re.compile(r"(.+)\.lora_(?:A\.weight|B\.weight|magnitude_vector)")
TOKEN_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
# What bitsandbytes stores beside a weight of 4 or 8 bits.
STATISTICS = re.compile(
    r".+\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format)"
)
INSTEAD = "serve the adapter on its base instead"


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to a linear layer: `scaling` B A is added; with DoRA each row then gets its magnitude."""

    a: Tensor
    """Float32 [r, in]."""
    b: Tensor
    """Float32 [out, r]."""
    scaling: float
    magnitude: Tensor | None = None
    """Float32 [out]; None: no DoRA."""

    def add_to(self, weight: Tensor) -> Tensor:
        """Returns the merged weight, float32 [out, in], where `weight` is."""
        merged = weight.float() + self.scaling * (self.b.to(weight.device) @ self.a.to(weight.device))
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.to(merged) / torch.linalg.norm(merged, dim=1))[:, None]


@dataclass(frozen=True)
class Rounding:
    """How bitsandbytes rounds a layer's weight when it is loaded."""

    bits: int
    quant_type: str = ""
    double: bool = False
    blocksize: int = 0

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the values [out, in] that the quantized layer computes with, to the bit."""
        if self.bits == 8:
            packed, scales, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
            return bnb.int8_vectorwise_dequant(packed, scales)
        packed, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.double,
            quant_type=self.quant_type,
        )
        return bnb.dequantize_4bit(packed, state)


@dataclass(frozen=True)
class Adapted:
    """A loaded base with its adapter, taken apart: small tensors on the CPU, by the names of the plain base."""

    tied: dict[str, str]
    """Parameters that are the same as another one."""
    layers: dict[str, LowRank] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that were trained whole, such as biases."""
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Trained rows of an embedding or output matrix: indices and values."""
    rounded: dict[str, Rounding] = field(default_factory=dict)
    """The layers that the base holds in 4 or 8 bits."""
    turned: set[str] = field(default_factory=set)
    """Layers whose weight is [in, out] in the files (GPT-2)."""
    kept: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    """Shape and precision of what is not quantized; matrices that grew for `model.new_tokens` have their new shape."""


def take_apart(model: PeftModel) -> Adapted:
    """Copies out of a loaded model what merging needs, so that the model can be let go.

    Raises `ConfigError` for an adapter that no plain model can hold.
    """
    base, peft_type = model.get_base_model(), model.peft_config[ADAPTER].peft_type
    if peft_type != PeftType.LORA:
        raise ConfigError(f"adapter: task=merge adds LoRA to a base, but this is PEFT's {peft_type}; {INSTEAD}")
    adapted = Adapted(tied=dict(base.all_tied_weights_keys))
    tuners: dict[str, LoraLayer] = {}
    tokens: dict[str, TrainableTokensWrapper] = {}
    for name, module in base.named_modules():
        plain = WRAPPERS.sub("", name)
        if isinstance(module, LoraLayer):
            tuners[plain] = module
        elif isinstance(module, TrainableTokensWrapper):
            tokens[plain] = module
        elif isinstance(module, Linear4bit | Linear8bitLt):
            adapted.rounded[plain] = _rounding(module)
        if isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D:
            adapted.turned.add(plain)
    for name, parameter in base.named_parameters():
        plain = WRAPPERS.sub("", name)
        if parameter.is_floating_point() and plain.removesuffix(".weight") not in adapted.rounded:
            adapted.kept[plain] = (parameter.shape, parameter.dtype)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    parts = {name.removeprefix("base_model.model."): tensor.detach().cpu() for name, tensor in saved.items()}
    for name, tensor in parts.items():
        plain = WRAPPERS.sub("", name)
        if (found := LORA.fullmatch(name)) and found[1] in tuners:
            adapted.layers[found[1]] = _low_rank(found[1], tuners[found[1]], parts)
        elif (found := TOKEN_ROWS.fullmatch(name)) and found[1] in tokens:
            indices = tokens[found[1]].token_adapter.token_indices[ADAPTER]
            adapted.rows[f"{found[1]}.weight"] = (torch.tensor(indices), tensor)
        elif plain in adapted.kept:
            adapted.replaced[plain] = tensor
        else:
            raise ConfigError(f"adapter: a plain model has no place for its {name}; {INSTEAD}")
    _check_tied(adapted)
    return adapted


def _low_rank(name: str, layer: LoraLayer, parts: dict[str, Tensor]) -> LowRank:
    variant = layer.lora_variant.get(ADAPTER)
    a, b = parts[f"{name}.lora_A.weight"], parts[f"{name}.lora_B.weight"]
    if a.dim() != 2 or not (variant is None or isinstance(variant, DoraLinearVariant)):
        raise ConfigError(f"adapter: a plain model has no place for its {type(variant or layer).__name__} on {name}; "
                          f"{INSTEAD}")  # fmt: skip
    magnitude = parts.get(f"{name}.lora_magnitude_vector")
    return LowRank(a.float(), b.float(), layer.scaling[ADAPTER], None if magnitude is None else magnitude.float())


def _rounding(layer: Linear4bit | Linear8bitLt) -> Rounding:
    if isinstance(layer, Linear8bitLt):
        return Rounding(bits=8)
    state = layer.weight.quant_state
    return Rounding(bits=4, quant_type=state.quant_type, double=state.nested, blocksize=state.blocksize)


def _check_tied(adapted: Adapted) -> None:
    """Raises `ConfigError` if an adapter changes one of two matrices that are the same."""
    changed = {*(f"{name}.weight" for name in adapted.layers), *adapted.replaced}
    for one, other in adapted.tied.items():
        if found := changed & {one, other}:
            raise ConfigError(
                f"adapter: it changes {found.pop()}, but in this base {one} and {other} are the same matrix, and a "
                f"merged model would change both; {INSTEAD}, or train one with lora.target_modules=all-linear"
            )


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model."""

    source: str
    """Its name in the base's files."""
    parameter: str | None
    """Its name in the loaded model; None: loading joins it with others, so it is copied as it is."""
    shape: torch.Size
    dtype: torch.dtype

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

        Raises `ConfigError` if one that the adapter was trained on cannot be found.
        """
        parts: dict[str, Part] = {}
        loaded = {source: self.names.find(source) for source in self.tensors}
        there = set(loaded.values())
        for source, parameter in loaded.items():
            if self.names.is_converted(source):
                parts[source] = Part(source, None, self.tensors.shape(source), self.dtype)
            elif parameter is None:
                if not STATISTICS.fullmatch(source):
                    log.info("%s: loading the base leaves this tensor out, and so does merging", source)
            elif (twin := self.adapted.tied.get(parameter)) is None:
                parts[source] = self._part(source, parameter)
            elif twin not in there:  # of two tied matrices, readers look for the first
                there.add(twin)
                parts[twin] = self._part(source, twin)
        self._check_complete({part.parameter for part in parts.values()})
        return parts

    def _part(self, source: str, parameter: str) -> Part:
        plain = self.names.tensors[parameter]
        if not plain.is_floating_point():
            return Part(source, parameter, plain.shape, plain.dtype)
        shape, dtype = self.adapted.kept.get(parameter, (plain.shape, self.placement.weights))
        # What a model keeps in float32 whatever it is loaded in (the routers of some experts) stays float32.
        wide = dtype is torch.float32 and self.placement.weights is not torch.float32
        return Part(source, parameter, shape, dtype if wide else self.dtype)

    def _check_complete(self, found: set[str | None]) -> None:
        rounded = self.adapted.rounded if self.base is MergeBase.dequantized else ()
        layers = (f"{layer}.weight" for layer in (*self.adapted.layers, *rounded))
        for name in (*layers, *self.adapted.replaced, *self.adapted.rows):
            if name not in found:
                raise ConfigError(f"merge.base: in the files of the base no tensor is {name} alone; {INSTEAD}")
        if self.base is MergeBase.original and any(STATISTICS.fullmatch(source) for source in self.tensors):
            raise ConfigError(
                "merge.base=original: the base is stored in 4 or 8 bits only; use merge.base=dequantized, or give the "
                "16-bit weights as model.name"
            )

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(part.bytes for part in self.parts.values())

    @torch.no_grad()
    def write(self, folder: Path, *, max_shard_size: int, on_progress: Callable[[int], None]) -> None:
        """Writes safetensors files of up to so many bytes, and their index.

        `on_progress` is told how many tensors are done.
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
        """Returns a tensor of the merged model on the CPU; raises `ConfigError` where its dtype is too narrow."""
        value = self._value(part)
        written = value.to(part.dtype)
        if written.is_floating_point() and bool((written.isinf() & value.isfinite()).any()):
            dtype = str(part.dtype).removeprefix("torch.")
            raise ConfigError(f"merge.dtype: {part.source} holds numbers too large for {dtype}; use merge.dtype=bf16")
        return written.cpu().contiguous()

    def _value(self, part: Part) -> Tensor:
        name = part.parameter
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
        turned, rounding = layer in self.adapted.turned, self.adapted.rounded.get(layer)
        weight = self.tensors.read_stored(part.source, self.placement.device) if rounding else None
        if weight is None:
            weight = self.tensors.read(part.source).to(self.placement.device)
            weight = weight.T if turned else weight
            if rounding is None:
                weight = self._as_loaded(weight, part.parameter)
            else:
                rounded = rounding.apply(weight.to(self.placement.weights)).float()
                self.errors[layer] = float((rounded - weight).norm() / weight.float().norm().clamp(min=1e-30))
                weight = rounded if self.base is MergeBase.dequantized else weight
        if layer in self.adapted.layers:
            weight = self.adapted.layers[layer].add_to(weight)
        return weight.float().T if turned else weight.float()

    def _as_loaded(self, value: Tensor, name: str | None) -> Tensor:
        """Returns an unquantized tensor as the adapter saw it; `merge.base=original` takes it as it is in the file."""
        if self.base is MergeBase.original or not value.is_floating_point():
            return value
        _, dtype = self.adapted.kept.get(name or "", (None, self.placement.weights))
        return value.to(dtype)
