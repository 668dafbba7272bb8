"""The forward pass of checkpointed decoder layers as CUDA graphs, one for each layer: the host starts it by one call.

A checkpointed layer keeps nothing of its forward pass but its input, so that the memory in which a graph computes may
be that of all other graphs, too. In the backward pass the layer computes again as ever, kernel by kernel. A graph holds
the kernels that the layer starts without it, so the numbers have the same bits.

What a layer leaves in attributes of its modules for others to read (`NOTED`) is theirs after a graph, too. All else
that it reads must lie where it lay when the graph was captured: its weights, which are looked up at each step, and its
arguments, which are copied there.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora.runtime.device import capture_stream
from qlora.runtime.random_states import drawing_from, random_states
from qlora.text import brief_text
from qlora.upstream.torch import pool_bytes

log = logging.getLogger(__name__)

NOTED = "noted_routing"
"""The attribute of a module with tensors of its last forward pass that are read after it."""
SHAPES = 2
"""Shapes of micro-batches that have graphs; others are computed without."""
PLAIN_CALLS = 1
"""Calls of a layer with a shape before its graph is captured: kernels are compiled and chosen in them."""
OF_THE_LOSS = ("num_items_in_batch",)
"""Arguments that some architectures hand to their layers, which do not read them; other steps have other ones."""

Call = Callable[..., Any]
Recomputing = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class _Signature:
    """The arguments of a layer without the contents of tensors."""

    layout: tuple[tuple[Any, Any], ...]
    """By position or name: the number of tensors of a tuple, -1 for a tensor, or (value,) for any other argument."""
    tensors: tuple[Any, ...]
    mode: tuple[Any, ...]
    """What autocast does."""

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Signature, list[Tensor]] | None:
        """Returns the signature of a call and its tensors, the hidden states first; None: a graph cannot hold it."""
        layout: list[tuple[Any, Any]] = []
        tensors: list[Tensor] = []
        for name, value in (*enumerate(args), *kwargs.items()):
            if name in OF_THE_LOSS:
                continue
            if isinstance(value, Tensor):
                layout.append((name, -1))
                tensors.append(value)
            elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
                layout.append((name, len(value)))
                tensors += value
            elif value is None or isinstance(value, (bool, int, float, str)):
                layout.append((name, (value,)))
            else:
                return None
        if not layout or layout[0] != (0, -1) or any(tensor.requires_grad for tensor in tensors[1:]):
            return None
        kind = tensors[0].device.type
        mode = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
        return cls(tuple(layout), shapes, mode), tensors

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call with other tensors."""
        source, args, kwargs = iter(tensors), [], {}
        for name, held in self.layout:
            value: Any
            if held == -1:
                value = next(source)
            elif isinstance(held, int):
                value = tuple(next(source) for _ in range(held))
            else:
                (value,) = held
            if isinstance(name, int):
                args.append(value)
            else:
                kwargs[name] = value
        return tuple(args), kwargs


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    noted: list[tuple[nn.Module, Any]]
    """Modules with what they note; each replay overwrites the tensors."""


@dataclass(frozen=True)
class _Source:
    """A tensor, and whether it has been changed since."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(weakref.ref(tensor), tensor._version)

    def is_still(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.version == tensor._version


@dataclass
class _Buffers:
    """The arguments that all graphs of a signature read; a graph writes the layer's output over the hidden states."""

    tensors: list[Tensor]
    graphs: dict[int, _Graph] = field(default_factory=dict)
    sources: list[_Source] = field(default_factory=list)
    """The tensors that the buffers are copies of."""

    def fill(self, tensors: list[Tensor]) -> None:
        """Copies arguments, but for those that are there."""
        known: list[_Source | None] = [*self.sources] or [None] * len(tensors)
        for buffer, tensor, source in zip(self.tensors, tensors, known, strict=True):
            if source is None or not source.is_still(tensor):
                _without_repeats(buffer).copy_(_without_repeats(tensor))
        self.sources = [_Source.of(tensor) for tensor in tensors]


