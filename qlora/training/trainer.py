"""`transformers.Trainer` with this project's measurement, optimizer groups and quiet console."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from bitsandbytes.optim.optimizer import Optimizer8bit  # the base of all of them, in 32 bits too
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput, seed_worker

from qlora.config.optimizers import read_arguments, write_arguments
from qlora.config.schema import TrainerConfig, WatchdogConfig
from qlora.errors import ConfigError
from qlora.runtime import distributed
from qlora.runtime.atomic_files import folder_size, read_json, replace_folder, write_text
from qlora.runtime.disk_space import patiently
from qlora.step.kernels.linear_cross_entropy import IGNORED
from qlora.training.checkpoints import (
    DIVERGED,
    UNFINISHED,
    find_checkpoints,
    flushing,
    last_checkpoint,
    remove_surplus,
    seal,
    set_aside,
    step_of,
)
from qlora.training.flat_optimizer import flatten_groups, run_ahead
from qlora.training.memory_budget import Budget, Step, StepMemory
from qlora.training.meter import Meter
from qlora.training.sampler import LengthGroupedSampler, SharedBatches, ShuffledSampler
from qlora.training.stopping import Agreement, Stop
from qlora.training.watchdog import Halted, Rollback, Watchdog

log = logging.getLogger(__name__)

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
        lr_scheduler_kwargs=dict(config.lr_scheduler_kwargs or {}),
        warmup_steps=config.warmup_steps,
        optim=config.optim,
        optim_args=write_arguments(config.optim_args or {}),
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
    blank: dict[str, Any]
    """A row without a label, for a process that has no rows left while others have: it takes part in the step."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows or [self.blank])
        return {**batch, COUNTS: self.count(batch) if rows else (0, 0)}


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
        watchdog: WatchdogConfig,
        name_rows: Callable[[int], list[tuple[str, dict[str, Any]]]],
        callbacks: list[TrainerCallback],
    ) -> None:
        """Takes the parts of a training.

        `name_rows` returns the rows of an item of `rows`, each with its name: of a pack those in it.
        """
        self.control: TrainerControl
        self.optimizer: torch.optim.Optimizer | None
        self.measure, self.verify, self.lengths = measure, verify, lengths
        self.loraplus_lr_ratio, self.step, self.meter = loraplus_lr_ratio, step, meter
        self._unreported_tokens = 0
        self._trained: list[torch.nn.Parameter] = []
        self.memory = StepMemory(step, arguments.device, budget, alone=arguments.world_size == 1)
        self.facts, self.agreement = facts, Agreement(stop)
        self.checkpoint_size = estimate_checkpoint(model)
        self._place = Path(arguments.output_dir)
        self._random_states: list[tuple[str, bytes]] = []
        self._is_over = False
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=[],  # unused: `evaluate` below measures
            data_collator=_Counting(collate, count, _blank(rows[0])),
            callbacks=[meter, *callbacks, self.agreement],
        )
        self.add_callback(_LossRecall(self))
        self.name_rows = name_rows
        self.watchdog = Watchdog(watchdog, arguments.device, find_rows=self._find_bad_rows, scales=self._scales)
        self.add_callback(self.watchdog)
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
        rows = len(inputs["input_ids"]) if can_be_cut else 1
        return self.watchdog.add_loss(self.memory.run(inputs, learn, model.zero_grad, rows=rows))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the held-out rows, logs the result and tells the callbacks."""
        with self._averaged():
            measured = self.measure(self.model, self.state.global_step)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.store_flos()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Lets the model hold the average of its weights, which is what a schedule-free optimizer trains."""
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval"):
            yield
            return
        optimizer.eval()
        yield
        optimizer.train()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the weights of a checkpoint, has them completed and checked, and saves the losses so far."""
        super()._save(output_dir, state_dict)
        logged, unlogged = self._globalstep_last_logged, self._tr_loss.item()
        losses = {"total": self._total_loss_scalar, "unlogged": unlogged, "logged": logged, "over": self._ended_itself}
        write_text(Path(output_dir or self.args.output_dir) / LOSS_FILE, json.dumps(losses) + "\n")
        self.watchdog.save(Path(output_dir or self.args.output_dir))
        if state_dict is None:  # else it is gathered from several devices
            self.verify(Path(output_dir or self.args.output_dir), self.model)

    @property
    def _scales(self) -> bool:
        """Whether losses are scaled for fp16; the scaler looks at the gradients before the optimizer steps."""
        return getattr(self.accelerator, "scaler", None) is not None

    @property
    def _ended_itself(self) -> bool:
        """Whether a callback, rather than a signal or the last step, has ended the training."""
        return self.control.should_training_stop and not (
            self.agreement.ended_by_signal or self.state.global_step >= self.state.max_steps
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves a checkpoint; the first process writes it, and waits for space, if need be."""
        self.store_flos()
        if self.args.world_size > 1:
            self._random_states = self._gather_random_states()
        if distributed.is_main_process():
            place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            patiently(place, lambda: self._write_checkpoint(place, model), size=self.checkpoint_size)
            self.checkpoint_size = folder_size(place)
            while remove_surplus(place.parent, self.args.save_total_limit):
                pass
        distributed.barrier()

    def _write_checkpoint(self, place: Path, model: torch.nn.Module) -> None:
        """Writes a checkpoint beside its place, marks it as complete and puts it there."""
        unfinished = place.parent / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        self._place = unfinished
        try:
            # With a trial the library leaves out the counting of operations, which takes all processes.
            with _without_checksums(), flushing(unfinished):
                super()._save_checkpoint(model, trial={})
            seal(unfinished / place.name, {"step": self.state.global_step, "epoch": self.state.epoch, **self.facts})
            replace_folder(unfinished / place.name, place)
        finally:
            self._place = place.parent
            shutil.rmtree(unfinished, ignore_errors=True)

    def _gather_random_states(self) -> list[tuple[str, bytes]]:
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            (file,) = Path(own).iterdir()
            return distributed.all_gather((file.name, file.read_bytes()))

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the state of the random generators of all processes."""
        if self.args.world_size == 1:
            super()._save_rng_state(output_dir)
        for name, state in self._random_states:
            (Path(output_dir) / name).write_bytes(state)

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
        with self.meter.waiting(), self.watchdog.expecting_batches():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self.watchdog.begin(items)
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
            logs["loss"], missing = self.watchdog.mean_since_log(logs["loss"])
            self._total_loss_scalar += missing
            logs.update(self.meter.since_last_log(self.state))
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Scales the gradients down; returns their norm before that."""
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Returns the norm of the gradients, of which the watchdog decides whether they are used."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watchdog.judge(norm)
        return norm

    def run(self, checkpoint: Path | None) -> TrainOutput:
        """Trains, from a checkpoint on; goes back to an earlier one when the watchdog says so."""
        while True:
            try:
                output = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                optimizer: Any = self.optimizer
                if hasattr(optimizer, "eval"):  # a checkpoint holds the weights of the next step instead
                    optimizer.eval()
                return output
            except RuntimeError as error:  # a worker's end is noticed anywhere
                if (lost := self.watchdog.explain_loss(error)) is None:
                    raise
                raise lost from error
            except Rollback as order:
                checkpoint = self._find_good_checkpoint(order)
                factor = self.watchdog.course.rate_factor
                log.warning("%s; going back to %s, with %g times the learning rate", order, checkpoint.name, factor)

    def _find_good_checkpoint(self, order: Rollback) -> Path:
        self.watchdog.go_back()
        checkpoints = Path(self.args.output_dir)
        found = None
        if distributed.is_main_process():
            for late in (each for each in find_checkpoints(checkpoints) if step_of(each) > order.step):
                set_aside(late, DIVERGED)
            found = last_checkpoint(checkpoints)
        found = distributed.broadcast(found)
        if found is None:
            raise Halted(f"{order}. There is no checkpoint from before to go back to; set a smaller trainer.save_steps")
        return found

    def _find_bad_rows(self, step: int) -> list[str]:
        """Runs the rows of a step one by one; returns the names of those whose loss or gradients are no numbers."""
        per_epoch = -(-len(self._shared) // self.args.gradient_accumulation_steps)
        epoch, place = divmod(step - 1, per_epoch)
        items = self._shared.items(epoch, place * self.args.gradient_accumulation_steps,
                                   self.args.gradient_accumulation_steps)  # fmt: skip
        rows = [row for item in items for row in self.name_rows(item)]
        most = max(distributed.all_gather(len(rows)))  # a sharded base needs all processes at each row
        found = []
        if not all(bool(each.isfinite().all()) for each in self._trained):
            return []  # weights that are no numbers make no row bad
        with torch.random.fork_rng([] if self.args.device.type == "cpu" else [self.args.device]):
            for index in range(most):
                name, row = rows[min(index, len(rows) - 1)] if rows else ("", self.data_collator.blank)
                if not self._is_finite(row) and index < len(rows):
                    found.append(name)
        return [name for names in distributed.all_gather(found) for name in names]

    def _is_finite(self, row: dict[str, Any]) -> bool:
        batch = self.data_collator([row])
        batch.pop(COUNTS)
        with self.step, self.compute_loss_context_manager():
            loss = self.model(**self._prepare_inputs(batch)).loss
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        return bool(loss.isfinite()) and all(bool(each.isfinite().all()) for each in gradients if each is not None)

    def _run_epoch(self, *, model: torch.nn.Module, epoch: int, **kwargs: Any) -> None:
        """Trains an epoch; a training that goes on from its last step's checkpoint has none left."""
        self._shared.set_epoch(epoch)  # where a pass goes on, the library would not reach it
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
        return self._total_loss_scalar / max(self.state.global_step - self.watchdog.counts["skipped"], 1)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the batches of this process.

        The library's grouping goes from the longest rows to the shortest, and between processes it fills the last
        batches up with rows that were there before.
        """
        arguments, workers = self.args, self.args.dataloader_num_workers
        processes, rows = arguments.world_size, arguments.train_batch_size
        if arguments.train_sampling_strategy == "group_by_length":
            size = rows * arguments.gradient_accumulation_steps * processes
            order: Any = LengthGroupedSampler(self.lengths, size, arguments.seed)
        else:
            order = ShuffledSampler(len(self.train_dataset), arguments.seed)
        self._shared = SharedBatches(order, rows, process=arguments.process_index, processes=processes)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._shared,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=arguments.process_index),
        )
        return prepare_data_loader(
            loader,
            device=arguments.device,
            num_processes=1,  # the batches are shared out already
            process_index=0,
            put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Lets several processes average the gradients of what is trained; a base may be sharded."""
        if self.args.world_size == 1 or self.accelerator.unwrap_model(model) is not model:
            return super()._wrap_model(model, *args, **kwargs)
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        parts = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
        devices = None if self.args.device.type == "cpu" else [self.args.device]
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the schedule; a `num_..._steps` below 1 among its arguments is a share of all steps."""
        kwargs = self.args.lr_scheduler_kwargs or {}
        shares = {key: value for key, value in kwargs.items() if key.endswith("_steps") and 0 < value < 1}
        steps = {key: round(share * num_training_steps) for key, share in shares.items()}
        self.args.lr_scheduler_kwargs = {**kwargs, **steps}
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        for group in scheduler.optimizer.param_groups:
            if "warmup_steps" in group:  # a schedule-free optimizer warms up by itself, and takes no share for it
                group["warmup_steps"] = self.args.get_warmup_steps(num_training_steps)
        return scheduler

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Returns the class of the optimizer and its arguments, which transformers leaves out in part.

        It passes texts for numbers (`block_size`), reads every text as true, and gives not every Adam its betas.
        """
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        takes = inspect.signature(kind).parameters
        if "triton" in takes and args.device.type == "cpu":  # torch-optimi takes it for granted where it is installed
            options["triton"] = False
        if {"betas", "eps"} <= takes.keys():
            options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, **options}
        given = read_arguments(args.optim.value, args.optim_args)
        given.pop("beta3", None)  # among the betas already
        return kind, {**options, **given}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer by transformers' name; with LoRA+ the B matrices get their own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = self._create_optimizer(model)
        if isinstance(optimizer, Optimizer8bit):
            if isinstance(self.model, PeftModel) and not self._scales:
                flatten_groups(optimizer)
            run_ahead(optimizer)
        self.watchdog.guard(optimizer)
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
def _without_checksums() -> Iterator[None]:
    """Spares torch's own checksums of what it saves, a third of the time that takes: sealing has better ones."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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


def _blank(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [IGNORED] * len(row["labels"])}


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
