"""Typed calls of transformers, whose own annotations are wider than what the calls of this project return.

Its tokenizers take one text or many, and return tokens or texts by the value of an argument. Each function below fixes
that argument, so that one type is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadingReport(TypedDict):
    """What `from_pretrained` found to differ between a model and its files."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]


def load_causal_model(folder: str, **options: Any) -> tuple[PreTrainedModel, LoadingReport]:
    """Loads a causal language model with the report of what its files lack or hold beyond it."""
    from transformers import AutoModelForCausalLM  # which imports torch and more than tokenizers need

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = loaded
    return model, report


def set_device_map(model: PreTrainedModel, device_map: dict[str, torch.device]) -> None:
    """Notes on which device each part of a model is, as `from_pretrained` does."""
    model.hf_device_map = device_map  # type: ignore[assignment]  # torch's `Module.__setattr__` declares tensors alone


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Generates token ids [rows, tokens], each row behind its prompt."""
    return cast("torch.Tensor", cast(Any, model).generate(**inputs, **options))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    """Returns the text of one row of tokens."""
    return cast(str, tokenizer.decode(cast(list[int], ids), **options))


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Returns the id of a token; None where the tokenizer has neither it nor an unknown token."""
    return cast("int | None", tokenizer.convert_tokens_to_ids(token))


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Returns the ids of tokens that the tokenizer has."""
    return cast(list[int], tokenizer.convert_tokens_to_ids(tokens))


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns a token as the vocabulary has it."""
    return cast(str, tokenizer.convert_ids_to_tokens(token))


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> str:
    """Returns the text of a conversation."""
    return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
