"""Token-weighted loss of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@torch.inference_mode()
def measure_loss(
    model: torch.nn.Module, rows: Sequence[dict[str, Any]], *, collate: Collate, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Returns `loss`, the mean negative log-likelihood of a trained token in nats, and `perplexity`.

    Every token weighs the same whatever its batch; rows are taken longest first, so that padding is small and a
    lack of memory shows at once. The caller sets autocast and evaluation mode.
    """
    order = sorted(range(len(rows)), key=lambda index: -rows[index]["length"])
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = collate([rows[index] for index in order[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:].to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        kept = labels != -100
        total += F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
        count += int(kept.sum())
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
