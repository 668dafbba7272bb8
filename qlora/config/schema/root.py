"""The whole config of a run, and the rules across its groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from qlora.config.addresses import missing_package
from qlora.config.optimizers import check_installed
from qlora.config.registries.objectives import RowKind
from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.config.registries.quantization_methods import AUTO, load_method
from qlora.config.registries.rope_scaling import NO_ROPE, check_has_rope, check_positions, scaled_context
from qlora.config.schema.code_names import (
    CALLBACK_PACKAGES,
    FUNCTION_PATH,
    OWN_FUNCTIONS,
    check_plain,
    check_trusted,
    is_installed_callback,
)
from qlora.config.schema.data import ROW_LENGTH, DataConfig
from qlora.config.schema.evaluation import (
    METRIC_LIBRARY,
    EvaluationConfig,
    EvaluationName,
    known_metrics,
    known_metrics_of_rows,
    metric_name,
)
from qlora.config.schema.export import ExportConfig
from qlora.config.schema.generation import GenerationConfig
from qlora.config.schema.head import HeadConfig, check_head
from qlora.config.schema.lora import LoraConfig, LoraInit
from qlora.config.schema.loss import LossConfig, check_preferences
from qlora.config.schema.manifest import ManifestConfig
from qlora.config.schema.merge import MergeConfig
from qlora.config.schema.model import ModelConfig
from qlora.config.schema.plan import PlanConfig
from qlora.config.schema.quantization import BaseProducts, ExpertsBits, ExpertsOffload, QuantizationConfig
from qlora.config.schema.serve import ServeConfig
from qlora.config.schema.sweep import SweepConfig
from qlora.config.schema.task import TASK_KEYS, TaskConfig, TaskName
from qlora.config.schema.tracking import TrackingConfig
from qlora.config.schema.trainer import Keep, Parallel, TrainerConfig
from qlora.config.schema.values import HOLDS, written
from qlora.config.schema.verify import VerifyConfig
from qlora.config.schema.watchdog import WatchdogAction, WatchdogConfig
from qlora.errors import ConfigError, did_you_mean, require
from qlora.text import listed

Device = StrEnum("Device", "auto cpu cuda xpu")
"""Where the model runs."""

Resume = StrEnum("Resume", "auto force never")
"""What a start does in a folder that holds a run."""

TRAIN_ON_ROWS = (TaskName.train, TaskName.plan, TaskName.preview, TaskName.replay, TaskName.doctor)
"""The tasks that train on rows, or say how it would be."""

SameBase = StrEnum("SameBase", "auto force")
"""What happens where an adapter meets another base than its own."""


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str | None = None
    """Name of the run or sweep: its folder below `outputs/` and its name in the tracker; unset: the time."""
    seed: int = 0
    """Seed of adapter weights, dropout and the order of the batches."""
    device: Device = Device.auto
    """`auto` takes the GPU (CUDA, ROCm or Intel XPU) if there is one, else the CPU; or `cpu`, `cuda`, `xpu`."""
    objective: str | None = "eval_loss"
    """The metric that a run returns to a sweeper; null: none."""
    resume: Resume = Resume.auto
    """What a start does in a folder that holds a run: `auto` resumes from the last good checkpoint, and refuses another
    config or other rows; `force` resumes in spite of such changes; `never` starts again in a new folder (`NAME-2`)."""
    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    quantization: QuantizationConfig = MISSING
    lora: LoraConfig = MISSING
    data: DataConfig = MISSING
    trainer: TrainerConfig = MISSING
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    watchdog: WatchdogConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    generation: GenerationConfig = MISSING
    tracking: TrackingConfig = MISSING
    adapter: str | None = None
    """What to evaluate, predict, chat with, serve, merge, export, verify or push: a folder of an adapter, of a merged
    model or of a finished run, whose settings the task takes, or `none` for the untuned base. Unset: the adapter in
    this run's own folder (`hydra.run.dir=FOLDER`), else the base that the command names."""
    base: SameBase = SameBase.auto
    """What happens where the base has other weights than the one that an adapter, or the resumed run, was trained on:
    `auto` refuses them, `force` accepts them with a warning."""
    repo: str | None = None
    """The hub repository that `task=push` writes to, e.g. `me/guanaco-7b`."""
    runs: Any = field(default=None, metadata={HOLDS: list[str] | str | None})
    """What `task=report` shows: a folder of a run or of a sweep, a pattern of such, e.g. `outputs/runs/*`, or a list of
    both, e.g. `[outputs/runs/a,outputs/runs/b]`; of two runs it says what differs."""
    run: str | None = None
    """The folder of the finished training run that `task=replay` repeats and compares with."""
    source: str | None = None
    """What `task=migrate` reads, written `from=FILE`: a command or script of the original `qlora.py`, TRL or
    ms-swift, or a YAML of Axolotl, LLaMA-Factory, TRL or torchtune."""
    trusted: list[str] = field(default_factory=list)
    """Packages of your own whose code this config may name, in a `_target_` or as `module:function`, e.g.
    `trusted=[my_rows]`; given on the command line, or as `QLORA_TRUSTED=my_rows` in the environment, and in no file.
    Callbacks of `qlora` and `transformers` and metrics of `evaluate` need no trust. A full key with a dot, e.g.
    `hydra.launcher.setup`, lets a file set what is otherwise the command line's alone."""
    merge: MergeConfig = MISSING
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    plan: PlanConfig = MISSING
    manifest: ManifestConfig = field(default_factory=ManifestConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Trainer callbacks by a name of your own: each a `_target_` with its arguments."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", "lie between 0 and 4294967295", self.seed)
        if self.name is not None and not is_folder_name(self.name):
            raise ConfigError(
                f"name={self.name[:80]!r} must be a plain folder name; use hydra.run.dir=FOLDER for another place"
            )
        self._check_task_keys()
        self._check_runs()
        self._check_required_keys()
        self._check_held_out()
        self._check_stream()
        self._choose_kept()
        self._check_trust()
        _check_generation(self.generation, self.model)
        if self.task.name not in TASK_KEYS["adapter"]:  # what is trained already may be used otherwise
            self._quantization_method.check_adapter(self.quantization, self.lora)
            self._check_memory()
            self._check_projection()
            if self.trainer.parallel is Parallel.fsdp:
                self._check_fsdp()
            self._check_adapter_kind()
            self._check_context_parallel()
        self._check_offload()
        self._check_rope()
        self._check_watchdog()
        self._check_loss()
        trains = self.task.name is TaskName.train and self.task.train
        if trains or self.task.name is TaskName.doctor:  # which reports whether this machine can train like that
            self._check_optimizer()
        if trains:
            self._quantization_method.check_installed(self.quantization)
        if self.task.name is not TaskName.report:  # which reads the metrics of other runs
            self._check_objective()

    def _check_runs(self) -> None:
        names = [self.runs] if isinstance(self.runs, str) else self.runs
        is_list = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        require(names is None or bool(is_list), "runs", "be a folder, a pattern of folders or a list of them", names)

    def _check_required_keys(self) -> None:
        """Refuses a task without the key that names its input or output."""
        if self.task.name is TaskName.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo or ""):
            given = "is not set" if self.repo is None else f"must be OWNER/NAME, got {self.repo!r}"
            raise ConfigError(f"repo {given}; name the hub repository to upload to, e.g. repo=me/guanaco-7b")
        if self.task.name is TaskName.report and self.runs is None:
            raise ConfigError(
                "runs is not set; name what task=report shows, e.g. runs=outputs/sweeps/mine or runs='outputs/runs/*'"
            )
        if self.task.name is TaskName.replay and self.run is None:
            raise ConfigError("run is not set; name the finished training run to repeat, e.g. run=outputs/runs/mine")
        if self.task.name is TaskName.migrate and self.source is None:
            raise ConfigError(
                "from is not set; name what task=migrate reads, e.g. from=finetune.sh or from=axolotl.yaml"
            )

    def _check_trust(self) -> None:
        """Refuses callbacks and functions of packages that are not trusted."""
        for name, node in self.callbacks.items():
            is_one = isinstance(node, dict) and isinstance(node.get("_target_"), str)
            rule = "be a mapping with a _target_ (module.Class) and its arguments"
            require(is_one, f"callbacks.{name}", rule, node, "leave it out, or name the class")
            if not is_installed_callback(node["_target_"]):
                check_trusted(f"callbacks.{name}._target_", node["_target_"], [*CALLBACK_PACKAGES, *self.trusted])
            check_plain(f"callbacks.{name}", {key: value for key, value in node.items() if key != "_target_"})
        for key, name in named_functions(self):
            if name not in OWN_FUNCTIONS:
                check_trusted(key, name, self.trusted)

    def _check_held_out(self) -> None:
        """Refuses to measure rows where none are held out."""
        name = self.task.name
        if name.measures_rows and not name.trains and not self.data.holds_out and self._measures_rows:
            raise ConfigError(
                f"task={name.value} measures held-out rows, and data.eval_dataset_size=0 holds out none; name rows "
                "with data.eval_path=FILE, or leave data.eval_dataset_size out"
            )

    def _check_stream(self) -> None:
        """Refuses what a run on streamed rows cannot do, because it does not know how many there are."""
        trainer = self.trainer
        if self.task.name in (TaskName.train, TaskName.preview, TaskName.doctor):
            for key, path in self.data.paths.items():
                if (remedy := missing_package(path)) is not None:
                    raise ConfigError(f"{key}={path} is read by a package that is not installed; {remedy}")
        if not (self.data.streaming and self.task.name in TRAIN_ON_ROWS):
            return
        if trainer.max_steps is None:
            raise ConfigError(
                f"data.streaming=true and trainer.num_train_epochs={written(trainer.num_train_epochs)} exclude each "
                "other: the number of streamed rows is not known; set trainer.max_steps, e.g. to 1000"
            )
        for name, interval in (("eval_steps", trainer.eval_steps), ("save_steps", trainer.save_steps)):
            if isinstance(interval, str):
                raise ConfigError(
                    f"trainer.{name}={interval} is a share of an epoch, whose length data.streaming=true does not "
                    "know; set a number of steps, e.g. 250"
                )
        loss = f"loss.name={self.loss.name}"
        reasons = {
            "trainer.group_by_length=true": (trainer.group_by_length,
                                             "it sorts all rows by length before the first step"),
            f"trainer.dataloader_num_workers={trainer.dataloader_num_workers}": (
                trainer.dataloader_num_workers > 0, "the rows are read in the training process"),
            loss: (self.loss.rows is not RowKind.tokens,
                   "it needs rows of pairs, labels or whole texts, which are all read before the run"),
        }  # fmt: skip
        for name, (is_set, reason) in reasons.items():
            if is_set:
                change = "set it to false" if name.endswith("=true") else "leave one of them out"
                raise ConfigError(f"data.streaming=true and {name} exclude each other: {reason}; {change}")

    @property
    def _measures_rows(self) -> bool:
        return self.task.name is TaskName.predict or self.evaluation.name is EvaluationName.rows

    def _choose_kept(self) -> None:
        """Decides what `trainer.keep=auto` keeps; refuses what cannot be compared or averaged."""
        trainer, keep = self.trainer, self.trainer.keep
        compares = self.data.holds_out and trainer.eval_steps is not None
        if keep is Keep.auto:
            self.trainer = replace(trainer, keep=Keep.best if compares else Keep.last)
        elif keep is Keep.best and not compares:
            what, way = "data.eval_dataset_size=0 holds out none", "leave that out"
            if self.data.holds_out:
                what, way = "trainer.eval_steps is not set", "set it, e.g. to 0.5ep"
            raise ConfigError(
                f"trainer.keep=best compares steps by the held-out rows, and {what}; {way}, or set trainer.keep=last"
            )
        elif keep is Keep.average:
            self._check_average()
        if (metric := trainer.keep_metric) is not None and metric not in (known := measured_at_steps(self)):
            raise ConfigError(
                f"trainer.keep_metric={metric!r} is not measured at trainer.eval_steps{did_you_mean(metric, known)}; "
                f"choose one of {', '.join(known)}"
            )

    def _check_average(self) -> None:
        """Refuses an average that no adapter can hold."""
        reasons = {
            "trainer.save_steps=null": (self.trainer.save_steps is None, "there are no checkpoints to average"),
            "lora.use_dora=true": (self.lora.enabled and self.lora.use_dora,
                                   "no adapter holds the mean of several magnitudes and directions"),
            f"trainer.optim={self.trainer.optim}": (
                OPTIMIZERS[self.trainer.optim].is_schedule_free,
                "its checkpoints hold the weights of the next step, and it averages by itself"),
        }  # fmt: skip
        for name, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(f"trainer.keep=average and {name} exclude each other: {reason}; change one of them")

    @property
    def kept_metric(self) -> str:
        """The metric by which `trainer.keep` compares steps."""
        chosen, measured = self.trainer.keep_metric or self.objective, measured_at_steps(self)
        if self.loss.is_preference and self.trainer.keep_metric is None and chosen == "eval_loss":
            return "eval_preference_loss"  # the likelihood of chosen answers falls while preferences are learned
        return chosen if chosen in measured else "eval_loss"

    def _check_memory(self) -> None:
        """Refuses a base that is spread over several devices where the run needs it on one."""
        if not (self.model.device_map or self.model.max_memory):
            return
        if not self.lora.enabled:
            raise ConfigError(
                "model.device_map and model.max_memory spread a frozen base; full finetuning (lora=none) needs the "
                "model on one device: leave them out"
            )
        if self.trainer.memory_budget is not None:
            raise ConfigError(
                "trainer.memory_budget counts one GPU's memory, and model.device_map and model.max_memory spread the "
                "base over several; leave the one or the others out"
            )

    def _check_adapter_kind(self) -> None:
        """Refuses what is made for LoRA beside an adapter of another kind, or with frozen A matrices."""
        lora, is_average = self.lora, self.trainer.keep is Keep.average
        if is_average and lora.enabled and lora.freeze_a:
            raise ConfigError(
                "trainer.keep=average and lora.freeze_a=true exclude each other: the mean of products is written by A "
                "and B of each step, and A is in no step; leave one of them out"
            )
        if lora.other_kind is None:
            return
        optim = self.trainer.optim
        averages = lora.other_kind.steers and optim.startswith("schedule_free")
        of_optim = (
            "it averages weights that are switched off" if averages else "it turns LoRA's matrices, and these alone"
        )
        reasons = {
            f"trainer.optim={optim}": (averages or optim == "muon", of_optim),
            "model.new_tokens": (bool(self.model.new_tokens), "their rows are trained beside LoRA"),
            f"loss.name={self.loss.name}": (self.loss.has_head, "its head is saved beside LoRA"),
            "trainer.keep=average": (is_average, "only products of LoRA have a mean that an adapter holds"),
            "trainer.parallel=fsdp": (self.trainer.parallel is Parallel.fsdp, "sharded layers compute LoRA alone"),
            "trainer.memory_budget": (self.trainer.memory_budget is not None, "its formula counts LoRA"),
            "trainer.fused_linear=true": (self.trainer.fused_linear is True, "its kernels compute LoRA"),
            "trainer.compile=true": (self.trainer.compile is True, "only layers with LoRA are compiled"),
            "quantization.compute=fp8": (self.quantization.compute is BaseProducts.fp8, "its kernels compute LoRA"),
        }
        for name, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(
                    f"lora.kind={lora.kind} and {name} exclude each other: {reason}; leave one of them out"
                )

    def _check_context_parallel(self) -> None:
        """Refuses what cannot be computed where several processes share a row."""
        trainer, name = self.trainer, self.loss.name
        if trainer.context_parallel == 1:
            return
        reasons = {
            "trainer.parallel=fsdp": (trainer.parallel is Parallel.fsdp, "each process must hold the whole base"),
            "trainer.fused_attention=false": (trainer.fused_attention is False, "that part attends across processes"),
            "trainer.fused_loss=false": (trainer.fused_loss is False, "that part takes the labels of shared rows"),
            "trainer.memory_budget": (trainer.memory_budget is not None, "its formula counts rows of one process"),
            f"loss.name={name}": (name != "sft", "only the loss of single tokens is computed in parts"),
            f"trainer.neftune_noise_alpha={trainer.neftune_noise_alpha}": (
                trainer.neftune_noise_alpha is not None, "its noise is scaled by the length of whole rows"),
        }  # fmt: skip
        for other, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(
                    f"trainer.context_parallel={trainer.context_parallel} and {other} exclude each other: {reason}; "
                    "leave one of them out"
                )

    def _check_rope(self) -> None:
        """Refuses to stretch positions that are not rotary, and rows beyond the positions of a model that is known."""
        model, length = self.model, self.data.max_length
        is_usual = model.rope_scaling is None and length in (None, ROW_LENGTH)
        if is_usual or (shape := model.known_architecture) is None:
            return
        has_rope = shape.model_type not in NO_ROPE and shape.options.get("position_embedding_type", "rope") == "rope"
        check_has_rope(model.rope_scaling, shape.model_type, has_rope=has_rope)
        is_scaled, context = model.rope_scaling is not None, shape.max_position_embeddings
        if is_scaled:
            context = scaled_context(model.rope_scaling, context) or context
        trains = self.task.name is TaskName.train and self.task.train
        if trains and length not in (None, ROW_LENGTH) and length > context:
            check_positions(length, context, model.name, has_rope=has_rope, is_scaled=is_scaled)

    def _check_offload(self) -> None:
        """Refuses to have experts wait in the host's memory where they cannot."""
        quantization, model = self.quantization, self.model
        if quantization.experts_offload is not ExpertsOffload.all:
            return
        is_named = quantization.method != AUTO
        method = f"method={quantization.method}" if is_named else f"bits={quantization.bits}"
        sharded = self.trainer.parallel is Parallel.fsdp
        reasons = {
            f"quantization.{method}": (not self._quantization_method.offloads_experts, "it is for experts in 4 bits"),
            "quantization.experts=none": (quantization.experts is ExpertsBits.none, "it is for experts in 4 bits"),
            "model.device_map": (bool(model.device_map or model.max_memory), "that spreads the base by itself"),
            "trainer.parallel=fsdp": (sharded, "a process holds a part of every layer"),
        }
        for name, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(
                    f"quantization.experts_offload=all and {name} exclude each other: {reason}; leave one of them out"
                )

    def _check_objective(self) -> None:
        """Refuses an objective that this run does not measure."""
        known = known_metrics(self.evaluation)
        if self.loss.reads_whole_texts:
            known = [name for name in known if not name.endswith("perplexity")]
        known += [f"{prefix}{name}" for prefix in ("eval_", "base_eval_") for name in self.loss.measured]
        # lm-eval and the `evaluate` library name their metrics only once they have measured.
        prefixes = [metric_name(name) for name in self.evaluation.metrics if name.startswith(f"{METRIC_LIBRARY}:")]
        prefixes += ["lm_eval"] if self.evaluation.name is EvaluationName.lm_eval else []
        open_names = tuple(f"eval_{prefix}_" for prefix in prefixes)
        if self.objective is not None and not (self.objective in known or self.objective.startswith(open_names)):
            raise ConfigError(
                f"objective={self.objective!r} is not a metric of this run{did_you_mean(self.objective, known)}; "
                f"choose one of {listed(known, 3)}, or null"
            )

    def _check_task_keys(self) -> None:
        """Refuses a key that names the input or output of another task."""
        for key, tasks in TASK_KEYS.items():
            owner, name = (self.task, key.removeprefix("task.")) if key.startswith("task.") else (self, key)
            value = getattr(owner, name)
            if self.task.name in tasks or value == next(item.default for item in fields(owner) if item.name == name):
                continue
            if key == "adapter" and self.task.name is TaskName.train and not self.task.train:
                continue  # which measures it and lets it answer
            readers = [f"task={task.value.replace('_', '-')}" for task in tasks]
            setting = f"{'from' if key == 'source' else key}={written(value)}"
            added = "one of these" if len(readers) > 1 else readers[0]
            is_to_train = key == "adapter" and self.task.name.trains
            further = f", write lora.start={written(value)} to train it further" if is_to_train else ""
            raise ConfigError(
                f"{setting} is not read by task={self.task.name.value.replace('_', '-')}, but by "
                f"{' and '.join(filter(None, [', '.join(readers[:-1]), readers[-1]]))}; add {added}{further}, or leave "
                f"{setting.partition('=')[0]} out"
            )

    @property
    def _quantization_method(self) -> Any:
        """What says which training the base allows."""
        return load_method(self.quantization.method, self.quantization.bits)

    def _check_watchdog(self) -> None:
        """Refuses actions that the training cannot take."""
        rollback = [name for name in ("nonfinite", "divergence")
                    if getattr(self.watchdog, name) is WatchdogAction.rollback]  # fmt: skip
        if rollback and self.trainer.save_steps is None:
            raise ConfigError(
                f"watchdog.{rollback[0]}=rollback needs checkpoints to go back to; set trainer.save_steps, e.g. to 100"
            )

    def _check_loss(self) -> None:
        """Refuses what the objective, or the form of the batches, does not allow."""
        if self.trainer.label_smoothing_factor and self.loss.name != "sft":
            raise ConfigError(
                f"trainer.label_smoothing_factor={self.trainer.label_smoothing_factor:g} is read by loss=sft, and "
                f"loss.name={self.loss.name} has a loss of its own; leave one of them out"
            )
        if self.trainer.neftune_noise_alpha is not None and self.data.packing:
            raise ConfigError(
                "trainer.neftune_noise_alpha scales its noise by the length of a row, and data.packing=true joins "
                "rows; leave one of them out"
            )
        check_head(
            self.head,
            self.loss,
            lora=self.lora,
            data=self.data,
            evaluation=self.evaluation,
            new_tokens=self.model.new_tokens,
            task=self.task.name,
        )
        check_preferences(self.loss, self.lora, self.data, self.trainer)

    def _check_optimizer(self) -> None:
        """Refuses an optimizer that this machine, or the device that the run names, does not have."""
        name = self.trainer.optim
        check_installed(name)
        if OPTIMIZERS[name].needs_cuda and self.device in (Device.cpu, Device.xpu):
            raise no_cuda(name, self.device.value)

    def _check_projection(self) -> None:
        """Refuses an optimizer that reads other gradients than those of what is trained."""
        name = self.trainer.optim
        if OPTIMIZERS[name].trains_all_weights and self.lora.enabled:
            raise ConfigError(
                f"trainer.optim={name} projects the gradients of whole matrices to a low rank, and those of an adapter "
                "are of low rank already; set lora=none, or choose another, e.g. trainer.optim=muon"
            )
        if OPTIMIZERS[name].trains_b_alone and not (self.lora.enabled and self.lora.freeze_a):
            raise ConfigError(
                f"trainer.optim={name} changes the gradients of B by an A that stays as it is; set lora=lora-fa "
                "(lora.freeze_a=true), or choose another, e.g. trainer.optim=adamw_torch"
            )

    def _check_fsdp(self) -> None:
        """Refuses what reads or initialises whole weights of a base that no process holds whole."""
        lora, model = self.lora, self.model
        sharding = self._quantization_method.fsdp_unsupported_reason()
        reasons = {
            "lora=none": (not lora.enabled, "it trains all weights, and the frozen ones are sharded"),
            "lora.use_dora=true": (lora.use_dora, "it reads whole weights"),
            "trainer.optim=lorafa": (self.trainer.optim == "lorafa", "it reads A matrices, which are sharded"),
            "lora.init=eva": (lora.init is LoraInit.eva, "it runs the whole base before the training"),
            "lora.modules_to_save": (bool(lora.modules_to_save), "such a module trains whole, and layers are sharded"),
            f"quantization.bits={self.quantization.bits}": (sharding is not None, sharding),
            "model.device_map": (bool(model.device_map or model.max_memory), "it spreads the base in one process"),
            "trainer.memory_budget": (self.trainer.memory_budget is not None, "its formula counts whole layers"),
        }
        for name, (is_set, reason) in reasons.items():
            if is_set:
                raise ConfigError(
                    f"trainer.parallel=fsdp and {name} exclude each other: {reason}; leave one of them out"
                )


