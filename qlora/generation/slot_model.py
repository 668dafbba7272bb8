"""A model that reads prompts into slots and decodes one token of each, and whether a model can be one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qlora.config.schema import GenerationConfig
from qlora.experts.host import WAITING
from qlora.generation.elementwise import fused_elementwise
from qlora.generation.graphs import StepGraphs, warn_of_no_graph
from qlora.generation.slots import NAME, Pass, SlotCache
from qlora.generation.transfer import upload
from qlora.models.outputs import plain_ids
from qlora.upstream.peft import base_of
from qlora.upstream.torch_models import weight_of
from qlora.upstream.transformers_model import attention_of, set_attention, takes_any_attention

ATTENTIONS = {"full_attention", "sliding_attention"}
"""The kinds of layers that a slot serves."""
OTHER_SEARCHES = ("num_beams", "penalty_alpha", "repetition_penalty", "no_repeat_ngram_size")
"""Options of `generation` that transformers' own loop alone computes, where they are set."""
FAILURES = (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError)
"""What a forward pass raises that takes no slots."""


_graphs: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[SlotModel, StepGraphs]] = WeakKeyDictionary()
"""The captured decode steps of models while they are served; they hold what `serving` has built."""


class SlotModel:
    """The forward passes of a model over slots; use it inside `serving` and `torch.inference_mode`."""

    def __init__(self, model: torch.nn.Module, *, slots: int, length: int) -> None:
        """`length` is the most tokens that a slot holds."""
        self.model, self.cache = model, SlotCache(slots, length)
        self.device = next(model.parameters()).device
        self._tuner = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        self._waits = any(WAITING in module.__dict__ for module in model.modules())

    @property
    def is_ahead(self) -> bool:
        """Whether decode steps return before they are computed."""
        return self.device.type == "cuda"

    def read(self, prompts: list[list[int]], *, first: int = 0) -> Tensor:
        """Reads prompts (token ids) into the slots from `first` on; returns the logits after them.

        These are [prompts, vocabulary].
        """
        lengths = [len(prompt) for prompt in prompts]
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        ids = upload([token for prompt in prompts for token in prompt], self.device)
        positions = upload([index for length in lengths for index in range(length)], self.device)
        slots = upload([first + row for row, length in enumerate(lengths) for _ in range(length)], self.device)
        step = Pass(slots, positions, lengths=lengths, cu_seqlens=upload(ends, self.device, torch.int32))
        kept = upload([end - 1 for end in ends[1:]], self.device)
        return self._forward(ids[None], positions[None], step, kept)[0]

    def decode(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Reads one more token of each of the first slots, int64 [rows]; returns the logits after it.

        These are [rows, vocabulary], and the next step may overwrite them. `lengths` are the tokens that the slots
        hold before it.
        """
        if not self.is_ahead:
            return self._decode(tokens, torch.tensor(lengths, device=self.device), max_length=max(lengths) + 1)
        if self._waits:
            warn_of_no_graph("the host copies the weights of experts in each step")
            return self.decode_by_kernel(tokens, upload(lengths, self.device))
        of_model = _graphs[_base_of(self.model)]
        if self not in of_model:
            of_model[self] = StepGraphs(self.cache.slots, self.device)
        return of_model[self].run(self.decode_by_kernel, tokens, lengths, self._adapter)

    def decode_by_kernel(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `decode`, with the kernel of the attention, which reads the positions on the device."""
        return self._decode(tokens, positions, by_kernel=True)

    def _decode(self, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
        step = Pass(torch.arange(len(tokens), device=self.device), positions, **options)
        return self._forward(tokens[:, None], positions[:, None], step, 1)[:, -1]

    @property
    def _adapter(self) -> Hashable:
        """What is on of the adapters."""
        return None if self._tuner is None else (self._tuner.disable_adapters, *self._tuner.active_adapters)

    def _forward(self, ids: Tensor, positions: Tensor, step: Pass, kept: Any) -> Tensor:
        self.cache.current = step
        output: Any = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, slot_pass=step,
            logits_to_keep=kept,
        )  # fmt: skip
        logits: Tensor = output.logits
        return logits


@contextlib.contextmanager
def serving(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model attends over slots; around it, `linears` says how its linear layers compute."""
    base = _base_of(model)
    previous = attention_of(base.config)
    set_attention(base.config, NAME)
    outer, _graphs[base] = _graphs.get(base), WeakKeyDictionary()
    is_on_gpu = weight_of(base.get_input_embeddings()).is_cuda
    try:
        with fused_elementwise(base) if is_on_gpu else contextlib.nullcontext():
            yield
    finally:
        if is_on_gpu:
            torch.cuda.synchronize()  # a step that was asked for ahead may still read what is freed now
        _graphs.pop(base)
        if outer is not None:
            _graphs[base] = outer
        set_attention(base.config, previous)


def unsupported_reason(model: torch.nn.Module, config: GenerationConfig) -> str | None:
    """Returns why slots do not serve a model or the options of `generation`; None: they do, as far as both tell."""
    base = _base_of(model)
    settings = base.config.get_text_config()
    if (reason := unsupported_option(config)) is not None:
        return reason
    if kinds := set(getattr(settings, "layer_types", None) or []) - ATTENTIONS:
        return f"{settings.model_type} has layers of another kind ({', '.join(sorted(kinds))})"
    if not takes_any_attention(base):
        return f"{settings.model_type} computes its attention in a way of its own"
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
        return "the model is sharded over processes"
    return None


def unsupported_option(config: GenerationConfig) -> str | None:
    """Returns which option of `generation` slots do not compute; None: they compute all."""
    unset = GenerationConfig()
    if read := [name for name in OTHER_SEARCHES if getattr(config, name) != getattr(unset, name)]:
        return f"generation.{read[0]}={getattr(config, read[0])} is not computed there"
    return None if config.use_cache else "generation.use_cache=false"


def differs_reason(
    model: torch.nn.Module,
    dtype: torch.dtype,
    linears: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> str | None:
    """Returns how a model's logits over slots differ from its own; None: they are the same, but for rounding.

    Two short rows are read together, and then one more token of each, inside of `linears`. The model is in evaluation
    mode, under autocast.
    """
    ids = plain_ids(_base_of(model))[0].tolist()
    rows = [ids[:6], ids[2:5]]
    begun, last = [row[:-1] for row in rows], [row[-1] for row in rows]
    slots = SlotModel(model, slots=2, length=len(ids))
    try:
        with linears(), serving(model):
            logits = slots.read(begun)
            actual = torch.cat([logits, slots.decode(upload(last, slots.device), [len(row) for row in begun])])
    except FAILURES as error:
        return f"its forward pass takes no slots: {' '.join(str(error).split())[:100] or type(error).__name__}"
    inputs = (torch.tensor([row], device=slots.device) for row in (*begun, *rows))
    expected = torch.cat([model(input_ids=row).logits[:, -1] for row in inputs])
    distance = float((actual.float() - expected.float()).norm() / expected.float().norm())
    return (
        None
        if distance <= max(8 * torch.finfo(dtype).eps, 1e-4)
        else f"its logits over slots are {distance:.1g} away from its own"
    )


def _base_of(model: Any) -> PreTrainedModel:
    base: PreTrainedModel = base_of(model) if isinstance(model, PeftModel) else model
    return base
