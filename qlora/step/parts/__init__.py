"""The parts of the fast step by name, in the order in which they are decided on and entered.

Another package adds its own under the entry point group `qlora.step_parts`, or is named as `module:Class`; the key
`trainer.step_parts` switches such a part on.
"""

from __future__ import annotations

from typing import Any

from qlora.runtime.registry import load_named

PARTS = {
    "fused_linear": "qlora.step.parts.fused_linear:FusedLinear",
    "fp8": "qlora.step.parts.fp8:Fp8",
    "fused_attention": "qlora.step.parts.attention:FusedAttention",
    "flash_attention": "qlora.step.parts.attention:NewerFlashAttention",
    "fused_loss": "qlora.step.parts.loss:FusedLoss",
    "compile": "qlora.step.parts.compile:CompiledLayers",
}
METHODS = ("unsupported_reason", "prepare", "enter", "exit", "extra_bytes")


def find_part(name: str) -> Any:
    """Returns the class of a part: one of `PARTS`, of an entry point, or `module:Class`."""
    return load_named(name, PARTS, group="qlora.step_parts", key="trainer.step_parts", methods=METHODS)
