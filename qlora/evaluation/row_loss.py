"""Token-weighted loss of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from qlora.evaluation.kept_logits import takes_logits_to_keep
from qlora.runtime import console

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@torch.inference_mode()
def measure_loss(
    model: torch.nn.Module, rows: Dataset, *, collate: Collate, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Returns `loss`, the mean negative log-likelihood of a trained token in nats, and `perplexity`.

    Every token weighs the same whatever its batch; rows are taken longest first, so that padding is small and a
    lack of memory shows at once. Only the rows of a batch are in memory, and the logits where one of them has a label.
    The caller sets autocast and evaluation mode.
    """
    lengths = rows.with_format("numpy", columns=["length"])[:]["length"]
    order, columns = np.argsort(-lengths, kind="stable"), rows.select_columns(["input_ids", "labels"])
    total, count, chooses = 0.0, 0, takes_logits_to_keep(model)
    with console.progress("measuring", len(order)) as update:
        for start in range(0, len(order), batch_size):
            cells = columns[order[start : start + batch_size]]
            batch = collate([dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)])
            labels = batch.pop("labels")[:, 1:]
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            if chooses:
                read = (labels != -100).any(0).nonzero().view(-1)
                labels, inputs["logits_to_keep"] = labels[:, read], read.to(device)
            logits = model(**inputs, use_cache=False).logits
            labels = labels.to(logits.device)  # another one where the base is spread over several
            logits, kept = logits[:, : labels.shape[1]], labels != -100
            total += F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum").item()
            count += int(kept.sum())
            update(min(start + batch_size, len(order)))
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
