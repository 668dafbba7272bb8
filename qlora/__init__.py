"""Config-driven fine-tuning of quantized language models.

import qlora

run = qlora.train("lora.r=16", "name=mine")
run.metrics.eval_loss
run.ask("What is the opposite of brave?")

Importing this package sets no environment variable, blocks no module and imports no torch; a run does all of that.
"""

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.run import FinishedRun, Metrics, Run, train

__version__ = "0.1.0"
__all__ = ["FinishedRun", "Metrics", "Run", "__version__", "train"]

if find_spec("fcntl") is None:  # locks of folders need it
    _sentence = "qlora runs on Linux and macOS; on Windows install WSL (`wsl --install`), and qlora inside it"
    _program = next(iter(sys.argv), "")
    # While Python looks for the module to run, the first argument is `-m` instead of the module's file.
    if _program == "-m" or os.path.basename(_program).partition(".")[0] == "qlora":  # noqa: PTH119
        sys.exit(f"error: {_sentence}")
    raise ImportError(_sentence)


def __getattr__(name: str) -> Any:
    """Imports `qlora.run` when one of its names is first asked for."""
    if name in __all__:
        from qlora import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
