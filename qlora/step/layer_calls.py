"""How a step calls the decoder layers: compiled or not, checkpointed or not, with their inputs on the host or not.

Checkpointed layers may be computed by CUDA graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from qlora.step.layer_graphs import LayerGraphs
from qlora.step.offload import Offloading
from qlora.step.part import StepContext
from qlora.step.parts.fused_linear import FastLinear
from qlora.upstream.torch import call_layer, set_layer_call

USUAL_CHILDREN = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""The children of a decoder layer that adds the output of its feed-forward layer to its input, and ends so."""
MIXTURE_CHILDREN = {"gate", "experts"}
"""The children of a feed-forward layer whose output is that of its experts."""


class LayerCalls:
    """Changes the calls of the decoder layers for the time of a step."""

    def __init__(self, context: StepContext, *, compiled: bool, as_graphs: bool) -> None:
        self.layers = context.layers
        is_sharded = any(isinstance(layer, FSDPModule) for layer in self.layers)
        self._call = torch.compile(call_layer) if compiled and not is_sharded else call_layer
        # Not the hooks around the forward method, which gather a sharded layer.
        self._forward = torch.compile(_call_forward) if compiled and is_sharded else None
        self._offloading = Offloading(context.placement.device)
        rates = [module.p for module in context.base.modules() if isinstance(module, torch.nn.Dropout)]
        self._has_dropout = any(rates) or any(experts.dropout for experts in context.experts)
        device = context.placement.device
        self.graphs = LayerGraphs(device, has_dropout=self._has_dropout) if as_graphs else None
        """The graphs of checkpointed layers; None: none are captured."""

    def enter(self, checkpointed: int, offloaded: int) -> None:
        """Replaces the calls; the first `checkpointed` layers recompute, the first `offloaded` of them offload."""
        self._previous = [layer.gradient_checkpointing for layer in self.layers]
        self._offloading.begin()
        if self.graphs is not None:
            self.graphs.begin(self.layers[:checkpointed])
        for index, layer in enumerate(self.layers):
            layer.gradient_checkpointing = False
            set_layer_call(layer, self._call_of(index, index < checkpointed, index < offloaded))
            if self._forward is not None:
                layer.forward = partial(self._forward, layer)

    def exit(self) -> None:
        """Restores the calls."""
        for layer, checkpointing in zip(self.layers, self._previous, strict=True):
            set_layer_call(layer, None)
            layer.gradient_checkpointing = checkpointing
            if self._forward is not None:
                del layer.__dict__["forward"]

    def _call_of(self, index: int, is_checkpointed: bool, is_offloaded: bool) -> Callable[..., Any]:
        layer = self.layers[index]
        call = partial(self._call, layer)
        if not is_checkpointed:
            return call
        # Nothing in a layer reads what the layer adds to its input last: the recomputation leaves that matmul out.
        recomputing = find_unread(layer)
        again: Callable[..., Any] = partial(
            checkpoint,
            call,
            use_reentrant=False,
            preserve_rng_state=self._has_dropout,
            context_fn=lambda: (contextlib.nullcontext(), recomputing()),
        )
        if self.graphs is not None:
            again = partial(self.graphs.call, index, layer, call, again, recomputing)
        return partial(self._offloading.call, again) if is_offloaded else again


def find_unread(layer: torch.nn.Module) -> Callable[[], contextlib.AbstractContextManager[None]]:
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
            unread: Callable[[], contextlib.AbstractContextManager[None]] = fast.unread
            return unread
    return contextlib.nullcontext


def _call_forward(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
