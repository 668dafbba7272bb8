"""Config-driven fine-tuning of quantized language models.

from qlora import Run
from qlora.config.compose import compose

result = Run(compose(["lora.r=16", "data.max_eval_samples=100"]), "outputs/my-run").train()

Importing this package sets no environment variable, blocks no module and imports no torch; a run does all of that.
"""

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__"]

if find_spec("fcntl") is None:  # locks of folders need it
    _sentence = "qlora runs on Linux and macOS; on Windows install WSL (`wsl --install`), and qlora inside it"
    _program = next(iter(sys.argv), "")
    # While Python looks for the module to run, the first argument is `-m` instead of the module's file.
    if _program == "-m" or os.path.basename(_program).partition(".")[0] == "qlora":  # noqa: PTH119
        sys.exit(f"error: {_sentence}")
    raise ImportError(_sentence)


def __getattr__(name: str) -> Any:
    """Imports `Run` when it is first asked for."""
    if name == "Run":
        from qlora.run import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
