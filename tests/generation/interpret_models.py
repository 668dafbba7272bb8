"""Decodes with small models by the kernels of a step, in Triton's interpreter.

Prints how far their logits are from the models' own, and what computed by kernels: norms, gates, rotary positions.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import sys

import torch

from qlora.generation.elementwise import ROTARY, fused_elementwise
from qlora.generation.experts import served_experts
from qlora.generation.slot_model import SlotModel, serving
from tests.generation.test_slots import KINDS, distance, randomised
from tests.models.bases import build

KERNELS = "qlora.generation.kernels.elementwise"
results = {}
for kind in KINDS:
    model = randomised(build(kind, **KINDS.get(kind, {}))).eval()
    rows = [[5, 900, 31, 8, 1200, 6, 7], [77, 4, 3]]
    slots = SlotModel(model, slots=3, length=12)
    code = sys.modules[type(model).__module__]
    original = getattr(code, ROTARY)
    with torch.inference_mode(), serving(model):
        with served_experts(model, torch.float32, decoded=True), fused_elementwise(model):
            fused = sum("forward" in module.__dict__ for module in model.modules())
            is_turned = getattr(code, ROTARY) is not original
            logits = [slots.read([row[:-2] for row in rows])]
            for back in (2, 1):
                tokens, lengths = ([row[-back] for row in rows], [len(row) - back for row in rows])
                logits.append(slots.decode_by_kernel(torch.tensor(tokens), torch.tensor(lengths)))
        assert getattr(code, ROTARY) is original
        assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.inference_mode():
        expected = [torch.cat([model(torch.tensor([row[: len(row) - back]])).logits[:, -1] for row in rows])
                    for back in (2, 1, 0)]  # fmt: skip
    apart = max(distance(*pair) for pair in zip(logits, expected, strict=True))
    results[kind] = {"apart": apart, "fused": fused, "is_turned": is_turned}
print(json.dumps(results))
