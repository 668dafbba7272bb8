"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), on a model in memory with its adapter attached."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import EvaluationConfig, check_trusted
from qlora.errors import ConfigError, UserError, did_you_mean
from qlora.evaluation.measure import Measurement, random_state_kept
from qlora.evaluation.metrics import check_library_metric
from qlora.evaluation.statistics import Score
from qlora.runtime.console import progress
from qlora.runtime.user_code import import_function

log = logging.getLogger(__name__)

# The seeds of the harness's own command line, so that its solved questions and orders are the same.
PYTHON_SEED, OTHER_SEED = 0, 1234
READERS = ("json", "csv", "parquet", "arrow", "text")
"""The readers of `datasets` that a task may name; others call what their arguments name."""


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

        A folder's tasks call functions of packages in `trusted` alone. Raises `ConfigError` if the package is missing,
        or for a task that does not exist or cannot be had.
        """
        self.limit, self.batch_size, self.device = config.max_samples, batch_size, device
        self.path = config.path
        self.tokenizer = copy.deepcopy(tokenizer)  # the harness may give it another padding token
        self.trusted = tuple(trusted)
        with _quiet(), _harness_seeds(device), _guarded(config.path, self.trusted):
            self.tasks = _load_tasks(config)
            for task in self.tasks["tasks"].values():
                _set_shots(task, config.shots)

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measures a model that is in evaluation mode, under autocast."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        kind = self.device.type
        guarded = _guarded(self.path, self.trusted)
        with progress("lm-eval", None) as update, _quiet(), _harness_seeds(self.device), guarded:
            lm = HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,
                batch_size=self.batch_size,
                # It switches autocast off but for this.
                mixed_precision_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
                softmax_dtype=torch.float32,
            )
            lm.set_cache_hook(_Counter(update))
            for task in self.tasks["tasks"].values():
                task.set_fewshot_seed(OTHER_SEED)
            found = evaluate(lm, self.tasks, limit=self.limit, bootstrap_iters=0)
            measured = Measurement(records=list(_records(found["samples"])))
            for item in _roots(self.tasks):
                measured |= _read(item, found)
            return measured


def _import_harness() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("evaluation=lm-eval needs the package lm_eval; pip install 'qlora[eval]'") from error
    return TaskManager


def _load_tasks(config: EvaluationConfig) -> Any:
    """Returns what `lm_eval.evaluate` takes: the tasks and groups of `evaluation.tasks`, with their data."""
    manager_of = _import_harness()
    if config.path is not None and not Path(config.path).expanduser().is_dir():
        raise ConfigError(f"evaluation.path={config.path}: no such folder; with evaluation=lm-eval it holds task files")
    try:
        manager = manager_of(include_path=config.path and str(Path(config.path).expanduser()))
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"evaluation.path={config.path}: a task file in it is broken: {_said(error)}") from error
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
        raise ConfigError(f"evaluation.tasks: {name} needs the package {error.name}; pip install it") from error
    except OSError as error:
        raise ConfigError(
            f"evaluation.tasks: the data of {name} is not to be had: {_said(error)}; check the network, or give tasks "
            "of your own with evaluation.path=FOLDER"
        ) from error
    except Exception as error:
        raise ConfigError(f"evaluation.tasks: {name} cannot be loaded: {_said(error)}") from error
    for task_name, task in loaded["tasks"].items():
        for flag, reason in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "asks about images")):
            if getattr(task, flag, False):
                raise ConfigError(f"evaluation.tasks: {task_name} {reason}, which is not done here; leave it out")
    return loaded


def _set_shots(task: Any, shots: int | None) -> None:
    """Sets how many solved questions stand before each; as in the harness, a task that says 0 itself is left alone."""
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots != 0:
        log.warning("evaluation.shots=%d is not used for %s, which is asked without any", shots, task.task_name)
    elif shots is not None or own is None:
        task.set_config("num_fewshot", shots or 0)


def _roots(loaded: Any) -> list[Any]:
    """Returns the tasks and groups that are part of no other group."""
    children = {name for group in loaded["groups"].values() for name in group.child_names}
    named = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in named.items() if name not in children]


def _read(item: Any, found: Any, above: str | None = None) -> Measurement:
    """Returns the measurement of a task, or of a group with its parts.

    Parts of a group that has a total of its own are called `lm_eval_GROUP_METRIC/PART`, below `above`.
    """
    parts = list(item) if hasattr(item, "child_names") else []
    name = item.name if parts else item.task_name
    leaves = [task.task_name for task in item.get_all_tasks()] if parts else [name]
    numbers = {tuple(key.split(",")): value for key, value in found["results"][name].items() if "," in key}
    numbers = {key: value for key, value in numbers.items() if not key[0].endswith("_stderr")}
    metrics = [metric for metric, _ in numbers]
    measured = Measurement()
    for (metric, kind), value in numbers.items():
        said = metric if metrics.count(metric) == 1 else f"{metric}_{kind}"
        full = f"{above.format(_plain(said))}/{_plain(name)}" if above else f"lm_eval_{_plain(name)}_{_plain(said)}"
        measured |= _with_items(full, float(value), [_earned(found["samples"][leaf], metric, kind) for leaf in leaves])
    pattern = above or (f"lm_eval_{_plain(name)}_{{}}" if numbers else None)
    for part in parts:
        measured |= _read(part, found, pattern)
    return measured


def _with_items(name: str, value: float, parts: list[list[float] | None]) -> Measurement:
    """Returns a number with what the items earned, where it is their mean, over all or over the parts' means."""
    if None in parts or not any(parts):
        return Measurement({name: value})
    values = [earned for part in parts for earned in part or ()]
    groups = [str(place) for place, part in enumerate(parts) for _ in part or ()]
    for score in (Score(values), Score(values, groups)):
        if math.isclose(score.estimate().value, value, rel_tol=1e-6, abs_tol=1e-9):
            return Measurement({name: value}, {name: score})
    return Measurement({name: value})


