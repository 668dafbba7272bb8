"""Config-driven fine-tuning of quantized language models.

from qlora.compose import compose
from qlora.run import Run

result = Run(compose(["lora.r=16", "data.max_eval_samples=100"]), "outputs/my-run").train()
"""

__version__ = "0.1.0"
