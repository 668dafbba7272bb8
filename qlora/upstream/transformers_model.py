"""What the fast step reads and sets of `transformers.PreTrainedModel` under a private name.

The implementation of attention has a public setter, `set_attn_implementation`, which checks and imports too much to be
called in every training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from qlora.upstream.torch_models import weight_of


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the decoder of a causal model, without its output layer and towers for pictures.

    transformers returns whatever an architecture calls `decoder`: in ModernBERT the output layer, in Llama 4 the whole.
    """
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    inside = (child for child in model.children() if isinstance(child, PreTrainedModel))
    return next(inside, cast(PreTrainedModel, model.base_model))


def attention_of(config: PretrainedConfig) -> str | None:
    """Returns the name of the attention that a model computes with."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Makes a model compute with the attention that `AttentionInterface` holds under `name`."""
    config._attn_implementation = name


RECURRENT_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""The kinds of layers that carry a state, or the last inputs, from token to token beside or in place of attention."""
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "moe"}) | RECURRENT_LAYERS
"""The kinds of layers, as `layer_types` of a config names them, that attend to all earlier tokens or to the last ones,
or not at all. Others choose tokens by a mask of their own: in chunks, by an indexer, in compressed blocks."""
PROBE = "qlora_probe"
MOVED = 0.02
"""The largest part of the distance of two tokens that counts as rounding: in 8 bits they round by their neighbours."""


def takes_any_attention(model: PreTrainedModel) -> bool:
    """Returns whether a model calls its attention through `AttentionInterface`, for plain causal attention.

    With a sliding window the step packs the rows of a batch, which recurrent layers must not see.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    settings = model.config.get_text_config()
    kinds = {*(getattr(settings, "layer_types", None) or [])}
    if not PLAIN_LAYERS.issuperset(kinds):
        return False
    if getattr(settings, "sliding_window", None) is not None and kinds & RECURRENT_LAYERS:
        return False
    return _hands_on(model, packed=not kinds & RECURRENT_LAYERS)


def mixes_by_attention_alone(model: PreTrainedModel) -> bool:
    """Returns whether what a model computes of a token depends on other tokens through attention alone.

    Then the answers of a pair may stand behind one prompt. A few tokens are tried with an attention that returns zeros,
    of which the first one is changed: recurrences, convolutions and shifts show it to the next.
    """
    size = model.config.get_text_config().vocab_size
    is_handed_on: list[bool] = []

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        is_handed_on.append("shared_rows" in kwargs)
        return _no_attention(query, value), None

    logits = []
    for first in (0, 5):
        ids = torch.tensor([[first, 1, 2, 3]]) % size
        batch = {"input_ids": ids, "position_ids": torch.arange(4)[None], "shared_rows": None}
        output = _try_attention(model, note, batch)
        if output is None:
            return False
        logits.append(output[0].float())
    spread, moved = (logits[0][1] - logits[0][2]).norm(), (logits[0][1:] - logits[1][1:]).norm()
    return bool(is_handed_on) and all(is_handed_on) and bool(moved <= MOVED * spread)


def _hands_on(model: PreTrainedModel, *, packed: bool) -> bool:
    """Returns whether every attention of a model gets what the model was given and its window, and no other mask.

    Some architectures drop arguments on the way, and some say by a mask alone what a token sees; so a few tokens are
    tried. `packed` says whether rows are to be packed.
    """
    given: list[bool] = []
    windowed: dict[Any, bool] = {}

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        given.append(mask is None and (kwargs.get("cu_seqlens") is not None) is packed)
        windowed[module] = kwargs.get("sliding_window") is not None
        return _no_attention(query, value), None

    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(8)[None]}
    if packed:
        batch |= {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32), "max_seqlen": 8}
    if _try_attention(model, note, batch) is None:
        return False
    return bool(given) and all(given) and sum(windowed.values()) == _windows(model, len(windowed))


def _no_attention(query: Tensor, value: Tensor) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_zeros(rows, tokens, heads, value.shape[-1])


@torch.no_grad()
def _try_attention(model: PreTrainedModel, attention: Callable[..., Any], batch: dict[str, Any]) -> Tensor | None:
    """Returns the logits of a batch with another attention; None: the model cannot compute with it."""
    AttentionInterface.register(PROBE, attention)
    device, former = weight_of(model.get_input_embeddings()).device, attention_of(model.config)
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = [module for module in model.modules() if module.training]
    is_16_bit = model.dtype is not torch.float32
    set_attention(model.config, PROBE)
    try:
        model.eval()
        with torch.autocast(device.type, model.dtype if is_16_bit else torch.bfloat16, enabled=is_16_bit):
            logits: Tensor = model(use_cache=False, **batch).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of code of any architecture, which needs the mask or does not know an argument
        return None
    finally:
        set_attention(model.config, former)
        for module in training:
            module.training = True
    return logits


def _windows(model: PreTrainedModel, layers: int) -> int:
    """Returns how many of the layers that attend look at the last tokens alone, by the config."""
    settings = model.config.get_text_config()
    if getattr(settings, "sliding_window", None) is None:
        return 0
    kinds = getattr(settings, "layer_types", None)
    return layers if kinds is None else sum(kind in ("sliding_attention", "hybrid_sliding") for kind in kinds)
