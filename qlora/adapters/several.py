"""Several adapters on one base, of which one is on at a time."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PeftType

from qlora.adapters.biases import REWRITING
from qlora.adapters.load import check_fit, check_whole
from qlora.errors import DataError
from qlora.text import brief_text
from qlora.upstream.peft import names_kept


def check_sharing(folder: Path, key: str) -> None:
    """Raises `DataError` for an adapter that changes its base otherwise than by LoRA on linear layers."""
    config = PeftConfig.from_pretrained(str(folder))
    reason = _alone_reason(config)
    if reason is not None:
        raise DataError(
            f"{key}={folder} {reason}, so that it cannot share its base with another adapter; serve it by itself"
        )


def attach_adapter(model: PeftModel, folder: Path, base_name: str, *, name: str, key: str) -> None:
    """Loads a further adapter, which `key` names, beside those of a model; it is off.

    Raises `DataError` for one of another base and for one with gaps. `check_sharing` has accepted all of them.
    """
    check_fit(model, folder, base_name, key)
    try:
        with names_kept():
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            model.add_adapter(name, config)
            model.load_adapter(str(folder), name)
    except Exception as error:
        raise DataError(
            f"{key}={folder} does not fit model.name={base_name} ({type(error).__name__}: {brief_text(str(error))})"
        ) from error
    check_whole(model, folder, key, name)


def _alone_reason(config: PeftConfig) -> str | None:
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        return f"is no LoRA ({config.peft_type})"
    start = config.init_lora_weights
    reasons = {
        "trains biases": config.bias != "none",
        "trains the embeddings of new tokens": bool(config.trainable_token_indices),
        "trains whole modules": bool(config.modules_to_save),
        "adapts tensors of experts": bool(config.target_parameters),
        f"begins as a part of its base (init_lora_weights={start})": isinstance(start, str)
        and start.startswith(REWRITING),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
