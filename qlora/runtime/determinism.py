"""`trainer.deterministic`: the same bits from the same seed on the same machine, also on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from qlora.config.schema import TrainerConfig
from qlora.errors import ConfigError, RunError
from qlora.upstream.torch_models import deterministic_inductor

WORKSPACE, SETTING = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""cuBLAS accumulates in fixed order only with a workspace of fixed size (NVIDIA's manual: Results Reproducibility)."""


def fix_workspace() -> None:
    """Chooses cuBLAS's workspace, if nobody has; to be called before CUDA starts."""
    os.environ.setdefault(WORKSPACE, SETTING)


@contextlib.contextmanager
def deterministic(config: TrainerConfig) -> Iterator[None]:
    """Restricts torch to deterministic algorithms inside the block, if `config` asks for it.

    cuDNN's attention, which accumulates in any order, is replaced by FlashAttention with a fixed order, and Inductor
    measures no kernels. Raises `ConfigError` for an operation without a deterministic algorithm, and
    `RunError` if CUDA has started without it.
    """
    if not config.deterministic:
        yield
        return
    if torch.cuda.is_initialized() and WORKSPACE not in os.environ:
        raise RunError(
            f"trainer.deterministic=true: CUDA has already started in this process; set {WORKSPACE}={SETTING} before "
            "it starts, or run in a new process"
        )
    fix_workspace()
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with deterministic_inductor():
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().split(". ")[0].splitlines()[0]
        raise ConfigError(
            f"trainer.deterministic=true: {reason}; set it to false, or leave out what needs this operation"
        ) from error
    finally:
        torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
