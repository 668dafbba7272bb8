"""4-bit weights for the tests of the kernels."""

from __future__ import annotations

import bitsandbytes as bnb
import torch

from qlora.quantization.bnb4.quantized_weight import QuantizedWeight, read_codes


def weight(
    rows: int, columns: int, *, quant_type: str = "nf4", nested: bool = True, device: str = "cpu", seed: int = 0
) -> bnb.nn.Params4bit:
    """Returns a 4-bit weight as a layer holds it."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    made = bnb.nn.Params4bit(values, requires_grad=False, quant_type=quant_type, compress_statistics=nested)
    return made._quantize(torch.device(device))


def codes(rows: int, columns: int, **options: object) -> QuantizedWeight:
    """Returns what is stored of such a weight."""
    result = read_codes(weight(rows, columns, **options))  # type: ignore[arg-type]
    assert result is not None
    return result
