"""The head of a reward model: a linear layer that makes one number of the hidden state of a text's last token.

It is saved with the adapter as PEFT saves a trained module, under the name that transformers' models for sequence
classification have for it: `AutoModelForSequenceClassification` with one label and `PeftModel` load both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora.adapters.adapter_files import ADAPTER_CONFIG
from qlora.models.json_files import read_object
from qlora.objectives.protocol import HEAD
from qlora.upstream.peft import base_of
from qlora.upstream.torch_models import weight_of


def attach_head(model: PreTrainedModel) -> None:
    """Gives a language model a head of zeros in float32: without an adapter, all rewards are 0."""
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    model.add_module(HEAD, head.to(weight_of(model.get_input_embeddings()).device))


def start_head(model: PeftModel) -> None:
    """Initialises the head that is trained with an adapter from torch's current seed, as transformers does."""
    settings = base_of(model).config.get_text_config()
    head = model.get_submodule(f"base_model.model.{HEAD}.modules_to_save.default")
    torch.nn.init.normal_(weight_of(head), std=getattr(settings, "initializer_range", 0.02))


def is_reward_model(folder: Path) -> bool:
    """Returns whether a folder holds the adapter of a reward model."""
    return has_head(read_object(folder / ADAPTER_CONFIG, f"adapter={folder}").get("modules_to_save"))


def has_head(modules_to_save: object) -> bool:
    """Returns whether an adapter's config says that it holds a reward head."""
    return isinstance(modules_to_save, list) and HEAD in modules_to_save
