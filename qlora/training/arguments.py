"""The config's `trainer` group as `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from qlora.config.optimizers import write_arguments
from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.config.schema import TrainerConfig
from qlora.config.training_length import TrainingLength
from qlora.upstream.transformers_trainer import checkpointing_arguments, use_one_gpu


def build_arguments(
    config: TrainerConfig,
    *,
    output_dir: Path,
    device: torch.device,
    compute: torch.dtype,
    seed: int,
    length: TrainingLength | None = None,
) -> TrainingArguments:
    """Returns transformers' arguments; nothing in them is left to a default that a config could contradict.

    `length` resolves intervals that are a share of an epoch.
    """
    intervals, builder = length or config, OPTIMIZERS[config.optim].builder
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_train_epochs or 1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=dict(config.lr_scheduler_kwargs or {}),
        warmup_steps=config.warmup_steps,
        optim=config.optim if builder is None else "adamw_torch",  # it accepts its own names alone
        optim_args=write_arguments(config.optim_args or {}),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        neftune_noise_alpha=config.neftune_noise_alpha,
        **checkpointing_arguments(config.gradient_checkpointing),
        bf16=compute is torch.bfloat16,
        fp16=compute is torch.float16,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if intervals.eval_steps else "no",
        eval_steps=intervals.eval_steps,
        save_strategy="steps" if intervals.save_steps else "no",
        save_steps=intervals.save_steps or 500,
        save_total_limit=config.save_total_limit,
        dataloader_num_workers=config.dataloader_num_workers,
        **_without_waiting(device),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    if builder is not None:
        arguments.optim = config.optim
    use_one_gpu(arguments)  # one process drives one device; several GPUs are for torchrun or model.device_map
    return arguments


def _without_waiting(device: torch.device) -> dict[str, Any]:
    """Returns the arguments by which nothing between two logs waits for the device.

    Batches are copied while it computes, losses are not searched for NaN, and tokens are counted before they leave the
    host.
    """
    has_device_memory = device.type != "cpu"
    return {
        "dataloader_pin_memory": has_device_memory,
        "accelerator_config": {"non_blocking": has_device_memory},
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "no",
    }
