"""The test of `evaluation=mmlu` or `evaluation=lm-eval`, and whether answers fit into the model's context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import Config, EvaluationName, GenerationConfig
from qlora.errors import ConfigError
from qlora.evaluation.generation import prompt_lengths
from qlora.evaluation.lm_harness import LmHarness
from qlora.evaluation.measure import Suite
from qlora.evaluation.mmlu import HUB_SET, HUB_SUBSET, Mmlu, load_questions

log = logging.getLogger(__name__)


def build_suite(
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase,
    context: Callable[[], int | None],
    pad_token_id: Callable[[], int],
    device: torch.device,
    read_file: Callable[[str], Iterable[Any]],
    load_hub: Callable[..., Iterable[Any]],
) -> Suite | None:
    """Returns the test that `evaluation=` names; None: held-out rows alone are measured.

    `context` and `pad_token_id` read the model's config, so they are called only where the test needs them.
    """
    evaluation, batch_size = config.evaluation, config.trainer.per_device_eval_batch_size
    if evaluation.name is EvaluationName.lm_eval:
        return LmHarness(evaluation, tokenizer=tokenizer, batch_size=batch_size, device=device, trusted=config.trusted)
    if evaluation.name is not EvaluationName.mmlu:
        return None

    def load_split(split: str) -> Iterable[Any]:
        return load_hub(
            HUB_SET,
            HUB_SUBSET,
            split,
            key="evaluation.path",
            failure=f"evaluation=mmlu: {HUB_SET} is not available",
            remedy="or give the questions as a file: evaluation.path=FILE",
        )

    return Mmlu(
        load_questions(evaluation, read_file=read_file, load_split=load_split),
        split=evaluation.split.value,
        tokenizer=tokenizer,
        source_max_len=evaluation.source_max_len,
        context=context(),
        pad_token_id=pad_token_id(),
        batch_size=batch_size,
        device=device,
    )


def fit_answers(rows: Dataset, answers: int | None, config: Config, context: int | None) -> GenerationConfig:
    """Returns `generation` with answers that the model's context holds; `answers` rows are answered (None: all).

    The default of `max_new_tokens` shrinks to what fits. Raises `ConfigError` where a value that was asked for does not
    fit, or nothing does.
    """
    generation = config.generation
    if answers == 0 or context is None:
        return generation
    longest_prompt = int(prompt_lengths(rows)[:answers].max(initial=0))
    new_tokens = generation.new_tokens
    if longest_prompt + new_tokens > context:
        if generation.max_new_tokens is None and (room := context - longest_prompt) >= max(
            generation.min_new_tokens or 1, 1
        ):
            log.info(
                "answers have up to %d tokens instead of %d: the longest prompt has %d, and %s reads %d "
                "(generation.max_new_tokens)",
                *(room, new_tokens, longest_prompt, config.model.name, context),
            )
            return replace(generation, max_new_tokens=room)
        remedies = [f"generation.max_new_tokens={context - longest_prompt}"] if context > longest_prompt else []
        remedies += [f"data.source_max_len={context - new_tokens}"] if context > new_tokens else []
        remedies = remedies or [
            f"generation.max_new_tokens={context // 4} data.source_max_len={context - context // 4}"
        ]
        raise ConfigError(
            f"generation.max_new_tokens={new_tokens} on top of the longest prompt's {longest_prompt} tokens is more "
            f"than the {context} that {config.model.name} reads; set {' or '.join(remedies)}"
        )
    return generation
