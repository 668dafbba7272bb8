"""The parts of a run: device, tokenizer, data, models, evaluator and trainer, each built when it is first needed.

A session knows no task. What differs between tasks is in its `needs`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qlora import adapters
from qlora.adapters.code_files import check_code_files
from qlora.config.paths import short_path
from qlora.config.registries.objectives import WHOLE_TEXTS, Head, RowKind
from qlora.config.registries.rope_scaling import check_positions, scaled_context
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import (
    Config,
    Device,
    EvaluationName,
    ExpertsOffload,
    Keep,
    Parallel,
    Reference,
    TaskName,
    Weights,
)
from qlora.config.schema.data import ROW_LENGTH
from qlora.config.schema.evaluation import known_metrics_of_rows
from qlora.config.schema.loss import may_share_prompts
from qlora.config.training_length import TrainingLength, training_length
from qlora.data.batching.collate import (
    Collator,
    PartnersCollator,
    SharedPromptsCollator,
    SidesCollator,
    WholeTextsCollator,
)
from qlora.data.batching.row_encoder import RowEncoder, build_encoder
from qlora.data.chat.templates import choose_saved_template
from qlora.data.data_set import Questions
from qlora.data.ingest.row_files import read_rows
from qlora.data.ingest.sources import load_hub
from qlora.data.pipeline import Data, StreamLength, build_data
from qlora.data.used_tokens import first_used
from qlora.errors import ConfigError, DataError, Pruned, Stopped
from qlora.evaluation.answer_measures import AnswerMeasurer
from qlora.evaluation.head_measures import HeadMeasurer
from qlora.evaluation.measure import Measurement, Measurer, Suite, evaluation_mode
from qlora.evaluation.metrics import find_metrics
from qlora.evaluation.suites import build_suite, fit_answers
from qlora.evaluation.wins import Judge, count_wins, find_judge
from qlora.experts.host import CudaCopies, describe_waiting, experts_on_host
from qlora.models import loading, random_weights
from qlora.models.context import describe_limit, fit_rows, model_context
from qlora.models.decoder import read_decoder
from qlora.models.fingerprint import Base, adapter_digest, read_base, write_base
from qlora.models.finished_model import check_not_rounded
from qlora.models.first_pass import explain_nonfinite, try_training
from qlora.models.model_config import build_model_config, has_rope, load_model_config
from qlora.models.model_files import locate
from qlora.models.new_tokens import add_end_token, resize_embeddings
from qlora.models.same_base import check_base, identify_base
from qlora.models.saved_quantization import open_decoded
from qlora.models.tokenizer import (
    check_vocabulary,
    load_saved_tokenizer,
    load_tokenizer,
    pad_token_id,
    refuse_token,
    repair_special_tokens,
)
from qlora.models.weight_files import Checkpoint, Tensors, local_files
from qlora.objectives import Objective, build_objective
from qlora.objectives.answers import AnswerLoss
from qlora.objectives.head_loss import HeadLoss
from qlora.planning.waiting_experts import RunOnGpu, waiting_for_run
from qlora.quantization.method import find_method
from qlora.quantization.placement import find_placement
from qlora.reporting.start_lines import model_lines
from qlora.runtime import distributed
from qlora.runtime.device import Placement, computes_bf16, find_device, free_memory
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.row_processes import row_takers
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.sweep_job import SweepJob
from qlora.runtime.trained import find_trained
from qlora.step.reference import ReferenceWeights
from qlora.step.shard import shard_base
from qlora.text import listed
from qlora.training.device_checks import check_checkpointing
from qlora.training.keep import KeepRule
from qlora.training.stopping import Stop
from qlora.training.trackers import NoTracker, TrackedRun, Tracker, build_tracker
from qlora.upstream.peft import base_of
from qlora.upstream.torch import as_dataset
from qlora.upstream.transformers import token_ids

log = logging.getLogger(__name__)

T = TypeVar("T")

RowsCollator = Collator | SharedPromptsCollator | SidesCollator | WholeTextsCollator | PartnersCollator


@dataclass(frozen=True)
class ModelSummary:
    """What is said of a model: lines of the start screen by label, and what has no part in quantization or adapter."""

    lines: dict[str, str]
    count: adapters.ParameterCount
    unquantized: str | None
    """The parts of the base that are not quantized; None: nothing is quantized, or all is."""
    unadapted: str | None
    """The layers that `lora.target_modules=all-linear` gives no adapter; None: there are none, or it is not set."""


class Session:
    """The parts of one run in one folder."""

    def __init__(
        self,
        config: Config,
        output_dir: Path | str,
        overrides: Sequence[str] = (),
        sweep: SweepJob | None = None,
        *,
        needs: Needs,
    ) -> None:
        self.config, self.overrides, self.sweep, self.needs = config, list(overrides), sweep, needs
        self.folder = RunFolder(Path(output_dir))
        self.stop = Stop()
        self.closing_lines: list[tuple[str, str]] = []
        """What the tracker says when the run has ended."""
        self.reference_weights: ReferenceWeights | None = None
        """What a loss that compares takes for the reference of a model that is trained; None: there is none."""
        self.reference: Callable[[], contextlib.AbstractContextManager[None]] | None = None
        """The context in which the loaded model is its reference; None: there is none."""
        self.previous_answers: list[dict[str, Any]] = []
        """The answers of the model before, as `Measurer.predict` returns them: what `evaluation.win` compares with."""

    # Cheap parts first: a broken data set must fail before a large model is loaded.

    @cached_property
    def placement(self) -> Placement:
        """The device and its precision."""
        placement = find_placement(self.config.quantization, find_device(self.config.device))
        if placement.compute_dtype is torch.float16 and computes_bf16(placement.device):
            log.warning(
                "quantization.compute_dtype=fp16 on a device that computes in bf16: fp16 overflows more easily; "
                "compute_dtype=auto takes bf16"
            )
        if placement.param_dtype is torch.float16 and not self.config.lora.enabled and self.needs.rows is Rows.all:
            raise ConfigError(
                "lora=none with fp16 weights cannot train (gradients underflow); use quantization=fp32, or "
                "quantization.compute_dtype=bf16"
            )
        return placement

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; special tokens that it lacks come from the model's config."""
        tokenizer = load_tokenizer(self.config.model)
        if not (self.has_random_weights or (tokenizer.bos_token and tokenizer.eos_token)):
            repair_special_tokens(tokenizer, self.model_config)
        return tokenizer

    @property
    def has_random_weights(self) -> bool:
        """Whether the base weights are initialised from `seed` instead of loaded."""
        return self.config.model.weights is Weights.random

    @cached_property
    def model_config(self) -> Any:
        """transformers' config object of the base model."""
        if self.has_random_weights:
            return build_model_config(self.config.model, self.tokenizer)
        return load_model_config(self.config.model)

    @cached_property
    def pad_token_id(self) -> int:
        """The token id that pads batches."""
        return pad_token_id(self.tokenizer, self._embedding_rows)

    @property
    def _embedding_rows(self) -> int:
        return int(self.model_config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None: its config names no limit, or is not here and not needed."""
        if not self.needs.base:
            return model_context(self.config.model)
        context = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        scaling = self.config.model.rope_scaling
        return context if scaling is None else scaled_context(scaling, context)

    @cached_property
    def new_token_ids(self) -> list[int]:
        """The ids of `model.new_tokens`."""
        return [int(token) for token in token_ids(self.tokenizer, self.config.model.new_tokens)]

    @cached_property
    def collate(self) -> Collator:
        """Turns rows into padded tensors."""
        return Collator(self.pad_token_id)

    def collator(self, width: int = 0) -> RowsCollator:
        """Returns what makes batches of rows or packs to train on, each at least `width` tokens wide."""
        if (packed := self.data.packed) is not None:
            return Collator(self.pad_token_id, width=width, most_cells=(packed.most_cells or 0) if width else 0)
        if self.data.shares_prompts:
            return SharedPromptsCollator(self.pad_token_id)
        if self.row_kind in WHOLE_TEXTS:
            return self._whole_texts
        return Collator(self.pad_token_id, width=width) if self.row_kind is RowKind.tokens else self._sides

    @property
    def _whole_texts(self) -> WholeTextsCollator | PartnersCollator:
        """Lays what a head is to say beside each text."""
        if self.row_kind is RowKind.texts:
            return PartnersCollator(self.pad_token_id)
        return WholeTextsCollator(self.pad_token_id, self.head.labels)

    @property
    def _sides(self) -> SidesCollator:
        """Lays the answers of rows of preference side by side."""
        return SidesCollator(self.pad_token_id, fit_rows(self.config.data, self.context).longest_row)

    @cached_property
    def data(self) -> Data:
        """Tokenized rows, to train on and to measure on."""
        with distributed.local_main_process_first():
            data = build_data(
                fit_rows(self.config.data, self.context),
                self.tokenizer,
                need_train=self.needs.rows is Rows.all,
                questions=self._questions if self.needs.questions else None,
                kind=self.row_kind,
                shares_prompts=self._shares_prompts,
                length=self._stream_length,
            )
        distributed.check_same("tokens", data.report.fingerprint)
        self._check_columns(data.train)
        return data

    @property
    def _stream_length(self) -> StreamLength | None:
        """How much the training run takes of streamed rows; None: they are read whole, or not trained on."""
        config = self.config
        if not (config.data.streaming and config.task.name.trains and config.task.train):
            return None
        assert config.trainer.max_steps is not None, "Config checks it"
        return StreamLength(config.trainer.max_steps, self.rows_a_step, config.seed)

    @property
    def _shares_prompts(self) -> bool:
        """Whether the training step is to compute the prompt of a pair once; some architectures cannot."""
        on_gpu = self.config.device in (Device.auto, Device.cuda) and torch.cuda.is_available()
        return self.row_kind is RowKind.pairs and may_share_prompts(
            self.config.loss, self.config.trainer, on_gpu=on_gpu
        )

    def separate_prompts(self) -> None:
        """Takes the rows as those of a step that computes a prompt with each of its answers."""
        self.data = self.data.without_sharing(fit_rows(self.config.data, self.context))
        self.__dict__.pop("length", None)  # it follows from the packs

    @property
    def row_kind(self) -> RowKind:
        """What a row is to the training objective; rows that are answered alone are those of any other."""
        return RowKind.tokens if self.needs.questions else getattr(self.objective, "rows", RowKind.tokens)

    @property
    def _questions(self) -> Questions:
        """How rows without an answer ask: as in `task=chat`, where the training run saved its template."""
        is_saved = self.saved_template is not None
        return Questions(self.chat_encoder.writer.template if is_saved else None)

    @property
    def row_limit(self) -> str:
        """How long a row may be, and why."""
        return describe_limit(self.config.data, self.config.model.name, self.context)

    @cached_property
    def objective(self) -> Objective:
        """What the training run minimises."""
        return build_objective(
            self.config.loss, self.config.head, label_smoothing=self.config.trainer.label_smoothing_factor
        )

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
        if self.data.eval is None:
            data = self.config.data
            raise DataError(
                f"data.path={data.path}: no row is held out, so there is nothing to measure; name rows with "
                "data.eval_path=FILE, or how many to hold out with data.eval_dataset_size"
            )
        _ = self.judge  # a function that is not there fails before the model is loaded
        return Measurer(
            rows=self.data.eval,
            collate=self.collate,
            tokenizer=self.tokenizer,
            generation=fit_answers(self.data.eval, self.needs.answers, self.config, self.context),
            metrics=find_metrics(self.config.evaluation.metrics),
            pad_token_id=self.pad_token_id,
            batch_size=self.config.trainer.per_device_eval_batch_size,
            device=self.placement.device,
            autocast=self.placement.autocast,
            seed=self.config.seed,
            dtype=self.placement.compute_dtype,
            compare=self._comparison(),
            reads_tokens=self.row_kind not in WHOLE_TEXTS,
        )

    def _comparison(self) -> Callable[[torch.nn.Module], Measurement] | None:
        """Returns what measures rows of preference or whole texts; None: rows are those of a loss over tokens."""
        if self.head_measurer is not None:
            return self.head_measurer.measure
        if self.row_kind is RowKind.tokens or not isinstance(self.objective, AnswerLoss):
            return None
        assert self.data.eval is not None
        return AnswerMeasurer(
            self.data.eval,
            self._sides,
            self.objective,
            lambda: self.reference,
            self.config.trainer.per_device_eval_batch_size,
            self.placement.device,
        ).measure

    @cached_property
    def head_measurer(self) -> HeadMeasurer | None:
        """Measures what a head says of the held-out texts; None: rows are no whole texts."""
        if not isinstance(self.objective, HeadLoss) or self.data.eval is None:
            return None
        self._check_classes(self.data.eval)
        return HeadMeasurer(
            self.data.eval,
            self._whole_texts,
            self.objective,
            self.head.labels,
            self.config.trainer.per_device_eval_batch_size,
            self.placement.device,
        )

    @property
    def baseline(self) -> str:
        """What is measured beside what was trained."""
        return getattr(self.objective, "constant_name", "") or "the untuned base"

    @cached_property
    def head(self) -> adapters.HeadLayout:
        """What the outputs of the head are: by the rows to train on, else as it was saved with an adapter.

        Raises a `UserError` for a class of rows that `head.labels` leaves out.
        """
        loss, folder = self.config.loss, None if self.needs.rows is Rows.all else self.trained[0]
        if folder is not None and (saved := adapters.read_head(folder)) is not None:
            return saved
        if loss.is_preference:
            return adapters.HeadLayout(Head.regress, 1, is_reward=True)
        if self.row_kind is RowKind.texts:
            self._check_partners()
            return adapters.HeadLayout(Head.embed, 0, pooling="mean" if self.config.head.pools_mean else "last")
        if self.needs.rows is not Rows.all or self.data.train is None:
            raise DataError(
                f"head={self.config.head.name.value} says nothing without an adapter, in which its head is saved; name "
                "one with adapter=FOLDER, or train one"
            )
        if self.row_kind is RowKind.values:
            return adapters.HeadLayout(Head.regress, len(self.data.train[0]["values"]))
        labels = tuple(self.config.head.labels or self.data.labels)
        for name in self.data.labels:
            if name not in labels:
                raise ConfigError(
                    f"head.labels={listed(labels)} leaves out {name!r}, which rows to train on are labelled with; add "
                    "it, or leave head.labels out"
                )
        return adapters.HeadLayout(Head.classify, len(labels), labels)

    def _check_classes(self, rows: Dataset) -> None:
        """Refuses a held-out text of a class that no row to train on has."""
        if self.row_kind is RowKind.texts:
            self._check_measured(is_scored=bool(rows[0]["values"]))
        elif self.row_kind is RowKind.classes:
            known = set(self.head.labels)
            if unknown := [
                (row, name) for row, name in zip(rows["row"], rows["label"], strict=True) if name not in known
            ]:
                row, name = unknown[0]
                raise DataError(
                    f"{self.config.data.name}: held-out row {row + 1} is labelled {name!r}, a class that is not one of "
                    f"those trained ({listed(self.head.labels)}); add rows of it to train on, draw others to hold out "
                    "with data.split_seed, or leave such rows out"
                )
        elif (count := len(rows[0]["values"])) != self.head.outputs:
            raise DataError(
                f"{self.config.data.name}: held-out rows hold {count} numbers, and the head says {self.head.outputs}; "
                "name the columns that it was trained on with data.label"
            )

    def _check_partners(self) -> None:
        """Refuses micro-batches of one pair, in which there is no wrong text."""
        rows = self.data.train if self.reads_rows else None
        alone = self.config.trainer.per_device_train_batch_size == 1
        if rows is not None and alone and len(rows[0]["partners"]) == 1 and not rows[0]["values"]:
            raise ConfigError(
                "trainer.per_device_train_batch_size=1 leaves a pair alone, and head=embed learns from the texts of "
                "the other rows of a micro-batch; set it to 2 or more (8 to 64 are usual), or give a column negative"
            )

    def _check_measured(self, *, is_scored: bool) -> None:
        """Refuses to go by a measure that texts with scores have, or those without."""
        missing = ("mrr", "ndcg") if is_scored else ("pearson", "spearman")
        for key, name in (("objective", self.config.objective), ("trainer.keep_metric", self.config.kept_metric)):
            if name is not None and name.removeprefix("base_").removeprefix("eval_") in missing:
                what = "have scores, of which correlations are" if is_scored else "have no scores, and ranks are"
                raise ConfigError(
                    f"{key}={name}: the held-out rows {what} measured; choose "
                    f"{'eval_spearman' if is_scored else 'eval_ndcg'}, or leave it out"
                )

    @property
    def reads_rows(self) -> bool:
        """Whether rows are read."""
        return self.needs.rows is not Rows.none

    @property
    def measures_rows(self) -> bool:
        """Whether held-out rows are measured: there are some, and the task reads them."""
        return self.reads_rows and self.data.eval is not None

    @cached_property
    def length(self) -> TrainingLength:
        """How long the training run is."""
        data, processes = self.data, row_takers(self.config.trainer.context_parallel)
        assert data.train is not None
        is_stream = self.config.data.streaming
        unit = "packs" if self.config.data.packing else "rows"
        units = len(data.packed or data.train)
        length = training_length(self.config.trainer, units, unit=unit, processes=processes, is_stream=is_stream)
        return length if self.measures_rows else replace(length, eval_steps=None)

    @cached_property
    def keep_rule(self) -> KeepRule:
        """What of the training run is kept."""
        keep = self.config.trainer.keep
        return KeepRule(Keep.last if keep is Keep.best and not self.measures_rows else keep, self.config.kept_metric)

    @cached_property
    def suite(self) -> Suite | None:
        """The test of `evaluation=mmlu` or `evaluation=lm-eval`."""
        if self.config.evaluation.name is EvaluationName.rows:
            return None
        return build_suite(
            self.config,
            tokenizer=self.tokenizer,
            context=lambda: self.context,
            pad_token_id=lambda: self.pad_token_id,
            device=self.placement.device,
            read_file=partial(read_rows, key="evaluation.path"),
            load_hub=load_hub,
        )

    # Chat templates and tokens

    @property
    def saved_template(self) -> str | None:
        """The chat template that was saved with the adapter or the finetuned model."""
        return self.trained_tokenizer.chat_template if self.trained_tokenizer is not None else None

    @cached_property
    def chat_encoder(self) -> RowEncoder:
        """Writes a conversation in tokens as the training run of `adapter` did; no rows are read."""
        template = choose_saved_template(self.trained_tokenizer, self.tokenizer, self.config.data.template)
        return build_encoder(self.config.data, self.tokenizer, template)

    @property
    def end_id(self) -> int | None:
        """The end-of-turn token of the template that writes conversations; None: there is none."""
        if self.needs.saved_template and (not self.reads_rows or self.saved_template is not None):
            return self.chat_encoder.writer.end_id
        return self.data.end_id if self.reads_rows else None

    @cached_property
    def is_trainable(self) -> bool:
        """True; raises a `UserError`, before rows or weights are read, for a base that the config does not fit."""
        _ = self._beyond_embeddings
        self._check_positions()
        model, quantization = self.config.model, self.config.quantization
        loading.check_quantization(model, quantization, self.model_config, placement=self.placement)
        if quantization.experts_offload is ExpertsOffload.all:
            _ = self.waiting_experts
        return True

    def _check_positions(self) -> None:
        """Refuses rows that are to be longer than what the base reads."""
        data, model, context = self.config.data, self.config.model, self.context
        trains = self.needs.rows is Rows.all and self.config.task.train
        if trains and data.max_length not in (None, ROW_LENGTH) and context is not None:
            rotary, is_scaled = has_rope(self.model_config), model.rope_scaling is not None
            check_positions(data.max_length, context, model.name, has_rope=rotary, is_scaled=is_scaled)

    @cached_property
    def _beyond_embeddings(self) -> dict[int, str]:
        """The tokens, by id, that the base has no embedding for."""
        return check_vocabulary(self.tokenizer, self.config.model, self._embedding_rows)

    @cached_property
    def tokens_without_embedding(self) -> list[str]:
        """The tokens that the base has no embedding for; a warning names them, and a row that holds one is refused."""
        model, count, beyond = self.config.model, self._embedding_rows, self._beyond_embeddings
        if not beyond:
            return []
        tokens = list(beyond.values())
        for part in (self.data.train, self.data.eval) if self.reads_rows else ():
            if part is not None and (used := first_used(part, beyond)) is not None:
                raise refuse_token(self.tokenizer, model, count, beyond[used], tokens)
        if self.reads_rows and self.data.stream is not None:
            self.data.stream.check = partial(self._refuse_row, beyond, tokens)
        log.warning(
            "the tokenizer has %s tokens and the base embeddings for %s: a text with %s cannot be read (no row here "
            "has it); model.new_tokens gives a token an embedding",
            *(f"{len(self.tokenizer.get_vocab()):,}", f"{count:,}", " or ".join(map(repr, tokens[:3]))),
        )
        return tokens

    # The base and what was trained on it

    def load_base(self) -> PreTrainedModel:
        """Loads or initialises the frozen base."""
        _ = self.is_trainable
        _ = self.tokens_without_embedding
        if not self.has_random_weights:
            return self._load(None)
        with self._waiting():
            base = loading.build_random_base(
                self.config.model, self.config.quantization, self._random_weights(), self._base_device
            )
        return self._fit_to_tokens(base)

    def _load(self, folder: Path | None) -> PreTrainedModel:
        with self._waiting():
            base = loading.load_base(
                self.config.model,
                self.config.quantization,
                placement=replace(self.placement, device=self._base_device),
                model_config=self.model_config,
                folder=folder,
                tried=not self.is_sharded,
            )
        return self._fit_to_tokens(base)

    @cached_property
    def waiting_experts(self) -> int | None:
        """The number of layers whose experts wait in the host's memory; None: those of all layers."""
        model, device = self.config.model, self.placement.device
        run = RunOnGpu(
            device.type,
            self.is_sharded or bool(model.device_map or model.max_memory),
            settings=lambda: self.model_config.get_text_config().to_dict(),
            free=lambda: free_memory(device),
            longest_row=self._longest_row,
        )
        return waiting_for_run(self.config, run)

    def _refuse_row(self, beyond: dict[int, str], tokens: list[str], row: Any) -> None:
        """Refuses a streamed row with a token that the base has no embedding for."""
        if (used := next((int(token) for token in row.ids if int(token) in beyond), None)) is not None:
            raise refuse_token(self.tokenizer, self.config.model, self._embedding_rows, beyond[used], tokens)

    def _longest_row(self) -> int | None:
        """Returns the tokens of the longest row or pack to train on; None: nothing is trained."""
        if self.needs.rows is not Rows.all or not self.config.task.train:
            return None
        return self.data.max_length

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which the base is loaded, so that experts that wait never fill the GPU."""
        if self.waiting_experts == 0:
            return contextlib.nullcontext()
        return experts_on_host(self.waiting_experts, CudaCopies(self.placement.device))

    @property
    def _base_device(self) -> torch.device:
        """Where the base is loaded to; from the host's memory it is sharded layer by layer."""
        return torch.device("cpu") if self.is_sharded else self.placement.device

    def _fit_to_tokens(self, base: PreTrainedModel) -> PreTrainedModel:
        resize_embeddings(base, self.new_token_ids)
        add_end_token(base, self.end_id)
        return base

    def tensors(self) -> Tensors:
        """Opens the base's weights as they are before quantization."""
        if self.has_random_weights:
            return self._random_weights()
        model = self.config.model
        saved = Checkpoint(local_files(locate(model.name), revision=model.revision, cache_dir=model.cache_dir))
        return open_decoded(saved, self.model_config, f"model.name={model.name}")

    def _random_weights(self) -> random_weights.RandomWeights:
        return random_weights.RandomWeights(self.model_config, placement=self.placement, seed=self.config.seed)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the base only, so that all must call the model together."""
        return self.config.trainer.parallel is Parallel.fsdp and distributed.world_size() > 1

    def build_model(self) -> PreTrainedModel | PeftModel:
        """Returns the base with a fresh adapter, as it is trained."""
        base = self.load_base()
        check_checkpointing(self.config.trainer, base)
        model = self.add_adapter(base)
        if isinstance(model, PeftModel) and isinstance(self.objective, AnswerLoss) and self.objective.compares:
            is_base = self.config.loss.reference is Reference.base
            self.reference_weights = adapters.reference_at_start(model, is_base=is_base)
            self.reference = self.reference_weights.active
        if not self.is_sharded:
            try_training(model, f"model.name={self.config.model.name}", self.placement)
        else:
            assert isinstance(model, PeftModel), "Config checks it"
            shard_base(model, self.placement.device, distributed.world_size())
        return model

    def add_adapter(self, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Attaches a fresh adapter initialised from `seed`, or that of `lora.start`, or makes all weights trainable."""
        set_seed(self.config.seed)
        if self.start is not None:
            return adapters.continue_adapter(self.config.lora, base, self.start, self.config.model.name)
        if not self.config.lora.enabled:
            base.requires_grad_(True)
            return base
        model = adapters.add_lora(
            self.config.lora,
            base,
            tensors=self.tensors,
            new_token_ids=self.new_token_ids,
            batches=self._batches(),
            head=self.head if self.config.loss.has_head else None,
        )
        if self.config.lora.init in adapters.REWRITES_BASE and distributed.is_main_process():
            adapters.save_initial_adapter(model, self.folder.path / "initial_adapter")
        return model

    def _batches(self) -> DataLoader[Any]:
        assert self.data.train is not None
        size = self.config.trainer.per_device_train_batch_size

        def on_device(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(self.placement.device) for name, tensor in self.collate(rows).items()}

        return DataLoader(as_dataset(self.data.train), batch_size=size, collate_fn=on_device)

    @cached_property
    def start(self) -> Path | None:
        """The adapter that is trained further; raises a `UserError` for one of another base. None: a fresh one is."""
        if self.config.lora.start is None:
            return None
        folder = Path(self.config.lora.start)
        adapters.check_adapter_folder(folder, key="lora.start")
        self.check_base(f"lora.start={folder}", read_base(folder))
        return folder

    @cached_property
    def trained(self) -> tuple[Path | None, Path | None]:
        """The (adapter, fully finetuned model) that `adapter` or this folder holds; (None, None): the base.

        Raises `UserError` where there is none, and for an adapter of another base than the task would use it on.
        """
        adapter, full = find_trained(self.config, self.overrides, self.folder.path)
        if adapter is not None:
            adapters.check_adapter_folder(adapter)
            if self.needs.base:
                self.check_base(f"adapter={adapter}", read_base(adapter))
        return adapter, full

    @cached_property
    def trained_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer saved with what `adapter` names, with the same tokens as `tokenizer`; None: there is none."""
        folder = self.trained[0] or self.trained[1]
        if folder is None:
            return None
        check_code_files(folder, self.config.model)
        return load_saved_tokenizer(folder, self.config.model, self.tokenizer)

    def load_trained(self) -> PreTrainedModel | PeftModel:
        """Loads what `adapter` names: the base with an adapter, a fully finetuned model, or the bare base.

        Raises `DataError` where the base's tokens are not those of the training run.
        """
        adapter, full = self.trained
        _ = self.trained_tokenizer  # before the weights
        if adapter is not None:
            self._check_head(adapter)
            model = adapters.load_adapter(self.load_base(), adapter, self.config.model.name)
            if self._compares_rows:
                is_base = self.config.loss.reference is Reference.base
                self.reference = adapters.reference_of_trained(model, None if is_base else self.start)
            return model
        if full is None:
            base = self.load_base()
            if self.config.loss.has_head and self.head.outputs:
                adapters.attach_head(base, self.head.outputs)
            if self._compares_rows:
                self.reference = contextlib.nullcontext  # the base is its own reference
            return base
        if self._compares_rows or self.config.loss.has_head:
            raise DataError(
                f"adapter={full} is a whole model, and loss={self.config.loss.name} is measured with an adapter on its "
                "base; choose loss=sft, or name the adapter"
            )
        check_not_rounded(full, self.config.quantization)
        return self._load(full)

    @property
    def _compares_rows(self) -> bool:
        """Whether rows of preference are measured against a reference."""
        return self.reads_rows and self.config.loss.is_preference and self.config.loss.compares

    def _check_head(self, adapter: Path) -> None:
        """Refuses a head where texts are to be written, and a language model where something is to be said of them."""
        task, saved, loss = self.config.task.name, adapters.read_head(adapter), self.config.loss
        if saved is not None and task not in (TaskName.train, TaskName.evaluate, TaskName.predict):
            written = "the rewards of pairs" if saved.is_reward else "what it says of held-out texts"
            raise DataError(
                f"adapter={adapter} is a {saved.kind}: it scores texts and answers nothing; task={task.value} needs a "
                f"language model, and task=predict writes {written}"
            )
        if saved is not None and saved.name is not loss.head:
            raise DataError(f"adapter={adapter} is a {saved.kind}; add {saved.setting}, or name another adapter")
        if saved is not None and saved.pooling and saved.pooling != self.config.head.pooling:
            raise DataError(f"adapter={adapter} was trained with head.pooling={saved.pooling}; set it so")
        if saved is None and loss.has_head:
            kind, setting = ("reward model", "loss=reward") if loss.is_preference else ("model with a head", "head")
            raise DataError(f"adapter={adapter} is no {kind}; leave {setting} out, or name another adapter")

    @cached_property
    def base(self) -> Base:
        """The base that the config names, identified by its weights; those on the hub are downloaded for it."""
        model_config = None if self.has_random_weights else self.model_config  # says what is wrong with a folder
        return identify_base(self.config, model_config, self.placement)

    def check_base(self, user: str, trained: Base, otherwise: str = "") -> bool:
        """Returns whether the base is the one that `user` was trained on, as `same_base.check_base` does."""
        return check_base(user, trained, self.base, self.config.base, otherwise=otherwise)

    # Describing, tracking and measuring

    @property
    def run_name(self) -> str:
        """The name in the tracker: `name`, or the folder's."""
        return self.config.name or self.folder.path.name

    def describe(self, model: PreTrainedModel | PeftModel) -> ModelSummary:
        """Returns what the start screen and the reports say of a model."""
        decoder = read_decoder(base_of(model) if isinstance(model, PeftModel) else model)
        lora, count = self.config.lora, adapters.count_parameters(model)
        unquantized = decoder.describe_unquantized() if find_method(self.config.quantization).is_quantized else None
        is_all_linear = lora.enabled and lora.target_modules == ["all-linear"]
        lines = model_lines(self.config, count, decoder.beside, unquantized)
        if (waiting := describe_waiting(model)) is not None:
            lines |= {"experts": waiting}
        if self.needs.rows is Rows.all and self.start is not None:
            lines |= {"start": f"{self.start}, trained further (sha256 {adapter_digest(self.start)[:16]})"}
        lines |= {"device": str(self.placement), "folder": short_path(self.folder.path)}
        return ModelSummary(lines, count, unquantized, decoder.describe_unadapted() if is_all_linear else None)

    @contextlib.contextmanager
    def tracking(self, *, resumes: bool = False) -> Iterator[tuple[Tracker, dict[str, float]]]:
        """Yields the tracker and the metrics to fill; closes it with what was measured, also after a failure.

        `resumes` says whether a run that the folder has in the tracker is continued.
        """
        run = TrackedRun(
            name=self.run_name,
            folder=self.folder.path,
            config=config_to_dict(self.config),
            sweep=self.sweep,
            resumes=resumes,
        )
        tracker = build_tracker(self.config.tracking, run) if self.needs.tracker else NoTracker()
        summary: dict[str, float] = {}
        status = "failed"
        try:
            yield tracker, summary
            status = "finished"
        except Pruned:
            status = "pruned"
            raise
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        finally:
            tracker.finish(status, {key: value for key, value in summary.items() if math.isfinite(value)})
            self.closing_lines = tracker.closing_lines()

    @property
    def is_tracked(self) -> bool:
        """Whether metrics go to a tracker."""
        return self.needs.tracker and bool(self.config.tracking.trackers)

    @property
    def scored_answers(self) -> int | None:
        """How many held-out rows are answered where the model is measured; None: all."""
        return self.config.evaluation.scored_answers

    @cached_property
    def judge(self) -> Judge | None:
        """Says which of two answers is better; None: nothing asks for it."""
        return find_judge(self.config.evaluation.win)

    def in_main_process(self, work: Callable[[], T]) -> T:
        """Returns in all processes what `work` returns in the main one; with a sharded base, all of them do it."""
        return distributed.broadcast(work() if distributed.is_main_process() or self.is_sharded else None)  # type: ignore[return-value]

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measures the held-out rows and the suite, as far as the task and `evaluation=` ask for them."""

        def measure() -> Measurement:
            rows = self.measurer.measure(model, answers=self.scored_answers) if self.measures_rows else Measurement()
            return rows | self._count_wins(rows) | self._measure_suite(model)

        return self.in_main_process(measure)

    def _count_wins(self, measured: Measurement) -> Measurement:
        if self.judge is None or not (measured.predictions and self.previous_answers):
            return Measurement()
        return count_wins(self.judge, measured.predictions, self.previous_answers)

    def _measure_suite(self, model: torch.nn.Module) -> Measurement:
        if self.suite is None:
            return Measurement()
        with evaluation_mode(model), self.placement.autocast():
            return self.suite.measure(model)

    def measure_base(self, model: PreTrainedModel | PeftModel) -> Measurement:
        """Measures a model without an adapter, of which a head says the same of all texts.

        Raises `UserError` if its loss is NaN or infinite.
        """
        if self.head_measurer is not None and self.head_measurer.loss.constant_name:
            return self.in_main_process(self.head_measurer.measure_constant)
        measured = self.measure(model)
        if not math.isfinite(measured.metrics.get("loss", 0.0)):
            base = base_of(model) if isinstance(model, PeftModel) else model
            forward = partial(self.measurer.measure, model, answers=0)
            key, what = f"model.name={self.config.model.name}", "its loss on the held-out rows is"
            raise self.in_main_process(lambda: explain_nonfinite(base, key, self.placement, forward, what))
        return measured

    @property
    def rows_a_step(self) -> int:
        """How many rows, or packs, the processes take together in an optimizer step."""
        trainer = self.config.trainer
        takers = row_takers(trainer.context_parallel)
        return trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * takers

    def measure_step(self, model: torch.nn.Module, step: int, tracker: Tracker) -> dict[str, float]:
        """Measures the model in the middle of training, and shows the tracker some answers."""
        printed = self.config.evaluation.show_predictions if self.is_tracked else 0
        kept = self.keep_rule.metric.removeprefix("eval_") if self.keep_rule.keep is not Keep.last else "loss"
        is_of_answers = kept in known_metrics_of_rows(self.config.evaluation)[2:]
        measured = self.measurer.measure(model, answers=self.scored_answers if is_of_answers else printed)
        tracker.log_predictions(measured.predictions[:printed], step=step)
        if is_of_answers:
            measured |= self._count_wins(measured)
        tokens = ["perplexity"] if self.measurer.reads_tokens else []
        asked = self.config.loss.measured
        if not tokens:  # which of them are measured depends on the rows
            asked = [name for name in asked if name in measured.metrics]
        names = ["loss", *tokens, *asked, *([kept] if is_of_answers else [])]
        metrics = {name: measured.metrics[name] for name in names}
        if self.suite is not None and self.suite.at_each_evaluation:
            metrics |= self._measure_suite(model).metrics
        return metrics

    def write_head(self, folder: Path, model: PeftModel) -> None:
        """Writes beside an adapter what its head says, if it has one."""
        if self.config.loss.has_head:
            adapters.write_head(self.head, base_of(model), folder, pad_token_id=self.pad_token_id)

    def finish_adapter(self, folder: Path, model: torch.nn.Module) -> None:
        """Completes the adapter of a checkpoint with its base, and checks what was written."""
        if isinstance(model, PeftModel):
            write_base(self.base, folder)
            self.write_head(folder, model)
        adapters.verify_adapter(folder, model)
