"""Config-driven fine-tuning of quantized language models.

from qlora.config.compose import compose
from qlora.run import Run

result = Run(compose(["lora.r=16", "data.max_eval_samples=100"]), "outputs/my-run").train()
"""

import os
import sys
from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fcntl") is None:  # locks of folders need it
    _sentence = "qlora runs on Linux and macOS; on Windows install WSL (`wsl --install`), and qlora inside it"
    _program = next(iter(sys.argv), "")
    # While Python looks for the module that it is to run, `-m` stands for its file.
    if _program == "-m" or os.path.basename(_program).partition(".")[0] == "qlora":  # noqa: PTH119
        sys.exit(f"error: {_sentence}")
    raise ImportError(_sentence)

# Nothing is told to others, and no code is fetched, unless the user asks for it: what is set already stays.
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a service of the hub to convert other weights
    "USE_HUB_KERNELS": "NO",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
if os.environ["USE_HUB_KERNELS"].upper() not in ("1", "ON", "YES", "TRUE"):
    # bitsandbytes and transformers fetch code from the hub by this package, the former when it is imported.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
