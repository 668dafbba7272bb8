"""Private names of torch that the fast step and the trainer need, because torch has no public ones for them.

- `compile_options`: how layers are compiled one by one, without a limit on the number of shapes;
- `call_layer`, `set_layer_call`: what `module(...)` calls, hooks included, without a change of the module's class;
- `scaled_mm`, `foreach_norm`, `foreach_copy`: kernels for 8-bit matmuls and for many small tensors at once;
- `ignore_in_ddp`: parameters that `DistributedDataParallel` leaves alone;
- `raise_if_worker_died`: the error that torch's own signal handler would raise later;
- `as_dataset`: rows of any class, for loaders that declare torch's own;
- `set_last_rate`: the learning rate that a scheduler reports;
- `compile_cuda`: kernels in CUDA, compiled by the library that torch brings;
- `pool_bytes`: the memory of CUDA graphs, which is a field of what torch knows of all its memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data._utils import signal_handling

RECOMPUTE_MORE = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
}
"""Compiled layers recompute all element-wise operations, dropout masks too, instead of keeping their results."""

scaled_mm = torch._scaled_mm
foreach_norm = torch._foreach_norm
foreach_copy = torch._foreach_copy_
raise_if_worker_died = signal_handling._error_if_any_worker_fails


@contextlib.contextmanager
def compile_options() -> Iterator[None]:
    """Sets how layers are compiled in the block.

    They are compiled one by one, so there is no graph to split for the exchange of gradients between processes. All
    training runs of this process share the compiled code. Past the recompile limit a layer would run uncompiled, and
    its recomputed activations would differ from those of the forward pass.
    """
    limit = torch._dynamo.config.accumulated_recompile_limit
    with (
        torch._functorch.config.patch(RECOMPUTE_MORE),
        torch._dynamo.config.patch(optimize_ddp=False, recompile_limit=limit),
    ):
        yield


def call_layer(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer with its hooks, past what `set_layer_call` has set."""
    return layer._call_impl(*args, **kwargs)


def set_layer_call(layer: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Makes `layer(...)` call `call`; None: the layer itself again."""
    layer._compiled_call_impl = call


def ignore_in_ddp(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Makes `DistributedDataParallel` leave the named parameters and buffers alone."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


class Rows(Protocol):
    """Rows by their index: a data set, or the packs of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def as_dataset(rows: Rows) -> torch.utils.data.Dataset[Any]:
    """Returns rows as a loader takes them: it needs a length and an index, and declares a base class."""
    return cast("torch.utils.data.Dataset[Any]", rows)


def set_last_rate(scheduler: Any, rates: list[float]) -> None:
    """Sets the learning rates that `get_last_lr` reports until the next step."""
    scheduler._last_lr = rates


class CudaKernel:
    """A kernel of `compile_cuda`."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(self, grid: tuple[int, int, int], threads: int, args: Sequence[torch.Tensor | int]) -> None:
        """Starts `grid` blocks of `threads` threads in the current stream; whole numbers are passed as `int`."""
        self._kernel(grid=grid, block=(threads, 1, 1), args=list(args))


def cuda_compiler_reason() -> str | None:
    """Returns why `compile_cuda` does not serve."""
    return None if hasattr(torch.cuda, "_compile_kernel") else "this version of torch compiles no CUDA kernels"


def compile_cuda(source: str, name: str) -> CudaKernel:
    """Compiles the function `name`, which is `extern "C"`, for the current GPU, in about a second."""
    return CudaKernel(torch.cuda._compile_kernel(source, name))


def pool_bytes(pool: Any) -> int:
    """Returns the bytes that torch holds for CUDA graphs in a pool (`torch.cuda.graph_pool_handle`)."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))