class LayerGraphs:
    """The graphs of a model's decoder layers, in one pool of memory."""

    def __init__(self, device: torch.device, *, has_dropout: bool) -> None:
        self.device, self.has_dropout = device, has_dropout
        self.is_on = True
        """Whether layers are computed by graphs; a graph that cannot be captured switches them off."""
        self._stream = capture_stream(device)
        self._weights: list[tuple[dict[str, Any], str]] = []
        self.forget()

    def forget(self) -> None:
        """Frees all graphs."""
        self._buffers: dict[_Signature, _Buffers] = {}
        self._calls: Counter[Hashable] = Counter()
        self._pool = torch.cuda.graph_pool_handle()
        self._addresses: list[int] = []
        self._trained: dict[int, list[nn.Parameter]] = {}
        self._measured = (0, 0)

    def give_up(self) -> bool:
        """Frees all graphs and captures none from now on; returns whether there were any."""
        had_graphs = bool(self._buffers)
        self.is_on = self.is_on and not had_graphs
        self.forget()
        return had_graphs

    @property
    def bytes(self) -> int:
        """What graphs compute in, which torch does not count among the tensors that there are."""
        captured = sum(len(buffers.graphs) for buffers in self._buffers.values())
        if captured != self._measured[0]:
            self._measured = captured, pool_bytes(self._pool)
        return self._measured[1]

    def begin(self, layers: list[Any]) -> None:
        """Begins a micro-batch: graphs of weights that have moved since are freed."""
        if not self._weights:
            modules = [module for layer in layers for module in layer.modules()]
            stores = [store for module in modules for store in (module._parameters, module._buffers)]
            self._weights = [(store, name) for store in stores for name in store]
        addresses = [0 if (tensor := store[name]) is None else tensor.data_ptr() for store, name in self._weights]
        if addresses != self._addresses:
            if self._buffers:
                self.forget()
            self._addresses = addresses
        for buffers in self._buffers.values():  # a tensor may have been changed since
            buffers.sources = []

    def call(
        self, index: int, layer: nn.Module, call: Call, plain: Call, recomputing: Recomputing, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls layer `index`: `call` computes it, `plain` checkpoints it, `recomputing` surrounds the second time."""
        read = _Signature.read(args, kwargs) if self.is_on and torch.is_grad_enabled() else None
        if read is None or not read[1][0].requires_grad:
            return plain(*args, **kwargs)
        signature, tensors = read
        if self._calls[index, signature] < PLAIN_CALLS:
            self._calls[index, signature] += 1
            return plain(*args, **kwargs)
        buffers = self._buffers.get(signature)
        if buffers is None:
            if len(self._buffers) == SHAPES:
                return plain(*args, **kwargs)
            buffers = self._buffers[signature] = _Buffers([_empty_like(tensor) for tensor in tensors])
        if index not in buffers.graphs and not self._capture(index, layer, call, signature, buffers):
            return plain(*args, **kwargs)
        again = _Again(call, recomputing, signature, tensors[1:], self.device if self.has_dropout else None)
        if index not in self._trained:
            self._trained[index] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        output: Tensor = _Replay.apply(buffers, index, again, tensors[0], *self._trained[index])
        buffers.sources[0] = _Source.of(output)
        return output

    def _capture(self, index: int, layer: nn.Module, call: Call, signature: _Signature, buffers: _Buffers) -> bool:
        """Captures the graph of a layer; says why where it cannot, and then captures none from then on."""
        hidden, *others = buffers.tensors
        arguments = signature.arguments([hidden.detach().requires_grad_(), *others])
        current, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.cuda.stream(self._stream))
                stack.enter_context(saved_tensors_hooks(_forget, _forget))
                stack.enter_context(_fresh_casts())
                stack.enter_context(_capturing(graph, self._pool))
                output = call(*arguments[0], **arguments[1])
                hidden.copy_(output.detach())
                del output
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.give_up()
            log.warning("layers are computed without CUDA graphs: %s", brief_text(str(error)))
            return False
        finally:
            current.wait_stream(self._stream)
        noted = [(module, module.__dict__[NOTED]) for module in layer.modules() if NOTED in module.__dict__]
        buffers.graphs[index] = _Graph(graph, noted)
        return True


@dataclass(frozen=True)
class _Again:
    """How the backward pass computes a layer again."""

    call: Call
    recomputing: Recomputing
    signature: _Signature
    others: list[Tensor]
    """The tensors among the arguments, but for the hidden states."""
    random: torch.device | None
    """The device whose random numbers the layer takes."""

    def run(self, hidden: Tensor, states: list[Tensor] | None) -> Tensor:
        """Returns the output of the layer, with its graph of gradients."""
        args, kwargs = self.signature.arguments([hidden, *self.others])
        enabled, dtype = self.signature.mode
        with contextlib.ExitStack() as stack:
            if self.random is not None and states is not None:
                stack.enter_context(drawing_from(self.random, states))
            stack.enter_context(torch.autocast(hidden.device.type, enabled=enabled, dtype=dtype))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.recomputing())
            output: Tensor = self.call(*args, **kwargs)
            return output


class _Replay(torch.autograd.Function):
    """A layer that is computed by its graph, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, buffers: _Buffers, index: int, again: _Again, hidden: Tensor, *trained: Tensor) -> Tensor:
        ctx.again, ctx.trained = again, trained
        ctx.states = None if again.random is None else random_states(again.random)
        ctx.save_for_backward(hidden)
        buffers.fill([hidden, *again.others])
        held = buffers.graphs[index]
        held.graph.replay()
        for module, noted in held.noted:
            module.__dict__[NOTED] = noted
        return buffers.tensors[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        hidden = saved.detach().requires_grad_()
        output = ctx.again.run(hidden, ctx.states)
        grads = torch.autograd.grad(output, (hidden, *ctx.trained), grad, allow_unused=True)
        return None, None, None, *grads


def _without_repeats(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that `expand` repeats."""
    return tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]


def _empty_like(tensor: Tensor) -> Tensor:
    """Returns a new tensor of the same layout in memory."""
    return torch.empty_like(_without_repeats(tensor)).expand(tensor.shape)


def _forget(tensor: Any) -> Any:
    """Keeps nothing for a backward pass, which does not come."""


@contextlib.contextmanager
def _fresh_casts() -> Iterator[None]:
    """Inside, autocast does not take casts from before; those that it makes are dropped."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """As `torch.cuda.graph`, which waits for the GPU and empties torch's cache each time."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may copy batches meanwhile
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # that the capture is not whole
            graph.capture_end()
        raise
    graph.capture_end()
