"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), on a model in memory with its adapter attached."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import EvaluationConfig
from qlora.errors import ConfigError, DataError, ResourceError, UserError, did_you_mean
from qlora.evaluation.harness_guard import guarded
from qlora.evaluation.harness_results import find_roots, read_records, read_result
from qlora.evaluation.measure import Measurement, random_state_kept
from qlora.runtime.console import progress

log = logging.getLogger(__name__)

PYTHON_SEED, OTHER_SEED = 0, 1234
"""The seeds of the harness's own command line, which make its solved questions and orders the same here."""


class LmHarness:
    """Measures a model on tasks of the harness, as its own command line does."""

    at_each_evaluation = False

    def __init__(
        self,
        config: EvaluationConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        device: torch.device,
        trusted: Sequence[str] = (),
    ) -> None:
        """Loads tasks and their data.

        The tasks of a folder may call only functions of packages in `trusted`. Raises a `UserError` if `lm_eval` is
        missing, or for a task that does not exist or is not available.
        """
        self.limit, self.batch_size, self.device = config.max_samples, batch_size, device
        self.path = config.path
        self.tokenizer = copy.deepcopy(tokenizer)  # the harness may change its padding token
        self.trusted = tuple(trusted)
        _import_harness()
        with _quiet(), _harness_seeds(device), guarded(config.path, self.trusted):
            self.tasks = _load_tasks(config)
            for task in self.tasks["tasks"].values():
                _set_shots(task, config.shots)

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measures a model that is in evaluation mode, under autocast."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        kind = self.device.type
        guard = guarded(self.path, self.trusted)
        with progress("lm-eval", None) as update, _quiet(), _harness_seeds(self.device), guard:
            lm = HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,
                batch_size=self.batch_size,
                # Without this it switches autocast off.
                mixed_precision_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
                softmax_dtype=torch.float32,
            )
            lm.set_cache_hook(_Counter(update))
            for task in self.tasks["tasks"].values():
                task.set_fewshot_seed(OTHER_SEED)
            output = evaluate(lm, self.tasks, limit=self.limit, bootstrap_iters=0)
            measured = Measurement(records=list(read_records(output["samples"])))
            for item in find_roots(self.tasks):
                measured |= read_result(item, output)
            return measured


def _import_harness() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError("evaluation=lm-eval needs the package lm_eval; pip install 'qlora[eval]'") from error
    return TaskManager


def _load_tasks(config: EvaluationConfig) -> Any:
    """Returns the input of `lm_eval.evaluate`: the tasks and groups of `evaluation.tasks`, with their data."""
    manager_of = _import_harness()
    if config.path is not None and not Path(config.path).expanduser().is_dir():
        raise ConfigError(f"evaluation.path={config.path}: no such folder; with evaluation=lm-eval it holds task files")
    try:
        manager = manager_of(include_path=config.path and str(Path(config.path).expanduser()))
    except UserError:
        raise
    except Exception as error:
        raise DataError(f"evaluation.path={config.path}: a task file in it is broken: {_first_line(error)}") from error
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"evaluation.tasks: lm_eval has no task {name!r}{did_you_mean(name, manager.all_tasks)}; `lm_eval ls "
                "tasks` lists all, and evaluation.path=FOLDER adds your own"
            )
        part = _load(manager, name)
        if twice := [task for task in part["tasks"] if task in loaded["tasks"]]:
            raise ConfigError(
                f"evaluation.tasks: {twice[0]} comes twice, the second time in {name}; leave one of the two out"
            )
        loaded = {kind: {**loaded[kind], **part[kind]} for kind in loaded}
    return loaded


def _load(manager: Any, name: str) -> Any:
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise ResourceError(f"evaluation.tasks: {name} needs the package {error.name}; pip install it") from error
    except OSError as error:
        raise ResourceError(
            f"evaluation.tasks: the data of {name} is not available: {_first_line(error)}; check the network, or give "
            "tasks of your own with evaluation.path=FOLDER"
        ) from error
    except Exception as error:
        raise DataError(f"evaluation.tasks: {name} cannot be loaded: {_first_line(error)}") from error
    for task_name, task in loaded["tasks"].items():
        for flag, reason in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "asks about images")):
            if getattr(task, flag, False):
                raise ConfigError(f"evaluation.tasks: {task_name} {reason}, which is not supported here; leave it out")
    return loaded


def _set_shots(task: Any, shots: int | None) -> None:
    """Sets the number of solved questions before each question; as in the harness, a task that sets 0 keeps it."""
    configured = task.get_config("num_fewshot")
    if shots is not None and configured == 0 and shots != 0:
        log.warning("evaluation.shots=%d is not used for %s, whose questions come without any", shots, task.task_name)
    elif shots is not None or configured is None:
        task.set_config("num_fewshot", shots or 0)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class _Counter:
    """Counts answered requests; it replaces the harness's cache of answers."""

    def __init__(self, update: Callable[..., None]) -> None:
        self.update, self.done = update, 0

    def add_partial(self, *_: Any) -> None:
        """Called once for each answered request."""
        self.done += 1
        self.update(self.done)


@contextlib.contextmanager
def _harness_seeds(device: torch.device) -> Iterator[None]:
    """Sets the seeds for all code of the harness; even the name of a task takes a random number."""
    with random_state_kept(device):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the harness's progress bars on standard error; its log messages go to `train.log`."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
