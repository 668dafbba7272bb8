"""Attention without padding: a batch becomes one variable-length batch, with attention inside each row.

`FusedAttention` lays the batch out and computes with torch's own kernels (`torch.nn.attention.varlen`, and
`flex_attention` for scores behind tanh and for sinks); `NewerFlashAttention` puts FlashAttention 3 or 4 in the place of
the former where it is installed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import FlashAttention
from qlora.experts.layout import find_experts
from qlora.step.kernels.attention import (
    NEWER_FLASH,
    attend_batch,
    attend_flex,
    attend_plain,
    attend_varlen,
    build_block_mask,
    fastest_attention,
    flash_unsupported_reason,
    has_varlen,
    wide_tiles,
)
from qlora.step.kernels.kept_attention import attend_kept, is_on
from qlora.step.kernels.sharded_rows import STARTS, attend_shared
from qlora.step.kernels.shared_prompts import NAMES, SharedRows, to_cells, to_tokens
from qlora.step.part import IGNORED, SPREAD, ConfiguredPart, Packs, Request, StepContext
from qlora.upstream.transformers_model import (
    attention_of,
    mixes_by_attention_alone,
    set_attention,
    takes_any_attention,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BATCH, VARLEN = "qlora_batch", "qlora_varlen"
"""The names under which transformers finds the attention over padded batches, and that over variable-length ones."""

FALSE = "set trainer.fused_attention=false"
SPECIAL_ATTENTION = ("attention_chunk_size", "attention_dropout", "alibi")
"""Settings of architectures whose attention is none of those here."""


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
        on_gpu = self.context.placement.device.type == "cuda"
        if self.context.is_spread:
            return SPREAD
        if on_gpu and not has_varlen():
            return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 or later has)"
        if on_gpu and self.context.placement.compute_dtype is torch.float32:
            return "it computes in 16 bits only"
        if self.context.trainer.neftune_noise_alpha is not None:
            return "trainer.neftune_noise_alpha scales its noise by the length of padded rows"
        settings = self.config.get_text_config()
        special = [name for name in SPECIAL_ATTENTION if getattr(settings, name, None)]
        if special or not takes_any_attention(self.context.base):
            detail = f" ({special[0]})" if special else ""
            return f"{settings.model_type} has an attention of its own{detail}"
        if self.context.trainer.context_parallel > 1 and (reason := self._why_not_shared()) is not None:
            return reason
        return None

    def _why_not_shared(self) -> str | None:
        """Returns why several processes cannot share a row."""
        settings, base = self.config.get_text_config(), self.context.base
        if not mixes_by_attention_alone(base):
            return f"{settings.model_type} reads other tokens not by attention alone"
        if self._needs_flex() or find_experts(base):
            return f"{settings.model_type} has caps, sinks or experts, which are computed of whole rows"
        return None

    def _needs_flex(self) -> bool:
        modules = (module for layer in self.context.layers for module in layer.modules())
        has_sinks = any(getattr(module, "sinks", None) is not None for module in modules)
        return has_sinks or bool(getattr(self.config.get_text_config(), "attn_logit_softcapping", None))

    def prepare(self) -> None:
        """Notes whether FlashAttention computes what the model does, or `flex_attention` must."""
        settings = self.config.get_text_config()
        self._is_flexible = self._needs_flex()
        self._windows = {None, getattr(settings, "sliding_window", None)}
        is_of_pairs = getattr(self.context.objective, "rows", None) is RowKind.pairs
        self.shares_prompts = is_of_pairs and mixes_by_attention_alone(self.context.base)
        """Whether the answers of a pair share their prompt where a batch says how."""

    def enter(self) -> None:
        """Chooses the fastest kernels for padded batches, and notes the model's own attention."""
        self._previous = attention_of(self.config)
        self._kernels = contextlib.ExitStack()
        self._kernels.enter_context(fastest_attention())

    def exit(self, *, failed: bool) -> None:
        """Gives the model its own attention back."""
        self._kernels.close()
        set_attention(self.config, self._previous)

    def lay_out(self, batch: dict[str, Any], packs: Packs | None) -> dict[str, Any]:
        """Makes one variable-length batch of `packs`; `cu_seqlens` has a fixed length, for the sake of compiled code.

        A batch of single rows stays padded: the padding comes last, where causal attention does not see it. For a
        model with a sliding window, or that needs `flex_attention`, such a batch is laid out too. Where answers share
        prompts, `input_ids` and `position_ids` are those of their tokens, and the rest is that of whole rows.
        """
        if STARTS in batch:
            set_attention(self.config, VARLEN)
            starts = batch[STARTS]
            return {name: value for name, value in batch.items() if name != STARTS} | {
                "cu_seqlens": starts, "max_seqlen": 0, STARTS: starts
            }  # fmt: skip
        ids = batch["input_ids"]
        count, width = ids.shape
        shared_rows = SharedRows.of(batch) if self.shares_prompts and NAMES[0] in batch else None
        if packs is None and "position_ids" in batch:  # of one pair each, whose rows hold no more than all its tokens
            packs = Packs(width, 2, width if shared_rows is None else len(shared_rows.first) // count)
        batch = {name: value for name, value in batch.items() if name not in ("attention_mask", *NAMES)}
        if packs is not None:
            positions, max_seqlen, max_rows = batch["position_ids"], packs.max_seqlen, packs.max_rows
        elif self._is_flexible or len(self._windows) > 1:
            positions, max_seqlen, max_rows = torch.arange(width, device=ids.device).expand(count, width), width, 1
        else:
            set_attention(self.config, BATCH)
            return batch
        set_attention(self.config, VARLEN)
        positions = positions.reshape(1, -1)
        begins = positions % max_seqlen == 0  # also inside padding that is longer than any row
        ends = torch.nonzero_static(begins.view(-1), size=count * max_rows + 1, fill_value=count * width)
        cu_seqlens = ends.view(-1).int()
        if self._is_flexible and ids.is_cuda:
            batch["block_masks"] = {
                window: build_block_mask(cu_seqlens, count * width, window) for window in self._windows
            }
            batch["tiles"] = wide_tiles(ids.device)
        if shared_rows is not None:
            batch["shared_rows"] = shared_rows
        return batch | {
            "input_ids": ids.view(1, -1) if shared_rows is None else ids.view(1, -1)[:, shared_rows.first],
            # The last token of a row predicts nothing, and not the first one of the row behind it.
            "labels": batch["labels"].view(1, -1).masked_fill(begins, IGNORED),
            "position_ids": positions if shared_rows is None else positions[:, shared_rows.first],
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
    _check_arguments(module, attention_mask, kwargs)
    if is_on():
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return attend_kept(q, k, v, scaling), None
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    block_masks: dict[int | None, BlockMask] | None = None,
    tiles: dict[str, int] | None = None,
    row_starts: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside the rows of a variable-length batch, in transformers' signature.

    `query` is [1, heads, tokens, width]; `cu_seqlens`, int32 [rows + 1], holds the first token of each row and the
    end; `max_seqlen` is the maximum number of tokens in a row. `s_aux` [heads] are sinks. `block_masks` are those of
    `cu_seqlens` by window, where `flex_attention` is needed, and `tiles` those for wide heads. `row_starts` are given
    where processes share the rows. Returns [1, tokens,
    heads, width].
    """
    _check_arguments(module, attention_mask, kwargs)
    if cu_seqlens is None:  # the model drops arguments that it does not know, and rows would attend to each other
        raise NotImplementedError(f"{type(module).__name__} gets no cu_seqlens: {FALSE}")
    if row_starts is not None:
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        return attend_shared(q, k, v, row_starts, scaling, sliding_window), None
    if block_masks is not None:
        mask = block_masks[sliding_window]
        output = attend_flex(query, key, value, mask, scaling, softcap=softcap, sinks=s_aux, tiles=tiles)
        return output.transpose(1, 2).contiguous(), None
    if is_on() and softcap is None and s_aux is None:
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        lengths: dict[str, Any] = {"cu_q": cu_seqlens, "max_q": max_seqlen, "window": sliding_window}
        return attend_kept(q, k, v, scaling, **lengths), None
    q, k, v = (tensor.transpose(1, 2).squeeze(0).contiguous() for tensor in (query, key, value))
    if softcap is None and s_aux is None:
        return attend_varlen(q, k, v, cu_seqlens, max_seqlen, scaling, sliding_window).unsqueeze(0), None
    if q.is_cuda:
        raise NotImplementedError(f"{type(module).__name__} has an attention of its own: {FALSE}")
    options = {"window": sliding_window, "softcap": softcap, "sinks": s_aux}
    return attend_plain(q, k, v, cu_seqlens, scaling, **options).unsqueeze(0), None


def attend_sharing(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_rows: SharedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `attend_packed`, whose rows are those of `shared_rows` where tokens stand in several of them.

    `query` is [1, heads, tokens, width]; returns [1, tokens, heads, width].
    """
    if shared_rows is None:
        return attend_packed(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (to_cells(tensor[0].transpose(0, 1), shared_rows).transpose(0, 1)[None] for tensor in (query, key, value))
    output, _ = attend_packed(module, q, k, v, attention_mask, **kwargs)
    return to_tokens(output[0], shared_rows)[None], None


def _check_arguments(module: torch.nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raises for what only an architecture's own attention computes: a mask, or an argument that nothing here reads."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} attends with {unknown[0]}: {FALSE}")


# Without mask functions: with one, transformers would look for packs in the positions, and wait for the device.
AttentionInterface.register(BATCH, attend_padded)
AttentionInterface.register(VARLEN, attend_sharing)
