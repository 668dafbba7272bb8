"""What a training run asks of a device, of processes and of the base, checked before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports torch
    from transformers import PreTrainedModel


from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.config.schema import ModelConfig, Parallel, TrainerConfig, no_cuda
from qlora.errors import ConfigError
from qlora.runtime import distributed


def check_device(trainer: TrainerConfig, device_type: str) -> None:
    """Raises `ConfigError` for settings that need a CUDA device, where there is none."""
    if device_type == "cuda":
        return
    if OPTIMIZERS[trainer.optim].needs_cuda:
        raise no_cuda(trainer.optim, device_type)
    here = f"and this run computes on {device_type}"
    if trainer.memory_budget not in (None, "auto"):
        raise ConfigError(
            f"trainer.memory_budget={trainer.memory_budget} limits a CUDA device's memory, {here}; leave it out"
        )
    if (flash := trainer.flash_attention.value) != "auto":
        raise ConfigError(
            f"trainer.flash_attention={flash} runs on CUDA only, {here}; set trainer.flash_attention=auto"
        )


def check_processes(trainer: TrainerConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` for settings that need several processes, or that exclude them."""
    if trainer.parallel is Parallel.fsdp and distributed.world_size() == 1:
        raise ConfigError(
            f"trainer.parallel=fsdp shards the base over several processes, and this is one alone; "
            f"{distributed.LAUNCH_HINT}, or leave it out"
        )
    if rest := distributed.world_size() % trainer.context_parallel:
        launched = "this is one alone" if distributed.world_size() == 1 else f"{distributed.world_size()} were launched"
        raise ConfigError(
            f"trainer.context_parallel={trainer.context_parallel} has that many processes share a row, and {launched}"
            f"{f', {rest} too many' if distributed.world_size() > trainer.context_parallel else ''}; launch a multiple "
            f"of {trainer.context_parallel} ({distributed.LAUNCH_HINT}), or leave it out"
        )
    if distributed.world_size() > 1 and (model.device_map or model.max_memory):
        raise ConfigError(
            f"model.device_map and model.max_memory spread one process over several GPUs, and "
            f"{distributed.world_size()} processes were launched, each with a GPU of its own; leave them out, or "
            "start without a launcher"
        )


def check_checkpointing(trainer: TrainerConfig, base: PreTrainedModel) -> None:
    """Raises `ConfigError` where activations are to be recomputed in a base whose code cannot do that."""
    if trainer.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing=true: the {base.config.model_type} of transformers cannot recompute its "
            "activations; set trainer.gradient_checkpointing=false"
        )
