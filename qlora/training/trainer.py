"""`transformers.Trainer` with this project's measurement, optimizer groups and quiet console."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit  # the base of all of them, in 32 bits too
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from qlora.errors import ConfigError
from qlora.files import folder_size, patiently, read_json, replace_folder, wait_for_space, write_text
from qlora.schema import TrainerConfig
from qlora.training.checkpoints import UNFINISHED, remove_surplus, seal
from qlora.training.flat import flatten_groups
from qlora.training.memory import Budget, Step, StepMemory
from qlora.training.meter import Meter
from qlora.training.sampler import LengthGroupedSampler
from qlora.training.stopping import Stop, StopCallback

LOSS_FILE = "losses.json"
CHECKPOINT_REST = 2**20
"""Bytes of a checkpoint beside weights and moments."""

Batch = dict[str, torch.Tensor]
COUNTS = "counts"
"""What a batch brings along beside its tensors: how many tokens and pairs it has."""


def build_arguments(
    config: TrainerConfig, *, output_dir: Path, device: torch.device, compute: torch.dtype, seed: int
) -> TrainingArguments:
    """Returns transformers' arguments; nothing in them is left to a default that a config could contradict."""
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
        lr_scheduler_kwargs=dict(config.lr_scheduler_kwargs),
        warmup_steps=config.warmup_steps,
        optim=config.optim,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=compute is torch.bfloat16,
        fp16=compute is torch.float16,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        dataloader_num_workers=config.dataloader_num_workers,
        # Nothing between two logs may wait for the device: batches go there while it computes, a loss that is no number
        # is not looked for, and tokens are counted before they leave the host.
        dataloader_pin_memory=device.type != "cpu",
        accelerator_config={"non_blocking": device.type != "cpu"},
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # one process drives one device; several GPUs are for torchrun or model.device_map
        arguments._n_gpu = 1
    return arguments


