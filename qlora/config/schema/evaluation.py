"""What is measured: the group `evaluation`, and the names of the metrics that a run reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qlora.config.registries.installed import installed_names
from qlora.config.schema.code_names import FUNCTION_PATH
from qlora.config.schema.watchdog import WATCHDOG_COUNTS
from qlora.errors import ConfigError, did_you_mean, require

# Metrics that are computed from generated text; a name with a colon is the user's own `module:function`.
METRIC_NAMES = ("exact_match",)
METRIC_GROUP = "qlora.metrics"
"""The entry points by which an installed package adds metrics."""


WIN_METRICS = ("win_rate", "win_count", "tie_count", "loss_count")
"""What `evaluation.win` measures: the share of answers that win, ties half, and how many there are of each."""

METRIC_LIBRARY = "evaluate"
"""In place of a module it means a metric of Hugging Face's library of this name."""

EvaluationName = StrEnum("EvaluationName", "rows mmlu lm_eval")
"""What is measured."""

MmluSplit = StrEnum("MmluSplit", "val test")
"""The questions of MMLU: 1,531 to choose a model by, or 14,042 to report."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is measured, by `task=evaluate` and during training."""

    name: EvaluationName = EvaluationName.rows
    """`rows` (held-out rows of `data`: loss, perplexity, metrics), `mmlu` or `lm_eval`; chosen with `evaluation=`. A
    training always measures the rows too."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of generated answers: `exact_match`; `evaluate:NAME`, one of Hugging Face's `evaluate` library; or your
    own `module:function`, called with a list of predictions and a list of references, returning a number, or one
    number a row. Empty: nothing is generated."""
    win: str | None = None
    """Your own `module:function` that says which answer is better, called with a prompt, the answer of the trained
    model and that of the model before: the untuned base, or with a preference loss the adapter of `lora.start`. It
    returns `win`, `tie` or `lose` for the trained one."""
    baseline: bool = True
    """Measure the untuned base too, for the before -> after comparison."""
    generate_samples: int | None = None
    """The maximum number of held-out rows to generate answers for; null: all."""
    show_predictions: int = 5
    """Predictions to print, and to send to the tracker at each evaluation."""
    path: str | None = None
    """`mmlu`: a file of questions, a JSON array or an object a line, each with `subject`, `input`, `output`; unset: the
    hub's `cais/mmlu`. `lm-eval`: a folder with tasks of your own."""
    split: MmluSplit = MmluSplit.val
    """`mmlu`: `val` or `test`, the split of the hub's set; for a file, what to call it."""
    shots: int | None = None
    """Solved questions before each: of the hub's MMLU 0 to 5 (unset: 5; a file brings its own), of lm-eval any (unset:
    as the task says)."""
    max_samples: int | None = None
    """`mmlu`: the number of questions to ask, from the first on; `lm-eval`: that of each task. Null: all."""
    source_max_len: int = 2048
    """`mmlu`: longest prompt in tokens; a longer one loses solved questions, and the beginning of its own last."""
    tasks: list[str] = field(default_factory=list)
    """`lm-eval`: names of the harness's tasks, e.g. `[arc_easy,hellaswag]`."""

    def __post_init__(self) -> None:
        for name in ("generate_samples", "max_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluation.{name}", "be positive or null", value)
        require(self.source_max_len > 0, "evaluation.source_max_len", "be positive", self.source_max_len)
        require(self.show_predictions >= 0, "evaluation.show_predictions", "not be negative", self.show_predictions)
        self._check_win()
        for name in self.metrics:
            if FUNCTION_PATH.fullmatch(name) or name in METRIC_NAMES:
                continue
            if name not in (known := [*METRIC_NAMES, *installed_names(METRIC_GROUP)]):
                raise ConfigError(
                    f"evaluation.metrics: {name!r} is unknown{did_you_mean(name, known)}; choose from "
                    f"{', '.join(known)}, evaluate:NAME of the evaluate library, or name your own function as "
                    "module:function"
                )
        names = ["loss", "perplexity", *(WIN_METRICS if self.win else ()), *map(metric_name, self.metrics)]
        for name in self.metrics:
            if names.count(metric_name(name)) > 1:
                raise ConfigError(
                    f"evaluation.metrics: two metrics would be called {metric_name(name)}; leave one out, or give your "
                    "function another name"
                )
        self._check_read()
        shots = self.shots
        if self.name is EvaluationName.mmlu:
            require(shots is None or 0 <= shots <= 5, "evaluation.shots", "lie between 0 and 5 for MMLU", shots)
            if shots is not None and self.path is not None:
                raise ConfigError(
                    f"evaluation.shots={shots} is not read beside evaluation.path: a file brings its solved questions "
                    "along; leave one of them out"
                )
        require(shots is None or shots >= 0, "evaluation.shots", "not be negative", shots)
        if self.name is EvaluationName.lm_eval and not self.tasks:
            raise ConfigError(
                "evaluation=lm-eval needs evaluation.tasks, names of the harness's tasks, e.g. "
                "evaluation.tasks=[arc_easy]"
            )

    def _check_win(self) -> None:
        if self.win is None:
            return
        if not FUNCTION_PATH.fullmatch(self.win):
            raise ConfigError(
                f"evaluation.win must be module:function, a function of yours that compares answers, got {self.win!r}"
            )
        if not self.baseline:
            raise ConfigError(
                f"evaluation.win={self.win} compares with answers of the model before, and evaluation.baseline=false "
                "writes none; leave one of them out"
            )

    @property
    def scored_answers(self) -> int | None:
        """How many held-out rows are answered where a model is measured; None: all."""
        return self.generate_samples if self.metrics or self.win else 0

    def _check_read(self) -> None:
        """Refuses a value that the chosen evaluation does not read."""
        suites = (EvaluationName.mmlu, EvaluationName.lm_eval)
        read_by = {
            "path": suites,
            "shots": suites,
            "max_samples": suites,
            "tasks": suites[1:],
            "split": suites[:1],
            "source_max_len": suites[:1],
        }
        unset: dict[str, Any] = {"tasks": [], "split": MmluSplit.val, "source_max_len": 2048}
        for name, readers in read_by.items():
            if self.name not in readers and getattr(self, name) != unset.get(name):
                chosen = " or ".join(reader.value.replace("_", "-") for reader in readers)
                raise ConfigError(
                    f"evaluation.{name} is read with evaluation={chosen} only; choose that, or leave it out"
                )


