"""Runs the bare base on a few tokens, so that its faults are not blamed on the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, __version__

from qlora.errors import ConfigError, DataError, UserError
from qlora.models.nonfinite import first_nonfinite_module
from qlora.models.outputs import plain_ids
from qlora.quantization.method import method_of
from qlora.runtime.device import Placement
from qlora.upstream.peft import base_of

OTHER_LOSS = 0.05
"""The relative difference of a loss from the cross entropy of the next tokens; rounding to 16 bits makes less."""


@torch.no_grad()
def try_base(model: PreTrainedModel, key: str, placement: Placement) -> None:
    """Raises a `UserError` if a forward pass fails or gives numbers that are NaN; `key` names the model.

    It runs in the precision of training. A lack of memory is raised as it is.
    """
    ids = plain_ids(model)

    def forward() -> Any:
        with placement.autocast():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    try:
        logits = forward().logits
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{key}: transformers {__version__} cannot run this {model.config.model_type} ({_first_line(error)}); its "
            "config.json does not fit, or that version has a fault: try another revision of the model"
        ) from error
    if bool(torch.isnan(logits).any() | torch.isposinf(logits).any()):
        raise explain_nonfinite(model, key, placement, forward, "its logits are")


def try_training(model: PreTrainedModel | PeftModel, key: str, placement: Placement) -> None:
    """Raises `DataError` if the code of a base fails on a few tokens, forward and backward, or computes another loss.

    `key` names it. Embeddings require a gradient in it, as where activations are recomputed. Gradients of weights are
    not computed, and no random state moves. A lack of memory is raised as it is.
    """
    base = base_of(model) if isinstance(model, PeftModel) else model
    ids, embedded, was_training = plain_ids(base), list[torch.Tensor](), model.training
    gpus = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}

    def note(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.requires_grad_())
        return output

    hook = base.get_input_embeddings().register_forward_hook(note)
    model.train()
    try:
        with torch.random.fork_rng(gpus), placement.autocast():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
        torch.autograd.grad(output.loss, embedded[0])
        model.eval()  # some change their weights here
        with torch.no_grad(), placement.autocast():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        unquantized = "quantization=none, or " if method_of(base).is_quantized else ""
        raise DataError(
            f"{key}: transformers {__version__} cannot train this {base.config.model_type} ({_first_line(error)}); "
            f"choose {unquantized}another base"
        ) from error
    finally:
        hook.remove()
        model.train(was_training)
    if getattr(output, "aux_loss", None) is not None:  # that of routers, which is a part of the loss
        return
    loss, logits = float(output.loss.detach()), output.logits[0, :-1].detach().float()
    expected = float(cross_entropy(logits, ids[0, 1:]))
    if abs(loss - expected) > OTHER_LOSS * max(1.0, expected):
        raise DataError(
            f"{key}: the {base.config.model_type} of transformers computes another loss ({loss:.3g}) than that of the "
            f"next tokens ({expected:.3g}), and would learn something else; choose another base"
        )


def explain_nonfinite(
    model: PreTrainedModel, key: str, placement: Placement, forward: Callable[[], Any], what: str
) -> UserError:
    """Returns the error for a base whose weights are finite and whose results in `forward` are not."""
    module = first_nonfinite_module(model, forward)
    where = f", first those of its module {module}" if module else ""
    dtype = str(placement.compute_dtype).removeprefix("torch.")
    kind: type[UserError] = DataError
    if placement.compute_dtype is torch.float16:
        kind = ConfigError
        remedy = "computing in float16 overflows, most likely; set quantization.compute_dtype=bf16 or fp32"
    else:
        remedy = f"its weights are finite, so its config.json does not fit them, or {dtype} is too narrow; choose " \
                 "another base, or quantization.compute_dtype=fp32"  # fmt: skip
    return kind(f"{key}: {what} NaN or infinite before anything is trained{where}: {remedy}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200].rstrip('.')}" if text else type(error).__name__
