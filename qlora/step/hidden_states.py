"""Computes the hidden states that the output layer reads, from tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora.upstream.transformers_model import decoder_of


def hidden_states(base: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Returns the last hidden states of a batch, [rows, tokens, width].

    The decoder gets tokens and not their embeddings: some architectures look a token up again, for embeddings in each
    layer (Gemma 3n and 4) or for the experts that it goes to (DeepSeek V4). The embeddings require a gradient, so that
    all layers see the same kind of tensor and share their code.
    """
    hook = base.get_input_embeddings().register_forward_hook(_require_gradient)
    try:
        output: Tensor = decoder_of(base)(use_cache=False, **batch).last_hidden_state
    finally:
        hook.remove()
    return output


def _require_gradient(_: torch.nn.Module, __: Any, embedded: Tensor) -> Tensor:
    return embedded if embedded.requires_grad else embedded.requires_grad_()
