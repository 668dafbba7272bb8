"""Saves an adapter for plain PEFT on the unchanged base, and checks what was written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from qlora.adapters.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from qlora.adapters.kinds import FRESH_LORA, fresh_tensors
from qlora.errors import RunError
from qlora.models.fingerprint import Base, write_base
from qlora.models.tokenizer import save_tokenizer
from qlora.runtime.atomic_files import write_folder
from qlora.upstream.peft import lora_config


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    initial: Path | None = None,
    base: Base | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Saves the adapter for plain PEFT on the unchanged base, with its tokenizer, and checks what was written.

    `initial` (PiSSA, OLoRA) is the folder of the initial weights; the saved adapter is the difference, of both ranks
    together.
    `base` is written beside the adapter, which is then used on that base alone; `finish` writes what else belongs
    there.
    """

    def write(partial: Path) -> None:
        # PEFT would add whole embeddings that grew; the trained rows are saved anyway.
        model.save_pretrained(str(partial), save_embedding_layers=False)
        save_tokenizer(tokenizer, partial)
        if base is not None:
            write_base(base, partial)
        if finish is not None:
            finish(partial)
        verify_adapter(partial, model)
        if initial is not None:
            _subtract_initial(partial, initial)
        _check_trained(partial, *fresh_tensors(model))

    write_folder(folder, write)


def save_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the initial weights of an init that rewrites the base, so that the final adapter can be converted."""
    if not folder.exists():
        config = lora_config(model)
        kept, config.init_lora_weights = config.init_lora_weights, True
        write_folder(folder, lambda partial: model.save_pretrained(str(partial)))
        config.init_lora_weights = kept


def _subtract_initial(folder: Path, initial: Path) -> None:
    """Makes a saved adapter one for the unchanged base: B A - B0 A0 as one product of both ranks together.

    PEFT's own conversion leaves out all but A and B: trained biases, rows of new tokens, DoRA's magnitudes.
    """
    with open_adapter(folder) as trained, open_adapter(initial) as start:
        tensors = {name: trained.get_tensor(name) for name in trained.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                tensors[name] = torch.cat([tensor, start.get_tensor(name)], dim=0)
            elif ".lora_B." in name:
                tensors[name] = torch.cat([tensor, -start.get_tensor(name)], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    rank = settings["r"] + json.loads((initial / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"]
    scale = rank / settings["r"]  # what is divided by r, or by its root, stays the same
    scale = math.sqrt(scale) if settings["use_rslora"] else scale
    settings |= {"r": rank, "lora_alpha": scale * settings["lora_alpha"], "init_lora_weights": True}
    settings["rank_pattern"] = {name: 2 * value for name, value in (settings["rank_pattern"] or {}).items()}
    settings["alpha_pattern"] = {name: scale * value for name, value in (settings["alpha_pattern"] or {}).items()}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def verify_adapter(folder: Path, model: torch.nn.Module) -> None:
    """Raises `RunError` unless a saved adapter holds every tensor of the live one, to the bit.

    A model without an adapter passes.
    """
    if not isinstance(model, PeftModel):
        return
    try:
        difference = _find_difference(folder, get_peft_model_state_dict(model, save_embedding_layers=False))
    except (OSError, SafetensorError) as error:
        difference = str(error)
    if difference is not None:
        raise RunError(
            f"{folder}: the adapter was not saved as it is in memory ({difference}); check the disk, and run the same "
            "command again to resume"
        )


def _find_difference(folder: Path, live: dict[str, torch.Tensor]) -> str | None:
    with open_adapter(folder) as file:
        saved = set(file.keys())
        for name, tensor in live.items():
            if name not in saved:
                return f"{name} is missing"
            if not _is_same(file.get_tensor(name), tensor.detach()):
                return f"{name} has other values"
    return None


def _is_same(saved: torch.Tensor, live: torch.Tensor) -> bool:
    """Returns whether two tensors are equal to the bit, compared where the live one is."""
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (saved.to(live.device), live))
    return (saved.shape, saved.dtype) == (live.shape, live.dtype) and torch.equal(first, second)


def _check_trained(folder: Path, part: str, value: float) -> None:
    """Raises `RunError` if all tensors of a saved adapter with a part of a name are what they are before training."""
    with open_adapter(folder) as file:
        keys = [key for key in file.keys() if part in key]  # noqa: SIM118 - no mapping
        if keys and not any((file.get_tensor(key) != value).any() for key in keys):
            what = "B matrices" if part == FRESH_LORA[0] else f"tensors {part.strip('.')}"
            begun = "zero" if value == 0 else f"{value:g}"
            raise RunError(
                f"{folder}: all {len(keys)} {what} of the adapter are {begun}: nothing was trained; raise "
                "trainer.learning_rate or trainer.max_steps"
            )
