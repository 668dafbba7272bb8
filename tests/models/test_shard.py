"""What a base that is shared out is stored as."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit

from qlora.models.shard import _store_as_floats


def test_every_byte_of_a_4_bit_weight_survives_a_copy_by_way_of_32_bits() -> None:
    """On a GPU torch's copy of several tensors computes in 32 bits, where 16-bit numbers that are none change."""
    layer = torch.nn.Sequential(Linear4bit(512, 512, bias=False, quant_type="nf4"))
    layer.to("cpu")
    packed = layer[0].weight.data
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    packed.copy_(pairs.view_as(packed))
    _store_as_floats(layer)
    stored = layer[0].weight.data
    assert stored.is_floating_point()
    assert len(stored) % 2 == 0
    copied = stored.to(torch.float32).to(stored.dtype)
    assert torch.equal(copied.view(torch.uint8).view(-1), pairs.view(-1)[: packed.numel()])
