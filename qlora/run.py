"""Run: the one place where config, data, model, trainer and reports meet."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from qlora import adapters
from qlora.config import saved_config
from qlora.config.schema import Parallel, Resume, TaskName
from qlora.data.ingest.arrow_writer import file_digest
from qlora.doctor import preflight
from qlora.errors import ConfigError, DamagedFile, Pruned, Stopped, UserError, describe_fault
from qlora.evaluation.answer_log import AnswerLog, rows_digest
from qlora.evaluation.generation import plan_batches, prompt_lengths
from qlora.evaluation.measure import Measurement
from qlora.models.decoder import Decoder, read_decoder
from qlora.models.fingerprint import adapter_digest, find_difference, folder_digest, read_base, read_run_base
from qlora.models.first_pass import explain_nonfinite
from qlora.models.hub import push
from qlora.models.model_files import is_local, locate
from qlora.models.packing_guard import check_packing
from qlora.models.tokenizer import (
    save_tokenizer,
)
from qlora.quantization.method import find_method
from qlora.reporting.loss_curve import plot_loss
from qlora.reporting.manifest import build_manifest, code_digest, keep_manifest, versions, write_json
from qlora.reporting.model_card import card_on_hub, write_model_card
from qlora.reporting.preview import plot_lengths, to_html, to_text
from qlora.reporting.run_page import write_run_page
from qlora.runtime import console, distributed
from qlora.runtime.atomic_files import (
    iter_lines,
    read_json,
    read_lines,
    write_folder,
    write_lines,
    write_text,
)
from qlora.runtime.determinism import deterministic
from qlora.runtime.device import peak_memory_gb, reset_peak_memory
from qlora.runtime.disk_space import Patience, wait_for_space, waiting_for_space
from qlora.runtime.energy import read_energy
from qlora.runtime.run_folder import config_digest, flatten
from qlora.runtime.saved_run import find_damage, set_damage_aside
from qlora.session import Session
from qlora.tasks.chat import ChatModel, hold
from qlora.tasks.merge import PROMPT_TOKENS, REPORT, Merge
from qlora.tasks.preview import build_preview, preview_metrics
from qlora.text import format_range, is_detail, quoted
from qlora.training.callbacks import build_callbacks
from qlora.training.checkpoints import find_checkpoints, last_checkpoint, read_metadata, remove_surplus, step_of
from qlora.training.trackers import NoTracker, TrackedRun, Tracker, build_tracker
from qlora.training.trainer import QLoraTrainer
from qlora.upstream.transformers_models import commit_hash

log = logging.getLogger(__name__)


class Run(Session):
    """One config in one folder; a method a task, and parts that are built when first needed.

    `overrides` are the command line's, for the model card, `sweep` is what the run is a job of, for the tracker. The
    same folder may be given again: a finished task returns its stored result, an interrupted training resumes.
    """

    started_by: Sequence[str] | None = None
    """The overrides of the command, where they are not those of the training."""

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

    # Tasks

    def train(self) -> dict[str, Any]:
        """Trains, measures and predicts as `task` says; returns the result written to `result.json`.

        Waits where the disk is full. Raises `Stopped` after a signal, when what can be saved is saved.
        """
        limit = self.config.trainer.save_total_limit
        patience = Patience(
            seconds=self.config.trainer.disk_wait,
            # The oldest would go when the next one is saved.
            make_room=lambda: (
                distributed.is_main_process() and remove_surplus(self.folder.checkpoints, limit and limit - 1)
            ),
            check=self.stop.check,
        )
        with self.stop.watching(), waiting_for_space(patience), deterministic(self.config.trainer):
            try:
                return self._train() if distributed.is_main_process() else self._train_along()
            except Stopped as stopped:
                raise Stopped(f"{stopped}: {self._how_to_go_on()}") from None
            except Exception as error:
                if isinstance(error, UserError | Pruned) or not self._is_removed:
                    raise
                raise ConfigError(
                    f"the run folder {self.folder.path} was removed while the run wrote into it "
                    f"({describe_fault(error)}); start the same command again"
                ) from error

    def _train(self) -> dict[str, Any]:
        if self.config.resume is Resume.never:
            self.folder.check_unused()
        self.folder.create()
        plain = saved_config.config_to_dict(self.config)
        before = self._read_before()
        is_same = self.folder.check_same_training(before, plain, self._moved_base(before))
        self._check_processes()
        if (stored := distributed.broadcast(self.folder.stored_result("train") if is_same else None)) is not None:
            console.say(f"{self.folder.path} is finished already; this is its stored result")
            self._print_summary("finished", stored, self._first_predictions())
            return stored
        if self.config.task.train:
            self._check_device()
        preflight(self.config)
        _ = self.is_trainable
        checkpoint = self._find_checkpoint(plain) if self.config.task.train else None
        data, _, _ = self.data, self.measurer, self.suite  # before the model: a broken data set fails at once
        _ = self.tokens_without_embedding
        rows = (self.folder.stored_manifest() or {}).get("data")
        is_same &= self.folder.check_same_rows(rows, asdict(data.report), plain)
        callbacks = build_callbacks(self.config.callbacks)
        if self.config.task.train:
            is_same &= self._check_same_base(checkpoint)
        if not is_same:
            for stale in (self.folder.result("train"), self.folder.baseline):
                stale.unlink(missing_ok=True)
        self._write_config()
        with self._tracking(plain) as (tracker, summary):
            reset_peak_memory(self.placement.device)
            model = self.build_model() if self.config.task.train else self.load_trained()
            facts = self._facts(model)
            manifest = self._build_manifest(plain, facts)
            with keep_manifest(self.folder.manifest, manifest, peak_memory_gb=self._peak_memory_gb, energy=read_energy):
                console.start_screen(list(facts.items()))
                base = self._baseline(model)
                summary |= _prefixed("base_eval_", base.metrics)
                if self.config.task.train:
                    summary |= self._fit(model, callbacks, tracker, checkpoint)
                measured = self._measure_after(model)
                summary |= _prefixed("eval_", measured.metrics)
                summary["peak_memory_gb"] = self._peak_memory_gb()
                if self._is_removed:
                    log.warning("%s was removed while the run went on; it is written again", self.folder.path)
                    self._write_config()
                result = self._write_result("train", summary, measured, base)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=self._steps)
            if self.folder.adapter.exists():
                tracker.log_adapter(self.folder.adapter)
        self._print_summary("finished", distributed.broadcast(result), measured.predictions)
        return result

    _has_config = False

    def _write_config(self) -> None:
        write_text(self.folder.config, saved_config.dump_config(self.config))
        self._has_config = True

    @property
    def _is_removed(self) -> bool:
        """Whether somebody has removed the folder since the run began to write into it."""
        return self._has_config and not self.folder.config.is_file()

    def _read_before(self) -> dict[str, Any] | None:
        """Returns the config of the training in this folder, or None; damaged files that it can do without are renamed.

        Raises `DamagedFile` for what nothing else tells; a job's sweep knows its config.
        """
        needed = () if self.sweep is not None else (self.folder.config.name, self.folder.manifest.name)
        for error in find_damage(self.folder.path, *needed) if needed else ():
            raise error
        set_damage_aside(self.folder.path)
        before = saved_config.read_config(self.folder.config)
        return before if self.folder.holds_training else None

    def _train_along(self) -> dict[str, Any]:
        """Takes part in the training that the first process leads; writes nothing, and returns its result."""
        if (stored := distributed.broadcast(None)) is not None:
            return stored
        preflight(self.config)
        _, _, _ = self.data, self.measurer, self.suite
        distributed.check_same("base weights", self.base.fingerprint)
        callbacks = build_callbacks(self.config.callbacks)
        model = self.build_model()
        self._baseline(model)
        self._run_steps(self._prepare_training(model, callbacks, NoTracker()), None)
        self._measure_after(model)
        return distributed.broadcast({})

    def evaluate(self) -> dict[str, Any]:
        """Measures what `adapter` names, and the untuned base beside it; the result goes to `evaluate.json`."""
        _ = self.trained  # before the rows: an adapter of another base fails at once
        _ = self.suite  # before the model: a broken file of questions fails at once, and so do rows
        if self.measures_rows:
            _ = self.measurer
        model = self._prepare_task()
        with self._tracking(saved_config.config_to_dict(self.config)) as (tracker, summary):
            base = self._baseline(model) if isinstance(model, PeftModel) else Measurement()
            summary |= _prefixed("base_eval_", base.metrics)
            if isinstance(model, PeftModel):
                measured = self._measure(model, answers=self._wanted_answers)
            else:
                measured = self._measure_base(model)
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
        set_damage_aside(self.folder.path, self.folder.result("predict").name)
        decided_by, metrics = self._answers_decided_by(), self.config.evaluation.metrics
        path, stored = self.folder.predictions, self.folder.stored_result("predict") or {}
        known = stored.get("answers", {})
        if known.get("decided_by") == decided_by and path.is_file() and known.get("sha256") == file_digest(path):
            if known.get("metrics") == metrics:
                console.say(f"{self.folder.path} holds these answers already; this is the stored result")
                self._print_summary("predicted", stored, self._first_predictions())
                return stored
            speed = stored["metrics"].get("predict_tokens_per_second", math.nan)
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
        write_text(page, to_html(preview))
        plot_lengths(preview, picture)
        console.say_colored(to_text(preview, ids=self.config.task.ids, color=console.screen().is_terminal))
        paths = {"page": str(page), "lengths": str(picture)}
        result = self._store("preview", preview_metrics(self.data), paths)
        console.say()
        console.say_rows(list(paths.items()))
        return result

    def chat(self) -> dict[str, Any]:
        """Talks in the terminal with what `adapter` names, until `/exit` or the end of the input; writes no file."""
        model = self._load_for_task()
        set_seed(self.config.seed)
        speaker = ChatModel(
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
        return _result("chat", metrics, {"conversation": str(chat.file)} if chat.file else {})

    def merge(self) -> dict[str, Any]:
        """Makes one model of the base and the adapter in `merged/`, if it answers as they do."""
        adapter, full = self.trained
        if adapter is None:
            what = f"adapter={self.config.adapter or full}: it is a whole model" if full else "adapter=none"
            raise ConfigError(
                f"{what}, so there is nothing to merge; give adapter=FOLDER of an adapter or of a finished run"
            )
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
        stored = saved_config.read_config(adapter.parent / self.folder.config.name)
        if stored is None:
            return
        before, now = (dict(flatten({"quantization": each.get("quantization", {})}))
                       for each in (stored, saved_config.config_to_dict(self.config)))  # fmt: skip
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
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        finally:
            tracker.finish(status, {key: value for key, value in summary.items() if math.isfinite(value)})

    def _check_processes(self) -> None:
        """Raises `ConfigError` for what needs several processes, or cannot be had in them."""
        if self.config.trainer.parallel is Parallel.fsdp and distributed.world_size() == 1:
            raise ConfigError(
                f"trainer.parallel=fsdp shares the base out among processes, and this is one alone; "
                f"{distributed.LAUNCH_HINT}, or leave it out"
            )
        if distributed.world_size() > 1 and (self.config.model.device_map or self.config.model.max_memory):
            raise ConfigError(
                f"model.device_map and model.max_memory spread one process over several GPUs, and "
                f"{distributed.world_size()} processes were launched, each with a GPU of its own; leave them out, or "
                "start without a launcher"
            )

    def _baseline(self, model: PreTrainedModel) -> Measurement:
        """Measures the untuned base once; a resumed run reads what the first start measured.

        The adapter is switched off; where it starts as a part of the base (PiSSA, OLoRA), it must stay on.
        """
        if not (self.config.evaluation.baseline and self.config.task.evaluate):
            return Measurement()
        training = self.config.task.name is TaskName.train
        path = self.folder.baseline
        stored = distributed.broadcast(read_json(path) if training and distributed.is_main_process() else None)
        if stored is not None:
            try:
                return Measurement.from_dict(stored)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DamagedFile(path, "it holds no measurement of the base") from error
        rows = f" on {len(self.measurer.rows):,} held-out rows" if self.measures_rows else ""
        console.say(f"measuring the untuned base{rows}")
        part_of_base = training and self.config.lora.init in adapters.REWRITES_BASE
        with contextlib.nullcontext() if part_of_base else adapters.adapter_off(model):
            measured = self._measure_base(model)
        if training and distributed.is_main_process():
            write_json(path, measured.to_dict())
        return measured

    def _measure_base(self, model: PreTrainedModel) -> Measurement:
        """Measures a model without an adapter; raises `ConfigError` if its loss is NaN or infinite."""
        measured = self._measure(model, answers=self._wanted_answers)
        if not math.isfinite(measured.metrics.get("loss", 0.0)):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            forward = partial(self.measurer.measure, model, answers=0)
            key, what = f"model.name={self.config.model.name}", "its loss on the held-out rows is"
            raise self._in_first(lambda: explain_nonfinite(base, key, self.placement, forward, what))
        return measured

    def _find_checkpoint(self, plain: dict[str, Any]) -> Path | None:
        """Returns the checkpoint to go on from, if there is a good one."""
        checkpoint = last_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            return None
        facts, force = read_metadata(checkpoint), self.config.resume is Resume.force
        if not (self.folder.config.is_file() or force) and facts["config"] != config_digest(plain):
            raise ConfigError(
                f"{checkpoint} was written with another config, and {self.folder.config}, which would say which, is "
                "gone; choose another folder (hydra.run.dir=FOLDER or name=NAME), or resume=force to go on"
            )
        self._check_same_processes(checkpoint, facts)
        for name, text in facts["trackers"].items():
            if not (self.folder.path / name).is_file():
                write_text(self.folder.path / name, text)
        return checkpoint

    def _moved_base(self, before: dict[str, Any] | None) -> tuple[str, ...]:
        """Returns the keys that may name the base otherwise than `before`, because it is the same in another folder."""
        name = self.config.model.name
        if before is None or self.draws or before.get("model", {}).get("name") == name or not is_local(locate(name)):
            return ()
        trained = read_run_base(self.folder)
        is_same = trained is not None and find_difference(trained, self.base) is None
        return ("model.name", "model.revision") if is_same else ()

    def _check_same_base(self, checkpoint: Path | None) -> bool:
        """Returns whether the base is the one that the run in this folder began with, if it has begun."""
        trained = read_base(checkpoint) if checkpoint and self.config.lora.enabled else read_run_base(self.folder)
        elsewhere = ", or choose another folder (hydra.run.dir=FOLDER or name=NAME)"
        same = trained is None or self.check_base(f"the run in {self.folder.path}", trained, elsewhere)
        distributed.check_same("base weights", self.base.fingerprint)
        return same

    def _check_same_processes(self, checkpoint: Path, written: dict[str, Any]) -> None:
        """Raises `ConfigError` for a checkpoint of more or fewer processes; with `resume=force` it is a warning."""
        before, rows = written["processes"], written.get("rows")
        if before == distributed.world_size():
            return
        what = (
            f"{checkpoint} was written by {before} process{'es' if before > 1 else ''}, and this run has "
            f"{distributed.world_size()}: its steps hold "
        )
        if self.config.resume is Resume.force:
            same = "the same rows, but dropout draws other masks" if rows == self.rows_a_step else "other rows"
            log.warning("resume=force: %s%s", what, same)
            return
        accumulated, rest = divmod(
            rows or 0, self.config.trainer.per_device_train_batch_size * distributed.world_size()
        )
        same = f", with the same rows if trainer.gradient_accumulation_steps={accumulated}" if rows and not rest else ""
        raise ConfigError(
            f"{what}other rows; start {before} again, or choose another folder (hydra.run.dir=FOLDER or name=NAME); "
            f"resume=force goes on in spite of it{same}"
        )

    def _how_to_go_on(self) -> str:
        saved = find_checkpoints(self.folder.checkpoints)
        state = f"step {step_of(saved[-1]):,} is saved in {saved[-1]}" if saved else "there is no checkpoint yet"
        given = self.overrides if self.started_by is None else self.started_by
        words = [text for text in given if not text.startswith("resume=")]
        place = f"hydra.run.dir={quoted(str(self.folder.path))}"
        return f"{state}; go on with\n  {shlex.join([*distributed.command(), *words, place])}"

    def _prepare_training(self, model: PreTrainedModel, callbacks: list[Any], tracker: Tracker) -> QLoraTrainer:
        trainer = self._build_trainer(model, callbacks, tracker)
        if self.data.packed is not None:  # after the trainer is built, which switches the key-value cache off
            check_packing(model, self.placement, batch_size=self.config.trainer.per_device_train_batch_size)
        return trainer

    def _run_steps(self, trainer: QLoraTrainer, checkpoint: Path | None) -> None:
        """Trains from the first process' checkpoint on; raises `Stopped` if a signal ended that, when all is saved."""
        with self.stop.after_step():
            trainer.run(distributed.broadcast(checkpoint))
        self.stop.check()

    def _fit(
        self, model: PreTrainedModel, callbacks: list[Any], tracker: Tracker, checkpoint: Path | None
    ) -> dict[str, float]:
        trainer = self._prepare_training(model, callbacks, tracker)
        wait_for_space(self.folder.checkpoints, trainer.checkpoint_size)
        if checkpoint is not None:
            console.say(f"resuming from {checkpoint.name}")
        started = time.monotonic()
        try:
            self._run_steps(trainer, checkpoint)
        except BaseException:  # a run that fails has curves too
            with contextlib.suppress(UserError):
                write_json(self.folder.history, trainer.state.log_history)
            raise
        runtime = time.monotonic() - started
        write_json(self.folder.history, trainer.state.log_history)
        self._steps = trainer.state.global_step
        self._highest_memory_gb = trainer.memory.budget.highest / 1e9 if trainer.memory.budget is not None else 0.0
        self._save(model)
        plot_loss(trainer.state.log_history, self.folder.path / "loss.png")
        metrics = {"train_loss": trainer.mean_loss, "train_runtime": runtime}
        metrics["train_memory_retries"] = trainer.memory.retries
        return metrics | trainer.watchdog.metrics() | trainer.meter.overall(trainer.state)

    _steps, _highest_memory_gb = 0, 0.0
    _unquantized: str | None = None

    def _peak_memory_gb(self) -> float:
        return max(self._highest_memory_gb, peak_memory_gb(self.placement.device))

    def _build_manifest(self, plain: dict[str, Any], facts: dict[str, str]) -> dict[str, Any]:
        model = {**facts, **asdict(self.base)}
        seeds = {"seed": self.config.seed, "data.split_seed": self.config.data.split_seed}
        data = asdict(self.data.report)
        return build_manifest(plain, overrides=self.overrides, data=data, model=model, seeds=seeds)

    def _save(self, model: PreTrainedModel) -> None:
        self.tokenizer.chat_template = self.data.template.text  # chat and serving then write as training did
        if isinstance(model, PeftModel):
            rewritten = self.config.lora.init in adapters.REWRITES_BASE
            initial = self.folder.path / "initial_adapter" if rewritten else None
            adapters.save_adapter(model, self.folder.adapter, tokenizer=self.tokenizer, initial=initial, base=self.base)
        else:
            write_folder(self.folder.model, partial(self._save_model, model))

    def _save_model(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)

    def _measure_after(self, model: PreTrainedModel) -> Measurement:
        task, evaluation = self.config.task, self.config.evaluation
        measured = self._measure(model, answers=self._wanted_answers) if task.evaluate else Measurement()
        if not task.predict:
            return replace(measured, predictions=[])
        if measured.predictions:
            return measured
        answer = partial(self.measurer.predict, model, evaluation.show_predictions)
        return replace(measured, predictions=self._in_first(answer))

    def _answers_decided_by(self) -> dict[str, Any]:
        """Returns everything that decides the answers of `task=predict`, by name, in JSON's types."""
        config, place, (adapter, full) = saved_config.config_to_dict(self.config), self.placement, self.trained
        facts = {
            "model": {key: value for key, value in config["model"].items() if key not in ("cache_dir", "license")},
            "quantization": config["quantization"],
            "generation": config["generation"],
            "seed": config["seed"],
            "device": f"{place.device.type}, {place.param_dtype}, {place.compute_dtype}",
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
        return folder_digest(Path(place)) if is_local(place) else commit_hash(self.model_config)

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
        return self._load_for_task()

    def _load_for_task(self) -> PreTrainedModel:
        model = self.load_trained()
        console.start_screen(list(self._facts(model).items()))
        return model

    # Reports

    @property
    def run_name(self) -> str:
        """The name in the tracker: `name`, or the folder's."""
        return self.config.name or self.folder.path.name

    def _facts(self, model: PreTrainedModel) -> dict[str, str]:
        config = self.config
        quantization, trainer = config.quantization, config.trainer
        method = find_method(quantization)
        micro, steps = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
        count = adapters.count_parameters(model)
        decoder = read_decoder(model.get_base_model() if isinstance(model, PeftModel) else model)
        self._unquantized = decoder.describe_unquantized() if method.is_quantized else None
        base = method.describe(quantization)
        stored = sorted(count.by_dtype.items(), key=lambda item: -item[1])
        facts = {
            "model": f"{config.model.name}: {count.base / 1e6:,.1f} M parameters"
            + (f", {decoder.beside / 1e6:,.1f} M of them not for text" if decoder.beside else ""),
            "base": f"{base}; {self._unquantized}" if self._unquantized else base,
            "weights": ", ".join(f"{number / 1e6:,.1f} M in {dtype}" for dtype, number in stored),
            "device": str(self.placement),
            "folder": str(self.folder.path),
        }
        if config.task.name is TaskName.chat:
            place = self.trained[0] or self.trained[1] or "none"
            del facts["folder"]
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
            processes = distributed.world_size()
            facts |= {
                "data": f"{report.name}: {report.train_rows:,} rows to train ({report.train_tokens:,} tokens, "
                f"{report.trained_tokens:,} with loss), {report.describe_held_out()}",
                **({"template": report.template} if report.template else {}),
                **({"packing": f"{report.packs:,} packs, {report.packed_share:.1%} full"} if report.packs else {}),
                "training": f"{adapter}: {count}",
                **({"left out": left_out} if (left_out := self._left_out(decoder)) else {}),
                "batch": f"{micro} x {steps} accumulated x {processes} process{'es' if processes > 1 else ''} "
                f"= {self.rows_a_step} {unit} a step",
                "steps": f"{length}, {trainer.optim}, learning rate {trainer.learning_rate:g} "
                f"({trainer.lr_scheduler_type})",
            }
        return facts

    def _left_out(self, decoder: Decoder) -> str | None:
        """Says what `lora.target_modules=all-linear` has no adapter for; None: it has one for all, or is not set."""
        lora = self.config.lora
        is_all = lora.enabled and lora.target_modules == ["all-linear"]
        return decoder.describe_unadapted() if is_all else None

    def _store(self, task: str, metrics: Mapping[str, Any], paths: dict[str, str]) -> dict[str, Any]:
        """Writes the result of a task that has no objective, and returns it."""
        result = _result(task, metrics, paths)
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
                        compute_dtype=str(self.placement.compute_dtype).removeprefix("torch."),
                        unquantized=self._unquantized,
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
        own = ["task=", "adapter=", "hydra.run.dir=", "name=", "resume="]
        own += ["base="] if self.config.task.name is TaskName.train else []  # its adapter belongs to this base now
        chosen = [text for text in self.overrides if not text.startswith(tuple(own))]
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


def _result(task: str, metrics: Mapping[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    """Returns the result of a task that has no objective."""
    return {"status": "finished", "task": task, "objective": None, "metrics": dict(metrics), "paths": paths}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}
