"""How far an engine is from what was trained, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from qlora.text import brief_text, plural
from qlora.verify.engine import Engine, Likely, Message, Served
from qlora.verify.reference import Ending, Probe

LIMITS = {"q8": 1e-2, "q6": 5e-2, "q5": 1e-1, "q4": 0.2, "f16": 1e-3, "bf16": 1e-3, "f32": 1e-3, "float16": 1e-3,
          "bfloat16": 1e-3, "float32": 1e-3}  # fmt: skip
"""The mean KL divergence that is accepted, by how the engine's weights begin to be called."""
UNKNOWN_LIMIT = 5e-2
NEARER = 4
"""How many times nearer to the untuned base than to the trained model an engine is that ignores the adapter."""
AFTER_END = 8
"""How many tokens an engine may write behind a finished answer before it is told to stop."""


@dataclass(frozen=True)
class Divergence:
    """How two sets of next-token distributions differ."""

    kl_mean: float
    """KL(trained || engine), in nats a token."""
    kl_max: float
    top1_agreement: float
    tokens: int
    """Positions that were compared."""
    kl_to_base: float | None
    """The same to the untuned base; None: there is no adapter."""
    adapter_kl: float | None
    """KL(trained || base): what the adapter changes."""
    compared: int | None
    """The likeliest tokens over which it is computed, the others taken as one; None: all tokens."""


@dataclass(frozen=True)
class Chat:
    """A chat and the tokens by which the training asks for its answer."""

    messages: list[Message]
    ids: list[int]


@dataclass(frozen=True)
class Verdict:
    """What was divergence."""

    divergence: Divergence
    max_kl: float
    chats: int
    equal_chats: int
    counted_only: bool
    """Whether the engine gave the number of a chat's tokens alone."""
    endings: int
    ended: int
    causes: list[str]
    """What is wrong, the likeliest first; none: nothing is."""

    @property
    def accepted(self) -> bool:
        """Whether the engine serves what was trained."""
        return not self.causes


def limit_of(served: Served, asked: float | None) -> float:
    """Returns the mean KL divergence that is accepted."""
    if asked is not None:
        return asked
    precision = (served.precision or "").lower()
    known = next((limit for name, limit in LIMITS.items() if precision.startswith(name)), UNKNOWN_LIMIT)
    return max(known, served.max_kl or 0.0)