def _earned(samples: list[dict[str, Any]], metric: str, kind: str) -> list[float] | None:
    """Returns what each item earned in a metric; None where that is no number."""
    try:
        return [float(sample[metric]) for sample in samples if sample["filter"] == kind and metric in sample]
    except (TypeError, ValueError):
        return None


def _records(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yields what is known of each item, in JSON's types."""
    for task, items in samples.items():
        for item in items:
            kept = {"task": task, "id": item["doc_id"], "item": item["doc"], "target": item["target"]}
            kept |= {"answers": item["filtered_resps"], "filter": item["filter"]}
            yield json.loads(json.dumps(kept | {name: item[name] for name in item["metrics"]}, default=str))


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class _Counter:
    """Counts requests that are answered, in the place of the harness's cache of answers."""

    def __init__(self, update: Callable[..., None]) -> None:
        self.update, self.done = update, 0

    def add_partial(self, *_: Any) -> None:
        """Is called once for each answered request."""
        self.done += 1
        self.update(self.done)


@contextlib.contextmanager
def _harness_seeds(device: torch.device) -> Iterator[None]:
    """Everything of the harness runs in here: even a task's name draws a random number."""
    with random_state_kept(device):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        yield


@contextlib.contextmanager
def _guarded(path: str | None, trusted: Sequence[str]) -> Iterator[None]:
    """Lets the harness run no code that files of tasks bring along, but for functions of packages in `trusted`.

    Its own tasks call theirs. Texts are put together in Jinja's sandbox, and a metric or a data set is none that runs a
    script.
    """
    _import_harness()
    import datasets
    import lm_eval
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader

    own, import_named, environment = Path(lm_eval.__file__).parent, _yaml_loader._import_func_in_yml, utils.env
    key = f"evaluation.path={path}"

    def import_trusted(name: str, folder: Path) -> Any:
        if folder.resolve().is_relative_to(own.resolve()):
            return import_named(name, folder)
        is_installed = importlib.util.find_spec(name.partition(".")[0] or "sys") is not None
        if is_installed or (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").exists():
            check_trusted(f"{key}, !function in {folder}", name, trusted)
        if is_installed:  # the package that is trusted is this one, whatever the folder has of its name
            return import_function(":".join(name.rsplit(".", 1)), f"{key}, !function in {folder}")
        return import_named(name, folder)

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if path in datasets.packaged_modules._PACKAGED_DATASETS_MODULES and path not in READERS:
            raise ConfigError(f"{key}: dataset_path: {path} must be one of {', '.join(READERS)}, or name a data set")
        return load_any(path, *args, **kwargs)

    sandbox = ImmutableSandboxedEnvironment(undefined=environment.undefined, keep_trailing_newline=True)
    sandbox.filters |= environment.filters
    load_any = datasets.load_dataset
    _yaml_loader._import_func_in_yml, utils.env, datasets.load_dataset = import_trusted, sandbox, load_dataset
    try:
        with _library_metrics_guarded(key):
            yield
    finally:
        _yaml_loader._import_func_in_yml, utils.env, datasets.load_dataset = import_named, environment, load_any


@contextlib.contextmanager
def _library_metrics_guarded(key: str) -> Iterator[None]:
    """Lets the harness load metrics of the `evaluate` library by their plain names alone."""
    try:
        import evaluate
    except ImportError:
        yield
        return
    load_any = evaluate.load

    refused: list[UserError] = []  # for the harness goes on without a metric that is not to be had

    def load_metric(name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            check_library_metric(name, f"{key}: metric: {name}")
        except UserError as error:
            refused.append(error)
            raise
        return load_any(name, *args, **kwargs)

    evaluate.load = load_metric
    try:
        yield
    except Exception:
        if refused:
            raise refused[0] from None
        raise
    finally:
        evaluate.load = load_any
    if refused:
        raise refused[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars that the harness draws on standard error; what it logs goes to `train.log`."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
