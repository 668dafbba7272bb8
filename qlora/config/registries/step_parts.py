"""The parts of the fast step, and those that `trainer.step_parts` may add."""

from __future__ import annotations

GROUP = "qlora.step_parts"
"""The entry points by which an installed package adds parts."""
PARTS = {
    "fused_linear": "qlora.step.parts.fused_linear:FusedLinear",
    "fused_experts": "qlora.step.parts.experts:FusedExperts",
    "fp8": "qlora.step.parts.fp8:Fp8",
    "fused_attention": "qlora.step.parts.attention:FusedAttention",
    "flash_attention": "qlora.step.parts.attention:NewerFlashAttention",
    "fused_loss": "qlora.step.parts.loss:FusedLoss",
    "compile": "qlora.step.parts.compile:CompiledLayers",
    "cuda_graphs": "qlora.step.parts.graphs:GraphedLayers",
}
"""The parts of this package, in the order in which they are decided on and entered."""
