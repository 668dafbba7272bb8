"""Loads a model by transformers and reads its report: a tensor that the files lack would be initialised at random."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.errors import DataError
from qlora.quantization.method import QuantizationMethod
from qlora.upstream.transformers import load_causal_model
from qlora.upstream.transformers_models import failed_conversions

log = logging.getLogger(__name__)

SHOWN = 3
"""Names of tensors in a message."""


def load_complete(folder: str, *, key: str, method: QuantizationMethod, **options: Any) -> PreTrainedModel:
    """Loads a causal language model; raises `DataError` unless its files hold all that its config means.

    `key` is the key and value that name the model; `options` are those of transformers' `from_pretrained`. What the
    files hold beyond it is warned of.
    """
    try:
        model, report = load_causal_model(folder, ignore_mismatched_sizes=True, **options)
    except RuntimeError as error:
        if (failed := failed_conversions(error.__traceback__)) is None:
            raise
        raise DataError(
            f"{key}: {_tensors(failed)} cannot be made of what its files hold, {_first(failed)}: parts are missing or "
            "of other shapes; download or copy the model again"
        ) from error
    missing = _missing(model, report["missing_keys"]) + method.missing_statistics(model)
    misshapen = {name: (saved, needed) for name, saved, needed in report["mismatched_keys"]} | _misshapen(model, method)
    _check_missing(model, key, missing, report["unexpected_keys"])
    if misshapen:
        name = min(misshapen, key=_in_order)
        saved, needed = (" x ".join(map(str, shape)) for shape in misshapen[name])
        raise DataError(
            f"{key}: {_tensors(misshapen)} in its files differ{'s' if len(misshapen) == 1 else ''} in shape from "
            f"what its config.json means, first {name} ({saved}, and {needed} is needed); correct config.json, "
            "or download or copy the model again"
        )
    if unexpected := report["unexpected_keys"]:
        log.warning(
            "%s: a %s has no place for %s of its files, which training leaves out: %s",
            *(key, model.config.model_type, _tensors(unexpected), _first(unexpected)),
        )
    _warn_of_untied(model, key)
    return model


def _warn_of_untied(model: PreTrainedModel, key: str) -> None:
    """Warns where config.json ties the embeddings and the files hold two matrices, which transformers leaves apart."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)  # some have no such setting
    if not is_tied or output is None or output.weight is embedding.weight:
        return
    names = {module: name for name, module in model.named_modules()}
    log.warning(
        "%s: its config.json says tie_word_embeddings=true, but its files hold two matrices, %s.weight and %s.weight, "
        "that differ: both are used as they are",
        *(key, names[embedding], names[output]),
    )


def _missing(model: PreTrainedModel, reported: Iterable[str]) -> list[str]:
    """Returns the missing tensors but for buffers that the model computes from its config.

    A buffer of one number throughout is no such: it waits for what training put there (the balance of experts).
    """
    buffers = dict(model.named_buffers())
    return [name for name in reported if name not in buffers or buffers[name].unique().numel() == 1]


def _misshapen(model: PreTrainedModel, method: QuantizationMethod) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Returns the saved and the needed shape of quantized weights that differ; transformers compares the others."""
    differing = {}
    for name, module in model.named_modules():
        if not isinstance(module, method.layer_classes()):
            continue
        layer: Any = module
        saved, needed = method.saved_shape(layer), torch.Size([layer.out_features, layer.in_features])
        if saved is not None and saved != needed:
            differing[f"{name}.weight"] = (saved, needed)
    return differing


def _check_missing(model: PreTrainedModel, key: str, missing: list[str], unexpected: Iterable[str]) -> None:
    if not missing:
        return
    are = "are" if len(missing) > 1 else "is"
    what = f"{key}: {_tensors(missing)} {are} missing from its files, {_first(missing)}"
    output = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    if prefix := _common_prefix(missing, unexpected):
        raise DataError(
            f"{what}: there the names begin with {prefix!r}; save the model without it (from PEFT: "
            "model.merge_and_unload().save_pretrained(FOLDER))"
        )
    if {name.rpartition(".")[0] for name in missing} <= output:
        raise DataError(
            f"{what}: that is the output layer, and without it the base predicts no token; give the causal language "
            "model, or set tie_word_embeddings to true in config.json if the embedding is the output layer too"
        )
    raise DataError(
        f"{what}, and would be initialised at random; download or copy the model again, or correct its config.json"
    )


def _common_prefix(missing: list[str], unexpected: Iterable[str]) -> str | None:
    """Returns what the files put in front of the name of every missing tensor; None: they do nothing of that kind."""
    first = min(missing)
    for name in unexpected:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            return prefix if set(unexpected) >= {prefix + tensor for tensor in missing} else None
    return None


def _tensors(names: Iterable[str]) -> str:
    count = len(list(names))
    return f"{count:,} tensor{'s' if count != 1 else ''}"


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names, key=_in_order)
    return f"first {', '.join(ordered[:SHOWN])}" if len(ordered) > 1 else ordered[0]


def _in_order(name: str) -> tuple[Any, ...]:
    """Returns what sorts layer 10 behind layer 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