def measured_at_steps(config: Config) -> list[str]:
    """Returns the metrics that a training run measures, or can measure, at `trainer.eval_steps`."""
    measured = [*known_metrics_of_rows(config.evaluation), *config.loss.measured]
    if config.loss.reads_whole_texts:
        return [f"eval_{name}" for name in measured if name != "perplexity"]
    if config.evaluation.name is EvaluationName.mmlu:
        measured += [f"mmlu_{config.evaluation.split.value}_{name}" for name in ("accuracy", "loss")]
    return [f"eval_{name}" for name in measured]


def no_cuda(optim: str, device: str) -> ConfigError:
    """Returns the error for an optimizer that needs a CUDA device on another one."""
    return ConfigError(
        f"trainer.optim={optim} runs on CUDA only, and this run computes on {device}; set trainer.optim="
        f"{optim.removeprefix('paged_').removesuffix('_32bit')}"
    )


def is_folder_name(name: str) -> bool:
    """Returns whether a text names a folder right below another one, on every system: no path, and not too long."""
    return name not in (".", "..") and bool(re.fullmatch(r"[^/\x00-\x1f\x7f]+", name)) and len(name.encode()) <= 200


def named_functions(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the full keys whose values name a function of the user's, with the names: `module:function`."""
    data = config.data
    texts = {"data.path": data.path, "data.eval_path": data.eval_path, "data.format": data.format}
    texts |= {"quantization.method": config.quantization.method, "loss.name": config.loss.name}
    texts |= {"tracking.backend": config.tracking.backend, "evaluation.win": config.evaluation.win}
    texts |= {f"tracking.also[{index}]": name for index, name in enumerate(config.tracking.also)}
    texts |= {f"trainer.step_parts[{index}]": name for index, name in enumerate(config.trainer.step_parts)}
    for name, part in data.mix.items():
        texts |= {f"data.mix.{name}.path": part.path, f"data.mix.{name}.format": part.format}
    texts |= {
        f"evaluation.metrics[{index}]": name
        for index, name in enumerate(config.evaluation.metrics)
        if not name.startswith(f"{METRIC_LIBRARY}:")
    }
    return ((key, text) for key, text in texts.items() if text is not None and FUNCTION_PATH.fullmatch(text))


def _check_generation(generation: GenerationConfig, model: ModelConfig) -> None:
    community = generation.num_beam_groups > 1 or bool(generation.penalty_alpha)
    if community and not model.trust_remote_code:
        key = "num_beam_groups" if generation.num_beam_groups > 1 else "penalty_alpha"
        raise ConfigError(
            f"generation.{key}: transformers moved this search to a hub repository of its own and runs it as remote "
            "code; set model.trust_remote_code=true to allow that, or leave the option out"
        )
