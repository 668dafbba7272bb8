"""What a run sets in its process, in one place and before torch, transformers or a tracker is imported."""

from __future__ import annotations

import os
import sys

SILENT_SERVICES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a service of the hub to convert other weights
    "USE_HUB_KERNELS": "NO",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
"""Variables that keep libraries from reporting to others and from fetching code."""
QUIET_LIBRARIES = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "BITSANDBYTES_NOWELCOME": "1",
    "KINETO_LOG_LEVEL": "99",
}
"""Variables that keep libraries from printing hints and progress bars."""
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""The variables that settle how torch allocates a GPU's memory."""


def prepare_environment(*, verbose: bool = False) -> None:
    """Keeps libraries from talking to services, fetching code and printing; a variable that is set already stays.

    Every process that runs a task calls this before it imports torch or transformers: the command line, `Run`, jobs
    and workers. `verbose` (`hydra.verbose=true`) lets libraries print. Calling it again changes nothing.
    """
    for name, value in (SILENT_SERVICES | ({} if verbose else QUIET_LIBRARIES)).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ["USE_HUB_KERNELS"].upper() not in ("1", "ON", "YES", "TRUE"):
        # With this package, bitsandbytes fetches code from the hub when it is imported, and transformers later.
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def reuse_freed_memory() -> None:
    """Lets torch map freed GPU pages anew, unless the user has chosen an allocator; call it before CUDA starts.

    `trainer.memory_budget` counts what torch holds, so free pages must be usable wherever they lie.
    """
    if not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
