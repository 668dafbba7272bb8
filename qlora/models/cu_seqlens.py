"""Tells recurrent layers where the rows of a pack begin, by arguments that transformers hands to their kernels.

Attention reads the borders from positions that restart. Linear attention, Mamba and short convolutions get them as
`cu_seq_lens_q` and `seq_idx` only, with which `flash-linear-attention`, `causal-conv1d` and `mamba-ssm` compute.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qlora.upstream.peft import base_of
from qlora.upstream.transformers_model import RECURRENT_LAYERS, decoder_of


def is_recurrent(model: PreTrainedModel | PeftModel) -> bool:
    """Returns whether some layers of a model carry a state from token to token."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return bool(RECURRENT_LAYERS.intersection(kinds))


def hand_cu_seqlens(model: PreTrainedModel | PeftModel) -> None:
    """Makes the recurrent layers of a model get the borders of each pack that it is given from now on.

    Kernels take them for one row a batch alone; a larger batch is left as it is, and so is one with a mask or a cache.
    """
    decoder = decoder_of(base_of(model) if isinstance(model, PeftModel) else model)
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    if is_recurrent(model) and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        decoder.register_forward_pre_hook(_add_cu_seqlens, with_kwargs=True)


def _add_cu_seqlens(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    row = positions[0] if positions.dim() == 3 else positions  # one for time, height and width each
    return (args, kwargs | varlen_arguments(row)) if len(row) == 1 else None


def varlen_arguments(positions: Tensor) -> dict[str, Any]:
    """Returns what transformers calls the borders of a pack, whose positions [1, tokens] restart at 0 with each row."""
    begins = positions[0] == 0
    begins[0] = True
    starts = torch.nonzero(begins).view(-1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).int()
    max_seqlen = int(cu_seqlens.diff().max())
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "seq_idx": (begins.cumsum(0) - 1).int()[None],
    }
