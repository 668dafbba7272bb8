"""The parts of a run, built from its config when they are first needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qlora import adapters
from qlora.adapters.code_files import check_code_files
from qlora.config.optimizers import OPTIMIZERS
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import (
    Config,
    EvaluationName,
    Parallel,
    PlanStep,
    SameBase,
    TaskName,
    Weights,
    no_cuda,
)
from qlora.config.trackers import NO_TRACKER
from qlora.data.batching.collate import Collator, count_work
from qlora.data.batching.row_encoder import RowEncoder, build_encoder
from qlora.data.batching.token_store import column
from qlora.data.ingest.row_files import read_rows
from qlora.data.ingest.sources import load_hub
from qlora.data.pipeline import Data, build_data
from qlora.errors import ConfigError, did_you_mean
from qlora.evaluation.generation import prompt_lengths
from qlora.evaluation.lm_harness import LmHarness
from qlora.evaluation.measure import Measurement, Measurer, Suite, evaluation_mode
from qlora.evaluation.metrics import find_metrics
from qlora.evaluation.mmlu import HUB_SET, HUB_SUBSET, Mmlu, load_questions
from qlora.models import loading, random_weights
from qlora.models.fingerprint import (
    Base,
    find_difference,
    fingerprint_random,
    fingerprint_weights,
    read_base,
    write_base,
)
from qlora.models.model_config import build_model_config, load_model_config
from qlora.models.model_files import locate
from qlora.models.new_tokens import add_end_token, resize_embeddings
from qlora.models.tokenizer import (
    check_vocabulary,
    load_saved_tokenizer,
    load_tokenizer,
    pad_token_id,
    refuse_token,
    repair_special_tokens,
)
from qlora.models.weight_files import Checkpoint, Tensors, fetch_weights, local_files
from qlora.objectives import Objective, build_objective
from qlora.planning.memory_plan import FRAGMENTS, Ledger
from qlora.planning.model_shape import FAMILIES, read_shape
from qlora.planning.time_plan import Operations, count_operations
from qlora.quantization.method import find_method
from qlora.quantization.placement import find_placement
from qlora.runtime import console, distributed
from qlora.runtime.atomic_files import read_json
from qlora.runtime.device import Placement, computes_bf16, find_device, matrix_rate, peak_memory_gb
from qlora.runtime.run_folder import RunFolder, config_digest, find_adapter
from qlora.runtime.sweep_job import TRIAL_VARIABLE, SweepJob
from qlora.step.fast_step import FastStep
from qlora.step.part import Packs
from qlora.step.shard import shard_base
from qlora.tasks.chat import choose_saved_template
from qlora.tasks.plan import read_setup
from qlora.text import parse_size
from qlora.training.arguments import build_arguments
from qlora.training.memory_budget import Budget, Formula
from qlora.training.meter import Meter
from qlora.training.profiling import ProfileCallback
from qlora.training.progress import ProgressCallback
from qlora.training.stopping import Stop
from qlora.training.trackers import Tracker, tracker_ids
from qlora.training.trackers.callback import TrackerCallback
from qlora.training.trainer import QLoraTrainer
from qlora.upstream.transformers_models import commit_hash
from qlora.upstream.transformers_trainer import check_trainer

log = logging.getLogger(__name__)

T = TypeVar("T")


class Session:
    """What a run is made of: device, tokenizer, data, models, measurer, trainer."""

    def __init__(
        self, config: Config, output_dir: Path | str, overrides: Sequence[str] = (), sweep: SweepJob | None = None
    ) -> None:
        self.config, self.overrides, self.sweep = config, list(overrides), sweep
        self.folder = RunFolder(Path(output_dir))
        self.stop = Stop()

    # Cheap ones first: a broken data set must fail before a large model is loaded.

    @cached_property
    def placement(self) -> Placement:
        """The device and its precision."""
        placement = find_placement(self.config.quantization, find_device(self.config.device))
        if placement.compute_dtype is torch.float16 and computes_bf16(placement.device):
            log.warning(
                "quantization.compute_dtype=fp16 on a device that computes in bf16: fp16 overflows more easily; "
                "compute_dtype=auto takes bf16"
            )
        if placement.param_dtype is torch.float16 and not self.config.lora.enabled:
            raise ConfigError(
                "lora=none with fp16 weights cannot train (gradients underflow); use quantization=fp32, or "
                "quantization.compute_dtype=bf16"
            )
        return placement

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, repaired by the model's config."""
        tokenizer = load_tokenizer(self.config.model)
        healthy = tokenizer.bos_token and tokenizer.eos_token
        if not (self.draws or healthy):
            repair_special_tokens(tokenizer, self.model_config)
        return tokenizer

    @property
    def draws(self) -> bool:
        """Whether the base weights are drawn from `seed` instead of loaded."""
        return self.config.model.weights is Weights.random

    @cached_property
    def model_config(self) -> Any:
        """transformers' config object of the base model."""
        if self.draws:
            return build_model_config(self.config.model, self.tokenizer)
        return load_model_config(self.config.model)

    @cached_property
    def pad_token_id(self) -> int:
        """The id that fills up batches."""
        return pad_token_id(self.tokenizer, self._embedding_rows)

    @property
    def _embedding_rows(self) -> int:
        """How many tokens the base has embeddings for, as its config says."""
        return int(self.model_config.get_text_config().vocab_size)

    @cached_property
    def new_token_ids(self) -> list[int]:
        """The ids of `model.new_tokens`."""
        return [int(number) for number in self.tokenizer.convert_tokens_to_ids(self.config.model.new_tokens)]

    @cached_property
    def collate(self) -> Collator:
        """Turns rows into padded tensors."""
        return Collator(self.pad_token_id)

    @cached_property
    def data(self) -> Data:
        """Tokenized rows to train and to measure on."""
        task = self.config.task
        training = task.name is TaskName.preview or (task.name is TaskName.train and task.train)
        with distributed.local_main_process_first():
            data = build_data(self.config.data, self.tokenizer, need_train=training)
        self._check_columns(data.train)
        distributed.check_same("tokens", data.report.fingerprint)
        return data

    @cached_property
    def objective(self) -> Objective:
        """What the training run minimises."""
        return build_objective(self.config.loss)

    def _check_columns(self, rows: Dataset | None) -> None:
        """Raises `ConfigError` if the objective needs columns that tokenized rows do not have."""
        missing = [] if rows is None else sorted({*self.objective.columns} - {*rows.column_names})
        if missing:
            raise ConfigError(
                f"loss.name={self.config.loss.name} needs rows with {' and '.join(missing)}, which no data.format "
                "supplies; choose loss=sft, or an objective that needs input_ids and labels only"
            )

    @cached_property
    def measurer(self) -> Measurer:
        """Measures any model on the held-out rows."""
        assert self.data.eval is not None
        self._check_context(self.data.eval)
        return Measurer(
            rows=self.data.eval,
            collate=self.collate,
            tokenizer=self.tokenizer,
            generation=self.config.generation,
            metrics=find_metrics(self.config.evaluation.metrics),
            pad_token_id=self.pad_token_id,
            batch_size=self.config.trainer.per_device_eval_batch_size,
            device=self.placement.device,
            autocast=self.placement.autocast,
            seed=self.config.seed,
        )

    def _check_context(self, rows: Dataset) -> None:
        """Raises `ConfigError` if an answer could grow beyond what the model reads."""
        count = self._answered_rows
        limit = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        if count == 0 or limit is None:
            return
        longest = int(prompt_lengths(rows)[:count].max(initial=0))
        wanted = self.config.generation.max_new_tokens
        if longest + wanted > limit:
            remedies = [f"generation.max_new_tokens={limit - longest}"] if limit > longest else []
            remedies += [f"data.source_max_len={limit - wanted}"] if limit > wanted else []
            raise ConfigError(
                f"generation.max_new_tokens={wanted} on top of the longest prompt's {longest} tokens is more than the "
                f"{limit} that {self.config.model.name} reads; set {' or '.join(remedies)}"
            )

    @property
    def _answered_rows(self) -> int | None:
        """How many held-out rows are answered at most; None: all."""
        task, evaluation, wanted = self.config.task, self.config.evaluation, self._wanted_answers
        if task.name is TaskName.train and not task.evaluate:
            wanted = 0
        if task.name is TaskName.predict or wanted is None:
            return None
        if task.name is not TaskName.train:
            return wanted
        tracked = self.config.tracking.in_use != NO_TRACKER
        return max(wanted, evaluation.show_predictions if task.predict or tracked else 0)

    @property
    def end_id(self) -> int | None:
        """The end-of-turn token of the template that writes conversations; None: there is none."""
        saved = self.config.task.name is TaskName.merge and self._saved_template is not None
        if saved or self.config.task.name is TaskName.chat:
            return self.chat_encoder.writer.end_id
        return self.data.end_id if self.measures_rows else None

    @property
    def _saved_template(self) -> str | None:
        """The chat template that was saved with what `adapter` names."""
        return self.trained_tokenizer.chat_template if self.trained_tokenizer is not None else None

    @property
    def measures_rows(self) -> bool:
        """Whether the task measures the data's held-out rows; `task=evaluate` of a suite measures that alone."""
        task, rows = self.config.task.name, self.config.evaluation.name is EvaluationName.rows
        return task is not TaskName.chat and (rows or task is not TaskName.evaluate)

    @cached_property
    def chat_encoder(self) -> RowEncoder:
        """What writes a conversation in tokens as the training of `adapter` did; no rows are read."""
        template = choose_saved_template(self.trained_tokenizer, self.tokenizer, self.config.data.template)
        return build_encoder(self.config.data, self.tokenizer, template)

    @cached_property
    def suite(self) -> Suite | None:
        """The test of `evaluation=mmlu` or `evaluation=lm-eval`."""
        if self.config.evaluation.name is EvaluationName.mmlu:
            return self._build_mmlu()
        if self.config.evaluation.name is EvaluationName.lm_eval:
            return LmHarness(
                self.config.evaluation,
                tokenizer=self.tokenizer,
                batch_size=self.config.trainer.per_device_eval_batch_size,
                device=self.placement.device,
                trusted=self.config.trusted,
            )
        return None

    def _build_mmlu(self) -> Mmlu:
        evaluation = self.config.evaluation

        def load_split(split: str) -> Iterable[Mapping[str, Any]]:
            return load_hub(
                HUB_SET,
                HUB_SUBSET,
                split,
                key="evaluation.path",
                failure=f"evaluation=mmlu: {HUB_SET} is not to be had",
                remedy="or give the questions as a file: evaluation.path=FILE",
            )

        return Mmlu(
            load_questions(evaluation, read_file=partial(read_rows, key="evaluation.path"), load_split=load_split),
            split=evaluation.split.value,
            tokenizer=self.tokenizer,
            source_max_len=evaluation.source_max_len,
            context=getattr(self.model_config.get_text_config(), "max_position_embeddings", None),
            pad_token_id=self.pad_token_id,
            batch_size=self.config.trainer.per_device_eval_batch_size,
            device=self.placement.device,
        )

    @cached_property
    def is_trainable(self) -> bool:
        """True; raises `ConfigError`, before rows or weights are read, for a base that the config does not fit."""
        _ = self._beyond_embeddings
        model, quantization = self.config.model, self.config.quantization
        loading.check_quantization(model, quantization, self.model_config, placement=self.placement)
        return True

    @cached_property
    def _beyond_embeddings(self) -> dict[int, str]:
        """The tokens by their ids that the base has no embedding for."""
        return check_vocabulary(self.tokenizer, self.config.model, self._embedding_rows)

    @cached_property
    def tokens_without_embedding(self) -> list[str]:
        """The tokens that the base has no embedding for, which are warned of; no row may hold one."""
        model, rows, beyond = self.config.model, self._embedding_rows, self._beyond_embeddings
        if not beyond:
            return []
        tokens = list(beyond.values())
        for part in (self.data.train, self.data.eval) if self.measures_rows else ():
            if part is not None and (used := _first_used(part, beyond)) is not None:
                raise refuse_token(self.tokenizer, model, rows, beyond[used], tokens)
        log.warning(
            "the tokenizer has %s tokens and the base embeddings for %s: a text with %s cannot be read (no row here "
            "has it); model.new_tokens gives a token an embedding",
            *(f"{len(self.tokenizer.get_vocab()):,}", f"{rows:,}", " or ".join(map(repr, tokens[:3]))),
        )
        return tokens

    def load_base(self) -> PreTrainedModel:
        """Loads or draws the frozen base."""
        _ = self.is_trainable
        _ = self.tokens_without_embedding
        if not self.draws:
            return self._load(None)
        weights = self._drawn_weights()
        base = loading.build_random_base(self.config.model, self.config.quantization, weights, self._base_device)
        return self._fit_to_tokens(base)

    def _load(self, folder: Path | None) -> PreTrainedModel:
        base = loading.load_base(
            self.config.model,
            self.config.quantization,
            placement=replace(self.placement, device=self._base_device),
            model_config=self.model_config,
            folder=folder,
            tried=not self.is_sharded,
        )
        return self._fit_to_tokens(base)

    @property
    def _base_device(self) -> torch.device:
        """Where the base is loaded to; from the host's memory it is sharded layer by layer."""
        return torch.device("cpu") if self.is_sharded else self.placement.device

    def _fit_to_tokens(self, base: PreTrainedModel) -> PreTrainedModel:
        resize_embeddings(base, self.new_token_ids)
        add_end_token(base, self.end_id)
        return base

    def _tensors(self) -> Tensors:
        """Opens the base's weights as they are before quantization."""
        if self.draws:
            return self._drawn_weights()
        model = self.config.model
        return Checkpoint(local_files(locate(model.name), revision=model.revision, cache_dir=model.cache_dir))

    def _drawn_weights(self) -> random_weights.RandomWeights:
        return random_weights.RandomWeights(self.model_config, placement=self.placement, seed=self.config.seed)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the base only, so that all must call the model together."""
        return self.config.trainer.parallel is Parallel.fsdp and distributed.world_size() > 1

    def build_model(self) -> PreTrainedModel:
        """Returns the base with a fresh adapter, as it is trained."""
        model = self.add_adapter(self.load_base())
        if self.is_sharded:
            assert isinstance(model, PeftModel), "Config checks it"
            shard_base(model, self.placement.device, distributed.world_size())
        return model

    def add_adapter(self, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Attaches a fresh adapter drawn from `seed`, or makes all weights trainable (`lora=none`)."""
        set_seed(self.config.seed)
        if not self.config.lora.enabled:
            base.requires_grad_(True)
            return base
        model = adapters.add_lora(
            self.config.lora, base, tensors=self._tensors, new_token_ids=self.new_token_ids, batches=self._batches()
        )
        if self.config.lora.init in adapters.REWRITES_BASE and distributed.is_main_process():
            adapters.save_initial_adapter(model, self.folder.path / "initial_adapter")
        return model

    def _batches(self) -> DataLoader[Any]:
        assert self.data.train is not None
        size = self.config.trainer.per_device_train_batch_size

        def on_device(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(self.placement.device) for name, tensor in self.collate(rows).items()}

        return DataLoader(self.data.train, batch_size=size, collate_fn=on_device)

    # What was trained

    @cached_property
    def trained(self) -> tuple[Path | None, Path | None]:
        """The (adapter, fully finetuned model) that `adapter` or this folder holds; (None, None): the base.

        Raises `ConfigError` where there is none, and for an adapter of another base than the task would use it on.
        """
        wanted = self.config.adapter
        if wanted == "none":
            return None, None
        place = Path(wanted).expanduser() if wanted is not None else self.folder.path
        if not place.is_dir():
            siblings = [str(path) for path in place.parent.glob("*/")]
            raise ConfigError(f"adapter={wanted}: no such folder{did_you_mean(str(place), siblings)}")
        found = find_adapter(place)
        if found == (None, None):
            raise ConfigError(
                f"adapter={wanted or 'null'}: {place} holds no adapter; give adapter=FOLDER of an adapter "
                "or of a finished run, or adapter=none for the untuned base"
            )
        if (adapter := found[0]) is not None:
            adapters.check_adapter_folder(adapter)
            if self.config.task.name is not TaskName.push:  # which uses no base
                self.check_base(f"adapter={adapter}", read_base(adapter))
        return found

    @cached_property
    def trained_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was saved with what `adapter` names, of the same tokens as `tokenizer`; None: no such."""
        folder = self.trained[0] or self.trained[1]
        if folder is None:
            return None
        check_code_files(folder, self.config.model)
        return load_saved_tokenizer(folder, self.config.model, self.tokenizer)

    def load_trained(self) -> PreTrainedModel:
        """Loads what `adapter` names: the base with an adapter, a fully finetuned model, or the bare base.

        Raises `ConfigError` where the base's tokens are not those of the training.
        """
        adapter, full = self.trained
        _ = self.trained_tokenizer  # before the weights
        if adapter is not None:
            return adapters.load_adapter(self.load_base(), adapter, self.config.model.name)
        if full is None:
            return self.load_base()
        self._check_whole_model(full)
        return self._load(full)

    @cached_property
    def base(self) -> Base:
        """The base that the config means, known by its weights; those on the hub are downloaded for it."""
        model = self.config.model
        if self.draws:
            settings = random_weights.random_base_settings(model, self.placement, self.config.seed)
            return Base(model.name, fingerprint=fingerprint_random(settings), random=settings)
        _ = self.model_config  # says what is wrong with a folder
        files = fetch_weights(model)
        revision = commit_hash(self.model_config) or model.revision
        return Base(model.name, revision, None if files is None else fingerprint_weights(files))

    def check_base(self, user: str, trained: Base, otherwise: str = "") -> bool:
        """Returns whether the base is the one that `user` was trained on, as far as can be told.

        Raises `ConfigError` if it is another, whose message may offer something `otherwise`; with `base=force`, and
        where there is no fingerprint to compare, that is a warning.
        """
        difference = find_difference(trained, self.base)
        if difference is None:
            return True
        what = f"{user} does not fit {difference.what}"
        if not difference.is_certain:
            log.warning("%s may not fit %s; %s", user, difference.what, difference.remedy)
        elif self.config.base is SameBase.force:
            log.warning("base=force: %s", what)
        else:
            raise ConfigError(f"{what}; {difference.remedy}{otherwise}, or use it in spite of that with base=force")
        return not difference.is_certain

    def _finish_adapter(self, folder: Path, model: torch.nn.Module) -> None:
        """Completes the adapter of a checkpoint with its base, and checks what was written."""
        if isinstance(model, PeftModel):
            write_base(self.base, folder)
        adapters.verify_adapter(folder, model)

    def _check_whole_model(self, folder: Path) -> None:
        """Raises `ConfigError` if a finished model would be rounded again without a word."""
        quantization = self.config.quantization
        if (method := find_method(quantization)).is_quantized:
            stored = read_json(folder / "config.json")
            dtype = stored.get("dtype") or stored.get("torch_dtype")
            kind = method.data_type(quantization)
            raise ConfigError(
                f"adapter={folder} is a whole model in {dtype}, which quantization={kind} would round again; use "
                "quantization=none or quantization=fp32, or give it as model.name with adapter=none to quantize it on "
                "purpose"
            )

    # Measuring and training

    @property
    def _wanted_answers(self) -> int | None:
        return self.config.evaluation.generate_samples if self.config.evaluation.metrics else 0

    def _in_first(self, work: Callable[[], T]) -> T:
        """Returns what `work` gives in the first process, in all of them; a sharded base needs all to do it."""
        return distributed.broadcast(work() if distributed.is_main_process() or self.is_sharded else None)  # type: ignore[return-value]

    def _measure(self, model: torch.nn.Module, *, answers: int | None) -> Measurement:
        """Measures the held-out rows and the suite, as far as the task and `evaluation=` ask for them."""

        def measure() -> Measurement:
            measured = self.measurer.measure(model, answers=answers) if self.measures_rows else Measurement()
            return measured | self._measure_suite(model)

        return self._in_first(measure)

    def _measure_suite(self, model: torch.nn.Module) -> Measurement:
        if self.suite is None:
            return Measurement()
        with evaluation_mode(model), self.placement.autocast():
            return self.suite.measure(model)

    def _build_trainer(self, model: PreTrainedModel, callbacks: list[Any], tracker: Tracker) -> QLoraTrainer:
        assert self.data.train is not None
        arguments = build_arguments(
            self.config.trainer,
            output_dir=self.folder.checkpoints,
            device=self.placement.device,
            compute=self.placement.compute_dtype,
            seed=self.config.seed,
        )

        if arguments.world_size != distributed.world_size():
            raise ConfigError(
                f"{distributed.world_size()} processes were launched (WORLD_SIZE), and training would use "
                f"{arguments.world_size} of them; {distributed.LAUNCH_HINT}"
            )

        def measure(current: torch.nn.Module, step: int) -> dict[str, float]:
            return self._in_first(lambda: measure_rows(current, step))

        def measure_rows(current: torch.nn.Module, step: int) -> dict[str, float]:
            shown = self.config.evaluation.show_predictions if self.config.tracking.in_use != NO_TRACKER else 0
            measured = self.measurer.measure(current, answers=shown)
            tracker.log_predictions(measured.predictions, step=step)
            metrics = {name: measured.metrics[name] for name in ("loss", "perplexity")}
            if self.suite is not None and self.suite.at_each_evaluation:
                metrics |= self._measure_suite(current).metrics
            return metrics

        step = self._build_step(model)
        packed = self.data.packed
        lengths = (packed.lengths if packed else column(self.data.train, "length")).tolist()
        width = self.config.data.pack_width or 0 if step.is_compiled else 0
        return QLoraTrainer(
            model=model,
            arguments=arguments,
            rows=packed or self.data.train,
            lengths=lengths,
            collate=Collator(self.pad_token_id, width=width),
            count=partial(count_work, pad_token_id=self.pad_token_id),
            measure=measure,
            verify=self._finish_adapter,
            loraplus_lr_ratio=self.config.lora.loraplus_lr_ratio if self.config.lora.enabled else None,
            step=step,
            objective=self.objective,
            meter=self._build_meter(model),
            budget=self._build_budget(step, longest=max(width, *lengths)),
            stop=self.stop,
            metadata={
                "config": config_digest(config_to_dict(self.config)),
                "data": self.data.report.fingerprint,
                "processes": distributed.world_size(),
                "rows": self.rows_a_step,
                "trackers": tracker_ids(self.folder.path),
            },
            watchdog=self.config.watchdog,
            name_rows=self.data.named_rows,
            callbacks=[
                ProgressCallback(self.folder.progress),
                TrackerCallback(tracker),
                *([ProfileCallback(self.folder.trace, self.placement.device)] if self.config.trainer.profile else []),
                *self._build_pruning(),
                *callbacks,
            ],
        )

    @property
    def rows_a_step(self) -> int:
        """How many rows, or packs, the processes take together in an optimizer step."""
        trainer = self.config.trainer
        return trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * distributed.world_size()

    def _build_step(self, model: PreTrainedModel) -> FastStep:
        packed = self.data.packed
        width = self.config.data.pack_width
        packs = Packs(width, packed.most_rows, packed.longest_row) if packed and width else None
        step = FastStep(model, self.config.trainer, self.config.quantization, self.placement, packs, self.objective)
        if step.is_active:
            console.say_rows([("fast step", str(step))])
        return step

    def _build_meter(self, model: PreTrainedModel) -> Meter:
        device, operations = self.placement.device, self._count_operations(model)
        return Meter(
            device,
            peak_memory_gb=partial(peak_memory_gb, device),
            operations=operations.total if operations is not None else None,
            rate=matrix_rate(device, self.placement.compute_dtype),
        )

    def _count_operations(self, model: PreTrainedModel) -> Operations | None:
        """Returns what training takes a token; None for an architecture whose matrices are not known."""
        facts = self.model_config.get_text_config().to_dict()
        if facts["model_type"] not in FAMILIES:
            log.info("model FLOP utilisation is not known for the model type %s", facts["model_type"])
            return None
        trained = adapters.count_parameters(model).trainable if self.config.lora.enabled else 0
        return count_operations(read_shape(facts, self.config.model.name), trained)

    def _check_device(self) -> None:
        """Raises `ConfigError` for what a training is to have of a CUDA device, where there is none."""
        check_trainer()
        _ = self.objective
        trainer, device = self.config.trainer, self.placement.device
        if device.type == "cuda":
            return
        if OPTIMIZERS[trainer.optim].needs_cuda:
            raise no_cuda(trainer.optim, device.type)
        here = f"and this run computes on {device.type}"
        if trainer.memory_budget not in (None, "auto"):
            raise ConfigError(
                f"trainer.memory_budget={trainer.memory_budget} is one of a CUDA device's memory, {here}; leave it out"
            )
        wanted = {"fused_attention": trainer.fused_attention, "flash_attention": trainer.flash_attention.value}
        for name, value in wanted.items():
            if value not in (False, "auto"):
                said = str(value).lower()
                raise ConfigError(f"trainer.{name}={said} runs on CUDA only, {here}; set trainer.{name}=auto")

    def _build_budget(self, step: FastStep, *, longest: int) -> Budget | None:
        """Returns what `trainer.memory_budget` allows for rows of up to `longest` tokens."""
        wanted, device = self.config.trainer.memory_budget, self.placement.device
        if wanted is None or device.type != "cuda":
            return None
        shape = read_shape(self.model_config.get_text_config().to_dict(), f"trainer.memory_budget={wanted}")
        kind = PlanStep.fast if step.parts["fused_linear"] == "on" else PlanStep.plain
        setup = replace(read_setup(self.config, shape), step=kind, length=longest)

        def added(checkpointed: int, offloaded: int, rows: int, length: int) -> float:
            plan = replace(setup, checkpointed=checkpointed, offloaded=offloaded, rows=rows, length=length)
            return Ledger(shape, plan).added + step.extra_bytes(rows, length)

        formula = Formula(Ledger(shape, setup).at_start, setup.accumulates, added, setup.rows, longest)
        cap = parse_size(wanted)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit = min(cap, free) if cap is not None else free
        return Budget(formula, len(step.layers), limit * (1 - FRAGMENTS), cap, device)

    @staticmethod
    def _build_pruning() -> list[Any]:
        """Returns what reports to the search that this run is a trial of, if that ends trials early."""
        if (link := os.environ.get(TRIAL_VARIABLE)) is None:
            return []
        from qlora.runtime.search_trial import TrialLink  # Optuna is an extra
        from qlora.training.pruning import PruningCallback

        return [PruningCallback(TrialLink.from_text(link))]


def _first_used(rows: Dataset, ids: Collection[int]) -> int | None:
    """Returns the first token of `rows` that is one of `ids`; None: they hold none of them."""
    searched = pa.array(sorted(ids))
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(10_000):
        tokens = pc.list_flatten(batch["input_ids"])
        used = tokens.filter(pc.is_in(tokens, value_set=searched.cast(tokens.type)))
        if len(used):
            return int(used[0].as_py())
    return None
