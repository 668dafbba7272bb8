"""`trainer.deterministic`: the same bits from the same seed on the same machine, also on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from qlora.config.schema import TrainerConfig
from qlora.errors import ConfigError

WORKSPACE, SETTING = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""cuBLAS adds up in the same order with a workspace of fixed size only (NVIDIA's manual, Results Reproducibility)."""


def fix_workspace() -> None:
    """Chooses cuBLAS's workspace, if nobody has; to be called before CUDA starts."""
    os.environ.setdefault(WORKSPACE, SETTING)


@contextlib.contextmanager
def deterministic(config: TrainerConfig) -> Iterator[None]:
    """Lets torch take deterministic algorithms alone inside the block, if `config` asks for it.

    Then cuDNN's attention, which adds up in any order, gives way to FlashAttention with an order, and Inductor measures
    no kernels. Raises `ConfigError` for an operation that has no such algorithm, and where CUDA has started without it.
    """
    if not config.deterministic:
        yield
        return
    if torch.cuda.is_initialized() and WORKSPACE not in os.environ:
        raise ConfigError(
            f"trainer.deterministic=true: CUDA is at work in this process already; set {WORKSPACE}={SETTING} before it "
            "starts, or run in a process of its own"
        )
    fix_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch._inductor.config.patch(deterministic=True):
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().split(". ")[0].splitlines()[0]
        raise ConfigError(
            f"trainer.deterministic=true: {reason}; leave it out, or what needs this operation"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
