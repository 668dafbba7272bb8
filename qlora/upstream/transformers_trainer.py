"""What `QLoraTrainer` overrides and reads of `transformers.Trainer` under a private name.

Python accepts an override of a method that no longer exists upstream: nothing calls it, and no error is raised. With a
renamed `_save_checkpoint`, for example, a run ends with exit code 0 and with checkpoints that cannot be resumed.
`check_trainer` therefore compares the names and parameters before a model is loaded. What the methods do upstream is
compared by tests/upstream/test_trainer.py only, with the hashes of the versions that were tested.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

from qlora.errors import ResourceError

SUPPORTED = ">=5.17,<6"
"""The versions of transformers that pyproject.toml accepts."""

OVERRIDDEN = {
    "_clip_grad_norm": ("model",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_run_epoch": (
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "_wrap_model": ("model", "training", "dataloader"),
}
"""The underscore methods that `QLoraTrainer` overrides, and their parameters upstream."""

CALLED = {"_prepare_inputs": ("inputs",)}
"""The underscore methods that are only called."""


def check_trainer(trainer: type = Trainer) -> None:
    """Raises `ResourceError` if transformers has renamed or changed an underscore method that this project needs."""
    for name, parameters in (OVERRIDDEN | CALLED).items():
        method = getattr(trainer, name, None)
        actual = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if actual != parameters:
            change = (
                "does not exist"
                if actual is None
                else f"takes ({', '.join(actual)}) instead of ({', '.join(parameters)})"
            )
            raise ResourceError(
                f"transformers {transformers.__version__}: Trainer.{name} {change}, so a training run would lose what "
                f"this project does there; install a supported version (pip install 'transformers{SUPPORTED}'; "
                "constraints.txt names the tested one)"
            )


@dataclass(frozen=True)
class LossSums:
    """The sums from which the trainer computes mean losses."""

    total: float
    """Of all steps that were logged."""
    unlogged: float
    """Of the steps since the last log."""
    logged: int
    """The step of the last log."""


def read_loss_sums(trainer: Trainer) -> LossSums:
    """Returns the sums as they are now; waits for the device."""
    return LossSums(trainer._total_loss_scalar, trainer._tr_loss.item(), trainer._globalstep_last_logged)


def restore_loss_sums(trainer: Trainer, sums: LossSums) -> None:
    """Sets the sums of a checkpoint, where the trainer has set its own to zero."""
    trainer._total_loss_scalar, trainer._globalstep_last_logged = sums.total, sums.logged
    trainer._tr_loss += sums.unlogged


def total_loss(trainer: Trainer) -> float:
    """Returns the sum of the losses of all steps that were logged."""
    return float(trainer._total_loss_scalar)


def add_to_total_loss(trainer: Trainer, amount: float) -> None:
    """Corrects the sum of the losses of all steps that were logged."""
    trainer._total_loss_scalar += amount


def prepare_inputs(trainer: Trainer, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Moves a batch to the trainer's device."""
    return dict(trainer._prepare_inputs(batch))


def checkpointing_arguments(recompute: bool) -> dict[str, Any]:
    """Returns the `TrainingArguments` of gradient checkpointing, which newer versions call activation checkpointing."""
    renamed = any(item.name == "activation_checkpointing" for item in fields(TrainingArguments))
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return {name: recompute, f"{name}_kwargs": {"use_reentrant": False} if recompute else None}


def output_folder(arguments: TrainingArguments) -> Path:
    """Returns where checkpoints go; `TrainingArguments` declares that none may be given, and sets one itself then."""
    assert arguments.output_dir is not None
    return Path(arguments.output_dir)


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Makes a process use one GPU where it sees several; the trainer would wrap the model in `DataParallel`."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
