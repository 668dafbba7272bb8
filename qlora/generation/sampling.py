"""Chooses the next token of each row: the likeliest, or one drawn from the row's own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from qlora.config.schema import GenerationConfig
from qlora.generation.transfer import upload


@dataclass(frozen=True)
class Sampler:
    """The options of `generation` that choose a token."""

    config: GenerationConfig
    end_ids: list[int]
    seed: int = 0

    def uniforms(self, row: int) -> np.ndarray:
        """Returns a number in [0, 1) for each token of a row: they follow from the seed and the row alone."""
        if not self.config.do_sample:
            return np.empty(0)
        return np.random.default_rng([self.seed, row]).random(self.config.new_tokens)

    def choose(self, logits: Tensor, told: list[int], uniforms: list[np.ndarray]) -> Tensor:
        """Returns the next tokens, int64 [rows], for `logits` [rows, vocabulary].

        `told` holds how many tokens each row has been answered with already, `uniforms` each row's random numbers.
        """
        low = self.config.min_new_tokens or 0
        if self.end_ids and (early := [index for index, count in enumerate(told) if count < low]):
            logits = logits.clone()
            rows, ends = (upload(numbers, logits.device) for numbers in (early, self.end_ids))
            logits[rows[:, None], ends] = -torch.inf
        if not self.config.do_sample:
            return logits.argmax(-1)
        scores: Tensor = logits.float()
        for warper in self._warpers:
            scores = warper(torch.empty(0), scores)
        cumulated = scores.softmax(-1).double().cumsum(-1)
        numbers = [float(random[count]) for random, count in zip(uniforms, told, strict=True)]
        # Below the whole sum, which rounding leaves a little beside 1; tokens without probability add nothing to it.
        target = upload(numbers, logits.device, torch.float64)[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What decides how tokens are chosen: samplers of one kind choose alike from the same numbers."""
        config = self.config
        options = (config.temperature, config.top_k, config.top_p, config.typical_p) if config.do_sample else ()
        return (config.do_sample, config.min_new_tokens or 0, *options, *self.end_ids)

    @property
    def _warpers(self) -> list[Any]:
        config, warpers = self.config, list[Any]()
        if config.temperature != 1:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            warpers.append(TopPLogitsWarper(config.top_p))
        if config.typical_p < 1:
            warpers.append(TypicalLogitsWarper(config.typical_p))
        return warpers


def choose_each(
    samplers: Sequence[Sampler], logits: Tensor, told: Sequence[int], uniforms: Sequence[np.ndarray]
) -> Tensor:
    """Returns the next tokens as `Sampler.choose` does, each chosen by the sampler of its row."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for row, sampler in enumerate(samplers):
        kinds.setdefault(sampler.kind, []).append(row)
    if len(kinds) == 1:
        return samplers[0].choose(logits, list(told), list(uniforms))
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for rows in kinds.values():
        index = upload(rows, logits.device)
        chosen = samplers[rows[0]].choose(logits[index], [told[row] for row in rows], [uniforms[row] for row in rows])
        tokens[index] = chosen
    return tokens
