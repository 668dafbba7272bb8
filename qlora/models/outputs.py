"""Shows what each module of a model computes from plain text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.upstream.torch_models import weight_of

TOKENS = 8


@contextlib.contextmanager
def on_output(model: nn.Module, look: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """Shows `look` each module and its output as soon as it is computed: inner modules before those around them."""

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        look(module, output)

    hooks = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def switch_cache(model: PreTrainedModel, *, on: bool) -> None:
    """Makes a model keep keys and values, or not, in a pass that does not say so; a part for text is asked itself."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = on


def plain_ids(model: PreTrainedModel) -> Tensor:
    """Returns the ids of a few tokens where the model takes them, int64 [1, `TOKENS`]; none stands for a picture."""
    settings = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    special = {value for name, value in settings.items() if name.endswith(("_token_id", "_token_index"))
               and isinstance(value, int)}  # fmt: skip
    embedding = weight_of(model.get_input_embeddings())
    middle = embedding.shape[0] // 2
    ids = [number for number in range(middle, middle + TOKENS + len(special)) if number not in special]
    return torch.tensor([ids[:TOKENS]], device=embedding.device) % embedding.shape[0]
