"""The count of operations against those that torch counts in real modules."""

from __future__ import annotations

import pytest
import torch
from real_models import adapted, shape
from torch.utils.flop_counter import FlopCounterMode

from qlora.adapters import count_parameters
from qlora.planning.time_plan import count_operations

LAYERS, LENGTH, ROWS = 12, 16, 2
SIZES = {"num_hidden_layers": LAYERS, "intermediate_size": 320}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_products_of_a_step_are_counted_as_torch_counts_them(kind: str, lora: bool) -> None:
    model = adapted(kind, "quantization=none", **SIZES)
    if not lora:
        model = model.unload().requires_grad_(True)
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    model.config._attn_implementation = "eager"  # whose products are matrix products, of all pairs
    with torch.autocast("cpu", dtype=torch.bfloat16), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    operations = count_operations(shape(kind, **SIZES), count_parameters(model).trainable if lora else 0)
    # All pairs are twice the causal ones, and eager attention computes none of its products again.
    attention = sum(operations.per_pair.values()) * (3 / 3.5) * ROWS * LENGTH**2
    assert counter.get_total_flops() == pytest.approx(operations.per_token * ROWS * LENGTH + attention, rel=0.03)
