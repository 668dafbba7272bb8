"""Generates answers in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import GenerationConfig as HFGenerationConfig
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import GenerationConfig
from qlora.upstream.transformers import decode
from qlora.upstream.transformers import generate as generate_ids

# Searches that transformers moved out of the library: https://hf.co/transformers-community
COMMUNITY = {
    "num_beam_groups": "transformers-community/group-beam-search",
    "penalty_alpha": "transformers-community/contrastive-search",
}


@dataclass(frozen=True)
class Answer:
    """A generated answer; `finish` is `stop` when the model ended it, `length` when it was cut off."""

    text: str
    tokens: int
    finish: str


def prompt_lengths(rows: Dataset) -> np.ndarray:
    """Returns the tokens of each prompt, in the order of the rows; only some rows are in memory at a time."""
    column = rows.select_columns("prompt_ids").with_format("arrow")
    counts = [pc.list_value_length(part["prompt_ids"]).to_numpy() for part in column.iter(batch_size=1000)]
    return np.concatenate(counts) if counts else np.empty(0, int)


def plan_batches(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the indices of the rows of each batch: longest prompts first, so that padding is small.

    A lack of memory then shows at once.
    """
    order = np.argsort(-lengths.astype(int), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def generate(
    config: GenerationConfig,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    device: torch.device,
) -> list[Answer]:
    """Returns an answer for each prompt (token ids, bos included), all decoded as one batch, padded on the left.

    The caller sets autocast and evaluation mode.
    """
    end_ids = end_token_ids(model, tokenizer)
    settings = build_settings(config, pad_token_id=pad_token_id, end_ids=end_ids)
    inputs = left_pad(prompts, pad_token_id, device)
    with own_settings_aside(model):
        output = generate_ids(model, inputs, generation_config=settings, **community_code(config))
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    to_answer = AnswerReader(tokenizer, end_ids)
    return [to_answer(ids) for ids in answers]


def left_pad(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask` of shape (prompts, length), padded on the left."""
    length = max(len(ids) for ids in prompts)
    ids = [[pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def end_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns every id that ends an answer: the tokenizer's and those of the model's generation config."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


def spelled_ends(end_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts of the tokens that end an answer, as a model may spell them with ordinary tokens.

    Models do so whose training text held the end token as characters; decoding leaves out the token, not its letters.
    An end token that is an ordinary word or a line feed may stand inside an answer, so only added tokens count.
    """
    added = tokenizer.added_tokens_decoder
    texts = {str(added[token]) for token in end_ids if token in added}
    return sorted(text for text in texts if text.strip())


def cut_at(text: str, ends: Sequence[str]) -> str:
    """Returns a text up to the first of `ends` in it."""
    return text[: min((text.index(end) for end in ends if end in text), default=len(text))]


def build_settings(config: GenerationConfig, *, pad_token_id: int, end_ids: list[int]) -> HFGenerationConfig:
    """Returns transformers' settings without those that the chosen search does not read."""
    options = asdict(config) | {"max_new_tokens": config.new_tokens}
    for name in ("batch_size", "loop", "weights"):
        del options[name]
    if not config.do_sample:  # only sampling reads these, and transformers warns about them otherwise
        for name in ("temperature", "top_p", "typical_p"):
            del options[name]
        if not config.penalty_alpha:
            del options["top_k"]
    if config.num_beams == 1:
        del options["length_penalty"]
    return HFGenerationConfig(**options, pad_token_id=pad_token_id, eos_token_id=end_ids or None)


@contextlib.contextmanager
def own_settings_aside(model: torch.nn.Module) -> Iterator[None]:
    """Hides the model's own generation config, from which transformers would take every unset option."""
    owner: Any = model
    base = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    kept, base.generation_config = base.generation_config, HFGenerationConfig()
    try:
        yield
    finally:
        base.generation_config = kept


def community_code(config: GenerationConfig) -> dict[str, object]:
    """Returns the arguments that run a search from transformers' community repositories, if one is asked for."""
    name = "num_beam_groups" if config.num_beam_groups > 1 else "penalty_alpha" if config.penalty_alpha else None
    return {"custom_generate": COMMUNITY[name], "trust_remote_code": True} if name else {}


class AnswerReader:
    """Makes answers of token ids: up to the token that ends them, or to its spelled text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: list[int]) -> None:
        self.tokenizer, self.end_ids, self._end_texts = tokenizer, end_ids, spelled_ends(end_ids, tokenizer)

    def __call__(self, ids: list[int]) -> Answer:
        """Returns the answer."""
        end = next((index for index, token in enumerate(ids) if token in self.end_ids), None)
        kept = ids if end is None else ids[:end]
        said = decode(self.tokenizer, kept, skip_special_tokens=True)
        text = cut_at(said, self._end_texts)
        return Answer(text.strip(), len(kept), "length" if end is None and text == said else "stop")
