"""Run: the one place where config, data, model, trainer and reports meet."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qlora import compose, console
from qlora.data import Data, build_data, column
from qlora.data.collate import Collator, token_mask
from qlora.errors import ConfigError, did_you_mean
from qlora.evaluation.generation import tokens_per_second
from qlora.evaluation.measure import Measurement, Measurer
from qlora.evaluation.metrics import find_metrics
from qlora.folder import RunFolder, find_adapter, read_json, read_lines, write_lines
from qlora.models import adapters, loading
from qlora.models.device import (
    Placement,
    computes_bf16,
    find_device,
    peak_memory_gb,
    place,
    reset_peak_memory,
)
from qlora.models.files import locate
from qlora.models.packing_guard import check_packing
from qlora.models.tokenizer import load_tokenizer, pad_token_id, repair_special_tokens
from qlora.preview import build_preview, preview_metrics
from qlora.reporting.card import write_model_card
from qlora.reporting.manifest import build_manifest, write_json
from qlora.reporting.plot import plot_loss
from qlora.reporting.preview import plot_lengths, to_html, to_text
from qlora.schema import Config, Init, TaskName, TrackingBackend
from qlora.training.progress import ProgressCallback
from qlora.training.tracking import Tracker, TrackerCallback, build_tracker
from qlora.training.trainer import QLoraTrainer, build_arguments, last_checkpoint

log = logging.getLogger(__name__)


class Run:
    """One config in one folder; a method a task, and parts that are built when first needed.

    `overrides` are the command line's, for the model card. The same folder may be given again: a finished task
    returns its stored result, an interrupted training resumes.
    """

    def __init__(self, config: Config, output_dir: Path | str, overrides: Sequence[str] = ()) -> None:
        self.config, self.overrides = config, list(overrides)
        self.folder = RunFolder(Path(output_dir))

    def execute(self) -> dict[str, Any]:
        """Runs the task of `task=` and returns its result, as stored in the run's folder."""
        tasks = {
            TaskName.train: self.train,
            TaskName.evaluate: self.evaluate,
            TaskName.predict: self.predict,
            TaskName.preview: self.preview,
        }
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
        if self.config.model.init is Init.pretrained and not healthy:
            repair_special_tokens(tokenizer, self.model_config)
        return tokenizer

    @cached_property
    def model_config(self) -> Any:
        """transformers' config object of the base model."""
        if self.config.model.init is Init.random:
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
        return Measurer(
            rows=self.data.eval.to_list(),
            collate=self.collate,
            tokenizer=self.tokenizer,
            generation=self.config.generation,
            metrics=find_metrics(self.config.evaluation.metrics),
            pad_token_id=self.pad_token_id,
            batch_size=self.config.trainer.per_device_eval_batch_size,
            device=self.placement.device,
            autocast=self.placement.autocast,
        )

    def load_base(self) -> PreTrainedModel:
        """Loads the frozen base, or draws it first (once: a drawn base stays in the folder)."""
        if self.config.model.init is Init.pretrained:
            return self._load(None)
        adapter, _ = self.trained if self.config.task.name is not TaskName.train else (None, None)
        folder = adapter.parent / self.folder.drawn.name if adapter else self.folder.drawn
        if not (folder / "config.json").exists():
            loading.draw_model(self.config.model, self.tokenizer, folder, self.placement, self.config.seed)
        return self._load(folder)

    def _load(self, folder: Path | None) -> PreTrainedModel:
        base = loading.load_base(
            self.config.model,
            self.config.quantization,
            placement=self.placement,
            model_config=self.model_config,
            folder=folder,
        )
        loading.resize_embeddings(base, self.tokenizer)
        loading.add_end_token(base, self.data.end_id)
        return base

    def add_adapter(self, base: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Attaches a fresh adapter drawn from `seed`, or makes all weights trainable (`lora=none`)."""
        set_seed(self.config.seed)
        if not self.config.lora.enabled:
            base.requires_grad_(True)
            return base
        folder = self.folder.drawn if self.config.model.init is Init.random else Path(locate(self.config.model.name))
        new_tokens = self.tokenizer.convert_tokens_to_ids(self.config.model.new_tokens)
        model = adapters.add_lora(
            self.config.lora, base, base_folder=str(folder), new_token_ids=new_tokens, batches=self._batches()
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
            self._print_summary("finished", stored, read_lines(self.folder.predictions))
            return stored
        data, _ = self.data, self.measurer  # before the model: a broken data set fails at once
        callbacks = compose.build_callbacks(self.config.callbacks)
        self.folder.config.write_text(compose.dump_config(self.config), encoding="utf-8")
        with self._tracking(plain) as (tracker, summary):
            reset_peak_memory(self.placement.device)
            model = self.add_adapter(self.load_base()) if self.config.task.train else self.load_trained()
            facts = self._facts(model)
            manifest = build_manifest(plain, data=asdict(data.report), model=facts)
            write_json(self.folder.path / "manifest.json", manifest)
            console.start_screen(list(facts.items()))
            summary |= {f"base_eval_{name}": value for name, value in self._baseline(model).items()}
            if self.config.task.train:
                summary |= self._fit(model, callbacks, tracker)
            measured = self._measure_after(model)
            summary |= {f"eval_{name}": value for name, value in measured.metrics.items()}
            summary["peak_memory_gb"] = peak_memory_gb(self.placement.device)
            result = self._write_result("train", summary, measured.predictions)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=self._steps)
            if self.folder.adapter.exists():
                tracker.log_adapter(self.folder.adapter)
        self._print_summary("finished", result, measured.predictions)
        return result

    def evaluate(self) -> dict[str, Any]:
        """Measures an adapter (or the untuned base) on all held-out rows; the result goes to `evaluate.json`."""
        model = self._prepare_task()
        with self._tracking(compose.config_to_dict(self.config)) as (tracker, summary):
            if isinstance(model, PeftModel):
                summary |= {f"base_eval_{name}": value for name, value in self._baseline(model).items()}
            measured = self.measurer.measure(model, answers=self._wanted_answers)
            summary |= {f"eval_{name}": value for name, value in measured.metrics.items()}
            tracker.log({f"eval/{name}": value for name, value in measured.metrics.items()}, step=0)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=0)
            result = self._write_result("evaluate", summary, measured.predictions)
        self._print_summary("evaluated", result, measured.predictions)
        return result

    def predict(self) -> dict[str, Any]:
        """Writes an answer for every held-out row to `predictions.jsonl`."""
        model = self._prepare_task()
        started = time.monotonic()
        with console.progress("predicting", len(self.measurer.rows)) as advance:
            predictions = self.measurer.predict(model, self.measurer.rows, on_progress=advance)
        speed = tokens_per_second((row["answer_tokens"] for row in predictions), started)
        summary = {f"eval_{name}": value for name, value in self.measurer.score(predictions).items()}
        summary["predict_tokens_per_second"] = speed
        result = self._write_result("predict", summary, predictions)
        self._print_summary("predicted", result, predictions)
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
        result: dict[str, Any] = {
            "status": "finished",
            "task": "preview",
            "objective": None,
            "metrics": preview_metrics(self.data),
            "paths": paths,
        }
        write_json(self.folder.result("preview"), result)
        console.say()
        console.say_rows(list(paths.items()))
        return result

    # Steps of the tasks

    @contextlib.contextmanager
    def _tracking(self, plain: dict[str, Any]) -> Iterator[tuple[Tracker, dict[str, float]]]:
        """Yields the tracker and the metrics to fill; closes it with what was measured, also after a failure."""
        tracker = build_tracker(self.config.tracking, name=self.run_name, run_config=plain, output_dir=self.folder.path)
        summary: dict[str, float] = {}
        status = "failed"
        try:
            yield tracker, summary
            status = "finished"
        finally:
            tracker.finish(status, {key: value for key, value in summary.items() if math.isfinite(value)})

    def _baseline(self, model: PreTrainedModel) -> dict[str, float]:
        """Measures the untuned base once; a resumed run reads what the first start measured.

        The adapter is switched off; where it starts as a part of the base (PiSSA, OLoRA), it must stay on.
        """
        if not (self.config.evaluation.baseline and self.config.task.evaluate):
            return {}
        training = self.config.task.name is TaskName.train
        path = self.folder.path / "baseline.json"
        stored: dict[str, float] | None = read_json(path) if training else None
        if stored is None:
            console.say(f"measuring the untuned base on {len(self.measurer.rows):,} held-out rows")
            part_of_base = training and self.config.lora.init in adapters.REWRITES_BASE
            switched_off = isinstance(model, PeftModel) and not part_of_base
            with model.disable_adapter() if switched_off else contextlib.nullcontext():
                stored = self.measurer.measure(model, answers=self._wanted_answers).metrics
            if training:
                write_json(path, stored)
        return stored

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
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._steps = trainer.state.global_step
        self._save(model)
        history = trainer.state.log_history
        write_json(self.folder.path / "history.json", history)
        plot_loss(history, self.folder.path / "loss.png")
        runtime = output.metrics["train_runtime"]
        return {
            "train_loss": output.training_loss,
            "train_runtime": runtime,
            "train_tokens_per_second": trainer.trained_tokens / max(runtime - trainer.measuring_seconds, 1e-9),
        }

    _steps = 0

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
            return {name: measured.metrics[name] for name in ("loss", "perplexity")}

        return QLoraTrainer(
            model=model,
            arguments=arguments,
            rows=self.data.packed or self.data.train,
            lengths=(self.data.packed.lengths if self.data.packed else column(self.data.train, "length")).tolist(),
            collate=self.collate,
            token_mask=partial(token_mask, pad_token_id=self.pad_token_id),
            measure=measure,
            loraplus_lr_ratio=self.config.lora.loraplus_lr_ratio if self.config.lora.enabled else None,
            callbacks=[ProgressCallback(), TrackerCallback(tracker), *callbacks],
        )

    def _save(self, model: PreTrainedModel) -> None:
        if self.data.template is not None:  # serving then writes conversations as training did
            self.tokenizer.chat_template = self.data.template.text
        if isinstance(model, PeftModel):
            rewritten = self.config.lora.init in adapters.REWRITES_BASE
            initial = self.folder.path / "initial_adapter" if rewritten else None
            adapters.save_adapter(model, self.folder.adapter, tokenizer=self.tokenizer, initial=initial)
        else:
            model.save_pretrained(self.folder.model)
            self.tokenizer.save_pretrained(self.folder.model)

    def _measure_after(self, model: PreTrainedModel) -> Measurement:
        task, evaluation = self.config.task, self.config.evaluation
        if task.evaluate:
            measured = self.measurer.measure(model, answers=self._wanted_answers)
            if measured.predictions or not task.predict:
                return Measurement(measured.metrics, measured.predictions if task.predict else [])
            rows = self.measurer.rows[: evaluation.show_predictions]
            return Measurement(measured.metrics, self.measurer.predict(model, rows))
        if task.predict:
            rows = self.measurer.rows[: evaluation.show_predictions]
            return Measurement({}, self.measurer.predict(model, rows))
        return Measurement({})

    def _prepare_task(self) -> PreTrainedModel:
        self.folder.create()
        model = self.load_trained()
        console.start_screen(list(self._facts(model).items()))
        return model

    @cached_property
    def trained(self) -> tuple[Path | None, Path | None]:
        """The (adapter, fully finetuned model) that `task.adapter` or this folder holds; (None, None): the base."""
        wanted = self.config.task.adapter
        if wanted == "none":
            return None, None
        place = Path(wanted).expanduser() if wanted is not None else self.folder.path
        if not place.is_dir():
            siblings = [str(path) for path in place.parent.glob("*/")]
            raise ConfigError(f"task.adapter={wanted}: no such folder{did_you_mean(str(place), siblings)}")
        found = find_adapter(place)
        if found == (None, None):
            raise ConfigError(
                f"task.adapter={wanted or 'null'}: {place} holds no adapter; give task.adapter=FOLDER of an adapter "
                "or of a finished run, or task.adapter=none for the untuned base"
            )
        return found

    def load_trained(self) -> PreTrainedModel:
        """Loads what `task.adapter` names: the base with an adapter, a fully finetuned model, or the bare base."""
        adapter, full = self.trained
        if adapter is not None:
            adapters.check_adapter_folder(adapter)
            return adapters.load_adapter(self.load_base(), adapter, self.config.model.name)
        return self._load(full) if full is not None else self.load_base()

    # Reports

    @property
    def run_name(self) -> str:
        """The name in the tracker: `name`, or the folder's."""
        return self.config.name or self.folder.path.name

    def _facts(self, model: PreTrainedModel) -> dict[str, str]:
        config, report = self.config, self.data.report
        quantization, trainer = config.quantization, config.trainer
        base = f"{quantization.quant_type.value}" + (" + double quantization" if quantization.double_quant else "")
        micro, steps = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
        count = adapters.count_parameters(model)
        facts = {
            "model": f"{config.model.name}: {count.base / 1e6:,.1f} M parameters",
            "base": base if quantization.bits == 4 else f"{quantization.bits} bit",
            "data": f"{report.name}: {report.eval_rows:,} held-out rows",
            "device": str(self.placement),
            "folder": str(self.folder.path),
        }
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

    def _write_result(self, task: str, summary: dict[str, float], answers: list[dict[str, Any]]) -> dict[str, Any]:
        predictions = self.folder.predictions if task != "evaluate" else self.folder.path / "evaluate.jsonl"
        if answers:
            write_lines(predictions, answers)
        objective = self.config.objective
        places = {
            "adapter": self.folder.adapter,
            "model": self.folder.model,
            "predictions": predictions,
            "loss": self.folder.path / "loss.png",
            "config": self.folder.config,
            "card": self.folder.path / "README.md",
        }
        paths = {name: str(path) for name, path in places.items() if path.exists()}
        result: dict[str, Any] = {
            "status": "finished",
            "task": task,
            "objective": summary.get(objective) if objective else None,
            "metrics": summary,
            "paths": paths,
        }
        if task == "train":
            card = write_model_card(
                self.folder.path,
                config=self.config,
                result=result,
                base_model=self.config.model.name,
                command=shlex.join(["qlora", *self.overrides]),
                compute_dtype=str(self.placement.compute).removeprefix("torch."),
                example_prompt=self.measurer.rows[0]["prompt"],
            )
            paths["card"] = str(card)
            write_json(self.folder.path / "metrics.json", summary)
        write_json(self.folder.result(task), result)
        return result

    def _print_summary(self, title: str, result: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        metrics = result["metrics"]
        names = [key.removeprefix("eval_") for key in metrics if key.startswith("eval_")]
        rows = [(name, metrics.get(f"base_eval_{name}"), metrics[f"eval_{name}"]) for name in names]
        folder = self.folder.path
        own = ("task=", "task.adapter=", "hydra.run.dir=", "name=")
        chosen = [text for text in self.overrides if not text.startswith(own)]
        again = shlex.join(["qlora", *chosen, f"task.adapter={self.config.task.adapter or folder}"])
        console.summary(
            f"{title}: {folder}",
            rows,
            predictions[: self.config.evaluation.show_predictions],
            [(name, path) for name, path in result["paths"].items()],
            [f"{again} task=evaluate", f"{again} task=predict"],
        )
