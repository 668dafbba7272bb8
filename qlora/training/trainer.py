"""`transformers.Trainer` with this project's step, checkpoints, optimizer, watchdog and measurement.

The class only connects: each override hands on to the module that does the work. `upstream/transformers_trainer.py`
lists the private methods that are overridden, and why they are checked.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from bitsandbytes.optim.optimizer import Optimizer8bit  # the base of all of them, in 32 bits too
from peft import PeftModel
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
from transformers.trainer_utils import TrainOutput

from qlora.config.schema import WatchdogConfig
from qlora.experts.layout import Placeholder
from qlora.objectives import Objective
from qlora.objectives.row_loss import RowLoss
from qlora.runtime import distributed
from qlora.runtime.atomic_files import read_json, write_text
from qlora.runtime.row_processes import ALONE, RowProcesses
from qlora.training.bad_rows import NamedRow, find_bad_rows
from qlora.training.batches import (
    COUNTS,
    SAVED,
    TARGETS,
    WEIGHTS,
    Batch,
    Collate,
    CountingCollator,
    Micro,
    Stream,
    build_loader,
    share_batches,
    take_targets,
    without_labels,
)
from qlora.training.checkpoint_writer import CheckpointWriter, estimate_checkpoint, fitting
from qlora.training.checkpoints import (
    DIVERGED,
    Needed,
    find_checkpoints,
    last_checkpoint,
    needs_none,
    set_aside,
    step_of,
)
from qlora.training.flat_optimizer import flatten_groups, run_ahead
from qlora.training.garbage import Unsearched
from qlora.training.memory_budget import Budget, Step, StepMemory
from qlora.training.meter import Meter
from qlora.training.optimizers import create_loraplus, optimizer_class, resolve_schedule_steps
from qlora.training.peak_memory import PeakMemory
from qlora.training.ranks import RankCallback, Ranks
from qlora.training.routing import build_routing_meter
from qlora.training.stopping import Agreement, Stop
from qlora.training.watchdog import Halted, Rollback, Watchdog
from qlora.upstream.peft import base_of
from qlora.upstream.torch import Rows, as_dataset, ignore_in_ddp
from qlora.upstream.transformers_trainer import (
    LossSums,
    add_to_total_loss,
    check_trainer,
    output_folder,
    prepare_inputs,
    read_loss_sums,
    restore_loss_sums,
    total_loss,
)

log = logging.getLogger(__name__)

LOSS_FILE = "losses.json"


class QLoraTrainer(Trainer):
    """transformers' trainer, composed with the parts of a training run."""

    # What the library declares more widely than what is handed to it here.
    model: PreTrainedModel | PeftModel
    data_collator: CountingCollator
    accelerator: Accelerator
    control: TrainerControl
    optimizer: torch.optim.Optimizer | None
    objective: Objective

    def __init__(
        self,
        *,
        model: PreTrainedModel | PeftModel,
        arguments: TrainingArguments,
        rows: Rows,
        lengths: Sequence[int],
        collate: Collate,
        count: Callable[[Batch], tuple[int, ...]],
        measure: Callable[[torch.nn.Module, int], dict[str, float]],
        verify: Callable[[Path, torch.nn.Module], None],
        loraplus_lr_ratio: float | None,
        step: Step,
        objective: Objective,
        meter: Meter,
        budget: Budget | None,
        peak: PeakMemory | None = None,
        stop: Stop,
        metadata: dict[str, Any],
        watchdog: WatchdogConfig,
        name_rows: Callable[[int], list[NamedRow]],
        callbacks: list[TrainerCallback],
        needed: Needed = needs_none,
        ranks: Ranks | None = None,
        stream: Stream | None = None,
        shared: RowProcesses = ALONE,
        most_rows: int = 0,
    ) -> None:
        """Takes the parts of a training run.

        `measure` measures the held-out rows, `verify` completes and checks a saved adapter, and `name_rows` returns the
        rows of an item of `rows` with their names: those in a pack. `needed` names the checkpoints that
        `save_total_limit` leaves; `metadata` is stored with each checkpoint. `ranks` is the schedule of an adapter
        whose ranks change. `stream` is `rows` where these are read as they are needed. `shared` are the processes that
        share each row, and `most_rows` the most rows of a pack.
        """
        check_trainer()
        self.measure, self.verify, self.rows, self.lengths = measure, verify, rows, lengths
        self.loraplus_lr_ratio, self.step, self.objective, self.meter = loraplus_lr_ratio, step, objective, meter
        self._row_loss = objective if isinstance(objective, RowLoss) else None
        self.routing = build_routing_meter(base_of(model) if isinstance(model, PeftModel) else model)
        self.peak = peak or PeakMemory(arguments.device)
        self._unreported_tokens = self._logged_step = 0
        self._trained: list[torch.nn.Parameter] = []
        self.memory = StepMemory(step, arguments.device, budget, alone=arguments.world_size == 1)
        self.metadata, self.agreement, self.ranks, self.stream = metadata, Agreement(stop), ranks, stream
        self.checkpoints = CheckpointWriter(output_folder(arguments), estimate_checkpoint(model), needed)
        self._is_over = False
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=as_dataset(rows),
            eval_dataset=as_dataset([]),  # unused: `evaluate` below measures
            data_collator=CountingCollator(collate, count, objective, without_labels(rows[0]), shared, most_rows),
            callbacks=[meter, *callbacks, self.agreement],
        )
        self.add_callback(_LossRecall(self))
        self.name_rows = name_rows
        self.watchdog = Watchdog(watchdog, arguments.device, find_rows=self._find_bad_rows, scales=self._scales)
        self.add_callback(self.watchdog)
        self._unsearched = Unsearched()
        self.add_callback(self._unsearched)
        if ranks is not None:
            self.add_callback(RankCallback(ranks))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    # Running

    def run(self, checkpoint: Path | None) -> TrainOutput:
        """Trains, from a checkpoint if there is one; returns to an earlier one when the watchdog demands it."""
        while True:
            self._resume_stream(checkpoint)
            try:
                output = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                self._free_step()
                optimizer: Any = self.optimizer
                if hasattr(optimizer, "eval"):  # a checkpoint holds the weights of the next step instead
                    optimizer.eval()
                self.peak.gb()  # while the optimizer is there
                return output
            except RuntimeError as error:  # the end of a worker process can show anywhere
                if (lost := self.watchdog.explain_loss(error)) is None:
                    raise
                raise lost from error
            except Rollback as order:
                checkpoint = self._find_good_checkpoint(order)
                factor = self.watchdog.course.rate_factor
                log.warning("%s; going back to %s, with %g times the learning rate", order, checkpoint.name, factor)
            finally:
                self._unsearched.close()

    def _resume_stream(self, checkpoint: Path | None) -> None:
        """Makes a stream resume where a checkpoint has left it."""
        if self.stream is not None and checkpoint is not None:
            self.stream.load(checkpoint, self._first_item(step_of(checkpoint)))

    def _first_item(self, step: int) -> int:
        """Returns the number of the item of a stream that is the first one behind a step."""
        arguments = self.args
        groups = arguments.world_size // self.data_collator.shared.count
        micro_batches = arguments.gradient_accumulation_steps * groups
        return step * arguments.train_batch_size * micro_batches

    def _find_good_checkpoint(self, order: Rollback) -> Path:
        self.watchdog.go_back()
        checkpoints = output_folder(self.args)
        good = None
        if distributed.is_main_process():
            for late in (path for path in find_checkpoints(checkpoints) if step_of(path) > order.step):
                set_aside(late, DIVERGED)
            good = last_checkpoint(checkpoints)
        good = distributed.broadcast(good)
        if good is None:
            raise Halted(f"{order}. There is no checkpoint from before to go back to; set a smaller trainer.save_steps")
        return good

    def _run_epoch(self, model: torch.nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        """Trains an epoch; a run that resumes from its last step's checkpoint has none left."""
        self._shared.set_epoch(epoch)  # where an epoch is resumed, the library would not reach it
        if self._is_over:
            self.control.should_training_stop = True
        elif self.state.global_step < self.state.max_steps:
            model.train()
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with _without_walks(model, self._trained):
                super()._run_epoch(model, epoch, *args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Runs a micro-batch forward and backward, inside `step`; with less memory, if it ran out."""
        plain = super().training_step

        def learn(micro: Micro) -> torch.Tensor:
            batch, self.step.targets = take_targets(micro)
            if self.routing is None:
                with self.step:
                    return plain(model, batch, num_items_in_batch)
            self.routing.begin(batch)
            with self.step:
                loss = plain(model, batch, num_items_in_batch)
            self.routing.add()
            return loss

        can_be_cut = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # losses then add up
        can_be_cut &= self._row_loss is None or self._row_loss.is_separable
        rows = len(inputs["input_ids"]) if can_be_cut else 1
        loss = self.memory.run(inputs, learn, model.zero_grad, rows=rows)
        if self.ranks is not None and self.accelerator.sync_gradients:
            scaler = getattr(self.accelerator, "scaler", None)
            self.ranks.penalise(1.0 if scaler is None else scaler.get_scale())
        return self.watchdog.add_loss(loss)

    # Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the batches of this process."""
        in_order, shared = self.stream is not None, self.data_collator.shared
        self._shared = share_batches(self.args, self.lengths, len(self.rows), shared, in_order=in_order)
        non_blocking = self.accelerator.non_blocking
        return build_loader(
            self.rows, self._shared, self.data_collator, self.args, non_blocking=non_blocking
        )  # fmt: skip

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetches the micro-batches of a step, and notes what is in them and how long they took to come."""
        self.memory.begin()
        with self.meter.waiting(), self.watchdog.expecting_batches():
            batches, items = super().get_batch_samples(*args, **kwargs)
        if self._row_loss is not None:
            items = self._count_rows(batches)
        self.watchdog.begin(items if self._row_loss is None else items[0])
        for batch in batches:
            tokens, *pairs = batch.pop(COUNTS)
            computed = tokens - batch.pop(SAVED)
            unlabelled = computed - int(batch[TARGETS].sum())
            self._unreported_tokens += tokens
            self.meter.tokens += tokens
            if self.meter.operations is not None:
                operations: Any = self.meter.operations(
                    computed, *pairs
                )  # the library declares an int, and adds floats
                self.current_flos += operations - unlabelled * self.meter.output
        return batches, items

    def _count_rows(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Returns what the loss over rows of the whole step counts, in all processes: `RowLoss.count`, summed."""
        rows = [batch[WEIGHTS].sum(0) for batch in batches]
        count = torch.tensor(sum(rows, start=np.zeros(2)), dtype=torch.float32, device=self.args.device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        return count.clamp(min=1)

    def _find_bad_rows(self, step: int) -> list[str]:
        """Runs the rows of a step one by one; returns the names of those that are NaN or infinite by themselves."""
        accumulation = self.args.gradient_accumulation_steps
        epoch, index = divmod(step - 1, -(-len(self._shared) // accumulation))
        items = self._shared.items(epoch, index * accumulation, accumulation)
        rows = [row for item in items for row in self.name_rows(item)]
        return find_bad_rows(rows, self.data_collator.blank, self._is_finite, self._trained, self.args.device)

    def _is_finite(self, row: dict[str, Any]) -> bool:
        batch, _ = take_targets(self.data_collator([row]))
        batch.pop(COUNTS)
        batch.pop(SAVED)
        with self.step, self.compute_loss_context_manager():
            loss = self.model(**prepare_inputs(self, batch)).loss
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        return bool(loss.isfinite()) and all(bool(part.isfinite().all()) for part in gradients if part is not None)

    # Measuring

    def _free_step(self) -> None:
        """Frees what the step keeps from one micro-batch to the next, after it has been counted."""
        self.peak.gb()
        self.step.free()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the held-out rows, logs the result and calls the callbacks."""
        self._free_step()  # measuring has that memory
        with self._averaged():
            measured = self.measure(self.model, self.state.global_step)
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.store_flos()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Makes the model hold the average of its weights, which is what a schedule-free optimizer trains."""
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval"):
            yield
            return
        optimizer.eval()
        yield
        optimizer.train()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns 0: they are counted as batches come; the library's estimate walks through all modules."""
        return 0

    def store_flos(self) -> None:
        """Adds the tokens and operations since the last call, of all processes, to the state."""
        tokens, self._unreported_tokens = self._unreported_tokens, 0
        if self.args.world_size > 1:
            tokens = int(self.accelerator.reduce(torch.tensor(tokens, device=self.args.device)).item())
        self.state.num_input_tokens_seen += tokens
        super().store_flos()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs `logs` and the tokens so far; with a training loss, the speed and the objective's metrics, too."""
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        if "loss" in logs:
            logs["loss"], missing = self.watchdog.mean_since_log(logs["loss"])
            add_to_total_loss(self, missing)
            logs.update(self.objective.metrics())
            logs.update(self._routing_since_log())
            logs.update(self.meter.since_last_log(self.state))
        super().log(logs, start_time)

    def _routing_since_log(self) -> dict[str, float]:
        """Returns how a mixture has routed tokens since the last log, in all processes."""
        steps, self._logged_step = self.state.global_step - self._logged_step, self.state.global_step
        return self.routing.since_last_log(self.accelerator.reduce, steps) if self.routing is not None else {}

    @property
    def mean_loss(self) -> float:
        """The mean of all steps' losses, including those before the run was resumed, which the library leaves out."""
        return total_loss(self) / max(self.state.global_step - self.watchdog.counts["skipped"], 1)

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves a checkpoint; the main process writes it, and waits for disk space if need be."""
        self.store_flos()
        if self.args.world_size > 1:
            self.checkpoints.gather_random_states(super()._save_rng_state)
        if distributed.is_main_process():
            step = self.state.global_step
            # With a trial the library leaves out the counting of operations, which takes all processes.
            save = super()._save_checkpoint
            metadata = {"step": step, "epoch": self.state.epoch, **self.metadata}
            self.checkpoints.write(step, lambda: save(model, trial={}), metadata, self.args.save_total_limit)
        distributed.barrier()

    @property
    def checkpoint_size(self) -> int:
        """The bytes of the last checkpoint; before there is one, an upper estimate."""
        return self.checkpoints.size

    def _get_output_dir(self, trial: Any) -> str:
        """Returns where the library writes checkpoints."""
        return str(self.checkpoints.target)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the state of the random generators of all processes."""
        if self.args.world_size == 1:
            super()._save_rng_state(output_dir)
        self.checkpoints.write_random_states(Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the weights of a checkpoint, completes and checks them, and saves the losses so far."""
        super()._save(output_dir, state_dict)
        folder, sums = Path(output_dir) if output_dir else output_folder(self.args), read_loss_sums(self)
        losses = {"total": sums.total, "unlogged": sums.unlogged, "logged": sums.logged, "over": self._ended_itself}
        write_text(folder / LOSS_FILE, json.dumps(losses) + "\n")
        self.watchdog.save(folder)
        if self.stream is not None:
            self.stream.save(folder, self._first_item(self.state.global_step))
        if self.ranks is not None:
            self.ranks.save(folder)
        if state_dict is None:  # else it is gathered from several devices
            self.verify(folder, self.model)

    @property
    def _ended_itself(self) -> bool:
        """Whether a callback, rather than a signal or the last step, has ended the training run."""
        return self.control.should_training_stop and not (
            self.agreement.ended_by_signal or self.state.global_step >= self.state.max_steps
        )

    def recall_losses(self) -> None:
        """Restores the losses before the checkpoint from which the run is resumed, if it is."""
        checkpoint = output_folder(self.args) / f"checkpoint-{self.state.global_step}"
        if (losses := read_json(checkpoint / LOSS_FILE)) is not None:
            restore_loss_sums(self, LossSums(losses["total"], losses["unlogged"], losses["logged"]))
            self._is_over = losses["over"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Loads the weights; raises `RunError` where they are another model's (`resume=force`)."""
        with fitting(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ranks is not None:
            self.ranks.load(Path(resume_from_checkpoint))

    def load_weights(self, checkpoint: Path) -> None:
        """Gives the model the weights that were measured at a checkpoint, once the run has ended."""
        self._load_from_checkpoint(str(checkpoint), self.model)
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "eval"):  # schedule-free: the checkpoint holds the weights of the next step
            self._load_optimizer_and_scheduler(str(checkpoint))
            optimizer.eval()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer and schedule; raises `RunError` where they are another run's."""
        with fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    # Updates

    @property
    def _scales(self) -> bool:
        """Whether losses are scaled for fp16; the scaler looks at the gradients before the optimizer steps."""
        return getattr(self.accelerator, "scaler", None) is not None

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Scales the gradients down; returns their norm before that."""
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Returns the norm of the gradients, by which the watchdog decides whether they are used."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watchdog.judge(norm)
        return norm

    def _wrap_model(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Makes several processes average the gradients of what is trained; a base may be sharded."""
        if self.args.world_size == 1 or self.accelerator.unwrap_model(model) is not model:
            return super()._wrap_model(model, *args, **kwargs)
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        without_storage = (DTensor, Placeholder)  # sharded, or stored elsewhere
        ignored = [name for name, weight in model.named_parameters() if isinstance(weight, without_storage)]
        ignore_in_ddp(model, ignored)
        devices = None if self.args.device.type == "cpu" else [self.args.device]
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Builds the schedule; a `num_..._steps` below 1 among its arguments is a fraction of all steps."""
        settings = self.args.lr_scheduler_kwargs
        assert not isinstance(settings, str), "TrainingArguments has read the text"
        self.args.lr_scheduler_kwargs = resolve_schedule_steps(settings, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        for group in scheduler.optimizer.param_groups:
            if "warmup_steps" in group:  # a schedule-free optimizer warms up by itself, and takes no fraction
                group["warmup_steps"] = self.args.get_warmup_steps(num_training_steps)
        return scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Returns the class of the optimizer and all of its arguments."""
        return optimizer_class(args, model)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the optimizer; the updates of bitsandbytes' optimizers are joined, and the watchdog guards them."""
        if self.optimizer is not None:
            return self.optimizer
        if self.loraplus_lr_ratio is None:
            optimizer = super().create_optimizer(model)
        else:
            assert isinstance(self.model, PeftModel), "only an adapter has B matrices"
            optimizer = self.optimizer = create_loraplus(self.args, self.model, self.loraplus_lr_ratio)
        if isinstance(optimizer, Optimizer8bit):
            if isinstance(self.model, PeftModel) and not self._scales:
                flatten_groups(optimizer)
            run_ahead(optimizer)
        self.watchdog.guard(optimizer)
        self.peak.watch(optimizer, lambda: self.step.graph_bytes)
        return optimizer


@contextlib.contextmanager
def _without_walks(model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> Iterator[None]:
    """Makes what the library calls in every step skip the walk through all modules: 11 ms for a 7B model."""

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


class _LossRecall(TrainerCallback):
    """Acts where the library has set the losses to zero and has not trained yet."""

    def __init__(self, trainer: QLoraTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recall_losses()
