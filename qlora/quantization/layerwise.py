"""A method that quantizes linear layers one by one, by any function of a layer with a full weight."""

from __future__ import annotations

import abc
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qlora.config.schema import QuantizationConfig
from qlora.errors import ResourceError
from qlora.quantization.method import QuantizationMethod, quantization_key

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qlora.runtime.device import Placement


class LayerwiseMethod(QuantizationMethod, abc.ABC):
    """Quantizes each layer as soon as its weight is read, and a random base while it is initialised.

    A method says which matrices it `takes` and returns the quantized layer of a full one (`quantize_layer`); the
    package that it computes with is an extra of this one, by the same name.
    """

    package: str

    @abc.abstractmethod
    def quantize_layer(self, layer: nn.Linear, config: QuantizationConfig, placement: Placement) -> nn.Module:
        """Returns the quantized layer that takes the place of a full one; it may be the same, changed in place."""

    @abc.abstractmethod
    def quantized_classes(self) -> tuple[type[nn.Module], ...]:
        """Returns the classes of what `quantize_layer` returns."""

    def takes(self, config: QuantizationConfig, rows: int, columns: int) -> bool:
        """Returns whether a matrix [out, in] is quantized; another stays in 16 bits."""
        return True

    def peft_attributes(self) -> dict[str, Any]:
        """Returns what PEFT asks transformers' description of such a base for."""
        return {}

    def check_installed(self, config: QuantizationConfig) -> None:
        """Says how to install the package."""
        if find_spec(self.package) is None:
            raise ResourceError(
                f"{quantization_key(config)} needs the package {self.package}, which is not installed: pip install "
                f"'qlora[{self.package}]', or choose quantization=nf4"
            )

    def library_config(self, config: QuantizationConfig, placement: Placement) -> Any:
        """The description of `qlora.upstream.transformers_layers`."""
        from qlora.upstream.transformers_layers import LayersConfig

        self.check_installed(config)
        return LayersConfig(
            partial(self.takes, config),
            partial(self.quantize_layer, config=config, placement=placement),
            self.stored_base(config).weight_bytes,
            **self.peft_attributes(),
        )

    def layer_classes(self) -> tuple[type[torch.nn.Module], ...]:
        """Those that are quantized, and those that wait for their weight."""
        from qlora.upstream.transformers_layers import QuantizedLinear

        return (QuantizedLinear, *self.quantized_classes())

    def scales(self, parameter: Tensor) -> list[Tensor] | None:
        """Those that a quantized layer notes on its weight, and its zeros: `scales`."""
        return getattr(parameter, "scales", None)

    def count(self, parameter: Tensor) -> tuple[int, str]:
        """Counts the weights that integers hold, where a layer notes them: `quantized`, and their `data_type`."""
        if (count := getattr(parameter, "quantized", None)) is not None:
            return count, parameter.data_type  # type: ignore[attr-defined]
        return super().count(parameter)
