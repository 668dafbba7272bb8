"""How the weights of checkpoints that others have quantized are decoded, one matrix at a time.

A format says which tensors of a file belong to a weight, and computes that from them in float32. What a run does with
it is its own choice: 4 bits by `quantization=nf4`, 16 by `quantization=none`, or any other method.

- `fp8`: fine-grained 8-bit floats, each block with a scale (`weight_scale_inv`, DeepSeek-V3 and Qwen3)
- `compressed-tensors`: integers packed in 32 bits, or 8-bit integers or floats, with a scale for a tensor, row,
  group or block
- `gptq`: 2, 4 or 8 bits, packed along the inputs (AutoGPTQ, GPTQModel; both conventions of zeros)
- `awq`: 4 bits, packed along the outputs in AutoAWQ's order (`version: gemm`)
- `hqq` in whole bits, and torchao's 8-bit integers
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora.errors import ConfigError, DataError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each 4 bits of an integer, from the lowest."""
WORD = 32
HQQ_TOGETHER = {1: 8, 2: 4, 3: 10, 4: 2}
"""Codes in a byte (of 3 bits: in 32), by their bits; of more bits there is one."""
Settings = Mapping[str, Any]
"""The `quantization_config` in a `config.json`."""


@dataclass(frozen=True)
class Layout:
    """How the tensors of a weight are named: what the names end with behind a common stem."""

    main: str
    plain: str
    """The ending in the 16-bit files."""
    scale: str
    beside: dict[str, str] = field(default_factory=dict)
    """Further tensors, by what `Format.decode` calls them."""


@dataclass(frozen=True)
class Codes:
    """The integers of a weight, and what they stand for."""

    bits: int
    codes: Tensor
    """[in, out]"""
    zeros: Tensor
    """[groups, out]"""
    scales: Tensor
    """[groups, out]"""
    groups: Tensor
    """[in], the group of each input."""

    def decode(self) -> Tensor:
        """Returns the weight [out, in] in float32."""
        index = self.groups.long()
        return ((self.codes - self.zeros[index]) * self.scales.float()[index]).T.contiguous()


class Format:
    """A way in which a weight is saved."""

    layouts: tuple[Layout, ...]
    unused: tuple[str, ...] = ()
    """Endings of tensors that no training run reads, such as scales of activations."""

    def check(self, settings: Settings, key: str) -> None:
        """Raises `ConfigError` for settings that are not decoded; `key` names the model."""

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Returns a weight [..., out, in] in float32 from the tensors `main`, `scale` and those `beside`."""
        raise NotImplementedError

    def codes(self, parts: Mapping[str, Tensor], settings: Settings) -> Codes | None:
        """Returns the integers of a weight; None: it is kept in another way."""
        return None

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """Returns the shape of a weight by the shapes of its tensors."""
        raise NotImplementedError


class FineGrainedFp8(Format):
    """8-bit floats with a scale for each block."""

    layouts = (Layout("", "", "_scale_inv"),)
    unused = (".input_scale", ".activation_scale")

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Multiplies by the scales; those in bytes are exponents of two."""
        return parts["main"].float() * _spread(parts["scale"], parts["main"].shape, settings.get("weight_block_size"))

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """The shape of the 8-bit floats."""
        _check_grid(parts["scale"], parts["main"], settings.get("weight_block_size"))
        return parts["main"]


