"""Attention without padding: a batch becomes one variable-length batch, with attention inside each row.

`FusedAttention` lays the batch out and computes with torch's own kernels (`torch.nn.attention.varlen`);
`NewerFlashAttention` puts FlashAttention 3 or 4 in their place where it is installed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from qlora.config.schema import FlashAttention
from qlora.step.kernels.attention import (
    NEWER_FLASH,
    attend_batch,
    attend_varlen,
    fastest_attention,
    flash_unsupported_reason,
    has_varlen,
)
from qlora.step.part import SPREAD, ConfiguredPart, Request, StepContext
from qlora.upstream.transformers_model import attention_of, set_attention, takes_any_attention

BATCH, VARLEN = "qlora_batch", "qlora_varlen"
"""The names under which transformers finds the attention over padded batches, and that over variable-length ones."""

SPECIAL_ATTENTION = ("attn_logit_softcapping", "attention_chunk_size", "attention_dropout", "alibi")
"""Settings of architectures that compute more than scaled dot-product attention."""


class FusedAttention(ConfiguredPart):
    """The part that lays out batches and attends inside their rows."""

    label = "fused_attention"

    def __init__(self, context: StepContext) -> None:
        self.context, self.config = context, context.base.config

    def request(self) -> Request:
        """Returns what `trainer.fused_attention` asks for."""
        return Request.of_switch(self.context.trainer, "fused_attention")

    def unsupported_reason(self) -> str | None:
        """Returns why the model's own attention stays."""
        if self.context.placement.device.type != "cuda":
            return "the attention over rows runs on CUDA only"
        if self.context.is_spread:
            return SPREAD
        if not has_varlen():
            return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 or later has)"
        if self.context.placement.compute_dtype is torch.float32:
            return "it computes in 16 bits only"
        if self.context.trainer.neftune_noise_alpha is not None:
            return "trainer.neftune_noise_alpha scales its noise by the length of padded rows"
        settings = self.config.get_text_config()
        special = [name for name in SPECIAL_ATTENTION if getattr(settings, name, None)]
        if special or not takes_any_attention(self.context.base):
            detail = f" ({special[0]})" if special else ""
            return f"{settings.model_type} has an attention of its own{detail}"
        modules = (module for layer in self.context.layers for module in layer.modules())
        if any(getattr(module, "sinks", None) is not None for module in modules):
            return f"{settings.model_type} adds sinks to its attention"
        return None

    def enter(self) -> None:
        """Chooses the fastest kernels for padded batches, and notes the model's own attention."""
        self._previous = attention_of(self.config)
        self._kernels = contextlib.ExitStack()
        self._kernels.enter_context(fastest_attention())

    def exit(self, *, failed: bool) -> None:
        """Gives the model its own attention back."""
        self._kernels.close()
        set_attention(self.config, self._previous)

    def lay_out(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes one variable-length batch of packs; `cu_seqlens` has a fixed length, for the sake of compiled code.

        A batch of single rows stays padded: the padding comes last, where causal attention does not see it. For a
        model with a sliding window such a batch is laid out too.
        """
        ids = batch["input_ids"]
        count, width = ids.shape
        batch.pop("attention_mask", None)
        if (packs := self.context.packs) is not None:
            positions, max_seqlen = batch["position_ids"], packs.max_seqlen
            begins = (positions % max_seqlen == 0).view(-1)  # also inside padding that is longer than any row
            size = count * packs.max_rows + 1
            cu_seqlens = torch.nonzero_static(begins, size=size, fill_value=count * width).view(-1).int()
        elif getattr(self.config.get_text_config(), "sliding_window", None) is not None:
            positions, max_seqlen = torch.arange(width, device=ids.device).expand(count, width), width
            cu_seqlens = torch.arange(0, count * width + 1, width, device=ids.device, dtype=torch.int32)
        else:
            set_attention(self.config, BATCH)
            return batch
        set_attention(self.config, VARLEN)
        return batch | {
            "input_ids": ids.view(1, -1),
            "labels": batch["labels"].view(1, -1),
            "position_ids": positions.reshape(1, -1),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }


class NewerFlashAttention(ConfiguredPart):
    """The part that has a newer FlashAttention serve `FusedAttention`; it stays for the whole process."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.requested = context.trainer.flash_attention
        self.label = "flash_attention"

    def request(self) -> Request | None:
        """Asks for the one of the config; `auto` for the first that runs, if `FusedAttention` is on."""
        is_auto = self.requested is FlashAttention.auto
        if self.context.is_on("fused_attention"):
            if self.requested is FlashAttention.fa2 or self.context.trainer.deterministic:
                return None
        elif is_auto:
            return None
        setting = f"trainer.flash_attention={self.requested.value}"
        return Request("auto" if is_auto else True, setting, "set trainer.flash_attention=auto")

    def unsupported_reason(self) -> str | None:
        """Activates the first FlashAttention that runs; returns why none does."""
        if not self.context.is_on("fused_attention"):
            return f"trainer.fused_attention is off ({self.context.states['fused_attention']})"
        reasons: list[str] = []
        for name in NEWER_FLASH if self.requested is FlashAttention.auto else [self.requested.value]:
            reason = flash_unsupported_reason(name, self.context.placement.device)
            if reason is None:
                self.label = name
                return None
            reasons.append(reason)
        return ", ".join(reasons)


def attend_padded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention without a mask, in transformers' signature.

    `query` is [rows, heads, tokens, width]; returns [rows, tokens, heads, width].
    """
    _check_arguments(kwargs)
    return attend_batch(query, key, value, scaling).transpose(1, 2), None


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside the rows of a variable-length batch, in transformers' signature.

    `query` is [1, heads, tokens, width]; `cu_seqlens`, int32 [rows + 1], holds the first token of each row and the
    end; `max_seqlen` is the maximum number of tokens in a row. Returns [1, tokens, heads, width].
    """
    _check_arguments(kwargs)
    if cu_seqlens is None:  # the model drops arguments that it does not know, and rows would attend to each other
        raise NotImplementedError(f"{type(module).__name__} gets no cu_seqlens: set trainer.fused_attention=false")
    q, k, v = (tensor.transpose(1, 2).squeeze(0).contiguous() for tensor in (query, key, value))
    return attend_varlen(q, k, v, cu_seqlens, max_seqlen, scaling, sliding_window).unsqueeze(0), None


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Raises for an argument that only an architecture's own attention computes."""
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}: set trainer.fused_attention=false")


# Without mask functions: with one, transformers would look for packs in the positions, and wait for the device.
AttentionInterface.register(BATCH, attend_padded)
AttentionInterface.register(VARLEN, attend_packed)
