"""`task=train`: trains an adapter or all weights, measures before and after, and reports."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config import saved_config
from qlora.config.paths import short_path
from qlora.config.preset import differences_to_preset
from qlora.config.schema import Config, Resume
from qlora.config.training_length import TokenCount
from qlora.doctor import preflight
from qlora.errors import DamagedFile, Pruned, RunError, Stopped, UserError, describe_fault
from qlora.models.context import limit_warning
from qlora.models.embedded import embedded_warning
from qlora.reporting.kept import kept_lines
from qlora.reporting.live_page import LivePage
from qlora.reporting.manifest import build_manifest, keep_manifest, write_json
from qlora.reporting.model_card import write_model_card
from qlora.reporting.run_page import write_run_page
from qlora.reporting.start_lines import evaluation_lines, training_lines
from qlora.runtime import console, distributed
from qlora.runtime.atomic_files import read_json, read_lines, waiting_for_space, write_folder, write_lines, write_text
from qlora.runtime.disk_space import Patience, wait_for_space
from qlora.runtime.needs import Needs, Rows
from qlora.runtime.saved_run import find_damage, set_damage_aside
from qlora.runtime.task_result import TaskResult
from qlora.tasks.measured import build_result, first_predictions, measure_untuned, prefixed, print_measured
from qlora.tasks.plan import planned_time
from qlora.tasks.protocol import TaskJob
from qlora.tasks.shown_run import shown_run
from qlora.tasks.used import describe_used
from qlora.training.checkpoints import remove_surplus
from qlora.training.device_checks import check_device, check_processes
from qlora.training.resume import ANOTHER_FOLDER, check_prompts, find_checkpoint, how_to_resume
from qlora.training.trackers import NoTracker, Tracker

if TYPE_CHECKING:  # which import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora.evaluation.measure import Measurement, Measurer
    from qlora.session import Session
    from qlora.training.keep import Kept
    from qlora.training.peak_memory import PeakMemory
    from qlora.training.trainer import QLoraTrainer


log = logging.getLogger(__name__)


def needs(config: Config) -> Needs:
    """Returns what training needs; with `task.train=false` it measures what the folder holds."""
    task, evaluation = config.task, config.evaluation
    scored = evaluation.scored_answers if task.evaluate else 0
    is_tracked = bool(config.tracking.trackers)
    printed = evaluation.show_predictions if task.predict or is_tracked else 0
    if config.loss.reads_whole_texts:
        scored = printed = 0
    return Needs(
        torch=True,
        base=True,
        rows=Rows.all if task.train else Rows.held_out,
        answers=None if scored is None else max(scored, printed),
        several_processes=task.train,
        tracker=True,
        caches=True,
    )


def run(job: TaskJob) -> TaskResult:
    """Trains, measures and predicts as `task` says; returns the result written to `result.json`.

    Waits where the disk is full. Raises `Stopped` after a signal, when what can be saved is saved.
    """
    from qlora.runtime.determinism import deterministic

    session, limit = job.session, job.config.trainer.save_total_limit
    patience = Patience(
        seconds=job.config.trainer.disk_wait,
        # The oldest would go when the next one is saved.
        make_room=lambda: (
            distributed.is_main_process()
            and remove_surplus(job.folder.checkpoints, limit and limit - 1, session.keep_rule.needed)
        ),
        check=session.stop.check,
    )
    training = Training(job)
    with session.stop.watching(), waiting_for_space(patience), deterministic(job.config.trainer):
        try:
            return training.lead() if distributed.is_main_process() else training.follow()
        except Stopped as stopped:
            raise Stopped(
                f"{stopped}: {how_to_resume(job.folder, job.typed or [*(job.command or job.overrides), *job.options])}"
            ) from None
        except Exception as error:
            if isinstance(error, UserError | Pruned) or not training.folder_is_removed:
                raise
            raise RunError(
                f"the run folder {job.folder.path} was removed while the run wrote into it "
                f"({describe_fault(error)}); start the same command again"
            ) from error


class Training:
    """The steps of one training run."""

    def __init__(self, job: TaskJob) -> None:
        self.job, self.config, self.folder = job, job.config, job.folder
        self.session: Session = job.session
        self.steps = 0
        self._has_config = False
        self._peak: PeakMemory | None = None
        self._kept: Kept | None = None
        self._page: LivePage | None = None
        self.unquantized: str | None = None
        """The parts of the base that are not quantized, for the model card."""
        self.experts = ""
        """What is trained on routed experts, for the same."""
        self.mixture = ""
        """The size of a base that is a mixture of experts, for the same."""

    def lead(self) -> TaskResult:
        """Does all of it, in the main process."""
        session = self.session
        if self.config.resume is Resume.never:
            self.folder.check_unused()
        self.folder.create()
        resolved = saved_config.config_to_dict(self.config)
        previous = self._read_previous()
        is_same = self.folder.check_same_training(previous, resolved, self._moved_base(previous))
        check_processes(self.config.trainer, self.config.model)
        saved = distributed.broadcast(self.folder.stored_result("train") if is_same else None)
        if saved is not None:
            console.say(f"{short_path(self.folder.path)} is finished already; this is its saved result")
            result = TaskResult.from_dict(saved)
            self._print(result, first_predictions(self.job))
            return result
        if self.config.task.train:
            from qlora.upstream.transformers_trainer import check_trainer

            check_trainer()
            check_device(self.config.trainer, session.placement.device.type)
            _ = session.objective
        preflight(self.config)
        _ = session.is_trainable
        _ = session.start
        checkpoint = self._find_checkpoint(resolved) if self.config.task.train else None
        data, _, _ = session.data, self._measurer, session.suite  # before the model: a broken data set fails at once
        _ = session.tokens_without_embedding
        rows = (self.folder.stored_manifest() or {}).get("data")
        is_same &= self.folder.check_same_rows(rows, asdict(data.report), resolved)
        callbacks = _build_callbacks(self.config)
        if self.config.task.train:
            is_same &= self._check_same_base(checkpoint)
        if not is_same:
            for stale in (self.folder.result("train"), self.folder.baseline, self.folder.base_predictions):
                stale.unlink(missing_ok=True)
        self._write_config()
        with session.tracking(resumes=True) as (tracker, metrics):
            result, measured = self._train_and_measure(resolved, metrics, callbacks, tracker, checkpoint)
            tracker.log_predictions(measured.predictions[: self.config.evaluation.show_predictions], step=self.steps)
            if self.folder.adapter.exists():
                tracker.log_adapter(self.folder.adapter)
        distributed.broadcast(result.to_dict())
        self._print(result, measured.predictions)
        return result

    def _train_and_measure(
        self,
        resolved: dict[str, Any],
        metrics: dict[str, float],
        callbacks: list[Any],
        tracker: Tracker,
        checkpoint: Path | None,
    ) -> tuple[TaskResult, Measurement]:
        """Fills in the metrics as they are measured, and writes the result."""
        from qlora.runtime.device import reset_peak_memory
        from qlora.runtime.energy import read_energy
        from qlora.training.peak_memory import PeakMemory

        session = self.session
        reset_peak_memory(session.placement.device)
        peak = self._peak = PeakMemory(session.placement.device)
        model = session.build_model() if self.config.task.train else session.load_trained()
        lines = self._describe(model)
        manifest = self._build_manifest(resolved, lines)
        record = keep_manifest(self.folder.manifest, manifest, peak_memory_gb=peak.gb, energy=read_energy)
        with record, shown_run(self.job, self._command) as self._page:
            console.start_screen(list(lines.items()))
            base = self._measure_base(model)
            metrics |= prefixed("base_eval_", base.metrics)
            self._page.begin("preparing the training" if self.config.task.train else "measuring the held-out rows")
            if self.config.task.train:
                metrics |= self._fit(model, callbacks, tracker, checkpoint)
                self._page.update(self._page.history, "trained; measuring the held-out rows", measured=True)
            measured = self._measure_after(model)
            metrics |= prefixed("eval_", measured.metrics)
            metrics["peak_memory_gb"] = peak.gb()
            if self.folder_is_removed:
                log.warning("%s was removed while the run was at work; it is written again", self.folder.path)
                self._write_config()
            return self._write_result(metrics, measured, base), measured

    def follow(self) -> TaskResult:
        """Takes part in the training run that the main process leads; writes nothing, and returns its result."""
        saved = distributed.broadcast(None)
        if saved is not None:
            return TaskResult.from_dict(saved)
        preflight(self.config)
        _, _, _ = self.session.data, self._measurer, self.session.suite
        distributed.check_same("base weights", self.session.base.fingerprint)
        callbacks = _build_callbacks(self.config)
        model = self.session.build_model()
        self._measure_base(model)
        self._run_steps(self._build_trainer(model, callbacks, NoTracker()), None)
        self._measure_after(model)
        return TaskResult.from_dict(distributed.broadcast({}))

    def _print(self, result: TaskResult, predictions: list[dict[str, Any]]) -> None:
        # The adapter of this run belongs to its base, so the next command needs no `base=force`.
        print_measured("finished", self.job, result, predictions, left_out=["base="])

    # The folder

    def _write_config(self) -> None:
        write_text(self.folder.config, saved_config.dump_config(self.config))
        self._has_config = True

    @property
    def folder_is_removed(self) -> bool:
        """Whether somebody has removed the folder since the run began to write into it."""
        return self._has_config and not self.folder.config.is_file()

    def _read_previous(self) -> dict[str, Any] | None:
        """Returns the config of the training run in this folder, or None; damaged files it can do without are renamed.

        Raises `DamagedFile` for what is recorded nowhere else; the sweep of a job knows its config.
        """
        needed = () if self.job.sweep is not None else (self.folder.config.name, self.folder.manifest.name)
        for error in find_damage(self.folder.path, *needed) if needed else ():
            raise error
        set_damage_aside(self.folder.path)
        previous = saved_config.read_config(self.folder.config)
        return previous if self.folder.holds_training else None

    def _find_checkpoint(self, resolved: dict[str, Any]) -> Path | None:
        return find_checkpoint(self.folder, self.config, resolved, rows_a_step=self.session.rows_a_step)

    def _moved_base(self, previous: dict[str, Any] | None) -> tuple[str, ...]:
        """Returns the keys that may differ from `previous` because the same base now lies in another folder."""
        from qlora.models.fingerprint import find_difference, read_run_base
        from qlora.models.model_files import is_local, locate

        name = self.config.model.name
        if previous is None or self.session.has_random_weights or previous.get("model", {}).get("name") == name:
            return ()
        if not is_local(locate(name)):
            return ()
        trained = read_run_base(self.folder)
        is_same = trained is not None and find_difference(trained, self.session.base) is None
        return ("model.name", "model.revision") if is_same else ()

    def _check_same_base(self, checkpoint: Path | None) -> bool:
        """Returns whether the base is the one that the run in this folder began with, if it has begun."""
        from qlora.models.fingerprint import read_base, read_run_base

        trained = read_base(checkpoint) if checkpoint and self.config.lora.enabled else read_run_base(self.folder)
        user = f"the run in {self.folder.path}"
        same = trained is None or self.session.check_base(user, trained, f", or {ANOTHER_FOLDER}")
        distributed.check_same("base weights", self.session.base.fingerprint)
        return same

    # Training

    def _build_trainer(
        self,
        model: PreTrainedModel | PeftModel,
        callbacks: list[Any],
        tracker: Tracker,
        checkpoint: Path | None = None,
    ) -> QLoraTrainer:
        from qlora.tasks.build_trainer import build_trainer

        return build_trainer(self.session, model, callbacks, tracker, self._page, self._peak, checkpoint)

    def _fit(
        self, model: PreTrainedModel | PeftModel, callbacks: list[Any], tracker: Tracker, checkpoint: Path | None
    ) -> dict[str, float]:
        """Trains the model and saves what was trained; returns the metrics of the training steps."""
        from qlora.reporting.loss_curve import plot_loss

        trainer = self._build_trainer(model, callbacks, tracker, checkpoint)
        wait_for_space(self.folder.checkpoints, trainer.checkpoint_size)
        if checkpoint is not None:
            check_prompts(checkpoint, self.config, shares_prompts=self.session.data.shares_prompts)
            console.say(f"resuming from {checkpoint.name}")
        started = time.monotonic()
        with self._history_kept(trainer):
            self._run_steps(trainer, checkpoint)
        runtime = time.monotonic() - started
        if (stream := self.session.data.stream) is not None:
            console.say_rows([("stream", str(stream))])
        if self._kept is not None:
            console.say_rows(kept_lines({"kept": self._kept.to_dict({})}))
        write_json(self.folder.history, trainer.state.log_history)
        self.steps = trainer.state.global_step
        save_trained(self.session, model)
        plot_loss(trainer.state.log_history, self.folder.path / "loss.png")
        metrics = {"train_loss": trainer.mean_loss, "train_runtime": runtime}
        metrics["train_memory_retries"] = trainer.memory.retries
        return metrics | trainer.watchdog.metrics() | trainer.meter.overall(trainer.state)

    @contextlib.contextmanager
    def _history_kept(self, trainer: QLoraTrainer) -> Iterator[None]:
        """Writes the history of a run that fails, which has curves too."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(UserError):
                write_json(self.folder.history, trainer.state.log_history)
            raise

    def _run_steps(self, trainer: QLoraTrainer, checkpoint: Path | None) -> None:
        """Trains from the main process' checkpoint, and makes the model what `trainer.keep` keeps.

        Raises `Stopped` if a signal ended the steps, when all is saved.
        """
        from qlora import adapters
        from qlora.training.keep import keep_weights

        with self.session.stop.after_step():
            trainer.run(distributed.broadcast(checkpoint))
        self.session.stop.check()
        self._kept = keep_weights(trainer, self.session.keep_rule, adapters.average_trained)

    # Measuring

    @property
    def _measurer(self) -> Measurer | None:
        """What measures the held-out rows; None: none are held out."""
        return self.session.measurer if self.session.measures_rows else None

    def _measure_base(self, model: PreTrainedModel | PeftModel) -> Measurement:
        """Measures the untuned base once; a resumed run reads what the first start measured.

        The adapter is switched off; where it starts as a part of the base (PiSSA, OLoRA), it must stay on.
        """
        from qlora import adapters
        from qlora.evaluation.measure import Measurement

        measures = self.session.measures_rows or self.session.suite is not None
        if not (self.config.evaluation.baseline and self.config.task.evaluate and measures):
            return Measurement()
        path = self.folder.baseline
        saved = distributed.broadcast(read_json(path) if distributed.is_main_process() else None)
        if saved is not None and self._recall_answers():
            try:
                return Measurement.from_dict(saved)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DamagedFile(path, "it holds no measurement of the base") from error
        part_of_base = self.config.lora.init in adapters.REWRITES_BASE
        # A preference is compared with the model as the run begins, which may have an adapter.
        start = self.session.start if self.config.loss.is_preference else None
        is_start = start is not None
        label = self.session.baseline if start is None else f"the start ({short_path(start)})"
        measured = measure_untuned(self.session, model, keep_adapter=part_of_base or is_start, label=label)
        predictions = measured.predictions or self._answer_few(model, untuned=not (part_of_base or is_start))
        if distributed.is_main_process():
            if predictions:
                write_lines(self.folder.base_predictions, predictions)
            write_json(path, measured.to_dict())
        return measured

    def _recall_answers(self) -> bool:
        """Reads the answers of the start where others are compared with them; returns whether all are there."""
        if self.config.evaluation.win is None:
            return True
        is_main, path = distributed.is_main_process(), self.folder.base_predictions
        answers = distributed.broadcast(read_lines(path) if is_main and path.exists() else [])
        most = self.session.scored_answers
        count = len(self.session.measurer.rows)
        self.session.previous_answers = answers
        return len(answers) == (count if most is None else min(most, count))

    def _measure_after(self, model: PreTrainedModel | PeftModel) -> Measurement:
        from qlora.evaluation.measure import Measurement

        task, session = self.config.task, self.session
        measured = session.measure(model) if task.evaluate else Measurement()
        if not (task.predict and session.measures_rows):
            return replace(measured, predictions=[])
        if measured.predictions:
            return measured
        return replace(measured, predictions=self._answer_few(model))

    def _answer_few(self, model: PreTrainedModel | PeftModel, *, untuned: bool = False) -> list[dict[str, Any]]:
        """Returns answers to the rows that are shown, where no metric asks for more; `untuned` without the adapter."""
        from qlora.adapters import adapter_off

        if not (self.config.task.predict and self.session.measures_rows and self.session.measurer.reads_tokens):
            return []
        answer = partial(self.session.measurer.predict, model, self.config.evaluation.show_predictions)
        with adapter_off(model) if untuned else contextlib.nullcontext():
            return self.session.in_main_process(answer)

    # Reports

    def _describe(self, model: PreTrainedModel | PeftModel) -> dict[str, str]:
        """Returns the lines of the start screen."""
        session, report = self.session, self.session.data.report
        summary = session.describe(model)
        self.unquantized, self.experts = summary.unquantized, summary.count.describe_experts()
        self.mixture = summary.count.describe_base() if summary.count.routing else ""
        if not self.config.task.train:
            return summary.lines | evaluation_lines(self.config, report)
        too_long = limit_warning(report.max_length, self.config.model.name, session.context)
        lost = str(session.data.lost) if session.data.lost is not None else None
        for warning in filter(None, (session.length.warning, too_long, lost, embedded_warning(self.config))):
            log.warning(warning)
        lines = training_lines(
            self.config,
            report,
            summary.count,
            left_out=summary.unadapted,
            rows_a_step=session.rows_a_step,
            length=session.length,
            keeps=session.keep_rule.describe(measures=session.measures_rows),
            limit=session.row_limit,
            head=str(session.head) if self.config.loss.reads_whole_texts else "",
        )
        return summary.lines | lines | self._time_line()

    def _time_line(self) -> dict[str, str]:
        """Returns the line on the time that the training takes, where the plan knows the GPU."""
        from qlora.data.batching.token_store import column
        from qlora.data.token_count import padded_length

        session, trainer = self.session, self.config.trainer
        if session.placement.device.type != "cuda" or distributed.world_size() > 1 or self.config.data.streaming:
            return {}
        data, batch = session.data, trainer.per_device_train_batch_size
        if data.packed is not None:
            padded = float(self.config.data.pack_width or 0)
        else:
            padded = padded_length(data.lengths, batch, grouped=trainer.group_by_length)
        length, tokens = session.length, data.report.train_tokens
        targets = int(column(data.train, "trained").sum())
        count = TokenCount(
            length.units, length.unit, tokens, padded, targets=targets, most_targets=data.most_targets,
            attended=data.attended,
        )  # fmt: skip
        time = planned_time(self.config, count)
        return {"time": time} if time is not None else {}

    @property
    def _command(self) -> str:
        return shlex.join(["qlora", *self.job.overrides, *self.job.options])

    def _write_result(self, metrics: dict[str, float], measured: Measurement, base: Measurement) -> TaskResult:
        """Writes the result, model cards beside what was trained, and the page of the run."""
        from qlora.models.license import read_license

        folder, session = self.folder, self.session
        more: dict[str, Any] = {"measured": describe_used(self.job)}
        if session.config.task.train and (stream := session.data.stream) is not None:
            overlaps = [overlap._asdict() for overlap in stream.overlaps]
            more["stream"] = {"rows": stream.counts.rows, "passes": stream.passes, "overlaps": overlaps}
        if self._kept is not None:
            more["kept"] = self._kept.to_dict(metrics)
        result = build_result(self.job, metrics, measured, base, more=more)
        for parent in (folder.adapter, folder.model, folder.path):
            if parent.is_dir():
                card = write_model_card(
                    parent,
                    config=self.config,
                    result=result.to_dict(),
                    base_model=self.config.model.name,
                    command=self._command,
                    compute_dtype=str(session.placement.compute_dtype).removeprefix("torch."),
                    unquantized=self.unquantized,
                    experts=self.experts,
                    mixture=self.mixture,
                    license=read_license(self.config.model),
                    example_prompt=self._measurer.rows[0]["prompt"] if self._measurer is not None else None,
                )
        result.paths["card"] = str(card)
        write_json(folder.path / "metrics.json", metrics)
        result.paths["report"] = str(write_run_page(folder, result.to_dict(), command=self._command))
        write_json(folder.result("train"), result.to_dict())
        return result

    def _build_manifest(self, resolved: dict[str, Any], lines: dict[str, str]) -> dict[str, Any]:
        model = {**lines, **asdict(self.session.base)}
        seeds = {"seed": self.config.seed, "data.split_seed": self.config.data.split_seed}
        data = asdict(self.session.data.report)
        preset = differences_to_preset(self.config, self.job.overrides)
        return build_manifest(
            resolved, overrides=self.job.overrides, data=data, model=model, seeds=seeds, preset=preset
        )


def _build_callbacks(config: Config) -> list[Any]:
    from qlora.training.callbacks import build_callbacks

    return build_callbacks(config.callbacks)


def save_trained(session: Session, model: PreTrainedModel | PeftModel) -> None:
    """Writes the adapter, or the fully finetuned model, into the run's folder."""
    from peft import PeftModel

    from qlora import adapters
    from qlora.models.tokenizer import save_tokenizer

    def save_model(folder: Path) -> None:
        model.save_pretrained(str(folder))
        save_tokenizer(session.tokenizer, folder)

    session.tokenizer.chat_template = session.data.template.text  # chat and serving then write as training did
    if not isinstance(model, PeftModel):
        write_folder(session.folder.model, save_model)
        return
    rewritten = session.config.lora.init in adapters.REWRITES_BASE
    initial = session.folder.path / "initial_adapter" if rewritten else None
    adapters.save_adapter(
        model,
        session.folder.adapter,
        tokenizer=session.tokenizer,
        initial=initial,
        base=session.base,
        finish=lambda folder: session.write_head(folder, model),
    )
    if session.config.lora.per_expert:
        adapters.save_per_expert(model, session.folder.adapter, session.folder.adapter_per_expert)
