"""Sends metrics, predictions and the adapter to Weights & Biases or TensorBoard, or nowhere."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch

from qlora.console import is_main_process
from qlora.errors import ConfigError
from qlora.schema import TrackingBackend, TrackingConfig, WandbMode
from qlora.training.progress import ClockedCallback, evaluation_metrics

RUN_ID_FILE = "wandb_run_id.txt"  # a run that goes on in the same folder goes on in wandb, too
PREDICTION_COLUMNS = ("prompt", "reference", "prediction", "match")


def build_tracker(config: TrackingConfig, *, name: str, run_config: dict[str, Any], output_dir: Path) -> Tracker:
    """Starts the tracker that `config` names; in every process but the first, one that does nothing.

    Raises `ConfigError` if its package or its login is missing.
    """
    if config.backend is TrackingBackend.none or not is_main_process():
        return NoTracker()
    kind = WandbTracker if config.backend is TrackingBackend.wandb else TensorboardTracker
    return kind(config, name=name, run_config=run_config, output_dir=output_dir)


class Tracker:
    """Where metrics go besides the run folder; each kind says what it does with them."""

    url: str | None = None
    """The page that shows the run, if there is one."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records `metrics` at an optimizer step."""

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records answers with the columns prompt, reference, prediction and match."""

    def log_adapter(self, folder: Path) -> None:
        """Stores the finished adapter, where the config asks for it."""

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Ends the run with `status` (`finished`, or what stopped it) and its final metrics."""


class NoTracker(Tracker):
    """Records nothing."""


