"""Runs for notebooks and scripts: `train`, what it returns, and `Run`, one task with one config in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config.arguments import folder_override
from qlora.config.compose import compose_dict, to_config
from qlora.config.mistakes import MISTAKES
from qlora.config.overrides import with_environment
from qlora.config.schema import Config, TaskName
from qlora.errors import ConfigError, did_you_mean
from qlora.runtime import console
from qlora.runtime.command_folder import check_links, make_new, start_in
from qlora.runtime.environment import prepare_environment
from qlora.runtime.run_folder import RunFolder, find_adapter
from qlora.runtime.sweep_job import SweepJob
from qlora.tasks import build_job, run_job
from qlora.text import format_metric

if TYPE_CHECKING:  # which import torch
    from qlora.session import Session
    from qlora.tasks.chat_model import ChatModel


def train(*overrides: str, config_dir: Path | str | None = None) -> FinishedRun:
    """Trains as `qlora OVERRIDES` does, in the folder that the command would use, and returns the finished run.

    The same overrides with the same `name=` resume an interrupted run, and return a finished one as it was saved.
    `config_dir` holds options of the user's own (`--config-dir`). Raises a `UserError` for what the user can put right.
    """
    given = with_environment(overrides)
    composed = compose_dict(given, config_dir)
    if getattr(composed.hydra.mode, "name", None) == "MULTIRUN":
        raise ConfigError(
            "qlora.train starts one run, and a sweep is many; start it on the command line: qlora sweep=NAME"
        )
    config, folder = to_config(composed), Path(str(composed.hydra.run.dir))
    if (by := config.sweep.compare.by) is not None and composed.hydra.mode is None:
        raise ConfigError(
            f"sweep.compare.by={by} compares runs of a sweep, and qlora.train starts one run; start it on the command "
            f"line: qlora -m {by}=A,B"
        )
    if not config.task.name.trains:
        name = config.task.name.value.replace("_", "-")
        raise ConfigError(
            f"task={name}: qlora.train trains; leave it out, or start it on the command line: qlora task={name}"
        )
    check_links(folder)
    is_named = config.name is not None or folder_override(given) is not None
    start = start_in(folder) if is_named else make_new(folder)
    folder = folder.with_name(start.folder.name)
    try:
        result = Run(config, folder, overrides).train()
    except MISTAKES:
        start.restore()
        raise
    return FinishedRun(config, folder, result["metrics"])


class Run:
    """A config and a folder, as quiet as on the command line.

    `overrides` are the command line's, for the model card; `sweep` is the sweep that the run is a job of, for the
    tracker. The same folder may be given again: a finished task returns its saved result, an interrupted training run
    resumes.
    """

    def __init__(
        self, config: Config, output_dir: Path | str, overrides: Sequence[str] = (), sweep: SweepJob | None = None
    ) -> None:
        prepare_environment()
        self.config = config
        self._job = build_job(config, output_dir, overrides, sweep)

    @cached_property
    def session(self) -> Session:
        """Device, tokenizer, data and model of the run, each built when first needed."""
        with console.quiet_notebook():
            return self._job.session

    def train(self) -> dict[str, Any]:
        """Trains, measures and predicts as `task` says; returns what `result.json` holds."""
        if not self.config.task.name.trains:
            raise ConfigError(f"task={self.config.task.name.value} does not train; call execute(), or leave it out")
        return self.execute()

    def execute(self) -> dict[str, Any]:
        """Runs the task of `task=` and returns its result, as saved in the run's folder."""
        if not self._job.needs.torch:
            name = self.config.task.name.value.replace("_", "-")
            raise ConfigError(f"task={name} is no run; start it on the command line: qlora task={name}")
        with console.quiet_notebook():
            return run_job(self._job).to_dict()


class Metrics(Mapping[str, float]):
    """The metrics of a run by name, as attributes and as items: `metrics.eval_loss`, `metrics["eval_loss"]`."""

    eval_loss: float
    """Mean negative log-likelihood of a held-out token, in nats."""
    eval_perplexity: float
    """Its exponential."""
    eval_exact_match: float
    """The share of held-out rows whose answer equals the reference."""
    base_eval_loss: float
    """The same of the untuned base."""
    base_eval_perplexity: float
    base_eval_exact_match: float
    train_loss: float
    """Mean loss of the training steps."""
    train_runtime: float
    """Seconds of training."""
    train_tokens_per_second: float
    peak_memory_gb: float
    """The most memory, in 10^9 bytes."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> float:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(
                f"this run has no metric {name}{did_you_mean(name, values)}; it has {', '.join(values)}"
            )
        return float(values[name])

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._values})

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{name}={format_metric(name, value)}' for name, value in self._values.items())})"


class FinishedRun:
    """A finished training run: its folder, what was measured, and a model that answers."""

    def __init__(self, config: Config, folder: Path | str, metrics: Mapping[str, float]) -> None:
        self.config, self.folder, self.metrics = config, Path(folder), Metrics(metrics)

    @property
    def page(self) -> Path:
        """The page of the run, one file that a browser opens: curves, metrics before and after, answers, config."""
        return RunFolder(self.folder).report

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter, for PEFT and `adapter=`; None with `lora=none`, which trains all weights."""
        return find_adapter(self.folder)[0]

    def ask(self, question: str, *, system: str = "", base: bool = False) -> str:
        """Returns the answer to a question, as `task=chat` gives it to the first message of a conversation.

        The first call loads the model. `system` stands before the question; `base` lets the untuned base answer.
        """
        from qlora.tasks.conversation import Chat, Entered

        if not question.strip():
            raise ConfigError("ask needs a question, and this text is empty")
        with console.quiet_notebook():
            if base and not self._chat_model.has_adapter:
                raise ConfigError(
                    "base=True: there is no adapter to switch off; a run with lora=none trained all weights"
                )
            chat = Chat(self._chat_model, show=lambda text: None, say=console.say)
            chat.system, chat.base = system, base
            chat.hear(Entered(question, quoted=True))
        if not chat.replies or chat.replies[-1].finish == "interrupted":
            raise KeyboardInterrupt
        return chat.replies[-1].text

    @cached_property
    def _chat_model(self) -> ChatModel:
        from qlora.tasks.chat import build_chat_model

        task = replace(self.config.task, name=TaskName.chat)
        config = replace(self.config, task=task, adapter=str(self.folder))
        session = Run(config, self.folder).session
        return build_chat_model(session, session.load_trained())

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.folder)!r}, {self.metrics!r})"
