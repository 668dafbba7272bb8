"""What the trained adapter on its base answers: the side that an engine is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = 8
"""How many positions of a row are compared at most."""
END_ROWS = 8
"""How many finished answers must end at the engine, too."""
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """A held-out row in tokens."""

    ids: list[int]
    labels: list[int]
    """The tokens that are trained, `IGNORED` elsewhere."""

    @property
    def positions(self) -> list[int]:
        """The lengths of the prefixes whose next tokens are compared: the question's end and the answer first."""
        answer = [index for index, label in enumerate(self.labels) if label != IGNORED and index]
        chosen = answer[:POSITIONS] if answer else []
        rest = [index for index in range(1, len(self.ids)) if index not in chosen]
        step = max(1, len(rest) // POSITIONS)
        return sorted([*chosen, *rest[step - 1 :: step]][:POSITIONS])


@dataclass(frozen=True)
class Probe:
    """A prompt with what may follow it."""

    ids: list[int]
    trained: Tensor
    """Log-probabilities of the next token with the adapter, float32 [vocabulary]."""
    base: Tensor | None
    """The same without it; None: there is no adapter."""


@dataclass(frozen=True)
class Ending:
    """A finished answer, behind which the trained model ends."""

    ids: list[int]
    end_id: int


@torch.no_grad()
def take_probes(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    device: torch.device,
    adapter_off: Callable[[], contextlib.AbstractContextManager[None]] | None,
) -> list[Probe]:
    """Returns the next-token distributions at some positions of each row."""
    probes: list[Probe] = []
    for row in rows:
        trained = _log_softmax(model, row, device)
        base = None
        if adapter_off is not None:
            with adapter_off():
                base = _log_softmax(model, row, device)
        probes += [
            Probe(row.ids[:position], trained[position - 1], None if base is None else base[position - 1])
            for position in row.positions
        ]
    return probes


@torch.no_grad()
def take_endings(
    model: torch.nn.Module, rows: Sequence[Row], *, end_ids: Collection[int], device: torch.device
) -> list[Ending]:
    """Returns answers of rows behind which the trained model most likely writes the token that ends them."""
    endings: list[Ending] = []
    for row in rows:
        ends = [index for index, label in enumerate(row.labels) if label in end_ids and index]
        if len(endings) < END_ROWS and ends:
            likeliest = int(_log_softmax(model, row, device)[ends[-1] - 1].argmax())
            if likeliest == row.ids[ends[-1]]:
                endings.append(Ending(row.ids[: ends[-1]], likeliest))
    return endings


def _log_softmax(model: torch.nn.Module, row: Row, device: torch.device) -> Tensor:
    ids = torch.tensor([row.ids], device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