class CompressedTensors(Format):
    """Those of llm-compressor that hold a number a weight; bits and groups are read off the tensors."""

    layouts = (
        Layout(".weight_packed", ".weight", ".weight_scale",
               {"zero": ".weight_zero_point", "shape": ".weight_shape", "groups": ".weight_g_idx"}),
        Layout(".weight", ".weight", ".weight_scale", {"zero": ".weight_zero_point", "groups": ".weight_g_idx"}),
    )  # fmt: skip
    unused = (".input_scale", ".input_zero_point", ".k_scale", ".v_scale", ".q_scale", ".output_scale")
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")

    def check(self, settings: Settings, key: str) -> None:
        """Refuses codes that stand for other numbers, zeros that are left out, and rotations."""
        groups = (settings.get("config_groups") or {}).values()
        formats = {str(settings.get("format", "")), *(str(group.get("format") or "") for group in groups)} - {""}
        if others := sorted(formats - {*self.known, "mixed-precision"}):
            raise _undecoded(key, f"compressed-tensors in the format {others[0]}", f"{', '.join(self.known)} are")
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise _undecoded(key, "compressed-tensors with a sparsity_config", "dense weights are")
        if settings.get("transform_config"):
            raise _undecoded(key, "compressed-tensors with a transform_config (rotated weights)", "plain weights are")

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Unpacks, takes the zeros off, and multiplies by the scales."""
        codes, scale, zero = parts["main"], parts["scale"], parts.get("zero")
        if (saved_shape := parts.get("shape")) is not None:
            columns = int(saved_shape[-1])
            bits = _bits(codes.shape[-1], columns)
            codes = _unpack(codes, bits)[..., :columns] - (1 << (bits - 1))
            if zero is not None and zero.dtype is torch.int32:  # packed along the outputs
                rows = int(saved_shape[-2])
                zero = (_unpack(zero.mT, bits)[..., :rows] - (1 << (bits - 1))).mT
        groups = parts.get("groups")
        if groups is not None and bool((groups >= 0).all()):
            per_weight = scale.float()[..., groups.long()]
            return (codes.float() - (0 if zero is None else zero.float()[..., groups.long()])) * per_weight
        block = _block_structure(settings)
        numbers = codes.float()
        if zero is not None:
            numbers = numbers - _spread(zero.float(), codes.shape, block)
        return numbers * _spread(scale, codes.shape, block)

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """The number of inputs of a packed weight stands in a tensor: here it is what the scales mean."""
        return parts["main"]


class Gptq(Format):
    """Integers packed along the inputs, with a scale and a zero for each group of inputs and output."""

    layouts = (Layout(".qweight", ".weight", ".scales", {"zero": ".qzeros", "groups": ".g_idx"}),)

    def check(self, settings: Settings, key: str) -> None:
        """Refuses widths whose codes lie across two integers."""
        if (bits := settings.get("bits")) not in (2, 4, 8):
            raise _undecoded(key, f"GPTQ in {bits} bits", "2, 4 and 8 bits are")
        form = settings.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise _undecoded(key, f"GPTQ in the layout {form}", "gptq and gptq_v2 are")

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Takes the zeros off, and multiplies by the scales."""
        return self.codes(parts, settings).decode()

    def codes(self, parts: Mapping[str, Tensor], settings: Settings) -> Codes:
        """A zero is saved less one, but in `gptq_v2`."""
        bits = int(settings["bits"])
        codes = _unpack(parts["main"].T, bits).T  # [in, out]
        zeros = _unpack(parts["zero"], bits)
        if settings.get("checkpoint_format") != "gptq_v2":
            zeros = (zeros + 1) & ((1 << bits) - 1)
        groups = parts.get("groups")
        if groups is None:
            size = settings.get("group_size", -1)
            groups = torch.arange(len(codes), device=codes.device) // (size if size > 0 else len(codes))
        return Codes(bits, codes, zeros, parts["scale"], groups)

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """The codes are [in, out], packed by rows."""
        rows, columns = parts["main"]
        return torch.Size([columns, rows * WORD // int(settings["bits"])])


class Awq(Format):
    """4-bit integers packed along the outputs."""

    layouts = (Layout(".qweight", ".weight", ".scales", {"zero": ".qzeros"}),)

    def check(self, settings: Settings, key: str) -> None:
        """Refuses the layouts of other kernels."""
        bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version", "gemm")).lower()
        if bits != 4 or version != "gemm":
            raise _undecoded(key, f"AWQ in {bits} bits, version {version}", "4 bits of version gemm are")

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Takes the zeros off, and multiplies by the scales."""
        return self.codes(parts, settings).decode()

    def codes(self, parts: Mapping[str, Tensor], settings: Settings) -> Codes:
        """Each group of inputs has a zero and a scale for each output."""
        codes, zeros, scales = self._in_order(parts["main"]), self._in_order(parts["zero"]), parts["scale"]
        groups = torch.arange(len(codes), device=codes.device) // (len(codes) // len(scales))
        return Codes(4, codes, zeros, scales, groups)

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """The codes are [in, out], packed by columns."""
        rows, columns = parts["main"]
        return torch.Size([columns * WORD // 4, rows])

    def _in_order(self, packed: Tensor) -> Tensor:
        numbers = _unpack(packed, 4).unflatten(1, (-1, len(AWQ_ORDER)))
        ordered = torch.empty_like(numbers)
        ordered[..., list(AWQ_ORDER)] = numbers
        return ordered.flatten(1)


class Hqq(Format):
    """Codes in groups, with a scale and a zero each; a byte or integer holds codes of groups that lie far apart."""

    layouts = (Layout(".W_q", ".weight", ".scale", {"zero": ".zero", "shape": ".shape", "bits": ".nbits"}),)
    unused = tuple(
        f".{name}"
        for name in (
            *("axis", "group_size", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero"),
            *("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
            *("optimize", "round_zero"),
        )
    )

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """The first groups lie in the highest bits."""
        packed, bits = parts["main"], parts["bits"]
        if packed.is_floating_point() or bits.is_floating_point():
            raise ValueError("codes that are viewed as floats, or of 1.58 bits, are not decoded")
        width, shape = int(bits), torch.Size(parts["shape"].tolist())
        count = HQQ_TOGETHER.get(width, 1)
        shifts = [width * index for index in reversed(range(count))]
        codes = torch.cat([(packed >> shift) & ((1 << width) - 1) for shift in shifts])
        codes = codes[: shape.numel() // codes.shape[1]].float()
        return ((codes - parts["zero"].float()) * parts["scale"].float()).reshape(shape)


class Torchao(Format):
    """Integers of 8 bits as transformers writes torchao's tensors."""

    layouts = (Layout("._weight_qdata", ".weight", "._weight_scale", {"zero": "._weight_zero_point"}),)

    def check(self, settings: Settings, key: str) -> None:
        """Refuses other tensors of torchao."""
        kind = settings.get("quant_type")
        kind = kind.get("default", {}).get("_type", kind) if isinstance(kind, dict) else kind
        if kind != "Int8WeightOnlyConfig":
            raise _undecoded(key, f"torchao's {kind}", "Int8WeightOnlyConfig is")

    def decode(self, parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
        """Takes the zeros off, and multiplies by the scales."""
        codes, zero = parts["main"].float(), parts.get("zero")
        if zero is not None:
            codes = codes - _spread(zero.float(), codes.shape, None)
        return codes * _spread(parts["scale"], codes.shape, None)

    def shape(self, parts: Mapping[str, torch.Size], settings: Settings) -> torch.Size:
        """The shape of the integers."""
        return parts["main"]


FORMATS: dict[str, Format] = {
    "fp8": FineGrainedFp8(),
    "compressed-tensors": CompressedTensors(),
    "gptq": Gptq(),
    "awq": Awq(),
    "hqq": Hqq(),
    "torchao": Torchao(),
}
"""The formats by `quant_method`."""


@dataclass(frozen=True)
class SavedParts:
    """The tensors of one weight in the files."""

    names: dict[str, str]
    """By what `Format.decode` calls them."""


def find_parts(form: Format, names: Iterable[str], key: str) -> tuple[dict[str, SavedParts], set[str]]:
    """Returns the quantized weights of files, by their names in 16-bit ones, and the names that have no place there.

    Raises `DataError` for a weight without its scale.
    """
    there = set(names)
    weights: dict[str, SavedParts] = {}
    taken = {name for name in there if name.endswith(form.unused)} if form.unused else set[str]()
    for layout in form.layouts:
        for name in sorted(there - taken):
            if not name.endswith(layout.main):
                continue
            stem = name.removesuffix(layout.main) if layout.main else name
            scale = stem + layout.scale
            if scale not in there:
                if layout.main not in ("", ".weight"):
                    raise DataError(
                        f"{key}: its files hold {name}, and no {scale}, which it is decoded by; download or copy the "
                        "model again"
                    )
                continue
            beside = {part: stem + ending for part, ending in layout.beside.items() if stem + ending in there}
            weights[stem + layout.plain] = SavedParts({"main": name, "scale": scale, **beside})
            taken |= {name, scale, *beside.values()}
    return weights, taken


def _spread(scale: Tensor, shape: torch.Size, block: Any) -> Tensor:
    """Returns what each number [..., rows, columns] is multiplied by; the last block of a side may be cut."""
    if scale.dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)):
        scale = torch.ldexp(torch.ones((), device=scale.device), scale.view(torch.uint8).int() - 127)
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    for side in (-2, -1):
        count, size = scale.shape[side], shape[side]
        if count not in (1, size):
            scale = scale.repeat_interleave(_block_size(count, size, block, side), side).narrow(side, 0, size)
    return scale


def _check_grid(scale: torch.Size, shape: torch.Size, block: Any) -> None:
    if scale.numel() > 1 and len(scale) > 1:
        for side in (-2, -1):
            if scale[side] not in (1, shape[side]):
                _block_size(scale[side], shape[side], block, side)


def _block_size(count: int, size: int, block: Any, side: int) -> int:
    """Returns how many numbers of a side share a scale."""
    if block and -(-size // int(block[side])) == count:
        return int(block[side])
    if size % count:
        raise ValueError(f"{count} scales do not fit a side of {size}")
    return size // count


def _block_structure(settings: Settings) -> Any:
    for group in (settings.get("config_groups") or {}).values():
        if block := (group.get("weights") or {}).get("block_structure"):
            return block
    return None


def _bits(integers: int, columns: int) -> int:
    """Returns the bits of a code, of which an integer holds a whole number."""
    for bits in (2, 4, 8):
        if integers == -(-columns * bits // WORD):
            return bits
    raise ValueError(f"{columns} weights in {integers} integers have neither 2, 4 nor 8 bits each")


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Returns the codes in 32-bit integers [..., integers], the lowest bits first, [..., integers * 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, device=packed.device, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _undecoded(key: str, what: str, known: str) -> ConfigError:
    return ConfigError(
        f"{key} is saved as {what}, which is not decoded here ({known}); use the original 16-bit weights"
    )
