"""Heads: a linear layer that makes a few numbers of the hidden state of a text's last token.

It is saved with the adapter as PEFT saves a trained module, under the name that transformers' models for sequence
classification have for it, with a `config.json` that says what its outputs mean: `AutoModelForSequenceClassification`
with that config and `PeftModel` load both.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora.adapters.adapter_files import ADAPTER_CONFIG
from qlora.config.registries.objectives import Head
from qlora.errors import DataError
from qlora.models.json_files import read_object
from qlora.objectives.protocol import HEAD
from qlora.text import listed, plural
from qlora.upstream.peft import base_of
from qlora.upstream.torch_models import weight_of

CONFIG = "config.json"
"""Beside an adapter: the base's config with what its head says."""
PROBLEMS = {Head.classify: "single_label_classification", Head.regress: "regression"}
"""What transformers calls that which a head is for."""
KINDS = {Head.classify: "classifier", Head.regress: "regression", Head.embed: "model of embeddings"}
POOLED = {"last": "last token", "mean": "mean of all tokens"}
POOLING = "1_Pooling/config.json"
POOLING_MODES = {"last": "lasttoken", "mean": "mean"}
"""What sentence-transformers calls what a vector is made of."""


@dataclass(frozen=True)
class HeadLayout:
    """What the outputs of a head are."""

    name: Head
    outputs: int
    labels: tuple[str, ...] = ()
    """The classes, in the order of the outputs."""
    is_reward: bool = False
    """Whether its one output is the reward of a text, learned from pairs."""
    pooling: str = ""
    """What a vector is made of: `last` or `mean`; then there is no matrix."""

    @property
    def kind(self) -> str:
        """What a model with it is called."""
        return "reward model" if self.is_reward else KINDS[self.name]

    @property
    def setting(self) -> str:
        """What a command says to use it."""
        return "loss=reward" if self.is_reward else f"head={self.name.value}"

    def __str__(self) -> str:
        if self.labels:
            return f"{self.kind}, {self.outputs} classes: {listed(self.labels, 8)}"
        if self.pooling:
            return f"{self.kind}, unit vectors of the {POOLED[self.pooling]}"
        return f"{self.kind}, {plural(self.outputs, 'number')} a text"


def attach_head(model: PreTrainedModel, outputs: int = 1) -> None:
    """Gives a language model a head of zeros in float32: without an adapter, it says 0 of all texts."""
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, outputs, bias=False, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    model.add_module(HEAD, head.to(weight_of(model.get_input_embeddings()).device))


def start_head(model: PeftModel) -> None:
    """Initialises the head that is trained with an adapter from torch's current seed, as transformers does."""
    settings = base_of(model).config.get_text_config()
    head = model.get_submodule(f"base_model.model.{HEAD}.modules_to_save.default")
    torch.nn.init.normal_(weight_of(head), std=getattr(settings, "initializer_range", 0.02))


def has_head(modules_to_save: object) -> bool:
    """Returns whether an adapter's config says that it holds a head."""
    return isinstance(modules_to_save, list) and HEAD in modules_to_save


def write_head(layout: HeadLayout, base: PreTrainedModel, folder: Path, *, pad_token_id: int) -> None:
    """Writes the config by which plain transformers builds the model that an adapter with a head belongs to.

    Of embeddings it writes what sentence-transformers reads.
    """
    if layout.pooling:
        _write_modules(layout.pooling, base, folder)
        return
    config: Any = copy.deepcopy(base.config)
    config.num_labels = layout.outputs
    if layout.labels:
        config.id2label = dict(enumerate(layout.labels))
        config.label2id = {name: index for index, name in enumerate(layout.labels)}
    config.problem_type = None if layout.is_reward else PROBLEMS[layout.name]
    config.pad_token_id = pad_token_id
    settings = config.to_diff_dict()
    settings |= {"id2label": config.id2label, "label2id": config.label2id}
    for name in ("quantization_config", "architectures", "_name_or_path", "use_cache"):
        settings.pop(name, None)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_head(folder: Path, key: str = "adapter") -> HeadLayout | None:
    """Returns what the outputs of a saved adapter's head are; None: it has none."""
    if not has_head(read_object(folder / ADAPTER_CONFIG, f"{key}={folder}").get("modules_to_save")):
        return _read_modules(folder, key)
    if not (folder / CONFIG).is_file():  # a reward model of an older version
        return HeadLayout(Head.regress, 1, is_reward=True)
    settings = read_object(folder / CONFIG, f"{key}={folder}")
    names = settings.get("id2label")
    if not isinstance(names, dict) or {*names} != {str(index) for index in range(len(names))}:
        raise DataError(
            f"{key}={folder}: its {CONFIG} does not say what its head's outputs are (id2label); copy it again"
        )
    problem = settings.get("problem_type")
    if problem != PROBLEMS[Head.classify]:
        return HeadLayout(Head.regress, len(names), is_reward=problem is None)
    labels = tuple(str(names[str(index)]) for index in range(len(names)))
    return HeadLayout(Head.classify, len(labels), labels)


def _write_modules(pooling: str, base: PreTrainedModel, folder: Path) -> None:
    """Writes the modules of sentence-transformers: the model with its adapter, the pooling, the length of 1."""
    settings = base.config.get_text_config()
    types = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(types.items())
    ]
    files = {
        "modules.json": modules,
        POOLING: {"embedding_dimension": settings.hidden_size, "pooling_mode": POOLING_MODES[pooling]},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": getattr(settings, "max_position_embeddings", None)},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_modules(folder: Path, key: str) -> HeadLayout | None:
    """Returns how the texts of a saved adapter are pooled; None: it is that of a language model."""
    if not (folder / POOLING).is_file():
        return None
    mode = read_object(folder / POOLING, f"{key}={folder}").get("pooling_mode")
    pooling = next((name for name, known in POOLING_MODES.items() if known == mode), None)
    if pooling is None:
        raise DataError(
            f"{key}={folder}: its {POOLING} pools by {mode!r}, and what is known here are "
            f"{' and '.join(POOLING_MODES.values())}; copy it again"
        )
    return HeadLayout(Head.embed, 0, pooling=pooling)
