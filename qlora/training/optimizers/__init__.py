"""The optimizer by its name, with all of its arguments, and with LoRA+ where the config asks for it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from qlora.config.optimizers import read_arguments
from qlora.config.registries.optimizers import OPTIMIZERS


def optimizer_class(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """Returns the class of the optimizer and its arguments, some of which transformers leaves out.

    It passes texts for numbers (`block_size`), reads every text as true, and does not give every Adam its betas.
    """
    name = args.optim.value if isinstance(args.optim, OptimizerNames) else args.optim
    given = read_arguments(name, args.optim_args)
    if (path := OPTIMIZERS[name].builder) is not None:
        module, _, function = path.partition(":")
        return getattr(importlib.import_module(module), function)(args, model, given)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    takes = inspect.signature(kind).parameters
    if "triton" in takes and args.device.type == "cpu":  # torch-optimi assumes that Triton runs where it is installed
        options["triton"] = False
    if {"betas", "eps"} <= takes.keys():
        options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, **options}
    given.pop("beta3", None)  # among the betas already
    return kind, {**options, **given}


def create_loraplus(
    args: TrainingArguments, model: PeftModel, ratio: float
) -> torch.optim.Optimizer:  # fmt: skip
    """Builds the optimizer with another learning rate for B matrices: `ratio` times that of A matrices."""
    kind, options = optimizer_class(args, model)
    options["loraplus_weight_decay"] = args.weight_decay
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model, kind, lr=options.pop("lr"), loraplus_lr_ratio=ratio, **options
    )
    return optimizer


def resolve_schedule_steps(kwargs: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """Returns a schedule's arguments with step counts: a `num_..._steps` below 1 is a fraction of all steps."""
    kwargs = kwargs or {}
    fractions = {key: value for key, value in kwargs.items() if key.endswith("_steps") and 0 < value < 1}
    return {**kwargs, **{key: round(fraction * steps) for key, fraction in fractions.items()}}
