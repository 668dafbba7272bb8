"""How a step calls the decoder layers: compiled or not, checkpointed or not, with what they keep on the host or not.

Checkpointed layers may be computed by CUDA graphs, but not those of long rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from qlora.runtime.long_rows import is_long
from qlora.step.kernels.chunked import ChunkedLayers, Unread, skipped
from qlora.step.kernels.kept_attention import KeptOutputs, kept_attention
from qlora.step.layer_graphs import LayerGraphs
from qlora.step.offload import Offloading
from qlora.step.part import StepContext
from qlora.step.parts.fused_linear import FastLinear
from qlora.upstream.torch import call_layer, set_layer_call

USUAL_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""The children of a decoder layer that adds the output of its feed-forward layer to its input, and ends so."""
PLAIN_CHILDREN = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
"""The children of a feed-forward layer that computes each token by itself."""
MIXTURE_CHILDREN = {"gate", "experts"}
"""The children of a feed-forward layer whose output is that of its experts."""


class LayerCalls:
    """Changes the calls of the decoder layers for the time of a step."""

    def __init__(self, context: StepContext, *, compiled: bool, as_graphs: bool) -> None:
        self.layers = context.layers
        self._is_sharded = any(isinstance(layer, FSDPModule) for layer in self.layers)
        self._call = torch.compile(call_layer) if compiled and not self._is_sharded else call_layer
        # Not the hooks around the forward method, which gather a sharded layer.
        self._forward = torch.compile(_call_forward) if compiled and self._is_sharded else None
        self._offloading = Offloading(context.placement.device)
        rates = [module.p for module in context.base.modules() if isinstance(module, torch.nn.Dropout)]
        self._has_dropout = any(rates) or any(experts.dropout for experts in context.experts)
        device = context.placement.device
        self.graphs = LayerGraphs(device, has_dropout=self._has_dropout) if as_graphs else None
        """The graphs of checkpointed layers; None: none are captured."""
        self._chunked = ChunkedLayers(compiled=compiled, has_dropout=self._has_dropout)

    def enter(self, checkpointed: int, offloaded: int) -> None:
        """Replaces the calls; the first `checkpointed` layers recompute, the first `offloaded` of them offload."""
        self._previous = [layer.gradient_checkpointing for layer in self.layers]
        self._checkpointed, self._is_long, self._long = checkpointed, False, contextlib.ExitStack()
        self._offloading.begin()
        if self.graphs is not None:
            self.graphs.begin(self.layers[:checkpointed])
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = False
            set_layer_call(layer, self._call_of(index, index < checkpointed, index < offloaded))
            if self._forward is not None:
                layer.forward = partial(self._forward, layer)

    def begin(self, length: int) -> None:
        """Begins a forward pass of rows of `length` tokens; checkpointed layers compute long ones with less memory."""
        self._end()
        self._is_long = is_long(length) and self._checkpointed > 0
        if not self._is_long:
            return
        self._long.enter_context(kept_attention())
        self._long.callback(self._chunked.exit)
        for layer in self.layers[: self._checkpointed]:
            if (mlp := find_chunkable(layer)) is not None and not self._is_sharded:
                self._chunked.enter(mlp, find_unread(layer))

    def exit(self) -> None:
        """Restores the calls."""
        self._end()
        for layer, checkpointing in zip(self.layers, self._previous, strict=True):
            set_layer_call(layer, None)
            layer.gradient_checkpointing = checkpointing
            if self._forward is not None:
                del layer.__dict__["forward"]

    def _end(self) -> None:
        self._is_long = False
        self._long.close()

    def _call_of(self, index: int, is_checkpointed: bool, is_offloaded: bool) -> Callable[..., Any]:
        layer = self.layers[index]
        call = partial(self._call, layer)
        if not is_checkpointed:
            return call
        # Nothing in a layer reads what the layer adds to its input last: the recomputation leaves that matmul out.
        unread = find_unread(layer)
        contexts = partial(self._contexts, unread, is_offloaded)
        again: Callable[..., Any] = partial(
            checkpoint,
            call,
            use_reentrant=False,
            preserve_rng_state=self._has_dropout,
            context_fn=contexts,
        )
        if self.graphs is not None:
            again = partial(self._choose, again, partial(self.graphs.call, index, layer, call, again, unread))
        return partial(self._offloading.call, again) if is_offloaded else again

    def _choose(self, plain: Callable[..., Any], graphed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a layer by its graph; that of a long row keeps outputs of attention, which a graph would overwrite."""
        return (plain if self._is_long else graphed)(*args, **kwargs)

    def _contexts(
        self, unread: Unread, is_offloaded: bool
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Returns what is around the forward pass of a checkpointed layer, and around its recomputation."""
        if not self._is_long:
            return contextlib.nullcontext(), unread()
        offloading = self._offloading
        outputs = KeptOutputs(offloading.store_output, offloading.fetch) if is_offloaded else KeptOutputs()
        return outputs.active(again=False), _again(outputs, unread)


@contextlib.contextmanager
def _again(outputs: KeptOutputs, unread: Unread) -> Iterator[None]:
    """What is around the recomputation of a layer of a long row."""
    with outputs.active(again=True), skipped(), unread():
        yield


def find_chunkable(layer: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the feed-forward layer that can be computed in chunks: each token by itself, and its output is unread."""
    if {name for name, _ in layer.named_children()} != USUAL_CHILDREN:
        return None
    mlp: Any = layer.mlp
    names = {name for name, _ in mlp.named_children()}
    return mlp if "down_proj" in names and names <= PLAIN_CHILDREN else None


def find_unread(layer: torch.nn.Module) -> Unread:
    """Returns what leaves out the matmul whose output a layer adds to its input last, inside a step.

    Nothing is left out where the layer ends otherwise, for instance with a norm, or that matmul is not fused.
    """
    if {name for name, _ in layer.named_children()} != USUAL_CHILDREN:
        return contextlib.nullcontext
    mlp: Any = layer.mlp
    if isinstance(last := getattr(mlp, "down_proj", None), FastLinear):
        return last.group.unread
    if {name for name, _ in mlp.named_children()} == MIXTURE_CHILDREN:
        experts = mlp.experts.get_base_layer() if hasattr(mlp.experts, "get_base_layer") else mlp.experts
        if (fast := getattr(experts, "fast_experts", None)) is not None:
            unread: Unread = fast.unread
            return unread
    return contextlib.nullcontext


def _call_forward(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
