"""Embeddings for `model.new_tokens`, and the token that ends a turn of a chat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from qlora.upstream.torch_models import weight_of


def resize_embeddings(model: PreTrainedModel, new_token_ids: Sequence[int]) -> None:
    """Grows the embeddings for `model.new_tokens` if the matrix has no spare rows; new rows are the mean of the old.

    transformers would initialise them at random around the mean, differently each time a model is loaded.
    """
    rows, needed = weight_of(model.get_input_embeddings()).shape[0], max(new_token_ids, default=-1) + 1
    if needed <= rows:
        return
    model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight = weight_of(layer)
                weight[rows:] = mean_row(weight[:rows])
    model.requires_grad_(False)


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a matrix's rows, [columns], in its dtype: where the row of a new token starts."""
    return weight.float().mean(0).to(weight.dtype)


def add_end_token(model: PreTrainedModel, token_id: int | None) -> None:
    """Lets generation stop at a chat template's end-of-turn token too; full finetuning saves it with the model."""
    settings = model.generation_config
    if token_id is None or settings is None:
        return
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = sorted({token_id, *(token for token in known if token is not None)})
