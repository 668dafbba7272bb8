"""Small real models that the plan's parts are compared with."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PreTrainedModel

from qlora import adapters
from qlora.config.compose import compose
from qlora.config.schema import Config, PlanStep, QuantizationConfig
from qlora.models import loading
from qlora.models.random_weights import RandomWeights
from qlora.planning.adapter_targets import find_targets
from qlora.planning.model_shape import Shape
from qlora.planning.read_shape import read_shape
from qlora.planning.setup import Setup
from qlora.quantization.method import find_method
from qlora.runtime.device import Placement

CPU = torch.device("cpu")
BF16 = Placement(CPU, torch.bfloat16, torch.bfloat16)
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 96}
SIZES |= {"num_hidden_layers": 3, "max_position_embeddings": 2048}
GROUPED = SIZES | {"num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 32},
    "gemma2": GROUPED | {"head_dim": 24, "tie_word_embeddings": True},
    "gemma3_text": GROUPED | {"head_dim": 32, "tie_word_embeddings": True},
    "phi3": GROUPED,
    "gpt_neox": SIZES,
}
NF4 = QuantizationConfig(bits=4, double_quant=True)
PLAIN = Setup(
    base=find_method(NF4).stored_base(NF4), fp32=False, r=8, targets=(), dora=False, bf16_adapters=False, dropout=False,
    optim="paged_adamw_32bit", rows=1, length=64, accumulates=False, checkpointed=0, step=PlanStep.plain,
)  # fmt: skip


def shape(kind: str, **sizes: int) -> Shape:
    return read_shape({"model_type": kind, **KINDS[kind], **sizes}, "test")


def setup(for_shape: Shape, **changes: Any) -> Setup:
    chosen = replace(PLAIN, **changes)
    return chosen if chosen.targets else replace(chosen, targets=find_targets(for_shape, ["all-linear"]))


@functools.cache
def composed(*overrides: str) -> Config:
    """The config of `overrides`, to be read only."""
    return compose(overrides)


def base(kind: str, *overrides: str, **sizes: int) -> PreTrainedModel:
    config = composed(*overrides)
    model_config = AutoConfig.for_model(
        kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **{**KINDS[kind], **sizes}
    )
    return loading.build_random_base(
        config.model, config.quantization, RandomWeights(model_config, placement=BF16, seed=0)
    )


def adapted(kind: str, *overrides: str, **sizes: int) -> PeftModel:
    """A base with adapters of rank 8 on all linear layers and no dropout, ready to train."""
    overrides = ("lora.r=8", "lora.dropout=0", *overrides)
    config = composed(*overrides)
    model = adapters.add_lora(config.lora, base(kind, *overrides, **sizes), tensors=list, new_token_ids=[], batches=[])
    model.config.use_cache = False
    return model.train()


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a CPU compute as CUDA: PEFT sees autocast, dropout keeps a mask of bytes, LayerNorm is in float32."""
    norm, enabled = torch.nn.functional.layer_norm, torch.is_autocast_enabled

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p > 0 and training else x

    def layer_norm(x: Tensor, size: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        return norm(x.float(), size, weight.float(), bias.float(), eps)

    with monkeypatch.context() as patch:
        # Without a device's name it asks for CUDA; with one, autocast itself asks what to restore.
        patch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*device) if device else True)
        patch.setattr(torch.nn.functional, "dropout", dropout)
        patch.setattr(torch.nn.functional, "layer_norm", layer_norm)
        yield


def loss(model: torch.nn.Module, rows: int, length: int) -> Tensor:
    ids = torch.arange(3, 3 + length).remainder(90)[None].expand(rows, -1).contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=ids, labels=ids)
    output.logits = output.logits.float()  # as accelerate returns them
    return output.loss


def saved_bytes(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, rows: int, length: int) -> int:
    """Bytes of the distinct tensors, parameters left out, that one forward pass keeps for the backward pass."""
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its place
        return tensor

    with as_on_a_gpu(monkeypatch), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, rows, length)
    return sum(storage.nbytes() for storage in kept.values())


class Live(TorchDispatchMode):
    """Follows the bytes of the tensors that exist at once, those of `model` left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.model_storages = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.model_storages:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def peak_bytes(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, rows: int, length: int, *, checkpoint: bool, passes: int
) -> int:
    """The most bytes beside the model that exist during forward and backward passes."""
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    live = Live(model)
    with live, as_on_a_gpu(monkeypatch):
        for _ in range(passes):
            loss(model, rows, length).backward()
    return live.peak
