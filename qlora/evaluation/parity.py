"""Compares two models on the same prompts without having both in memory: the first leaves its logits on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.runtime import console


@dataclass(frozen=True)
class Parity:
    """How far a model's next-token probabilities are from those of a reference."""

    kl_mean: float
    """Mean of KL(reference || model) over all tokens, in nats a token."""
    kl_max: float
    """The largest of any token."""
    top1_agreement: float
    """Share of tokens at which both hold the same next token for the likeliest."""
    tokens: int
    prompts: int
    layers: list[float]
    """Relative difference of the hidden states of the first prompt: of the embedding, then behind each layer."""


@torch.no_grad()
def record(model: torch.nn.Module, prompts: Sequence[Sequence[int]], folder: Path, *, device: torch.device) -> None:
    """Writes the logits for every token of the prompts, and the hidden states of the first, into `folder`."""
    for number, prompt in enumerate(_watched(prompts, "answering")):
        save_file(_forward(model, prompt, device, hidden=number == 0), folder / f"{number}.safetensors")


@torch.no_grad()
def compare(model: torch.nn.Module, prompts: Sequence[Sequence[int]], folder: Path, *, device: torch.device) -> Parity:
    """Compares a model with what `record` wrote into `folder`; log-softmax and sums are in float32."""
    answers = (
        _forward(model, prompt, device, hidden=number == 0)
        for number, prompt in enumerate(_watched(prompts, "comparing"))
    )
    return _compare(answers, folder, device)


def _watched(prompts: Sequence[Sequence[int]], what: str) -> Iterator[Sequence[int]]:
    """Yields the prompts under a progress bar."""
    with console.progress(what, len(prompts)) as update:
        for number, prompt in enumerate(prompts, 1):
            yield prompt
            update(number)


def compare_records(folder: Path, reference: Path, *, device: torch.device) -> Parity:
    """Compares what `record` wrote into two folders."""
    count = len(list(folder.glob("*.safetensors")))
    return _compare((load_file(folder / f"{number}.safetensors") for number in range(count)), reference, device)


def _compare(answers: Iterable[dict[str, Tensor]], folder: Path, device: torch.device) -> Parity:
    kl, same, layers = [], [], []
    for index, actual in enumerate(answers):
        expected = load_file(folder / f"{index}.safetensors")
        reference, logits = (
            torch.log_softmax(answer["logits"].to(device).float(), dim=-1) for answer in (expected, actual)
        )
        terms = reference.exp() * (reference - logits)
        terms = terms.masked_fill(reference == -torch.inf, 0.0)  # p log p of an impossible token
        kl.append(terms.sum(-1).clamp(min=0).cpu())  # rounding can make the sum slightly negative
        same.append((reference.argmax(-1) == logits.argmax(-1)).cpu())
        layers += [_distance(expected[name], actual[name]) for name in sorted(expected, key=_layer) if name != "logits"]
    divergence, agreement = torch.cat(kl), torch.cat(same)
    return Parity(
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1_agreement=float(agreement.float().mean()),
        tokens=len(divergence),
        prompts=len(kl),
        layers=layers,
    )


def _forward(model: torch.nn.Module, prompt: Sequence[int], device: torch.device, *, hidden: bool) -> dict[str, Tensor]:
    """Returns `logits` [tokens, vocabulary] and, if asked, hidden states `0`, `1` ... [tokens, width], on the CPU."""
    ids = torch.tensor([prompt], device=device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=hidden)
    result = {"logits": output.logits[0].cpu().contiguous()}
    states = output.hidden_states if hidden else ()
    return result | {str(number): state[0].cpu().contiguous() for number, state in enumerate(states)}


def _layer(name: str) -> int:
    return int(name) if name.isdigit() else -1


def _distance(expected: Tensor, actual: Tensor) -> float:
    expected, actual = expected.float(), actual.float()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
