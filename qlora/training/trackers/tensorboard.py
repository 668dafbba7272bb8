"""Event files of TensorBoard."""

from __future__ import annotations

import json
import math

from qlora.config.schema import TrackingConfig
from qlora.text import is_detail
from qlora.training.trackers.base import PREDICTION_COLUMNS, PREDICTIONS, ResumingTracker, TrackedRun, import_package


class TensorboardTracker(ResumingTracker):
    """TensorBoard event files in `<run folder>/tensorboard`; it stores no adapter."""

    backend = "tensorboard"

    def __init__(self, config: TrackingConfig, run: TrackedRun) -> None:
        super().__init__(config, run)
        writer = import_package("tensorboard", "torch.utils.tensorboard.writer")
        self._writer = writer.SummaryWriter(str(run.folder / "tensorboard"))
        text = json.dumps({"name": run.title, **run.config}, indent=2, default=str)
        self._writer.add_text("config", _code_block(text))

    def send(self, metrics: dict[str, float], step: int) -> None:
        """Records a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run has sent what its record says

    def send_predictions(self, rows: list[list[str]], step: int) -> None:
        """Records a table of answers as text."""
        lines = ["| " + " | ".join(PREDICTION_COLUMNS) + " |", "|" + "---|" * len(PREDICTION_COLUMNS)]
        for row in rows:
            cells = (text.replace("|", "\\|") for text in row)
            lines.append("| " + " | ".join("<br>".join(cell.splitlines()) for cell in cells) + " |")
        self._writer.add_text(PREDICTIONS, "\n".join(lines), step)
        self._writer.flush()

    def finish(self, status: str, summary: dict[str, float]) -> None:
        """Records the final metrics and, for a finished run, a line of the HParams page."""
        text = json.dumps({"status": status, **summary}, indent=2)
        self._writer.add_text("summary", _code_block(text), self.sent.last_step)
        if status == "finished":
            self._add_hparams({name: value for name, value in summary.items() if not is_detail(name)})
        self._writer.close()

    def _add_hparams(self, metrics: dict[str, float]) -> None:
        """Does what `SummaryWriter.add_hparams` does, but in this run: that method creates another run below it."""
        from torch.utils.tensorboard.summary import hparams

        tagged = {f"hparam/{name}": value for name, value in metrics.items() if math.isfinite(value)}
        for part in hparams(self.run.hyperparameters, tagged):
            self._writer.file_writer.add_summary(part)
        for name, value in tagged.items():
            self._writer.add_scalar(name, value, self.sent.last_step)


def _code_block(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")
