"""Mixtures of experts in a loaded model; the room `experts` holds what quantization needs of them, too."""

from qlora.experts.forward import ADAPTERS, IMPLEMENTATION, ExpertAdapter, run_experts, use_experts
from qlora.experts.layout import ExpertsLayout, expert_weight, find_experts

__all__ = [
    "ADAPTERS",
    "IMPLEMENTATION",
    "ExpertAdapter",
    "ExpertsLayout",
    "expert_weight",
    "find_experts",
    "run_experts",
    "use_experts",
]
