"""A linear layer whose weight is packed integers with a scale and a zero for each group of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora.quantization.saved_formats import Codes


class PackedLinear(nn.Linear):
    """Decodes its weight in each product, forward and backward, so that no full weight outlives one.

    `weight` is uint8 [out, in * bits / 8], the lowest bits first.
    """

    scales: Tensor
    """[out, groups]"""
    zeros: Tensor
    """uint8 [out, groups]"""
    groups: Tensor
    """int32 [in], the group of each input."""

    def __init__(self, codes: Codes, bias: nn.Parameter | None, device: torch.device) -> None:
        inputs, outputs = codes.codes.shape
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.bits, self.bias = codes.bits, bias  # type: ignore[assignment]
        weight: Any = nn.Parameter(_pack(codes.codes.T, codes.bits).to(device), requires_grad=False)
        self.weight = weight
        self.register_buffer("scales", codes.scales.T.contiguous().to(device))
        self.register_buffer("zeros", codes.zeros.T.to(torch.uint8).contiguous().to(device))
        self.register_buffer("groups", codes.groups.int().to(device))
        weight.scales, weight.quantized = [self.scales, self.zeros], inputs * outputs
        weight.data_type = f"int{codes.bits}"

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight [out, in], computed in float32."""
        shifts = torch.arange(0, 8, self.bits, device=self.weight.device, dtype=torch.uint8)
        codes = ((self.weight[..., None] >> shifts) & ((1 << self.bits) - 1)).flatten(1)
        scales, zeros = (part.index_select(1, self.groups).float() for part in (self.scales, self.zeros))
        return ((codes.float() - zeros) * scales).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Casts the input as autocast does for a full weight, which it does not see here."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        output: Tensor = _Product.apply(input, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(input, layer.decode(input.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.decode(gradient.dtype), None


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Returns codes [out, in] in bytes [out, in * bits / 8], the lowest bits first."""
    together = codes.to(torch.uint8).unflatten(1, (-1, 8 // bits))
    packed = torch.zeros_like(together[..., 0])
    for index in range(8 // bits):
        packed |= together[..., index] << (bits * index)
    return packed.contiguous()
