"""Proves on the loaded model that the rows of a pack do not see each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qlora.errors import ConfigError
from qlora.models.cu_seqlens import is_recurrent
from qlora.quantization.method import method_of
from qlora.runtime.device import Placement
from qlora.upstream.transformers_models import attention_of

LEADING, LENGTH = (6, 3), 8
"""Tokens before the measured segment in the first and in the second row, and tokens in it."""

SEEN = 0.1
"""Fraction of the influence without restarting positions from which a segment counts as seen. Measured: 0 where rows
are kept apart
(rounding with experts; 0.03 in 8 bits, which round by all tokens of a batch), 0.75 to 1 where they do not. Less than
the fraction, but more than rounding, is a model in which some layers keep rows apart (Falcon H1: attention, not
Mamba)."""
MISSING = re.compile("can't keep packed sequences apart without `([^`]+)`")
"""What transformers says where a kernel is missing."""
MOVED = 0.25
"""Likewise for the distance from the segment alone, whose shapes and hence roundings are others."""


@torch.no_grad()
def check_packing(
    model: PreTrainedModel | PeftModel,
    placement: Placement,
    *,
    batch_size: int,
    logits_of: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> None:
    """Raises `ConfigError` if a segment's logits depend on the segments before it in the same row.

    transformers finds the packed rows by `position_ids` that restart, but not in every architecture (OPT, Falcon,
    Bloom, GPT-OSS: not), not with a key-value cache, and in flash attention only for one row per batch: nothing is
    reported then, the rows just see each other. So this forwards short batches of min(`batch_size`, 2) rows in the
    precision of training. It comes after the trainer is built, which switches the cache off. `logits_of` returns the
    logits of such a batch as training steps attend to it; None: as the model itself does.
    """
    caches = (getattr(config, "use_cache", False) for config in (model.config, model.config.get_text_config()))
    assert not any(caches), "with a key-value cache, packed rows see each other"
    method = method_of(model)
    method.prepare(model, placement.compute_dtype)  # no evaluation may come before it
    vocabulary = model.config.get_text_config().vocab_size
    compute = logits_of or (lambda batch: model(**batch).logits)
    one, other, segment = (_tokens(quarter * vocabulary // 4, vocabulary) for quarter in (1, 2, 3))
    with _evaluating(model), placement.autocast():

        def logits(leading: Tensor, *, restarts: bool) -> Tensor:
            batch = _batch(leading, segment, batch_size, restarts=restarts)
            return _of_segment(compute({name: tensor.to(placement.device) for name, tensor in batch.items()}))

        try:
            packed, changed = logits(one, restarts=True), logits(other, restarts=True)
        except ValueError as error:
            raise _without_kernels(model, error) from error
        plain, plain_changed = logits(one, restarts=False), logits(other, restarts=False)
        inputs = {"input_ids": segment[None].to(placement.device)}
        alone = model(**inputs).logits.float().expand(len(packed), -1, -1)
    rounding = torch.finfo(placement.compute_dtype).eps * _spread(alone)
    allowed = SEEN * _distance(plain, plain_changed)
    if not method.rounds_activations:
        allowed = min(allowed, 100 * rounding)
    if _distance(packed, changed) > allowed:
        raise ConfigError(
            f"data.packing=true: {_name(model)} lets packed rows see each other; {_remedy(model, batch_size)}"
        )
    if _distance(alone, packed) > max(MOVED * _distance(alone, plain), 4 * rounding):
        raise ConfigError(
            f"data.packing=true: {_name(model)} gives a packed row other logits than the row alone, so its positions "
            "do not restart; set data.packing=false"
        )


def _tokens(start: int, vocabulary: int) -> Tensor:
    """Returns tokens from `start` on, int64 [LENGTH]; fixed ones, so that no random state moves."""
    return (start + 7 * torch.arange(LENGTH)) % vocabulary


def _batch(leading: Tensor, segment: Tensor, batch_size: int, *, restarts: bool) -> dict[str, Tensor]:
    """Returns rows of `LEADING` other tokens, the segment and padding: each int64 [1 or 2, longest]."""
    width = LEADING[0] + LENGTH
    ids, positions = [], []
    for count in LEADING[:batch_size]:
        parts = [leading[:count], segment, leading.new_zeros(width - count - LENGTH)]
        ids.append(torch.cat(parts))
        positions.append(torch.cat([torch.arange(len(part)) for part in parts]))
    batch = {"input_ids": torch.stack(ids)}
    return batch | {"position_ids": torch.stack(positions)} if restarts else batch


def _of_segment(logits: Tensor) -> Tensor:
    """Returns the logits of the segment in every row: float32 [rows, LENGTH, vocabulary]."""
    rows = zip(logits.float(), LEADING, strict=False)
    return torch.stack([row[count : count + LENGTH] for row, count in rows])


def _distance(a: Tensor, b: Tensor) -> float:
    return _spread(a - b)


def _spread(logits: Tensor) -> float:
    """Returns the root mean square; what is added to all logits of a token changes no probability and is left out."""
    return float((logits - logits.mean(-1, keepdim=True)).square().mean().sqrt())


@contextmanager
def _evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Switches dropout off, and the modules that were training back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _without_kernels(model: PreTrainedModel | PeftModel, error: ValueError) -> Exception:
    """Returns what to say of recurrent layers whose kernels are not installed; another error is none of ours."""
    if (package := MISSING.search(str(error))) is None:
        return error
    return ConfigError(
        f"data.packing=true: the recurrent layers of {_name(model)} keep packed rows apart with kernels of "
        f"{package[1]}, which is not installed; pip install 'qlora[linear]', or set data.packing=false"
    )


def _name(model: PreTrainedModel | PeftModel) -> str:
    return f"{model.config.model_type} (attention: {attention_of(model)})"


def _remedy(model: PreTrainedModel | PeftModel, batch_size: int) -> str:
    if "flash" in str(attention_of(model)) and batch_size > 1:
        return (
            f"flash attention keeps them apart only with trainer.per_device_train_batch_size=1 (got {batch_size}); "
            "raise data.pack_length or trainer.gradient_accumulation_steps instead, or set data.packing=false"
        )
    if is_recurrent(model) and batch_size > 1:
        return (
            "kernels of its recurrent layers keep them apart only with trainer.per_device_train_batch_size=1 (got "
            f"{batch_size}); raise data.pack_length or trainer.gradient_accumulation_steps instead, or set "
            "data.packing=false"
        )
    return "set data.packing=false"
