"""Run: the one place where config, data, model, trainer and reports meet."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qlora import compose, console
from qlora.chat import Speaker, choose_saved_template, hold
from qlora.data import Data, build_data, column, load_hub, read_rows
from qlora.data.collate import Collator, count_work
from qlora.data.tokenize import Tokenizer, build_tokenizer
from qlora.data.writer import file_digest
from qlora.errors import ConfigError, Pruned, did_you_mean
from qlora.evaluation.answers import AnswerLog, rows_digest
from qlora.evaluation.generation import plan_batches, prompt_lengths
from qlora.evaluation.lm_harness import LmHarness
from qlora.evaluation.measure import Measurement, Measurer, Suite, evaluation_mode
from qlora.evaluation.metrics import find_metrics
from qlora.evaluation.mmlu import HUB_SET, HUB_SUBSET, Mmlu, load_questions
from qlora.folder import RunFolder, find_adapter, flatten, iter_lines, read_json, read_lines, write_lines
from qlora.membership import TRIAL_VARIABLE, Membership
from qlora.merging import PROMPT_TOKENS, REPORT, Merge
from qlora.models import adapters, drawing, loading
from qlora.models.checkpoint import Checkpoint, Tensors, local_files
from qlora.models.device import (
    Placement,
    computes_bf16,
    find_device,
    matrix_rate,
    peak_memory_gb,
    place,
    reset_peak_memory,
)
from qlora.models.fast import FastStep, Packs
from qlora.models.files import is_local, locate
from qlora.models.fingerprint import adapter_digest, folder_digest
from qlora.models.hub import push
from qlora.models.packing_guard import check_packing
from qlora.models.tokenizer import (
    load_saved_tokenizer,
    load_tokenizer,
    pad_token_id,
    repair_special_tokens,
    save_tokenizer,
)
from qlora.plan import read_setup
from qlora.planning.memory import FRAGMENTS, Ledger
from qlora.planning.shape import FAMILIES, read_shape
from qlora.planning.speed import Operations, count_operations
from qlora.preview import build_preview, preview_metrics
from qlora.reporting.card import card_on_hub, write_model_card
from qlora.reporting.manifest import build_manifest, code_digest, versions, write_json
from qlora.reporting.plot import plot_loss
from qlora.reporting.preview import plot_lengths, to_html, to_text
from qlora.reporting.run_page import write_run_page
from qlora.schema import Config, EvaluationName, PlanStep, TaskName, TrackingBackend, Weights
from qlora.training.memory import Budget, Formula
from qlora.training.meter import Meter
from qlora.training.profile import ProfileCallback
from qlora.training.progress import ProgressCallback
from qlora.training.tracking import TrackedRun, Tracker, build_tracker
from qlora.training.tracking.callback import TrackerCallback
from qlora.training.trainer import QLoraTrainer, build_arguments, last_checkpoint
from qlora.wording import format_range, is_detail, parse_size

log = logging.getLogger(__name__)


class Run:
    """One config in one folder; a method a task, and parts that are built when first needed.

    `overrides` are the command line's, for the model card, `sweep` is what the run is a job of, for the tracker. The
    same folder may be given again: a finished task returns its stored result, an interrupted training resumes.
    """

    def __init__(
        self, config: Config, output_dir: Path | str, overrides: Sequence[str] = (), sweep: Membership | None = None
    ) -> None:
        self.config, self.overrides, self.sweep = config, list(overrides), sweep
        self.folder = RunFolder(Path(output_dir))

    def execute(self) -> dict[str, Any]:
        """Runs the task of `task=` and returns its result, as stored in the run's folder."""
        tasks = {
            TaskName.train: self.train,
            TaskName.evaluate: self.evaluate,
            TaskName.predict: self.predict,
            TaskName.preview: self.preview,
            TaskName.chat: self.chat,
            TaskName.merge: self.merge,
            TaskName.push: self.push,
        }
        if self.config.task.name not in tasks:
            name = self.config.task.name.value.replace("_", "-")
            raise ConfigError(f"task={name} is no run; start it on the command line: qlora task={name}")
        return tasks[self.config.task.name]()

    # Parts, cheap ones first: a broken data set must fail before a large model is loaded.

    @cached_property
    def placement(self) -> Placement:
        """The device and its precision."""
        placement = place(self.config.quantization, find_device(self.config.device))
        if placement.compute is torch.float16 and computes_bf16(placement.device):
            log.warning(
                "quantization.compute_dtype=fp16 on a device that computes in bf16: fp16 overflows more easily; "
                "compute_dtype=auto takes bf16"
            )
        if placement.weights is torch.float16 and not self.config.lora.enabled:
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
            return loading.draw_model_config(self.config.model, self.tokenizer)
        return loading.load_model_config(self.config.model)

    @cached_property
    def pad_token_id(self) -> int:
        """The id that fills up batches."""
        return pad_token_id(self.tokenizer)

    @cached_property
    def collate(self) -> Collator:
        """Turns rows into padded tensors."""
        return Collator(self.pad_token_id)

    @cached_property
    def data(self) -> Data:
        """Tokenized rows to train and to measure on."""
        task = self.config.task
        training = task.name is TaskName.preview or (task.name is TaskName.train and task.train)
        return build_data(self.config.data, self.tokenizer, need_train=training)

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
        tracked = self.config.tracking.backend is not TrackingBackend.none
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
    def chat_encoder(self) -> Tokenizer:
        """What writes a conversation in tokens as the training of `adapter` did; no rows are read."""
        template = choose_saved_template(self.trained_tokenizer, self.tokenizer, self.config.data.template)
        return build_tokenizer(self.config.data, self.tokenizer, template)

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

    def load_base(self) -> PreTrainedModel:
        """Loads or draws the frozen base."""
        if not self.draws:
            return self._load(None)
        base = loading.draw_base(self.config.model, self.config.quantization, self._drawn_weights())
        return self._fit_to_tokens(base)

    def _load(self, folder: Path | None) -> PreTrainedModel:
        base = loading.load_base(
            self.config.model,
            self.config.quantization,
            placement=self.placement,
            model_config=self.model_config,
            folder=folder,
        )
        return self._fit_to_tokens(base)

    def _fit_to_tokens(self, base: PreTrainedModel) -> PreTrainedModel:
        loading.resize_embeddings(base, self.tokenizer)
        loading.add_end_token(base, self.end_id)
        return base

    def _tensors(self) -> Tensors:
        """Opens the base's weights as they are before quantization."""
        if self.draws:
            return self._drawn_weights()
        model = self.config.model
        return Checkpoint(local_files(locate(model.name), revision=model.revision, cache_dir=model.cache_dir))

    def _drawn_weights(self) -> drawing.DrawnWeights:
        return drawing.DrawnWeights(self.model_config, placement=self.placement, seed=self.config.seed)

    def add_adapter(self, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Attaches a fresh adapter drawn from `seed`, or makes all weights trainable (`lora=none`)."""
        set_seed(self.config.seed)
        if not self.config.lora.enabled:
            base.requires_grad_(True)
            return base
        new_tokens = self.tokenizer.convert_tokens_to_ids(self.config.model.new_tokens)
        model = adapters.add_lora(
            self.config.lora, base, tensors=self._tensors, new_token_ids=new_tokens, batches=self._batches()
        )
        if self.config.lora.init in adapters.REWRITES_BASE:
            adapters.save_initial_adapter(model, self.folder.path / "initial_adapter")
        return model

    def _batches(self) -> DataLoader[Any]:
        assert self.data.train is not None
        size = self.config.trainer.per_device_train_batch_size

        def on_device(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(self.placement.device) for name, tensor in self.collate(rows).items()}

        return DataLoader(self.data.train, batch_size=size, collate_fn=on_device)

    # Tasks

    def train(self) -> dict[str, Any]:
        """Trains, measures and predicts as `task` says; returns the result written to `result.json`."""
        self.folder.create()
        plain = compose.config_to_dict(self.config)
        self.folder.check_same_training(compose.read_config(self.folder.config), plain)
        if (stored := self.folder.stored_result("train")) is not None:
            console.say(f"{self.folder.path} is finished already; this is its stored result")
            self._print_summary("finished", stored, self._first_predictions())
            return stored
        self._check_budget()
        data, _, _ = self.data, self.measurer, self.suite  # before the model: a broken data set fails at once
        callbacks = compose.build_callbacks(self.config.callbacks)
        if self.draws:
            if self.folder.drawn.is_file():
                self._check_drawn_base(self.folder)
            write_json(self.folder.drawn, self._drawing_facts())
        self.folder.config.write_text(compose.dump_config(self.config), encoding="utf-8")
        with self._tracking(plain) as (tracker, summary):
            reset_peak_memory(self.placement.device)
            model = self.add_adapter(self.load_base()) if self.config.task.train else self.load_trained()
            facts = self._facts(model)
            manifest = build_manifest(plain, data=asdict(data.report), model=facts)
            write_json(self.folder.path / "manifest.json", manifest)
            console.start_screen(list(facts.items()))
            base = self._baseline(model)
            summary |= _prefixed("base_eval_", base.metrics)
            if self.config.task.train:
                summary |= self._fit(model, callbacks, tracker)
            measured = self._measure_after(model)
            summary |= _prefixed("eval_", measured.metrics)
            summary["peak_memory_gb"] = max(self._highest_memory_gb, peak_memory_gb(self.placement.device))
            result = self._write_result("train", summary, measured, base)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=self._steps)
            if self.folder.adapter.exists():
                tracker.log_adapter(self.folder.adapter)
        self._print_summary("finished", result, measured.predictions)
        return result

    def evaluate(self) -> dict[str, Any]:
        """Measures what `adapter` names, and the untuned base beside it; the result goes to `evaluate.json`."""
        _ = self.suite  # before the model: a broken file of questions fails at once, and so do rows
        if self.measures_rows:
            _ = self.measurer
        model = self._prepare_task()
        with self._tracking(compose.config_to_dict(self.config)) as (tracker, summary):
            base = self._baseline(model) if isinstance(model, PeftModel) else Measurement()
            summary |= _prefixed("base_eval_", base.metrics)
            measured = self._measure(model, answers=self._wanted_answers)
            summary |= _prefixed("eval_", measured.metrics)
            tracker.log(_prefixed("eval/", measured.metrics), step=0)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=0)
            result = self._write_result("evaluate", summary, measured, base)
        self._print_summary("evaluated", result, measured.predictions)
        return result

    def predict(self) -> dict[str, Any]:
        """Writes an answer for every held-out row to `predictions.jsonl`; a start that was stopped goes on.

        Answers that are there already, decided by the same model, rows and settings, are not generated again.
        """
        self.folder.create()
        decided_by, metrics = self._answers_decided_by(), self.config.evaluation.metrics
        path, stored = self.folder.predictions, self.folder.stored_result("predict") or {}
        known = stored.get("answers", {})
        if known.get("decided_by") == decided_by and path.is_file() and known["sha256"] == file_digest(path):
            if known["metrics"] == metrics:
                console.say(f"{self.folder.path} holds these answers already; this is the stored result")
                self._print_summary("predicted", stored, self._first_predictions())
                return stored
            speed = stored["metrics"]["predict_tokens_per_second"]
        else:
            speed = self._answer_rows(decided_by)
        measured = self.measurer.score(iter_lines(path))
        summary = _prefixed("eval_", measured.metrics) | {"predict_tokens_per_second": speed}
        facts = {"metrics": metrics, "sha256": file_digest(path), "decided_by": decided_by}
        result = self._write_result("predict", summary, measured, answers=facts)
        self.folder.unfinished_predictions.unlink(missing_ok=True)
        self._print_summary("predicted", result, self._first_predictions())
        return result

    def preview(self) -> dict[str, Any]:
        """Shows what would be trained, without loading weights; writes `preview.html` and `lengths.png`."""
        self.folder.create()
        preview = build_preview(self.config, self.data, self.tokenizer)
        page, picture = self.folder.path / "preview.html", self.folder.path / "lengths.png"
        page.write_text(to_html(preview), encoding="utf-8")
        plot_lengths(preview, picture)
        console.say_colored(to_text(preview, ids=self.config.task.ids, color=console.screen().is_terminal))
        paths = {"page": str(page), "lengths": str(picture)}
        result = self._store("preview", preview_metrics(self.data), paths)
        console.say()
        console.say_rows(list(paths.items()))
        return result

    def chat(self) -> dict[str, Any]:
        """Talks in the terminal with what `adapter` names, until `/exit` or the end of the input."""
        model = self._prepare_task()
        set_seed(self.config.seed)
        speaker = Speaker(
            model=model,
            encoder=self.chat_encoder,
            generation=self.config.generation,
            pad_token_id=self.pad_token_id,
            device=self.placement.device,
            autocast=self.placement.autocast,
        )
        chat = hold(speaker)
        tokens = sum(reply.tokens for reply in chat.replies)
        metrics = {
            "chat_answers": len(chat.replies),
            "chat_tokens": tokens,
            "chat_tokens_per_second": tokens / max(chat.seconds, 1e-9),
        }
        return self._store("chat", metrics, {"conversation": str(chat.file)} if chat.file else {})

    def merge(self) -> dict[str, Any]:
        """Makes one model of the base and the adapter in `merged/`, if it answers as they do."""
        adapter, full = self.trained
        if adapter is None:
            what = f"adapter={self.config.adapter or full}: it is a whole model" if full else "adapter=none"
            raise ConfigError(
                f"{what}, so there is nothing to merge; give adapter=FOLDER of an adapter or of a finished run"
            )
        adapters.check_adapter_folder(adapter)
        self._check_trained_base(adapter)
        self.folder.create()
        assert self.data.eval is not None
        rows = self.data.eval.select(range(min(self.config.merge.prompts, len(self.data.eval))))
        self.tokenizer.chat_template = self._saved_template or self.data.template.text
        merge = Merge(
            config=self.config,
            load=self._prepare_merge,
            tensors=self._tensors,
            model_config=self.model_config,
            tokenizer=self.tokenizer,
            prompts=[ids[:PROMPT_TOKENS] for ids in rows["input_ids"]],
            placement=self.placement,
            name=self.run_name,
        )
        folder, report = self.folder.merged, self.folder.path / REPORT
        facts = merge.run(folder, report)
        metrics = {f"merge_{name}": facts[name] for name in ("kl_mean", "kl_max", "top1_agreement")}
        result = self._store("merge", metrics, {"merged": str(folder), "report": str(report)})
        merge.print_summary(folder, facts, list(result["paths"].items()))
        return result

    def _prepare_merge(self) -> PeftModel:
        model = self.load_trained()
        console.start_screen(list(self._facts(model).items()))
        assert isinstance(model, PeftModel)
        return model

    def _check_trained_base(self, adapter: Path) -> None:
        """Raises `ConfigError` if the run that trained the adapter had other bits, which the merge would not show."""
        stored = compose.read_config(adapter.parent / self.folder.config.name)
        if stored is None:
            return
        before, now = (dict(flatten({"quantization": each["quantization"]}))
                       for each in (stored, compose.config_to_dict(self.config)))  # fmt: skip
        machine = "quantization.compute_dtype"  # `auto` is another on another machine
        if changed := [key for key in before if before[key] != now.get(key) and key != machine]:
            words = " ".join(f"{key}={str(before[key]).lower()}" for key in changed)
            raise ConfigError(
                f"adapter={self.config.adapter}: it was trained on other base weights than the config asks for, and it "
                f"is to be compared on its own; set {words}"
            )

    def push(self) -> dict[str, Any]:
        """Uploads what `adapter` names, its model card and what was measured to the hub repository `repo`."""
        assert self.config.repo is not None, "Config checks it"
        adapter, full = self.trained
        if adapter is not None:
            adapters.check_adapter_folder(adapter)
        folder = adapter or full
        if folder is None:
            raise ConfigError("adapter=none: there is nothing to push; give adapter=FOLDER of an adapter or a run")
        self.folder.create()
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        # A finished run has these beside its adapter.
        beside = ("loss.png", "metrics.json")
        files |= {name: folder.parent / name for name in beside if (folder.parent / name).is_file()}
        if isinstance(card := files.get("README.md"), Path):
            files["README.md"] = card_on_hub(card.read_text(encoding="utf-8"), self.config.repo).encode()
        url = push(
            files,
            repo=self.config.repo,
            private=self.config.task.private,
            message=f"{folder.name} of {folder.absolute().parent.name}, by qlora",
        )
        console.say_rows([("pushed", f"{len(files)} files of {folder}"), ("commit", url)])
        return self._store("push", {}, {"commit": url})

    # Steps of the tasks

    @contextlib.contextmanager
    def _tracking(self, plain: dict[str, Any]) -> Iterator[tuple[Tracker, dict[str, float]]]:
        """Yields the tracker and the metrics to fill; closes it with what was measured, also after a failure."""
        run = TrackedRun(
            name=self.run_name,
            folder=self.folder.path,
            config=plain,
            sweep=self.sweep,
            resumes=self.config.task.name is TaskName.train,
        )
        tracker = build_tracker(self.config.tracking, run)
        summary: dict[str, float] = {}
        status = "failed"
        try:
            yield tracker, summary
            status = "finished"
        except Pruned:
            status = "pruned"
            raise
        finally:
            tracker.finish(status, {key: value for key, value in summary.items() if math.isfinite(value)})

    def _baseline(self, model: PreTrainedModel) -> Measurement:
        """Measures the untuned base once; a resumed run reads what the first start measured.

        The adapter is switched off; where it starts as a part of the base (PiSSA, OLoRA), it must stay on.
        """
        if not (self.config.evaluation.baseline and self.config.task.evaluate):
            return Measurement()
        training = self.config.task.name is TaskName.train
        path = self.folder.path / "baseline.json"
        stored = read_json(path) if training else None
        if stored is not None:
            return Measurement.from_dict(stored)
        rows = f" on {len(self.measurer.rows):,} held-out rows" if self.measures_rows else ""
        console.say(f"measuring the untuned base{rows}")
        part_of_base = training and self.config.lora.init in adapters.REWRITES_BASE
        switched_off = isinstance(model, PeftModel) and not part_of_base
        with model.disable_adapter() if switched_off else contextlib.nullcontext():
            measured = self._measure(model, answers=self._wanted_answers)
        if training:
            write_json(path, measured.to_dict())
        return measured

    def _measure(self, model: torch.nn.Module, *, answers: int | None) -> Measurement:
        """Measures the held-out rows and the suite, as far as the task and `evaluation=` ask for them."""
        measured = self.measurer.measure(model, answers=answers) if self.measures_rows else Measurement()
        return measured | self._measure_suite(model)

    def _measure_suite(self, model: torch.nn.Module) -> Measurement:
        if self.suite is None:
            return Measurement()
        with evaluation_mode(model), self.placement.autocast():
            return self.suite.measure(model)

    @property
    def _wanted_answers(self) -> int | None:
        return self.config.evaluation.generate_samples if self.config.evaluation.metrics else 0

    def _fit(self, model: PreTrainedModel, callbacks: list[Any], tracker: Tracker) -> dict[str, float]:
        trainer = self._build_trainer(model, callbacks, tracker)
        if self.data.packed is not None:  # after the trainer is built, which switches the key-value cache off
            check_packing(model, self.placement, batch_size=self.config.trainer.per_device_train_batch_size)
        checkpoint = last_checkpoint(self.folder.checkpoints)
        if checkpoint is not None:
            console.say(f"resuming from {checkpoint.name}")
        try:
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:  # a run that fails has curves too
            write_json(self.folder.history, trainer.state.log_history)
        self._steps = trainer.state.global_step
        self._highest_memory_gb = trainer.memory.budget.highest / 1e9 if trainer.memory.budget is not None else 0.0
        self._save(model)
        plot_loss(trainer.state.log_history, self.folder.path / "loss.png")
        metrics = {"train_loss": trainer.mean_loss, "train_runtime": output.metrics["train_runtime"]}
        metrics["train_memory_retries"] = trainer.memory.retries
        return metrics | trainer.meter.overall(trainer.state)

    _steps, _highest_memory_gb = 0, 0.0

    def _build_trainer(self, model: PreTrainedModel, callbacks: list[Any], tracker: Tracker) -> QLoraTrainer:
        assert self.data.train is not None
        arguments = build_arguments(
            self.config.trainer,
            output_dir=self.folder.checkpoints,
            device=self.placement.device,
            compute=self.placement.compute,
            seed=self.config.seed,
        )

        def measure(current: torch.nn.Module, step: int) -> dict[str, float]:
            shown = (
                self.config.evaluation.show_predictions
                if self.config.tracking.backend is not TrackingBackend.none
                else 0
            )
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
            verify=adapters.verify_adapter,
            loraplus_lr_ratio=self.config.lora.loraplus_lr_ratio if self.config.lora.enabled else None,
            step=step,
            meter=self._build_meter(model),
            budget=self._build_budget(step, longest=max(width, *lengths)),
            callbacks=[
                ProgressCallback(self.folder.progress),
                TrackerCallback(tracker),
                *([ProfileCallback(self.folder.trace, self.placement.device)] if self.config.trainer.profile else []),
                *self._build_pruning(),
                *callbacks,
            ],
        )

    def _build_step(self, model: PreTrainedModel) -> FastStep:
        packed = self.data.packed
        width = self.config.data.pack_width
        packs = Packs(width, packed.most_rows, packed.longest_row) if packed and width else None
        step = FastStep(model, self.config.trainer, self.config.quantization, self.placement, packs)
        if step.is_active:
            console.say_rows([("fast step", str(step))])
        return step

    def _build_meter(self, model: PreTrainedModel) -> Meter:
        device, operations = self.placement.device, self._count_operations(model)
        return Meter(
            device,
            peak_memory_gb=partial(peak_memory_gb, device),
            operations=operations.total if operations is not None else None,
            rate=matrix_rate(device, self.placement.compute),
        )

    def _count_operations(self, model: PreTrainedModel) -> Operations | None:
        """Returns what training takes a token; None for an architecture whose matrices are not known."""
        facts = self.model_config.get_text_config().to_dict()
        if facts["model_type"] not in FAMILIES:
            log.info("model FLOP utilisation is not known for the model type %s", facts["model_type"])
            return None
        trained = adapters.count_parameters(model).trainable if self.config.lora.enabled else 0
        return count_operations(read_shape(facts, self.config.model.name), trained)

    def _check_budget(self) -> None:
        """Raises `ConfigError` for a size where there is no GPU that has it."""
        wanted, device = self.config.trainer.memory_budget, self.placement.device
        if wanted not in (None, "auto") and device.type != "cuda":
            raise ConfigError(
                f"trainer.memory_budget={wanted} is one of a CUDA device's memory, and this run computes on "
                f"{device.type}; leave it out"
            )

    def _build_budget(self, step: FastStep, *, longest: int) -> Budget | None:
        """Returns what `trainer.memory_budget` allows for rows of up to `longest` tokens."""
        wanted, device = self.config.trainer.memory_budget, self.placement.device
        if wanted is None or device.type != "cuda":
            return None
        shape = read_shape(self.model_config.get_text_config().to_dict(), f"trainer.memory_budget={wanted}")
        kind = PlanStep.fast if step.parts["fused_linear"] == "on" else PlanStep.plain
        setup = replace(read_setup(self.config, shape), step=kind, length=longest)

        def added(checkpointed: int, rows: int, length: int) -> float:
            return Ledger(shape, replace(setup, checkpointed=checkpointed, rows=rows, length=length)).added

        formula = Formula(Ledger(shape, setup).before, setup.accumulates, added, setup.rows, longest)
        cap = parse_size(wanted)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        limit = min(cap, free) if cap is not None else free
        return Budget(formula, len(step.layers), limit * (1 - FRAGMENTS), cap, device)

    @staticmethod
    def _build_pruning() -> list[Any]:
        """Returns what reports to the search that this run is a trial of, if that ends trials early."""
        if (link := os.environ.get(TRIAL_VARIABLE)) is None:
            return []
        from qlora.study import TrialLink  # Optuna is an extra
        from qlora.training.pruning import PruningCallback

        return [PruningCallback(TrialLink.from_text(link))]

    def _save(self, model: PreTrainedModel) -> None:
        self.tokenizer.chat_template = self.data.template.text  # chat and serving then write as training did
        if isinstance(model, PeftModel):
            rewritten = self.config.lora.init in adapters.REWRITES_BASE
            initial = self.folder.path / "initial_adapter" if rewritten else None
            adapters.save_adapter(model, self.folder.adapter, tokenizer=self.tokenizer, initial=initial)
        else:
            model.save_pretrained(self.folder.model)
            save_tokenizer(self.tokenizer, self.folder.model)

    def _measure_after(self, model: PreTrainedModel) -> Measurement:
        task, evaluation = self.config.task, self.config.evaluation
        measured = self._measure(model, answers=self._wanted_answers) if task.evaluate else Measurement()
        if not task.predict:
            return replace(measured, predictions=[])
        if measured.predictions:
            return measured
        return replace(measured, predictions=self.measurer.predict(model, evaluation.show_predictions))

    def _answers_decided_by(self) -> dict[str, Any]:
        """Returns everything that decides the answers of `task=predict`, by name, in JSON's types."""
        config, place, (adapter, full) = compose.config_to_dict(self.config), self.placement, self.trained
        if adapter is not None:
            adapters.check_adapter_folder(adapter)
        facts = {
            "model": {key: value for key, value in config["model"].items() if key not in ("cache_dir", "license")},
            "quantization": config["quantization"],
            "generation": config["generation"],
            "seed": config["seed"],
            "device": f"{place.device.type}, {place.weights}, {place.compute}",
            "base": None if self.draws else self._base_digest(),
            "adapter": adapter and adapter_digest(adapter),
            "finetuned model": full and folder_digest(full),
            "rows": rows_digest(self.measurer.rows),
            "end token": self.end_id,
            "version": versions(),
            "code": code_digest(),
        }
        return dict(flatten(facts))

    def _base_digest(self) -> str | None:
        place = locate(self.config.model.name)
        return folder_digest(Path(place)) if is_local(place) else self.model_config._commit_hash

    def _answer_rows(self, decided_by: dict[str, Any]) -> float:
        """Writes `predictions.jsonl`; returns the speed of generation in tokens a second."""
        measurer, rows = self.measurer, self.measurer.rows
        answers = AnswerLog(self.folder.unfinished_predictions, decided_by, len(rows))
        batches = dict(enumerate(plan_batches(prompt_lengths(rows), self.config.generation.batch_size)))
        left = {number: batch for number, batch in batches.items() if not answers.has(batch)}
        if left:
            model = self._prepare_task()
            if answers.answered:
                console.say(f"going on: {answers.answered:,} of {len(rows):,} rows are answered already")
            with console.progress("predicting", len(rows)) as update:
                update(answers.answered)
                for batch in measurer.answer(model, rows, left):
                    answers.append(*batch)
                    update(answers.answered, note=f"{answers.tokens_per_second:,.0f} tokens/s")
        write_lines(self.folder.predictions, measurer.records(rows, answers))
        return answers.tokens_per_second

    def _first_predictions(self) -> list[dict[str, Any]]:
        return read_lines(self.folder.predictions, self.config.evaluation.show_predictions)

    def _prepare_task(self) -> PreTrainedModel:
        self.folder.create()
        model = self.load_trained()
        console.start_screen(list(self._facts(model).items()))
        return model

    @cached_property
    def trained(self) -> tuple[Path | None, Path | None]:
        """The (adapter, fully finetuned model) that `adapter` or this folder holds; (None, None): the base."""
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
        return found

    @cached_property
    def trained_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was saved with what `adapter` names, of the same tokens as `tokenizer`; None: no such."""
        folder = self.trained[0] or self.trained[1]
        return load_saved_tokenizer(folder, self.config.model, self.tokenizer) if folder is not None else None

    def load_trained(self) -> PreTrainedModel:
        """Loads what `adapter` names: the base with an adapter, a fully finetuned model, or the bare base.

        Raises `ConfigError` where the base's tokens are not those of the training.
        """
        adapter, full = self.trained
        _ = self.trained_tokenizer  # before the weights
        if adapter is not None:
            adapters.check_adapter_folder(adapter)
            self._check_drawn_base(RunFolder(adapter.parent))
            return adapters.load_adapter(self.load_base(), adapter, self.config.model.name)
        if full is None:
            return self.load_base()
        self._check_whole_model(full)
        return self._load(full)

    def _drawing_facts(self) -> dict[str, Any]:
        return drawing.drawing_facts(self.config.model, self.placement, self.config.seed)

    def _check_drawn_base(self, trained: RunFolder) -> None:
        """Raises `ConfigError` if this config does not give the drawn base that the run `trained` an adapter on."""
        stored = read_json(trained.drawn)
        if stored is None and not self.draws:
            return
        if stored is None:
            raise ConfigError(
                f"model.weights=random: {trained.drawn} is missing, which says how the base of the adapter was drawn; "
                "give adapter=FOLDER of the run that trained it"
            )
        now = self._drawing_facts() if self.draws else {**stored, "model.weights": Weights.pretrained.value}
        if changed := [key for key in {**stored, **now} if stored.get(key) != now.get(key)]:
            words = " ".join(f"{key}={stored.get(key, 'null')}" for key in changed)
            raise ConfigError(
                f"{trained.path}: its adapter was trained on a base that was drawn otherwise than the config says; "
                f"set {words}"
            )

    def _check_whole_model(self, folder: Path) -> None:
        """Raises `ConfigError` if a finished model would be rounded again without a word."""
        quantization = self.config.quantization
        if quantization.bits in (4, 8):
            stored = read_json(folder / "config.json")
            dtype = stored.get("dtype") or stored.get("torch_dtype")
            kind = quantization.quant_type.value if quantization.bits == 4 else "int8"
            raise ConfigError(
                f"adapter={folder} is a whole model in {dtype}, which quantization={kind} would round again; use "
                "quantization=none or quantization=fp32, or give it as model.name with adapter=none to quantize it on "
                "purpose"
            )

    # Reports

    @property
    def run_name(self) -> str:
        """The name in the tracker: `name`, or the folder's."""
        return self.config.name or self.folder.path.name

    def _facts(self, model: PreTrainedModel) -> dict[str, str]:
        config = self.config
        quantization, trainer = config.quantization, config.trainer
        base = f"{quantization.quant_type.value}" + (" + double quantization" if quantization.double_quant else "")
        micro, steps = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
        count = adapters.count_parameters(model)
        facts = {
            "model": f"{config.model.name}: {count.base / 1e6:,.1f} M parameters",
            "base": base if quantization.bits == 4 else f"{quantization.bits} bit",
            "device": str(self.placement),
            "folder": str(self.folder.path),
        }
        if config.task.name is TaskName.chat:
            place = self.trained[0] or self.trained[1] or "none"
            return facts | {"adapter": str(place), "template": self.chat_encoder.writer.template.name}
        if not self.measures_rows:
            tasks = ": ".join([config.evaluation.name.value.replace("_", "-"), *config.evaluation.tasks[:1]])
            return facts | {"evaluation": ", ".join([tasks, *config.evaluation.tasks[1:]])}
        report = self.data.report
        facts["data"] = f"{report.name}: {report.eval_rows:,} held-out rows"
        if config.task.name is TaskName.train and config.task.train:
            adapter = f"LoRA r={config.lora.r}, alpha={config.lora.alpha:g}" if config.lora.enabled else "all weights"
            length = f"{trainer.max_steps:,} steps" if trainer.max_steps else f"{trainer.num_train_epochs:g} epochs"
            unit = "packs" if report.packs else "rows"
            world = max(1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
            facts |= {
                "data": f"{report.name}: {report.train_rows:,} rows to train ({report.train_tokens:,} tokens, "
                f"{report.trained_tokens:,} with loss), {report.eval_rows:,} held out",
                **({"template": report.template} if report.template else {}),
                **({"packing": f"{report.packs:,} packs, {report.packed_share:.1%} full"} if report.packs else {}),
                "training": f"{adapter}: {count}",
                "batch": f"{micro} x {steps} accumulated x {world} process{'es' if world > 1 else ''} "
                f"= {micro * steps * world} {unit} a step",
                "steps": f"{length}, {trainer.optim}, learning rate {trainer.learning_rate:g} "
                f"({trainer.lr_scheduler_type})",
            }
        return facts

    def _store(self, task: str, metrics: Mapping[str, Any], paths: dict[str, str]) -> dict[str, Any]:
        """Writes the result of a task that has no objective, and returns it."""
        result = {"status": "finished", "task": task, "objective": None, "metrics": dict(metrics), "paths": paths}
        write_json(self.folder.result(task), result)
        return result

    def _write_result(
        self,
        task: str,
        summary: dict[str, float],
        measured: Measurement,
        base: Measurement | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        base = base or Measurement()
        predictions = self.folder.predictions if task != "evaluate" else self.folder.path / "evaluate.jsonl"
        if measured.predictions:
            write_lines(predictions, measured.predictions)
        records = self.folder.path / f"{self.config.evaluation.name.value}.jsonl"
        if measured.records:
            write_lines(records, measured.records)
        objective = self.config.objective
        places = {
            "adapter": self.folder.adapter,
            "model": self.folder.model,
            "predictions": predictions,
            "questions": records,
            "loss": self.folder.path / "loss.png",
            "profile": self.folder.trace,
            "config": self.folder.config,
            "card": self.folder.path / "README.md",
        }
        paths = {name: str(path) for name, path in places.items() if path.exists()}
        result: dict[str, Any] = {
            "status": "finished",
            "task": task,
            "objective": summary.get(objective) if objective else None,
            "metrics": summary,
            "intervals": _prefixed("base_eval_", base.intervals()) | _prefixed("eval_", measured.intervals()),
            "gains": {name: gain._asdict() for name, gain in measured.gains(base).items()},
            "paths": paths,
            **more,
        }
        if task == "train":
            command = shlex.join(["qlora", *self.overrides])
            for folder in (self.folder.adapter, self.folder.model, self.folder.path):
                if folder.is_dir():
                    card = write_model_card(
                        folder,
                        config=self.config,
                        result=result,
                        base_model=self.config.model.name,
                        command=command,
                        compute_dtype=str(self.placement.compute).removeprefix("torch."),
                        example_prompt=self.measurer.rows[0]["prompt"],
                    )
            paths["card"] = str(card)
            write_json(self.folder.path / "metrics.json", summary)
            paths["report"] = str(write_run_page(self.folder, result, command=command))
        write_json(self.folder.result(task), result)
        return result

    def _print_summary(self, title: str, result: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        metrics = result["metrics"]
        names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_") and not is_detail(key)]
        rows = [
            (name, metrics.get(f"base_eval_{name}"), metrics[f"eval_{name}"], self._certainty(name, result))
            for name in names
        ]
        folder = self.folder.path
        own = ("task=", "adapter=", "hydra.run.dir=", "name=")
        chosen = [text for text in self.overrides if not text.startswith(own)]
        again = shlex.join(["qlora", *chosen, f"adapter={self.config.adapter or folder}"])
        console.summary(
            f"{title}: {folder}",
            rows,
            predictions[: self.config.evaluation.show_predictions],
            [(name, path) for name, path in result["paths"].items()],
            [f"{again} task={task}" for task in ("evaluate", "predict", "chat")],
        )

    def _certainty(self, name: str, result: dict[str, Any]) -> str:
        """Returns the 95 % interval of a metric in words, with the paired difference to the untuned base."""
        interval, gain = result.get("intervals", {}).get(f"eval_{name}"), result.get("gains", {}).get(name)
        if interval is None:
            return ""
        words = f"95 %: {format_range(name, *interval)}"
        if gain is None:
            return words
        return f"{words}; gain {format_range(name, gain['low'], gain['high'], signed=True)}"


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}
