"""Puts kernels in the place of norms, rotary positions and gates of a model while it answers on a GPU.

Each is recognised by what it computes: on a trial input the module's code must give the numbers of a twin, to the bit.
Whatever does not stays as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

ROTARY = "apply_rotary_pos_emb"
"""The function of transformers' modelling modules that turns queries and keys; attention looks it up in each pass."""
NORM_KINDS = (
    {"offset": False, "rounded": True},
    {"offset": True, "rounded": False},
    {"offset": False, "rounded": False},
)
"""How models multiply by the weight of a norm: after rounding, by one more, before rounding."""
GATES = {"silu": silu, "gelu": lambda x: gelu(x, approximate="tanh")}


@contextlib.contextmanager
def fused_elementwise(model: nn.Module) -> Iterator[None]:
    """Inside, the kernels compute; the model is in evaluation mode, and may be a GPU's alone."""
    replaced: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [module.__dict__.pop("forward", None) for module in replaced])
        with torch.no_grad(), torch.autocast(_device_of(model).type, enabled=False):
            for module in model.modules():
                if "forward" not in module.__dict__ and (forward := _find_norm(module) or _find_gate(module)):
                    module.__dict__["forward"] = forward
                    replaced.append(module)
            device = _device_of(model)
            for code in {sys.modules[type(module).__module__] for module in model.modules()}:
                if _is_rotary(code, device):
                    stack.callback(setattr, code, ROTARY, getattr(code, ROTARY))
                    setattr(code, ROTARY, _fuse_rotary(getattr(code, ROTARY), device))
        yield


def normalise_plainly(x: Tensor, weight: Tensor, epsilon: float, *, offset: bool, rounded: bool) -> Tensor:
    """As `kernels.elementwise.normalise`."""
    values = x.float()
    normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounded:
        normed = normed.to(x.dtype).float()
    factor = weight.float()
    return (normed * (factor + 1.0 if offset else factor)).to(x.dtype)


def rotate_plainly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.elementwise.rotate`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turn(q), turn(k)


def _find_norm(module: nn.Module) -> Callable[..., Tensor] | None:
    weight: Any = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(epsilon, float)):
        return None
    if weight.dim() != 1 or not weight.is_floating_point():
        return None
    norm: Any = module
    original = module.forward
    x = _trial(3, len(weight), dtype=weight.dtype, device=weight.device)
    expected = _try(original, x)
    kind = next(
        (kind for kind in NORM_KINDS if _is_same(expected, normalise_plainly(x, weight, epsilon, **kind))), None
    )
    if kind is None:
        return None
    dtype = weight.dtype

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden.dtype is not dtype or torch.is_grad_enabled():
            return original(hidden, *args, **kwargs)
        from qlora.generation.kernels.elementwise import normalise  # Triton is there with CUDA only

        return normalise(hidden, norm.weight, epsilon, **kind)

    return forward


def _find_gate(module: nn.Module) -> Callable[..., Tensor] | None:
    names = [name for name, _ in module.named_children()]
    if not {"gate_proj", "up_proj", "down_proj", "act_fn"}.issuperset(names) or "down_proj" not in names:
        return None
    gated: Any = module
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "act_fn")):
        return None
    original, like = module.forward, next(gated.gate_proj.parameters())
    sample = _trial(64, dtype=torch.float32, device=like.device)
    activation = next(
        (name for name, plain in GATES.items() if _is_same(_try(gated.act_fn, sample), plain(sample))), None
    )
    width = getattr(gated.gate_proj, "in_features", None)
    if activation is None or width is None:
        return None
    dtype = like.dtype if like.is_floating_point() else torch.bfloat16
    x = _trial(2, width, dtype=dtype, device=like.device)
    if not _is_same(
        _try(original, x), _try(lambda x: gated.down_proj(gated.act_fn(gated.gate_proj(x)) * gated.up_proj(x)), x)
    ):
        return None

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.is_grad_enabled():
            return original(hidden, *args, **kwargs)
        from qlora.generation.kernels.elementwise import multiply_gate  # Triton is there with CUDA only

        gate, up = gated.gate_proj(hidden), gated.up_proj(hidden)
        output: Tensor = gated.down_proj(multiply_gate(gate, up, gelu=activation == "gelu"))
        return output

    return forward


def _is_rotary(code: ModuleType, device: torch.device) -> bool:
    """Returns whether a module's function for rotary positions turns the two halves of a head."""
    original = getattr(code, ROTARY, None)
    if original is None:
        return False
    q, k, cos, sin = (_trial(*shape, device=device) for shape in ((2, 3, 1, 16), (2, 1, 1, 16), (2, 1, 16), (2, 1, 16)))
    actual = _try(original, q, k, cos, sin)
    if not (isinstance(actual, tuple) and len(actual) == 2):
        return False
    return all(_is_same(*pair) for pair in zip(actual, rotate_plainly(q, k, cos, sin), strict=True))


def _fuse_rotary(original: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns the function for decode steps on one device; whatever else is left to `original`."""

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = len(q), 1, q.shape[-1]
        is_step = q.dim() == 4 and q.shape[2] == 1 and cos.shape == sin.shape == shape and len(k) == len(q)
        are_alike = len({tensor.dtype for tensor in (q, k, cos, sin)}) == 1 and q.shape[-1] == k.shape[-1]
        are_dense = all(tensor.stride(-1) == 1 for tensor in (q, k, cos, sin))
        if (
            args
            or kwargs
            or torch.is_grad_enabled()
            or not (q.device == device and is_step and are_alike and are_dense)
        ):
            return original(q, k, cos, sin, *args, **kwargs)
        from qlora.generation.kernels.elementwise import rotate  # Triton is there with CUDA only

        return rotate(q, k, cos, sin)

    return turn


def _trial(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _try(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Returns what a function gives; None: it takes other inputs."""
    try:
        return function(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of code of any architecture
        return None


def _is_same(actual: Any, expected: Any) -> bool:
    return (
        isinstance(actual, Tensor)
        and isinstance(expected, Tensor)
        and actual.dtype is expected.dtype
        and bool(torch.equal(actual, expected))
    )


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
