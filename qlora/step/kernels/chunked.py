"""Feed-forward layers of long rows, a chunk of tokens at a time, in layers that compute their activations again.

What a feed-forward layer keeps for its backward pass, and what that adds, is several times the hidden states. Computed
in chunks, it exists of one chunk only. The layer is computed once in the forward pass, not at all when the decoder
layer around it is recomputed, which does not read its output, and once more chunk by chunk in its backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora.runtime.long_rows import chunk_size
from qlora.runtime.random_states import drawing_from, random_states
from qlora.upstream.torch import compile_options

Unread = Callable[[], contextlib.AbstractContextManager[None]]

_is_skipped = False


@contextlib.contextmanager
def skipped() -> Iterator[None]:
    """Makes chunked layers inside the block return NaN: nothing reads their output."""
    global _is_skipped
    _is_skipped = True
    try:
        yield
    finally:
        _is_skipped = False


class ChunkedLayers:
    """Feed-forward layers that compute in chunks between `enter` and `exit`."""

    def __init__(self, *, compiled: bool, has_dropout: bool) -> None:
        self._call = torch.compile(_call_inner) if compiled else _call_inner
        self._has_dropout = has_dropout
        self._entered: list[torch.nn.Module] = []

    def enter(self, layer: torch.nn.Module, unread: Unread) -> None:
        """Makes a layer compute in chunks; inside `unread` the last matmul, whose output is the layer's, is left out.

        Its class changes, and no attribute of its own that compiled code would check for each layer.
        """
        layer.__dict__["chunks"] = Chunks(self._call, unread, self._has_dropout)
        kind: Any = type(layer)
        object.__setattr__(layer, "__class__", _chunked_class(kind))
        self._entered.append(layer)

    def exit(self) -> None:
        """Makes the layers compute as before."""
        for layer in self._entered:
            kind: Any = type(layer)
            object.__setattr__(layer, "__class__", kind.inner)
            del layer.__dict__["chunks"]
        self._entered = []


class Chunks:
    """How a feed-forward layer is computed."""

    def __init__(self, call: Callable[..., Tensor], unread: Unread, has_dropout: bool) -> None:
        self.call, self.unread, self.has_dropout = call, unread, has_dropout

    def __call__(self, layer: torch.nn.Module, x: Tensor) -> Tensor:
        """Returns the layer's output for `x` [rows, tokens, width]."""
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        output: Tensor = _Chunked.apply(self, layer, x, *trained)
        return output

    def split(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields each chunk's tokens, and the chunk of `x` [tokens, width] as a row that takes a gradient."""
        size = chunk_size(len(x))
        for start in range(0, len(x), size):
            part = slice(start, min(start + size, len(x)))
            yield part, x[part][None].detach().requires_grad_()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunks, layer, x, *trained):
        ctx.save_for_backward(x)
        ctx.chunks, ctx.layer, ctx.trained = chunks, layer, trained
        ctx.autocast = _autocast(x.device.type)
        ctx.random = random_states(x.device) if chunks.has_dropout else None
        if _is_skipped:
            return torch.full_like(x, torch.nan)
        out = None
        for part, piece in chunks.split(x.reshape(-1, x.shape[-1])):
            # As in the backward pass, so that both share their compiled code.
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                y = chunks.call(layer, piece).detach()[0]
            out = y.new_empty(x.shape[:-1].numel(), y.shape[-1]) if out is None else out
            out[part] = y
            del y
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        flat, of_output = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dx, totals = torch.empty_like(flat), [None] * len(ctx.trained)
        with contextlib.ExitStack() as stack:
            stack.enter_context(compile_options())  # which hold for the thread of the forward pass alone
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
            stack.enter_context(torch.autocast(x.device.type, **ctx.autocast))
            if ctx.random is not None:
                stack.enter_context(drawing_from(x.device, ctx.random))
            for part, piece in ctx.chunks.split(flat):
                with ctx.chunks.unread():
                    y = ctx.chunks.call(ctx.layer, piece)
                given = of_output[part][None].to(y.dtype)
                dx[part], *grads = torch.autograd.grad(y, [piece, *ctx.trained], given, allow_unused=True)
                del y
                for index, grad in enumerate(grads):
                    if grad is not None:  # in 32 bits: a sum of chunks must not be rounded at each
                        totals[index] = grad.float() if totals[index] is None else totals[index].add_(grad)
        sums = (total if total is None else total.to(p.dtype) for total, p in zip(totals, ctx.trained, strict=True))
        return None, None, dx.view(x.shape), *sums


@functools.cache
def _chunked_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Returns a layer's class as it is inside a step: compiled code ends before it, and begins anew after it."""

    @torch.compiler.disable
    def forward(self: Any, x: Tensor) -> Tensor:
        output: Tensor = self.chunks(self, x)
        return output

    return type(f"Chunked{kind.__name__}", (kind,), {"inner": kind, "forward": forward})


def _call_inner(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = type(layer).inner.forward(layer, x)
    return output


def _as_it_is(x: Tensor) -> Tensor:
    """Lets a chunk keep a tensor, in place of the checkpoint around it, which would count it as its own."""
    return x


def _autocast(kind: str) -> dict[str, Any]:
    return {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
