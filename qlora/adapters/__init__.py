"""LoRA adapters: one module each to create, count, save, load and merge them."""

from qlora.adapters.adapter_files import check_adapter_folder
from qlora.adapters.average import average_trained
from qlora.adapters.biases import adapter_off
from qlora.adapters.count import ParameterCount, count_parameters
from qlora.adapters.create import REWRITES_BASE, add_lora
from qlora.adapters.head import HeadLayout, attach_head, read_head, write_head
from qlora.adapters.load import continue_adapter, load_adapter
from qlora.adapters.per_expert import save_per_expert
from qlora.adapters.rank_schedule import build_rank_schedule
from qlora.adapters.reference import reference_at_start, reference_of_trained
from qlora.adapters.save import save_adapter, save_initial_adapter, verify_adapter

__all__ = [
    "REWRITES_BASE",
    "HeadLayout",
    "ParameterCount",
    "adapter_off",
    "add_lora",
    "attach_head",
    "average_trained",
    "build_rank_schedule",
    "check_adapter_folder",
    "continue_adapter",
    "count_parameters",
    "load_adapter",
    "read_head",
    "reference_at_start",
    "reference_of_trained",
    "save_adapter",
    "save_initial_adapter",
    "save_per_expert",
    "verify_adapter",
    "write_head",
]