@dataclass(frozen=True)
class _Counting:
    """Collates rows and counts them while they are on the host."""

    collate: Callable[[list[dict[str, Any]]], Batch]
    count: Callable[[Batch], tuple[int, int]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        return {**batch, COUNTS: self.count(batch)}


class QLoraTrainer(Trainer):
    """The library's trainer, measuring held-out rows by `measure` and able to train by LoRA+."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: torch.utils.data.Dataset[Any],
        lengths: Sequence[int],
        collate: Callable[[list[dict[str, Any]]], Batch],
        count: Callable[[Batch], tuple[int, int]],
        measure: Callable[[torch.nn.Module, int], dict[str, float]],
        verify: Callable[[Path, torch.nn.Module], None],
        loraplus_lr_ratio: float | None,
        step: Step,
        meter: Meter,
        budget: Budget | None,
        stop: Stop,
        facts: dict[str, Any],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.control: TrainerControl
        self.optimizer: torch.optim.Optimizer | None
        self.measure, self.verify, self.lengths = measure, verify, lengths
        self.loraplus_lr_ratio, self.step, self.meter = loraplus_lr_ratio, step, meter
        self._unreported_tokens = 0
        self._trained: list[torch.nn.Parameter] = []
        self.memory = StepMemory(step, arguments.device, budget, alone=arguments.world_size == 1)
        self._grouped: LengthGroupedSampler | None = None
        self.facts, self.stop = facts, StopCallback(stop)
        self.checkpoint_size = estimate_checkpoint(model)
        self._place = Path(arguments.output_dir)
        self._is_over = False
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=[],  # unused: `evaluate` below measures
            data_collator=_Counting(collate, count),
            callbacks=[meter, *callbacks, self.stop],
        )
        self.add_callback(_LossRecall(self))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Runs a micro-batch forward and backward, inside `step`; with less memory, if it ran out."""
        plain = super().training_step

        def learn(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with self.step:
                return plain(model, batch, num_items_in_batch)

        can_be_cut = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # losses then add up
        return self.memory.run(inputs, learn, model.zero_grad, rows=len(inputs["input_ids"]) if can_be_cut else 1)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the held-out rows, logs the result and tells the callbacks."""
        metrics = {f"eval_{name}": value for name, value in self.measure(self.model, self.state.global_step).items()}
        self.store_flos()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the weights of a checkpoint, has them compared with those in memory, and saves the losses so far."""
        super()._save(output_dir, state_dict)
        logged, unlogged = self._globalstep_last_logged, self._tr_loss.item()
        losses = {"total": self._total_loss_scalar, "unlogged": unlogged, "logged": logged, "over": self._ended_itself}
        write_text(Path(output_dir or self.args.output_dir) / LOSS_FILE, json.dumps(losses) + "\n")
        if state_dict is None:  # else it is gathered from several devices
            self.verify(Path(output_dir or self.args.output_dir), self.model)

    @property
    def _ended_itself(self) -> bool:
        """Whether a callback, rather than a signal or the last step, has ended the training."""
        return self.control.should_training_stop and not (
            self.stop.ended_training or self.state.global_step >= self.state.max_steps
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves a checkpoint beside its place, marks it as complete and puts it there; waits for space, if need be."""
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

        def save() -> None:
            self._write_checkpoint(place, model, trial)

        if self.args.world_size == 1:
            patiently(place, save, size=self.checkpoint_size)
        else:  # the processes save together, so that none can do it again alone
            if self.args.should_save:
                wait_for_space(place, self.checkpoint_size)
            save()
        if self.args.should_save:
            self.checkpoint_size = folder_size(place)
            while remove_surplus(place.parent, self.args.save_total_limit):
                pass

    def _write_checkpoint(self, place: Path, model: torch.nn.Module, trial: Any) -> None:
        unfinished = place.parent / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._place = unfinished
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(unfinished / place.name, {"step": self.state.global_step, "epoch": self.state.epoch, **self.facts})
                replace_folder(unfinished / place.name, place)
        finally:
            self._place = place.parent
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Loads the weights; raises `ConfigError` where they are those of another model (`resume=force`)."""
        with _fitting(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer and schedule; raises `ConfigError` where they are those of another training."""
        with _fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Returns where the library writes checkpoints."""
        return str(self._place)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetches the micro-batches of a step, and notes what is in them and how long they took to come."""
        self.memory.begin()
        with self.meter.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            tokens, pairs = batch.pop(COUNTS)
            self._unreported_tokens += tokens
            if self.meter.operations is not None:
                self.current_flos += self.meter.operations(tokens, pairs)
        return batches, items

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """Returns 0: they are counted as batches come; the library's estimate walks through all modules."""
        return 0.0

    def store_flos(self) -> None:
        """Adds the tokens and operations since the last call, of all processes, to the state."""
        tokens, self._unreported_tokens = self._unreported_tokens, 0
        if self.args.world_size > 1:
            tokens = int(self.accelerator.reduce(torch.tensor(tokens, device=self.args.device)).item())
        self.state.num_input_tokens_seen += tokens
        super().store_flos()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs `logs` and the tokens so far; beside a training loss the speed, too."""
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        if "loss" in logs:
            logs.update(self.meter.since_last_log(self.state))
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Scales the gradients down; returns their norm before that."""
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _run_epoch(self, *, model: torch.nn.Module, epoch: int, **kwargs: Any) -> None:
        """Trains an epoch; a training that goes on from its last step's checkpoint has none left."""
        if self._grouped is not None:  # with several processes the library would not reach it
            self._grouped.set_epoch(epoch)
        if self._is_over:
            self.control.should_training_stop = True
        elif self.state.global_step < self.state.max_steps:
            model.train()
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with _without_walks(model, self._trained):
                super()._run_epoch(model=model, epoch=epoch, **kwargs)

    def recall_losses(self) -> None:
        """Takes up the losses before the checkpoint that the training goes on from, if it does."""
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if (losses := read_json(checkpoint / LOSS_FILE)) is not None:
            self._total_loss_scalar, self._globalstep_last_logged = losses["total"], losses["logged"]
            self._tr_loss += losses["unlogged"]
            self._is_over = losses["over"]

    @property
    def mean_loss(self) -> float:
        """The mean of all steps' losses, those before a resumption included; the library's leaves them out."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """Groups by length with `LengthGroupedSampler`; the library's own orders batches by length."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        self._grouped = LengthGroupedSampler(self.lengths, size, self.args.seed)
        return self._grouped

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the schedule; a `num_..._steps` below 1 among its arguments is a share of all steps."""
        kwargs = self.args.lr_scheduler_kwargs or {}
        shares = {key: value for key, value in kwargs.items() if key.endswith("_steps") and 0 < value < 1}
        steps = {key: round(share * num_training_steps) for key, share in shares.items()}
        self.args.lr_scheduler_kwargs = {**kwargs, **steps}
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer by transformers' name; with LoRA+ the B matrices get their own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = self._create_optimizer(model)
        if isinstance(optimizer, Optimizer8bit) and isinstance(self.model, PeftModel):
            flatten_groups(optimizer)
        return optimizer

    def _create_optimizer(self, model: torch.nn.Module | None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options["loraplus_weight_decay"] = self.args.weight_decay
        self.optimizer = create_loraplus_optimizer(
            self.model, kind, lr=options.pop("lr"), loraplus_lr_ratio=self.loraplus_lr_ratio, **options
        )
        return self.optimizer


@contextlib.contextmanager
def _without_walks(model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> Iterator[None]:
    """Spares what the library asks of a model in every step from walking through all modules: 11 ms of a 7B model's."""

    def train(mode: bool = True) -> torch.nn.Module:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.__dict__.update(train=train, zero_grad=zero_grad)
    try:
        yield
    finally:
        del model.__dict__["train"], model.__dict__["zero_grad"]


@contextlib.contextmanager
def _fitting(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{checkpoint} does not fit what the config makes of the model ({reason}); start with the config of the "
            "run, or anew with resume=never"
        ) from error


class _LossRecall(TrainerCallback):
    """Acts where the library has set the losses to zero and has not trained yet."""

    def __init__(self, trainer: QLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recall_losses()


def estimate_checkpoint(model: torch.nn.Module) -> int:
    """Returns about the bytes of a checkpoint at most: what is trained, and two moments of 32 bits each."""
    trained = (each for each in model.parameters() if each.requires_grad)
    return CHECKPOINT_REST + sum(each.numel() * (each.element_size() + 8) for each in trained)