class WandbTracker(Tracker):
    """A Weights & Biases run, online or offline; it prints nothing and leaves the console alone."""

    def __init__(self, config: TrackingConfig, *, name: str, run_config: dict[str, Any], output_dir: Path) -> None:
        wandb = _import_wandb()
        self._wandb, self._log_adapter = wandb, config.log_adapter
        mode = wandb_mode(config)
        if mode == "online":
            _check_login(wandb)
        try:
            self._run: Any = wandb.init(
                project=config.project,
                entity=config.entity,
                name=name,
                group=config.group,
                tags=config.tags or None,
                config=run_config,
                mode=mode,
                dir=str(output_dir),
                id=_run_id(output_dir),
                resume="allow" if mode == "online" else None,  # an offline run goes on by its id alone
                settings=wandb.Settings(console="off", silent=True, disable_code=True),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"tracking=wandb: wandb could not start a run ({reason}); check tracking.project, tracking.entity and "
                "the network, or set tracking.mode=offline and send the run later with `wandb sync`"
            ) from error
        # Steps are a metric of their own: wandb's step only grows, and a resumed run repeats steps.
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        self.url = self._run.url if mode == "online" else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records `metrics` at an optimizer step."""
        self._run.log({**metrics, "global_step": step})

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records a table of answers."""
        data = [[step, *(str(row.get(name, "")) for name in PREDICTION_COLUMNS)] for row in rows]
        table = self._wandb.Table(columns=["step", *PREDICTION_COLUMNS], data=data)
        self._run.log({"predictions": table, "global_step": step})

    def log_adapter(self, folder: Path) -> None:
        """Stores the adapter as an artifact of type `adapter`, with `tracking.log_adapter=true`."""
        if self._log_adapter:
            artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):  # add_dir would print
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
            self._run.log_artifact(artifact)

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Ends the run; any status but `finished` marks it as failed."""
        if self._run is not None:
            self._run.summary.update({**summary, "status": status})
            self._run.finish(exit_code=0 if status == "finished" else 1)
            self._run = None


class TensorboardTracker(Tracker):
    """TensorBoard event files in `<run folder>/tensorboard`; it stores no adapter."""

    def __init__(self, config: TrackingConfig, *, name: str, run_config: dict[str, Any], output_dir: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ConfigError(_missing_package("tensorboard")) from error
        self._writer = SummaryWriter(str(output_dir / "tensorboard"))
        self._last = 0
        text = json.dumps({"name": name, **run_config}, indent=2, default=str)
        self._writer.add_text("config", _code_block(text))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Records `metrics` at an optimizer step."""
        self._last = max(self._last, step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_predictions(self, rows: list[dict[str, str]], step: int) -> None:
        """Records a table of answers as text."""
        lines = ["| " + " | ".join(PREDICTION_COLUMNS) + " |", "|" + "---|" * len(PREDICTION_COLUMNS)]
        for row in rows:
            cells = (str(row.get(name, "")).replace("|", "\\|") for name in PREDICTION_COLUMNS)
            lines.append("| " + " | ".join("<br>".join(cell.splitlines()) for cell in cells) + " |")
        self._writer.add_text("predictions", "\n".join(lines), step)
        self._writer.flush()

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Records the final metrics and closes the file."""
        text = json.dumps({"status": status, **summary}, indent=2)
        self._writer.add_text("summary", _code_block(text), self._last)
        self._writer.close()


class TrackerCallback(ClockedCallback):
    """Forwards what the trainer logs, under names such as `train/loss` and `eval/exact_match`."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Sends the numbers of a training log or of an evaluation."""
        if not state.is_world_process_zero or not logs:
            return
        metrics = self._training_metrics(logs) if "loss" in logs else tracked_evaluation(logs)
        if metrics:
            self._tracker.log(metrics, state.global_step)

    def _training_metrics(self, logs: dict[str, Any]) -> dict[str, float]:
        names = {"num_input_tokens_seen": "tokens_seen"}
        kept = ("loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen")
        metrics = {f"train/{names.get(key, key)}": float(logs[key]) for key in kept if logs.get(key) is not None}
        rate = self.clock.tokens_per_second(logs.get("num_input_tokens_seen"))
        if rate is not None:
            metrics["train/tokens_per_second"] = rate
        if torch.cuda.is_available():
            metrics["train/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics


def tracked_evaluation(logs: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation as `eval/NAME`, those of the untuned base as `base/NAME`."""
    prefix = "base" if any(key.startswith("base_eval_") for key in logs) else "eval"
    return {f"{prefix}/{name}": float(value) for name, value in evaluation_metrics(logs).items()}


def wandb_mode(config: TrackingConfig) -> str:
    """Returns `online`, `offline` or `disabled`; the environment's WANDB_MODE may silence an online run."""
    if config.mode is WandbMode.offline:
        return "offline"
    asked = os.environ.get("WANDB_MODE", "")
    return {"dryrun": "offline", "offline": "offline", "disabled": "disabled"}.get(asked, "online")


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(_missing_package("wandb")) from error
    return wandb


def _missing_package(name: str) -> str:
    return f"tracking={name} needs the {name} package; pip install 'qlora[{name}]', or use tracking=none"


def _check_login(wandb: Any) -> None:
    """Raises `ConfigError` unless wandb finds credentials; asks nobody and no server."""
    try:
        wandb.setup(wandb.Settings(silent=True))
        if hasattr(wandb.sdk.lib, "wbauth"):
            from wandb.sdk.lib import wbauth

            host = wandb.setup().settings.base_url
            found: Any = wbauth.authenticate_session(host=host, source="qlora", prompt=False, update_session=False)
        else:
            found = wandb.api.api_key
    except wandb.errors.Error as error:
        raise ConfigError(f"tracking=wandb: the wandb login is unusable ({error}); {WAYS_IN}") from error
    if not found:
        raise ConfigError(f"tracking=wandb: nobody is logged in to wandb on this machine; {WAYS_IN}")


WAYS_IN = (
    "run `wandb login` once, or set the environment variable WANDB_API_KEY, or set tracking.mode=offline to write "
    "the run to its folder and send it later with `wandb sync`"
)


def _run_id(output_dir: Path) -> str:
    path = output_dir / RUN_ID_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _code_block(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")
