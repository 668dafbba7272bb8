"""What a quantization method answers, so that nothing else needs to know how a base is quantized.

Importing a method needs no torch: what computes with tensors imports it inside. A method of another package inherits
from `QuantizationMethod` to get the answers of a base whose layers know by themselves how to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from qlora.config.registries.quantization_methods import AUTO, load_method
from qlora.config.schema import ComputeDtype, ExpertsBits, LoraConfig, QuantizationConfig
from qlora.errors import ConfigError
from qlora.quantization.stored_base import StoredBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora.quantization.bnb4.quantized_weight import QuantizedWeight
    from qlora.quantization.saved_formats import Codes
    from qlora.runtime.device import Placement


class SavedTensors(Protocol):
    """The tensors of a base's files, by their names there."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""

    def names(self, prefix: str) -> list[str]:
        """Returns the names that begin with `prefix`."""


class QuantizationMethod(Protocol):
    """One way to store the frozen weights of a base. `config` is the group `quantization` throughout."""

    name: str
    """The name in `quantization.method`."""
    is_quantized: bool = True
    """Whether linear layers are stored in fewer than 16 bits."""
    package: str | None = None
    """The package that computes with the quantized layers, beside torch."""
    rounds_activations: bool = False
    """Whether a product rounds the activations too, by all tokens of a batch."""
    library_class: str | None = None
    """The class of transformers that describes this quantization; None: transformers does not know the method."""
    library_imports: tuple[str, ...] = ()
    """The imports that `library_arguments` or `quantizing_code` need, as Python code."""
    offloads_experts: bool = False
    """Whether the experts of a mixture can wait in the host's memory (`qlora.experts.host`)."""
    decodes: tuple[str, ...] = ()
    """The other methods, by their `quant_method` in `config.json`, whose saved weights are decoded while they load."""
    keep_codes: Callable[[str, Codes], None] | None = None
    """What gets the integers of each weight of a base that is decoded while it loads; None: they are not needed."""
    quantizing_operators: tuple[str, ...] = ()
    """The torch operators, `namespace::name`, that quantize a weight; they lose what was NaN or infinite."""

    # What it is called

    def describe(self, config: QuantizationConfig) -> str:
        """Returns the words of the start screen, e.g. `nf4 + double quantization`."""
        return self.name

    def describe_precision(self, config: QuantizationConfig) -> str:
        """Returns the words of the model card, e.g. `4-bit NF4 with double quantization`."""
        return self.describe(config)

    def width(self, config: QuantizationConfig) -> str:
        """Returns the bits of a weight as a word, e.g. `4-bit`."""
        return f"{config.bits}-bit"

    def data_type(self, config: QuantizationConfig) -> str:
        """Returns the data type of a quantized weight, e.g. `nf4`."""
        return self.name

    def library_arguments(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Returns the arguments of `library_class` as Python code; `dtype` is the code of the compute dtype."""
        return []

    def quantizing_code(self, config: QuantizationConfig, dtype: str) -> list[str]:
        """Returns Python that quantizes a loaded base, `model`, where `from_pretrained` cannot (model card)."""
        return []

    # What training allows; none of this imports torch

    def check_adapter(self, config: QuantizationConfig, lora: LoraConfig) -> None:
        """Raises `ConfigError` for a kind of training that the stored weights do not allow."""
        if not lora.enabled:
            raise ConfigError(
                f"lora=none trains all weights, which quantization.method={self.name} does not allow; choose "
                "quantization=none (16 bit), or an adapter with lora=all-linear"
            )
        if lora.use_dora or lora.init.value in ("pissa", "olora", "loftq"):
            kind = "lora.use_dora=true" if lora.use_dora else f"lora.init={lora.init.value}"
            raise ConfigError(
                f"{kind} computes with the base weights themselves, which quantization.method={self.name} does not "
                "allow; use lora=all-linear lora.init=default"
            )

    def fsdp_unsupported_reason(self) -> str | None:
        """Returns why the base cannot be sharded over processes; None: it can."""
        return f"weights of {self.name} cannot be sharded"

    def fast_step_unsupported_reason(self) -> str | None:
        """Returns why the fast step cannot fuse quantized layers with their adapters; None: it can."""
        return f"it has no kernels for weights of {self.name}"

    def experts_unsupported_reason(self) -> str | None:
        """Returns why the experts of a mixture cannot be quantized; None: they can, or nothing is quantized."""
        return f"{self.package or self.name} quantizes linear layers alone" if self.is_quantized else None

    def stored_base(self, config: QuantizationConfig) -> StoredBase:
        """Returns how a base is stored, for the plans of memory and time."""
        unquantized_bytes = 4 if config.compute_dtype is ComputeDtype.fp32 else 2
        return StoredBase(lambda rows, columns: rows * columns * config.bits // 8, config.bits / 8, unquantized_bytes)

    def largest_error(self, config: QuantizationConfig) -> float | None:
        """Returns the relative error of normally distributed weights that only a broken library exceeds."""
        return None

    def stores_fp32(self, config: QuantizationConfig) -> bool:
        """Returns whether parameters are kept in float32, whatever the compute dtype."""
        return False

    def prefers_bf16(self, config: QuantizationConfig) -> bool:
        """Returns whether `compute_dtype=auto` means bf16 also on a CPU that only emulates it."""
        return False

    # Loading

    def check_installed(self, config: QuantizationConfig) -> None:
        """Raises `ResourceError` where the method's package is not installed; imports nothing."""

    def library_config(self, config: QuantizationConfig, placement: Placement) -> Any | None:
        """Returns transformers' description of the base, for `from_pretrained`; None: it is loaded unquantized."""
        return None

    def loading(self, config: QuantizationConfig, saved: str | None = None) -> AbstractContextManager[None]:
        """Inside, transformers stores the experts of a base as this method does while it loads that.

        `saved` is the one of `decodes` that the files are quantized by; None: they are not, or by this method.
        """
        return nullcontext()

    def convert(self, model: torch.nn.Module, config: QuantizationConfig, placement: Placement) -> None:
        """Quantizes a loaded model in place, where transformers did not; it is called without gradients."""

    def check_saved(self, config: QuantizationConfig, settings: Mapping[str, Any], key: str) -> None:
        """Raises `ConfigError` unless this method loads a base that was saved quantized.

        `settings` are the `quantization_config` of its `config.json`; `key` names the model.
        """
        saved = settings.get("quant_method", "an unknown method")
        raise ConfigError(f"{key} is quantized by {saved}, which quantization.method={self.name} does not load; use "
                          "the original 16-bit weights")  # fmt: skip

    def set_decoded_dtype(self, parameter: Tensor, dtype: torch.dtype) -> bool:
        """Makes a quantized weight decode to `dtype`; returns False for any other parameter."""
        return False

    def missing_statistics(self, model: torch.nn.Module) -> list[str]:
        """Returns the names of scales that the files of a saved quantized base lack, as far as loading hides it."""
        return []

    def saved_shape(self, layer: torch.nn.Module) -> torch.Size | None:
        """Returns the shape that the files give a quantized layer's weight; None: it is not known."""
        return None

    def prepare(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Makes quantized layers compute in `dtype`, and keeps their layout."""

    # Quantized layers

    def layer_classes(self) -> tuple[type[torch.nn.Module], ...]:
        """Returns the classes of quantized layers."""
        return ()

    def quantize(self, layer: torch.nn.Module, weight: Tensor) -> Tensor:
        """Returns the parameter that a layer of `layer_classes` keeps of a full weight [out, in]."""
        return weight

    def dequantize(self, layer: torch.nn.Module) -> Tensor:
        """Returns the weight [out, in] of a quantized layer in full."""
        raise NotImplementedError

    def rounding(self, layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        """Returns the function from a full weight [out, in] to what the layer computes with; it outlives the layer."""
        raise NotImplementedError

    def quantize_experts(self, experts: torch.nn.Module, config: QuantizationConfig) -> None:
        """Stores the weights of a module of experts quantized (`StoredExperts`); on the meta device, their room."""
        raise NotImplementedError

    def scales(self, parameter: Tensor) -> list[Tensor] | None:
        """Returns the tensors that decide whether a quantized weight is finite; None for any other parameter."""
        return None

    def count(self, parameter: Tensor) -> tuple[int, str]:
        """Returns the weights that a parameter holds, and their data type."""
        return parameter.numel(), str(parameter.dtype).removeprefix("torch.")

    def packed_weight(self, layer: torch.nn.Module) -> QuantizedWeight | None:
        """Returns the tensors that the kernels of the fast step read; None: they cannot read this layer."""
        return None

    def exact_products(self, model: torch.nn.Module, key: str) -> AbstractContextManager[None]:
        """Inside, quantized layers compute with decoded weights, and no first call changes how they are stored.

        Raises `ConfigError`, which names the model by `key`, at the end for a layer that the method cannot compute.
        """
        return nullcontext()

    # Saved weights

    def is_statistic(self, name: str) -> bool:
        """Returns whether a tensor in a file belongs to a quantized weight beside it."""
        return False

    def read_saved(self, tensors: SavedTensors, name: str, device: torch.device) -> Tensor | None:
        """Returns a weight [out, in] in full that the files hold quantized; None for any other."""
        return None


def quantizes_experts(method: QuantizationMethod, config: QuantizationConfig) -> bool:
    """Returns whether the experts of a mixture are to be quantized, and can be."""
    is_asked = method.is_quantized and config.experts is ExpertsBits.same
    return is_asked and method.experts_unsupported_reason() is None


def find_method(config: QuantizationConfig) -> QuantizationMethod:
    """Returns the method that a config names."""
    method: QuantizationMethod = load_method(config.method, config.bits)
    return method


def quantization_key(config: QuantizationConfig) -> str:
    """Returns the key and value that chose the method, for a message: `quantization.bits=4`."""
    return f"quantization.bits={config.bits}" if config.method == AUTO else f"quantization.method={config.method}"


def set_method(model: Any, method: QuantizationMethod) -> None:
    """Notes the method on a base, for those that are given the model alone."""
    model.__dict__["qlora_quantization"] = method


def method_of(model: Any) -> QuantizationMethod:
    """Returns the method of a base, with or without an adapter on it; one that was never loaded here is unquantized."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method: QuantizationMethod = base.__dict__.get("qlora_quantization") or load_method("none", 16)
    return method