def metric_name(name: str) -> str:
    """Returns what a metric of `evaluation.metrics` is called in results: the function, or `evaluate_NAME`."""
    module, _, function = name.rpartition(":")
    return f"{METRIC_LIBRARY}_{function}" if module == METRIC_LIBRARY else function


def known_metrics_of_rows(evaluation: EvaluationConfig) -> list[str]:
    """Returns the plain names of the metrics of held-out rows; the `evaluate` library names its own once measured."""
    functions = [metric_name(name) for name in evaluation.metrics if not name.startswith(f"{METRIC_LIBRARY}:")]
    return ["loss", "perplexity", *functions, *(WIN_METRICS if evaluation.win else ())]


def known_metrics(evaluation: EvaluationConfig) -> list[str]:
    """Returns the names of the metrics that a training run reports."""
    measured = known_metrics_of_rows(evaluation)
    if evaluation.name is EvaluationName.mmlu:
        measured += [f"mmlu_{evaluation.split.value}_{name}" for name in ("accuracy", "loss")]
    speed = ["train_tokens_per_second", "train_mfu", "train_data_wait"]
    training = ["train_loss", *speed, "train_runtime", "train_memory_retries", "peak_memory_gb"]
    training += [f"train_watchdog_{name}" for name in WATCHDOG_COUNTS]
    of_base = [f"base_eval_{name}" for name in measured if name not in WIN_METRICS]
    return [f"eval_{name}" for name in measured] + of_base + training
