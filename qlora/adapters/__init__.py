"""LoRA adapters: one module each to create, count, save, load and merge them."""

from qlora.adapters.adapter_files import check_adapter_folder
from qlora.adapters.average import average_trained
from qlora.adapters.biases import adapter_off
from qlora.adapters.count import ParameterCount, count_parameters
from qlora.adapters.create import REWRITES_BASE, add_lora
from qlora.adapters.head import attach_head, is_reward_model
from qlora.adapters.load import continue_adapter, load_adapter
from qlora.adapters.per_expert import save_per_expert
from qlora.adapters.rank_schedule import build_rank_schedule
from qlora.adapters.reference import reference_at_start, reference_of_trained
from qlora.adapters.save import save_adapter, save_initial_adapter, verify_adapter

__all__ = [
    "REWRITES_BASE",
    "ParameterCount",
    "adapter_off",
    "add_lora",
    "attach_head",
    "average_trained",
    "build_rank_schedule",
    "check_adapter_folder",
    "continue_adapter",
    "count_parameters",
    "is_reward_model",
    "load_adapter",
    "reference_at_start",
    "reference_of_trained",
    "save_adapter",
    "save_initial_adapter",
    "save_per_expert",
    "verify_adapter",
]