def compare(
    engine: Engine,
    probes: Sequence[Probe],
    chats: Sequence[Chat],
    endings: Sequence[Ending],
    *,
    max_kl: float | None,
    show: Callable[[int], str],
    on_progress: Callable[[int], None],
) -> Verdict:
    """Asks an engine everything and returns what they say; `show` writes a token for a person."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done)

    different: list[str] = []
    counted = False
    for number, chat in enumerate(chats, 1):
        given = engine.chat_tokens(chat.messages)
        counted = counted or isinstance(given, int)
        if (difference := _difference(chat.ids, given, show)) is not None:
            different.append(f"chat {number} of {len(chats)}: {difference}")
        step()
    answers: list[list[Likely]] = []
    for probe in probes:
        answers.append(engine.next_tokens(probe.ids))
        step()
    divergence = measure(probes, answers)
    runs_on = [ending for ending in endings if not _stops(engine, ending)]
    limit = limit_of(engine.served, max_kl)
    causes = []
    if different:
        causes.append(f"its chat template is not that of the training ({different[0]})")
    if len(runs_on) > len(endings) // 2:
        causes.append(
            f"it does not stop at the end token {show(runs_on[0].end_id)}, behind which it writes on in "
            f"{len(runs_on)} of {plural(len(endings), 'finished answer')}"
        )
    causes += _cause_of_divergence(divergence, engine.served, limit)
    return Verdict(divergence, limit, len(chats), len(chats) - len(different), counted, len(endings),
                   len(endings) - len(runs_on), causes)  # fmt: skip


def measure(probes: Sequence[Probe], answers: Sequence[Sequence[Likely]]) -> Divergence:
    """Returns how what an engine answered to the prompts differs from the trained model and from the base."""
    trained = [_kl(probe.trained, answer) for probe, answer in zip(probes, answers, strict=True)]
    to_base = [_kl(probe.base, answer) for probe, answer in zip(probes, answers, strict=True) if probe.base is not None]
    changes = [_full_kl(probe.trained, probe.base) for probe in probes if probe.base is not None]
    same = [
        int(probe.trained.argmax()) in max(answer, key=lambda token: token.logprob).ids
        for probe, answer in zip(probes, answers, strict=True)
    ]
    fewest = min(sum(len(token.ids) for token in answer) for answer in answers)
    is_whole = fewest >= len(probes[0].trained)
    return Divergence(mean(trained), max(trained), mean(same), len(trained), mean(to_base) if to_base else None,
                      mean(changes) if changes else None, None if is_whole else min(map(len, answers)))  # fmt: skip


def _kl(reference: Tensor, answer: Sequence[Likely]) -> float:
    """Returns KL(reference || answer) over the tokens of the answer, with all others as one; a lower bound."""
    known = [token for token in answer if token.ids and max(token.ids) < len(reference)]
    owners = torch.tensor([index for index, token in enumerate(known) for _ in token.ids])
    ids = torch.tensor([index for token in known for index in token.ids])
    chances = torch.zeros(len(known), dtype=torch.float64).index_add(0, owners, reference.double().exp()[ids])
    given = torch.tensor([token.logprob for token in known], dtype=torch.float64).clamp(min=-1e4)
    total = float((chances * (chances.clamp(min=1e-300).log() - given)).sum())
    rest, given_rest = (max(0.0, 1.0 - float(values.sum())) for values in (chances, given.exp()))
    if rest > 1e-9 and len(ids) < len(reference):
        total += rest * (math.log(rest) - math.log(max(given_rest, 1e-9)))
    return max(0.0, total)


def _full_kl(reference: Tensor, other: Tensor) -> float:
    return max(0.0, float((reference.double().exp() * (reference.double() - other.double())).sum()))


def _difference(expected: Sequence[int], given: list[int] | int, show: Callable[[int], str]) -> str | None:
    """Says in words where the tokens of a chat differ; None: nowhere."""
    if isinstance(given, int):
        return (
            None
            if given == len(expected)
            else f"it has {given} tokens at the engine and {len(expected)} in the training"
        )
    if list(expected) == given:
        return None
    index = next((index for index, pair in enumerate(zip(expected, given, strict=False)) if pair[0] != pair[1]),
                 min(len(expected), len(given)))  # fmt: skip
    there, here = (show(ids[index]) if index < len(ids) else "the end" for ids in (given, expected))
    return f"token {index + 1} is {there} at the engine and {here} in the training"


def _stops(engine: Engine, ending: Ending) -> bool:
    """Returns whether an engine ends behind a finished answer, and writes nothing but blanks."""
    rest = engine.continue_greedily(ending.ids, AFTER_END)
    return rest.stops and not rest.text.strip()


def _cause_of_divergence(divergence: Divergence, served: Served, limit: float) -> list[str]:
    apart = f"KL divergence {divergence.kl_mean:.2g} nats a token"
    if math.isnan(divergence.kl_mean):
        return ["its probabilities are NaN"]
    nears_base = divergence.kl_to_base is not None and divergence.kl_to_base * NEARER < divergence.kl_mean
    if nears_base:
        return [
            f"it answers as the untuned base: the adapter is ignored ({apart} to the trained model, "
            f"{divergence.kl_to_base:.2g} to the base)"
        ]
    if divergence.kl_mean <= limit:
        return []
    held = (
        f"its weights are held as {served.precision}"
        if served.precision
        else "the precision of its weights is not known"
    )
    return [
        f"its probabilities are further away than verify.max_kl={limit:.2g} ({apart}): {held}, so quantization or "
        "rounding is the likely cause, or it serves other weights"
    ]


def to_record(served: Served, verdict: Verdict) -> dict[str, Any]:
    """Returns what `certificate.json` says, in JSON's types."""
    divergence = verdict.divergence
    return {
        "accepted": verdict.accepted,
        "causes": verdict.causes,
        "engine": served.name,
        "served": served.what,
        "precision": served.precision,
        **served.details,
        "max_kl": verdict.max_kl,
        "kl_mean": divergence.kl_mean,
        "kl_max": divergence.kl_max,
        "top1_agreement": divergence.top1_agreement,
        "positions": divergence.tokens,
        "compared_tokens": divergence.compared if divergence.compared is not None else "all",
        "kl_to_base": divergence.kl_to_base,
        "adapter_kl": divergence.adapter_kl,
        "chats": verdict.chats,
        "equal_chats": verdict.equal_chats,
        "chats_compared_by": "number of tokens" if verdict.counted_only else "tokens",
        "finished_answers": verdict.endings,
        "ended": verdict.ended,
    }


def describe(served: Served, verdict: Verdict) -> str:
    """Returns the line of a model card."""
    divergence = verdict.divergence
    over = "" if divergence.compared is None else f" over the {divergence.compared} likeliest tokens that it returned"
    precision = f" ({served.precision})" if served.precision else ""
    chats = "as many tokens" if verdict.counted_only else "equal tokens"
    return brief_text(
        f"{served.name}{precision}: mean KL divergence {divergence.kl_mean:.2g} nats a token{over}, at most "
        f"{divergence.kl_max:.2g}; the same likeliest token at {divergence.top1_agreement:.1%} of {divergence.tokens} "
        f"positions; {chats} in {verdict.equal_chats} of {verdict.chats} chats",
        400,
    )
