"""The border between Hydra's `DictConfig` and the dataclasses of `schema`; finds every unknown key.

Nothing here or below imports torch, so a mistake in a config is answered in well under a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml
from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, Node, OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException, UnsupportedInterpolationType
from yaml import MarkedYAMLError, YAMLError

from qlora.config import trust
from qlora.config.paths import check_paths
from qlora.config.schema import ArchitectureConfig, Config, TaskName
from qlora.config.search_path import KEY as SEARCH_PATH
from qlora.config.search_path import check_options, option_folder, search_folders
from qlora.config.spelling import (
    SHAPES,
    KeyPath,
    dotted,
    field_types,
    keep_spelling,
    reading_spellings,
    shape_in_words,
    takes_one_option,
    type_at,
)
from qlora.errors import ConfigError, DamagedFile, UserError, describe_fault, did_you_mean, mean, suggest
from qlora.secrets import find_secret, hide, is_secret_variable

_PACKAGE = Path(__file__).parent.parent
PLUGINS = _PACKAGE / "plugins"
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

VERSION_BASE = "1.3"
"""The version whose rules Hydra keeps to, wherever it composes."""

LOOKS, LOOKING = "looks", (TaskName.preview, TaskName.plan, TaskName.preview.name, TaskName.plan.name)
"""The folder of tasks that show what a run would be, and leave nothing that counts as one."""

START_VARIABLE = "QLORA_START"
"""The environment variable with the time that several processes started at, as it names the folder of them all."""

# Free mappings among Hydra's own keys.
HYDRA_MAPPINGS = (
    *(f"hydra.sweeper.{name}" for name in ("params", "conditions", "sampler_kwargs", "pruner_kwargs")),
    *(f"hydra.launcher.{name}" for name in ("additional_parameters", "ray.init", "ray.remote")),
)

LARGEST_NUMBER = 2**63 - 1
"""What torch and Arrow count to."""

LONGEST_KEY, DEEPEST = 500, 30
"""Characters of a key, and brackets inside each other in a value."""

CLEARED = ("trainer.lr_scheduler_kwargs", "trainer.optim_args")
"""Mappings that null, or `{}`, empties: a recipe fills them for its own choice."""

# Hydra's flags that a user meets.
FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-dir", "--config-name", "--experimental-rerun"),
)

# The flags of the original qlora.py, and ours: an option (`lora.r`) or a choice (`lora=none`).
ORIGINAL_FLAGS = {
    "model_name_or_path": "model.name",
    "trust_remote_code": "model.trust_remote_code",
    "cache_dir": "model.cache_dir",
    "max_memory_MB": "model.max_memory",
    "bits": "quantization.bits",
    "quant_type": "quantization.quant_type",
    "double_quant": "quantization.double_quant",
    "bf16": "quantization.compute_dtype=bf16",
    "fp16": "quantization.compute_dtype=fp16",
    "full_finetune": "lora=none",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "dataset": "data",
    "dataset_format": "data.format",
    "source_max_len": "data.source_max_len",
    "target_max_len": "data.target_max_len",
    "train_on_source": "data.train_on_source",
    "eval_dataset_size": "data.eval_dataset_size",
    "max_train_samples": "data.max_train_samples",
    "max_eval_samples": "data.max_eval_samples",
    "data_seed": "data.split_seed",
    "do_train": "task.train",
    "do_eval": "task.evaluate",
    "do_predict": "task.predict",
    "predict_with_generate": "task.predict",
    "adam8bit": "trainer.optim=paged_adamw_8bit",
    "optim": "trainer.optim",
    "max_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.num_train_epochs",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
    "per_device_eval_batch_size": "trainer.per_device_eval_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "learning_rate": "trainer.learning_rate",
    "lr_scheduler_type": "trainer.lr_scheduler_type",
    "warmup_ratio": "trainer.warmup_steps",
    "weight_decay": "trainer.weight_decay",
    "adam_beta2": "trainer.adam_beta2",
    "max_grad_norm": "trainer.max_grad_norm",
    "gradient_checkpointing": "trainer.gradient_checkpointing",
    "group_by_length": "trainer.group_by_length",
    "logging_steps": "trainer.logging_steps",
    "eval_steps": "trainer.eval_steps",
    "save_steps": "trainer.save_steps",
    "save_total_limit": "trainer.save_total_limit",
    "dataloader_num_workers": "trainer.dataloader_num_workers",
    "max_new_tokens": "generation.max_new_tokens",
    "min_new_tokens": "generation.min_new_tokens",
    "do_sample": "generation.do_sample",
    "num_beams": "generation.num_beams",
    "num_beam_groups": "generation.num_beam_groups",
    "penalty_alpha": "generation.penalty_alpha",
    "use_cache": "generation.use_cache",
    "temperature": "generation.temperature",
    "top_k": "generation.top_k",
    "top_p": "generation.top_p",
    "typical_p": "generation.typical_p",
    "diversity_penalty": "generation.diversity_penalty",
    "repetition_penalty": "generation.repetition_penalty",
    "length_penalty": "generation.length_penalty",
    "no_repeat_ngram_size": "generation.no_repeat_ngram_size",
    "output_dir": "hydra.run.dir",
    "run_name": "name",
    "report_to": "tracking",
    "seed": "seed",
}

# Names that people bring along from there, from PEFT and from transformers, and ours.
FOREIGN_NAMES = {
    **{flag: ours for flag, ours in ORIGINAL_FLAGS.items() if flag != ours},
    "lora.rank": "lora.r",
    "lora.lora_r": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lora.modules": "lora.target_modules",
    "lora_modules": "lora.target_modules",
    "quantization.dtype": "quantization.compute_dtype",
    "data.dataset": "data.path",
    "lr": "trainer.learning_rate",
    "trainer.lr": "trainer.learning_rate",
    "trainer.steps": "trainer.max_steps",
    "trainer.epochs": "trainer.num_train_epochs",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_ratio": "trainer.warmup_steps",
    "trainer.bf16": "quantization.compute_dtype=bf16",
    "trainer.fp16": "quantization.compute_dtype=fp16",
    "trainer.seed": "seed",
    "trainer.report_to": "tracking",
    "trainer.output_dir": "hydra.run.dir",
}


def register() -> None:
    """Tells Hydra the root schema and the resolver of `config.yaml`; may be called many times."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver(
        "qlora.folder",
        lambda name: name or os.environ.get(START_VARIABLE) or now(),
        use_cache=True,
        replace=True,
    )
    OmegaConf.register_new_resolver("qlora.kind", lambda task: LOOKS if task in LOOKING else "runs", replace=True)
    if PLUGINS.is_dir() and str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))  # a checkout that is not installed; Hydra looks for a package hydra_plugins
    trust.install(CONF_DIR)


def now() -> str:
    """Returns the time as it names a folder."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def compose(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Config:
    """Returns the checked config of `overrides`, as the command line would read them.

    `config_dir` holds the user's own groups and options (`--config-dir`). Raises `ConfigError` for every mistake.
    """
    return to_config(compose_dict(overrides, config_dir))


def open_entries(overrides: Sequence[str]) -> list[str]:
    """Returns overrides as Hydra is to get them; to do so again changes nothing.

    A text keeps its spelling. An entry of a free mapping is set whether it exists or not: `data.columns.output=x` and
    `data.columns={output: x}` get Hydra's `++`; `{}` takes all entries of some out.
    `from=FILE` becomes `source=FILE`: no field of a Python class can be called `from`. What QLORA_TRUSTED says
    becomes an override, which every job of a sweep gets.
    """
    overrides = [f"source={text.removeprefix('from=')}" if text.startswith("from=") else text
                 for text in keep_spelling(overrides)]  # fmt: skip
    overrides = with_environment(overrides)
    keys = _known_keys()
    return [_open_entry(text, override, keys) for text, override in zip(overrides, _parse(overrides), strict=True)]


def with_environment(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with those that QLORA_TRUSTED stands for; to do so again changes nothing."""
    return trust.add_environment(overrides, _parse(overrides))


def _open_entry(text: str, override: Override, keys: frozenset[str]) -> str:
    key = override.key_or_group
    if key == SEARCH_PATH and not override.is_delete():  # relative to this folder, wherever a job runs
        return write_override(key, [f"file://{folder}" for folder in search_folders([override])])
    if override.value() == {} and key in CLEARED:  # Hydra merges mappings, so that an empty one would take nothing out
        return f"{override.get_key_element()}=null"
    is_mapping = isinstance(override.value(), dict) and get_origin(field_type(key)) is dict
    is_entry = is_mapping or _in_free_mapping(key, keys)
    return f"++{text}" if override.type is OverrideType.CHANGE and is_entry else text


def write_override(key: str, value: Any) -> str:
    """Returns `KEY=VALUE` as the command line reads it back, with quotes where a text needs them."""
    return f"{key}={_written(value)}"


def override_value(text: str) -> Any:
    """Returns the value of `KEY=VALUE` as the command line reads it."""
    return _plain(_parse([text])[0].value())


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {str(_plain(key)): _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(each)}' for key, each in value.items())}}}"
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"[\w./@+-]+", value, re.ASCII) and isinstance(override_value(f"key={value}"), str):
        return value
    # Hydra reads a backslash as such unless it stands before a quote.
    quoted = re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ("\\" if found[2] else "") + found[2], value)
    return '"' + quoted.replace("${", "\\${") + '"'


def write_yaml(tree: Any) -> str:
    """Returns a tree as YAML that OmegaConf reads back as it is, texts such as `1e5` in quotes."""
    dumper = get_omega_conf_dumper()
    return str(yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000))


def read_yaml(path: Path) -> Any:
    """Returns what a YAML file of another project holds, its numbers read as OmegaConf does; no interpolation."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=get_yaml_loader())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text; save it as UTF-8") from None
    except MarkedYAMLError as error:
        raise _broken_yaml(error) from error
    except YAMLError as error:
        raise ConfigError(f"{path}: this is no valid YAML: {_first_line(str(error))}") from error


def compose_dict(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> DictConfig:
    """Composes `overrides` into the `DictConfig` that Hydra hands to a job, the `hydra` node included."""
    trust.check_version()
    register()
    refuse_unreadable(overrides)
    overrides = open_entries(overrides)
    try:
        with opened_hydra(overrides, config_dir) as hydra:
            check_keys(overrides, hydra)
            composed = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
            _check_job_folder(composed)
            return composed
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Hydra raises a plain ValueError for a broken defaults list, Python one for a file that is no UTF-8.
        raise explain(error, config_dir) from error
    except AssertionError as error:
        if "Unexpected type for root" not in str(error):
            raise
        raise _below_null(overrides) from error
    except RecursionError as error:
        where = f" in {config_dir}" if config_dir is not None else ""
        raise ConfigError(
            f"a config file{where} includes itself, or two each other; mend their defaults lists"
        ) from error


@contextlib.contextmanager
def opened_hydra(overrides: Sequence[str], config_dir: Path | str | None) -> Iterator[Hydra]:
    """Yields Hydra with our options and the user's own, as the instance of this process."""
    register()
    setbase(VERSION_BASE)
    instance = GlobalHydra.instance()
    outer = instance.hydra
    instance.clear()
    try:
        with reading_spellings(CONF_DIR):
            yield Hydra.create_main_hydra2("qlora", _search_path(config_dir, overrides))
    finally:
        instance.clear()
        if outer is not None:
            instance.initialize(outer)


GRID_SWEEPER = "hydra_plugins.qlora_sweep.GridSweeper"
"""The class that walks through the combinations of a grid."""


def _below_null(overrides: Sequence[str]) -> ConfigError:
    """Returns the error for a key below one that is null, of which OmegaConf tells neither."""
    text = next((text for text in overrides if text.lstrip("+~").startswith("hydra.")), "an override").lstrip("+~")
    key = text.partition("=")[0]
    if key.startswith("hydra.sweeper.params."):
        remedy = f"name the key itself with its values, e.g. -m {key.removeprefix('hydra.sweeper.params.')}=A,B"
    else:
        remedy = "leave it out"
    return ConfigError(f"{key} cannot be set: {key.rpartition('.')[0] or 'what holds it'} is null here; {remedy}")


def check_overrides(
    overrides: Sequence[str], config_dir: Path | str | None = None, *, multirun: bool = False
) -> DictConfig:
    """Raises `ConfigError` if a value in these overrides would be refused; starts nothing.

    Returns the config of the first job, without the `hydra` node.
    """
    return without_hydra(check_command(overrides, config_dir, multirun=multirun))


def check_command(
    overrides: Sequence[str],
    config_dir: Path | str | None = None,
    *,
    multirun: bool = False,
    leave_grid: bool = False,
    printed: bool = False,
) -> DictConfig:
    """Does what `check_overrides` does, and returns the config with its `hydra` node.

    A sweep's values come from the command line and from `hydra.sweeper.params` of a `sweep=` file; each is checked
    once, beside the first of every other key. Those that a search tries under a condition only are checked by it, those
    of a grid with `leave_grid` by its sweeper. `printed` says that the resolved config is to be shown.
    """
    refuse_unreadable(overrides)
    _refuse_secrets(text.partition("=")[::2] for text in overrides)
    overrides = keep_spelling(overrides)
    first = next(expand_sweep(overrides))
    composed = compose_dict(first, config_dir)
    _refuse_resolved_secrets(composed, printed=printed)
    if OmegaConf.is_missing(composed.task, "name"):
        raise ConfigError("task.name is not set; choose an option for its group, e.g. task=train")
    described = composed.task.name is TaskName.wandb_sweep  # for wandb, which runs the jobs
    if not multirun and not described and composed.hydra.mode is not RunMode.MULTIRUN:
        _refuse_sweeps(overrides)
        to_config(composed)
        return composed
    is_grid = str(composed.hydra.sweeper._target_) == GRID_SWEEPER
    if is_grid and not described:
        _refuse_intervals([*overrides, *sweep_params(composed, overrides)])
    if (words := _unconditional(composed, overrides)) != list(overrides):
        overrides = words
        composed = compose_dict(next(expand_sweep(overrides)), config_dir)
    if is_grid and leave_grid and not described:
        to_config(composed)
    else:
        Combinations(overrides, config_dir).check()
    return composed


def refuse_unreadable(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for an override that no config holds and that would take its readers very long."""
    for text in overrides:
        key, _, value = text.partition("=")
        if len(key) > LONGEST_KEY:
            raise ConfigError(
                f"{key[:40]} ... is no key: it has {len(key):,} characters, and keys have up to {LONGEST_KEY:,}; "
                "options are written KEY=VALUE, e.g. lora.r=16"
            )
        if _depth(value) > DEEPEST:
            raise ConfigError(
                f"{key}={value[:40]} ... opens more than {DEEPEST} brackets inside each other, which no value needs; "
                "put quotes around a text that holds brackets"
            )


def _depth(value: str) -> int:
    """Returns how many brackets are open at most, outside of quotes."""
    depth = deepest = 0
    for sign in re.sub(r"""(["'])(?:\\.|(?!\1).)*\1""", "", value):
        depth += (sign in "[{(") - (sign in "]})")
        deepest = max(deepest, depth)
    return deepest


def show_config(composed: DictConfig, package: str | None, *, resolve: bool) -> str:
    """Returns what `--cfg job` prints; Hydra's own way to it would compose everything a second time."""
    part = composed if package in (None, "_global_") else OmegaConf.select(composed, str(package))
    if part is None:
        raise unknown_key(str(package))
    if not OmegaConf.is_config(part):
        return f"{part}\n"
    head = f"# @package {package}\n" if part is not composed else ""
    return head + OmegaConf.to_yaml(part, resolve=resolve)


def _refuse_sweeps(overrides: Sequence[str]) -> None:
    for override in _parse(overrides):
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} gives several values: add -m to run a sweep, write "
                f"{override.get_key_element()}=[A,B] for one list, or quote a text that holds a comma"
            )


def _refuse_intervals(overrides: Sequence[str]) -> None:
    for override in _parse(overrides):
        if override.is_interval_sweep():
            raise ConfigError(
                f"{override.input_line}: a grid cannot walk through an interval; add hydra/sweeper=optuna to search in "
                "it, or list the values"
            )


JOB_FOLDER = "${qlora.job_name:}"
"""What `conf/config.yaml` says of `hydra.sweep.subdir`."""


def _check_job_folder(composed: DictConfig) -> None:
    nodes: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    if nodes["sweep"]["subdir"] != JOB_FOLDER:
        raise ConfigError(
            "hydra.sweep.subdir cannot be set: a job's folder is named after its overrides and its config, by which a "
            "sweep goes on; leave it out, and choose the sweep's folder with hydra.sweep.dir=FOLDER"
        )


def _refuse_secrets(values: Iterable[tuple[str, Any]]) -> None:
    """Raises `ConfigError` for a token, key or password in a value, which is named and not shown."""
    for key, value in values:
        if isinstance(value, str) and (kind := find_secret(value)) is not None:
            raise _holds_secret(hide(key), kind)


def _holds_secret(key: str, kind: str) -> ConfigError:
    name = key.lstrip(".+")
    if name == STORAGE:
        return ConfigError(
            f"{name} holds {kind}, which would stand in the command and in the folders of all jobs; put the whole URL "
            f"into a variable of the environment and give its name: '{STORAGE}=${{oc.env:NAME}}'"
        )
    return ConfigError(
        f"{name} holds {kind}; configs are stored, printed and sent to trackers. Put it into the environment, where "
        "the libraries read it (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_PASSWORD ...)"
    )


STORAGE = "hydra.sweeper.storage"
"""The one key that may refer to a secret, by the name of its variable: nothing resolves it but what opens the study."""
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^\s,:{}]+)")


def storage_variable(text: str | None) -> str | None:
    """Returns the variable of the environment that a storage's URL is taken from, as it is written; None: from none."""
    match = re.fullmatch(r"\$\{\s*oc\.env\s*:\s*(\w+)\s*\}", text or "")
    return match[1] if match else None


def _refuse_resolved_secrets(composed: DictConfig, *, printed: bool) -> None:
    """Raises `ConfigError` for a secret in any node, Hydra's own included, or that an interpolation brings there.

    `printed`: the config is to be shown as it is resolved.
    """
    leaves = list(_leaves(OmegaConf.to_container(composed, resolve=False), ""))
    _refuse_secrets([*leaves, *_names(leaves)])
    copies = (".hydra.overrides.", ".hydra.job.override_dirname")  # of what was typed
    referring = [(key.lstrip("."), text) for key, text in leaves
                 if isinstance(text, str) and "${" in text and not key.startswith(copies)]  # fmt: skip
    referring.sort(key=lambda leaf: leaf[0].startswith("hydra."))  # which takes most from the others
    for key, text in referring:  # first the keys that name a variable, then those that refer to them
        if key == STORAGE and (name := storage_variable(text)) is not None:
            if printed and is_secret_variable(name):
                raise ConfigError(f"{STORAGE} holds the value of {name}, which --resolve would print; leave it out")
            continue
        for name in FROM_ENVIRONMENT.findall(text):
            if is_secret_variable(name):
                raise _holds_secret(key, f"the value of {name}")
    for key, text in referring:
        if key == STORAGE and storage_variable(text) is not None:
            continue
        value = None
        # What Hydra knows later, such as the run's folder, cannot be resolved yet.
        with contextlib.suppress(OmegaConfBaseException, ValueError), trust.fixed_resolvers():
            value = OmegaConf.select(composed, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        resolved = [(name, str(leaf)) for name, leaf in _leaves(value, f".{key}")]  # a password may be of digits alone
        _refuse_secrets([*resolved, *_names(resolved)])


def _names(leaves: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields the keys that users name, such as those of `data.columns`, as values too."""
    for key, _ in leaves:
        if (name := key.lstrip(".")) not in _known_keys() and not name.startswith("hydra."):
            yield name, name


@functools.cache
def _known_keys() -> frozenset[str]:
    return frozenset(config_keys())


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{key}.{name}")
    else:
        yield key, node


def _unconditional(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Returns `overrides` and the sweep of a `sweep=` file but for what `hydra.sweeper.conditions` allows at times."""
    conditions = OmegaConf.select(composed, "hydra.sweeper.conditions") or {}
    given = [text for text, override in zip(overrides, _parse(overrides), strict=True)
             if not (override.is_sweep_override() and override.key_or_group in conditions)]  # fmt: skip
    params = sweep_params(composed, overrides)
    return given + [text for text, override in zip(params, _parse(params), strict=True)
                    if override.key_or_group not in conditions]  # fmt: skip


def sweep_params(composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Returns the sweep that a `sweep=` file describes as overrides, but for the keys that `overrides` name."""
    given = {}
    for override in _parse(overrides):
        given[override.get_key_element()] = override
    if "sweep" in given and given["sweep"].is_sweep_override():
        raise ConfigError(
            f"{given['sweep'].input_line}: one sweep at a time; name the keys to combine on the command line"
        )
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    return keep_spelling([f"{key}={value}" for key, value in params.items() if key not in given])


LATEST = 64
"""So many composed configs are kept, of the latest choices of groups."""
MISSING_VALUE = "???"


@dataclass(frozen=True)
class Axis:
    """A key of a grid with the overrides that give it its values, one after the other."""

    key: str
    overrides: tuple[str, ...]
    values: tuple[Any, ...] | None
    """What a plain field is set to; None: the config is composed anew for each of the overrides."""


class Combinations:
    """The jobs of a grid by the positions of their values; plain fields are set without composing anew."""

    def __init__(self, overrides: Sequence[str], config_dir: Path | str | None = None) -> None:
        parsed = _parse(keep_spelling(overrides))
        axes = {override.get_key_element(): _read_axis(override) for override in parsed}
        self.axes = list(axes.values())
        self._composed = functools.lru_cache(LATEST)(lambda words: _Composed(compose_dict(words, config_dir)))

    def __len__(self) -> int:
        return math.prod(len(axis.overrides) for axis in self.axes)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(len(axis.overrides)) for axis in self.axes))

    def words(self, positions: Sequence[int]) -> list[str]:
        """Returns the overrides of one job."""
        return [axis.overrides[position] for axis, position in zip(self.axes, positions, strict=True)]

    def config(self, positions: Sequence[int]) -> Config:
        """Returns the config of one job; raises `ConfigError` where its values exclude each other."""
        located = list(zip(self.axes, positions, strict=True))
        chosen = tuple(axis.overrides[position if axis.values is None else 0] for axis, position in located)
        values = {axis.key: axis.values[position] for axis, position in located if axis.values is not None}
        return self._composed(chosen).with_values(values)

    def check(self) -> dict[str, Any]:
        """Returns the full keys with their values that no axis changes, having composed every value of each once.

        Raises `ConfigError` for a value that is refused beside the first of all other axes.
        """
        first = [0] * len(self.axes)
        config = self.config(first)
        shared = dict(flatten(config_to_dict(config)))
        for place, axis in enumerate(self.axes):
            for position in range(1, len(axis.overrides)):
                for key in _differences(config, self.config([*first[:place], position, *first[place + 1 :]])):
                    shared.pop(key, None)
        return shared


def _read_axis(override: Override) -> Axis:
    key, texts = override.get_key_element(), swept_values(override)
    if texts is None:
        return Axis(key, (override.input_line or "",), None)
    if not override.is_discrete_sweep() or not _is_plain_field(override):
        return Axis(key, tuple(f"{key}={text}" for text in texts), None)
    elements = list(override.sweep_iterator())  # anew each time, where they are shuffled
    values = tuple(_plain(element) for element in elements)
    overrides = tuple(f"{key}={Transformer.encode(element)}" for element in elements)
    return Axis(key, overrides, None if any(isinstance(value, dict) for value in values) else values)


def _is_plain_field(override: Override) -> bool:
    key = override.key_or_group
    return override.type is OverrideType.CHANGE and key in _known_keys() - set(group_names())


class _Composed:
    """A composed config whose plain fields are set again and again."""

    def __init__(self, composed: DictConfig) -> None:
        self._node = without_hydra(composed)
        self._config: Config | None = None
        texts = (value for _, value in _leaves(OmegaConf.to_container(self._node, resolve=False), ""))
        self._refers = any(isinstance(text, str) and "${" in text for text in texts)
        """Whether a field takes its value from another."""

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """Returns the config with these values by full keys, always the same keys; as `to_config` checks them."""
        try:
            converted = {key: self._set(key, value) for key, value in values.items()}
            if self._config is None or self._refers or MISSING_VALUE in converted.values():
                self._config = to_config(self._node)
                return self._config
            _refuse_secrets(_leaves(dict(values), ""))
            for key, value in converted.items():
                _check_values(value, tuple(key.split(".")))
            groups = {key.partition(".")[0] for key in values}
            return dataclasses.replace(self._config, **{group: self._build(group) for group in groups})
        except OmegaConfBaseException as error:
            raise explain(error) from error

    def _set(self, key: str, value: Any) -> Any:
        """Sets a field, and returns its value in the field's type."""
        *path, name = key.split(".")
        holder: Any = self._node
        for part in path:
            holder = holder[part]
        if not isinstance(holder, DictConfig):  # null
            OmegaConf.update(self._node, key, value)
            return value
        holder[name] = value
        held = holder._get_node(name)
        return held._value() if isinstance(held, Node) and not OmegaConf.is_config(held) else value

    def _build(self, group: str) -> Any:
        value = self._node[group]
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _differences(first: Config, other: Config) -> Iterator[str]:
    """Yields the full keys whose values differ."""
    for name in _field_names(Config):
        before, now = getattr(first, name), getattr(other, name)
        if before is not now and before != now:
            left, right = (dict(flatten({name: _to_plain(value)})) for value in (before, now))
            yield from (key for key in {**left, **right} if left.get(key) != right.get(key))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields full keys and values of a nested config."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _search_path(config_dir: Path | str | None, overrides: Sequence[str]) -> Any:
    folders = [option_folder(str(config_dir), "--config-dir")] if config_dir is not None else []
    folders += search_folders(_parse(overrides))
    if folders:
        check_options(folders, CONF_DIR)
    search_path = create_config_search_path(str(CONF_DIR))
    for folder in folders:
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return search_path


def to_config(composed: DictConfig) -> Config:
    """Turns a composed config into dataclasses; raises `ConfigError` for unknown keys and impossible values."""
    with trust.fixed_resolvers():
        return _to_config(without_hydra(composed))


def _to_config(composed: DictConfig) -> Config:
    try:
        _refuse_secrets(_leaves(OmegaConf.to_container(composed, resolve=True), ""))
        for key in unknown_keys(composed):
            raise unknown_key(key)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{missing[0]} is not set; choose an option for its group or give {missing[0]}=VALUE")
        _check_values(OmegaConf.to_container(composed, resolve=True))
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(config, Config)
    check_paths(config)
    return config


def _check_values(value: Any, path: KeyPath = ()) -> None:
    """Raises `ConfigError` for what OmegaConf lets through: a list or a mapping as a text, a number of over 63 bits."""
    kind = type_at(path)
    if kind is str and isinstance(value, dict | list):
        raise ConfigError(f"{dotted(path)} must be a text, got {value!r}")
    if kind is int and isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise ConfigError(f"{dotted(path)} must lie between -2^63 and 2^63, got {value}; write a smaller number")
    for name, item in value.items() if isinstance(value, dict) else ():
        _check_values(item, (*path, str(name)))
    for index, item in enumerate(value) if isinstance(value, list) else ():
        _check_values(item, (*path, f"[{index}]"))


def without_hydra(composed: DictConfig) -> DictConfig:
    """Returns a config without the `hydra` node."""
    if "hydra" not in composed:
        return composed
    composed = composed.copy()
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed


def unknown_keys(composed: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the full names of keys that no dataclass field declares, such as `+` on the command line adds."""
    declared = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(declared):
        return
    names = {item.name for item in dataclasses.fields(declared)}
    for key in composed:
        full = f"{prefix}{key!s}"
        if key not in names:
            yield full
        elif isinstance(child := composed._get_node(key), DictConfig) and not (
            child._is_none() or child._is_missing() or child._is_interpolation()
        ):
            yield from unknown_keys(child, f"{full}.")


def unknown_key(key: str, where: str = "") -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that do."""
    group = key.split(".")[0]
    page = f"qlora --help {group}" if group in group_names() else "qlora --help"
    return ConfigError(f"unknown key {key!r}{where}{mean(nearest_keys(key))}; see `{page}`")


def unknown_flag(flag: str) -> ConfigError:
    """Returns the error for a word that begins with dashes and is no flag of ours, e.g. one of the original script."""
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    near = [*suggest(flag.split("=")[0], FLAGS), *([ORIGINAL_FLAGS[name]] if name in ORIGINAL_FLAGS else [])]
    near = near or nearest_keys(name)
    return ConfigError(
        f"unknown flag {flag.split('=')[0]}{mean(near)}; options are written KEY=VALUE without dashes, "
        "see `qlora --help`"
    )


def nearest_keys(key: str) -> list[str]:
    """Returns what `key` was meant to be: a foreign name's translation, else the nearest names level by level."""
    if key in FOREIGN_NAMES:
        return [FOREIGN_NAMES[key]]
    keys = [*config_keys(), *group_names()]
    found = [""]
    for word in key.split("."):
        found = [near for prefix in found for near in _nearest_children(prefix, word, keys)]
    if found:
        return found[:3]
    last = key.rpartition(".")[2]
    if same := [name for name in keys if name.rpartition(".")[2] == last]:
        return same[:3]
    names = {name.rpartition(".")[2]: name for name in reversed(keys)} | FOREIGN_NAMES
    return list(dict.fromkeys(names[name] for name in suggest(last, names)))


def _nearest_children(prefix: str, word: str, keys: list[str]) -> list[str]:
    """Returns the keys right below `prefix` that are `word`, or nearest to it; foreign names count as ours."""
    children = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == prefix}
    if word in children:
        return [children[word]]
    for name, ours in FOREIGN_NAMES.items():
        if name.rpartition(".")[0] == prefix and prefix:
            children.setdefault(name.rpartition(".")[2], ours)
    return list(dict.fromkeys(children[name] for name in suggest(word, children)))


def config_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Yields the full names of all fields: `lora.r`, `model.architecture.hidden_size`, ..."""
    for name, hint in _hints(schema).items():
        yield f"{prefix}{name}"
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                yield from config_keys(inner, f"{prefix}{name}.")


def group_names(conf_dir: Path = CONF_DIR) -> list[str]:
    """Returns the config groups a user chooses from, in alphabetical order."""
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir() and path.name != "hydra")


def check_keys(overrides: Sequence[str], hydra: Hydra) -> None:
    """Raises `ConfigError` for a key or a group's option that does not exist.

    Hydra finds most of these itself, but not an option of an `optional` entry of the defaults list (`recipe`), and
    for an unknown key it advises `+`, which would make a key that nothing reads.
    """
    loader = hydra.config_loader
    groups = set(loader.list_groups(""))
    keys = _known_keys()
    for override in _parse(overrides):
        key = override.key_or_group
        _refuse_several(override)
        if re.match(r"hydra\b", key):
            continue
        if override.package not in (None, "_global_"):
            raise ConfigError(f"{override.input_line}: an option stays in its group; write {key}=OPTION without the @")
        if key in groups:
            _check_choice(override, loader.get_group_options(key))
        elif not _exists(key, keys):
            raise unknown_key(key)
        elif override.is_delete():
            raise ConfigError(f"~{key}: a field cannot be removed; give it another value, or null if it may be unset")
        elif override.is_add() and not override.is_force_add() and key in keys:
            raise ConfigError(f"{override.input_line}: {key} exists; write it without the +")


def _exists(key: str, keys: frozenset[str]) -> bool:
    """Returns whether `key` is a field, an element of a list field, or inside a field that holds a free mapping."""
    return key in keys or key.partition("[")[0] in keys or _in_mapping(key, keys)


def _in_free_mapping(key: str, keys: frozenset[str]) -> bool:
    return _in_mapping(key, keys) or key.startswith(HYDRA_MAPPINGS)


def _in_mapping(key: str, keys: frozenset[str]) -> bool:
    parents = [key[: match.start()] for match in re.finditer(r"\.", key)]
    return any(parent in keys and get_origin(field_type(parent)) is dict for parent in parents)


def _refuse_several(override: Override) -> None:
    """Raises `ConfigError` for a list of options where a run has one; Hydra would take the last, or mix them."""
    group = override.key_or_group
    if takes_one_option(group, CONF_DIR) and any(isinstance(value, list) for value in _values(override)):
        several = f"-m {group}=A,B runs one after the other" if group != "sweep" else "start one sweep after the other"
        raise ConfigError(f"{override.input_line}: {group} takes one option, and this is a list; name one; {several}")


def _check_choice(override: Override, options: Sequence[str]) -> None:
    group = override.key_or_group
    if override.is_delete():
        raise ConfigError(f"~{group}: a run needs every group; choose an option instead, e.g. {group}=none")
    for choice in [item for value in _values(override) for item in (value if isinstance(value, list) else [value])]:
        if choice is None:
            remedy = (
                "leave it out" if group in ("experiment", "sweep") else f"choose one of {', '.join(sorted(options))}"
            )
            raise ConfigError(f"{group}=null: a group takes the name of an option; {remedy}")
        if isinstance(choice, dict):
            raise ConfigError(
                f"{group}={{...}}: name an option of {group} and set single fields with {group}.FIELD=VALUE"
            )
        if choice is not None and str(choice) not in options:
            raise unknown_option(group, str(choice), options)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise explain(error) from error


def unknown_option(group: str, choice: str, options: Sequence[str], where: str = "") -> ConfigError:
    """Returns the error for an option that a group does not have."""
    return ConfigError(
        f"{group}={choice}{where}: {group} has no such option{did_you_mean(choice, options)}; "
        f"choose one of {', '.join(sorted(options))}"
    )


def _values(override: Override) -> list[Any]:
    """Returns what an override may become: all elements of a sweep, or its one value."""
    if override.is_sweep_override() and override.is_discrete_sweep():
        return list(override.sweep_iterator())
    return [] if override.is_sweep_override() else [override.value()]


def expand_sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yields override lists that together hold every value of every swept key, one key varied at a time.

    Each is a job of the sweep's grid, so a mistake in any of them is a mistake in the sweep.
    """
    alternatives = []
    for text, override in zip(overrides, _parse(overrides), strict=True):
        values = swept_values(override)
        alternatives.append([text] if values is None else [f"{override.get_key_element()}={each}" for each in values])
    first = [options[0] for options in alternatives]
    yield first
    for place, options in enumerate(alternatives):
        for option in itertools.islice(options, 1, None):
            yield [*first[:place], option, *first[place + 1 :]]


def swept_values(override: Override) -> list[str] | None:
    """Returns the values of a sweep as overrides write them, of an interval its ends; None: it is no sweep.

    Raises `ConfigError` for an empty one.
    """
    if not override.is_sweep_override():
        return None
    value, text = override.value(), override.input_line
    if isinstance(value, Glob):
        raise ConfigError(f"{text}: glob(...) is not read here; list the values, e.g. lora=all-linear,attention")
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        if not value.start < value.end:
            raise ConfigError(f"{text} is empty: an interval runs from its lower end to its higher one")
        if field_type(override.key_or_group) is int and isinstance(value.start, float):
            raise ConfigError(
                f"{text}: {override.key_or_group} must be a whole number; write int(interval("
                f"{value.start:g},{value.end:g}))"
            )
        return [repr(value.start), repr(value.end)]
    if isinstance(value, RangeSweep) and not value.step:
        raise ConfigError(f"{text}: the step of a range must not be 0")
    if not (values := list(override.sweep_string_iterator())):
        raise ConfigError(f"{text} is empty: a range runs from its start up to its stop, which is no part of it")
    return values


def is_logarithmic(override: Override) -> bool:
    """Returns whether the values of a sweep are drawn on a logarithmic scale, as `tag(log,interval(1,9))` says.

    Raises `ConfigError` for another tag, and for bounds that have no logarithm.
    """
    text, value = override.input_line, override.value()
    tags = value.tags if isinstance(value, Sweep) else set()
    if unknown := sorted(tags - {"log"}):
        raise ConfigError(f"{text}: the tag {unknown[0]!r} is unknown; there is log only, as in tag(log,interval(1,9))")
    if "log" in tags and isinstance(value, IntervalSweep) and value.start is not None and value.start <= 0:
        raise ConfigError(f"{text}: a logarithmic scale needs bounds above 0, got {value.start:g}")
    return "log" in tags


def explain(error: Exception, config_dir: Path | str | None = None) -> UserError:
    """Turns what Hydra, OmegaConf or the YAML reader says into one clear sentence with the way out."""
    chain = _chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return link
        if isinstance(link, MarkedYAMLError):
            return _broken_yaml(link)
        if isinstance(link, UnicodeDecodeError):
            return ConfigError(f"{_not_utf8(config_dir)} is no UTF-8 text; save it as UTF-8")
        if isinstance(link, OverrideParseException):
            return _broken_override(link)
    text = "\n".join(str(link) for link in chain)
    if late := re.search(r"In '([^']+)': Overriding hydra.searchpath", text):
        return ConfigError(
            f"{SEARCH_PATH} is set in {_file_of(late[1], config_dir)}, where it comes too late; give it on the command "
            f"line: '{SEARCH_PATH}=[FOLDER]'"
        )
    found = re.search(r"In '([^']+)'|Error merging '([^']+)'", text)
    name = found[1] or found[2] if found else "config"
    where = "" if name.endswith("config") else f" in {_file_of(name, config_dir)}"  # not Hydra's own, nor the root
    if missing := re.search(r"Could not (?:find|load) '([\w.@/-]+)/([^/']+)'", text):
        listed = re.search(r"Available options in '[^']+':\n((?:\t.+\n?)*)", text)
        return unknown_option(missing[1], missing[2], listed[1].split() if listed else _options(missing[1]), where)
    inner = next((link for link in chain if isinstance(link, OmegaConfBaseException) and link.full_key), None)
    key = str(inner.full_key) if inner is not None else _key_of(text)
    if unset := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return ConfigError(
            f"{unset[1]} is not set by the option that was chosen for it; a file of its group begins without "
            "`# @package _group_`, which Hydra no longer knows"
        )
    if several := re.search(r"Multiple values for ([\w./-]+)", text):
        group = several[1].rstrip(".")
        return ConfigError(
            f"{group} is chosen twice{where}; where it has an option already, write {group}=OPTION on the command line "
            f"without a +, or `override /{group}: OPTION` in a file's defaults"
        )
    if key and re.search(r"Key '[^']*' (?:is )?not in|Could not (?:override|append)", text):
        return _no_place_for(key, where)
    if isinstance(inner, UnsupportedInterpolationType) or "Unsupported interpolation type" in text:
        name = (re.search(r"Unsupported interpolation type '?([\w.]*)", text) or ["", "?"])[1]
        return ConfigError(
            f"{key}{where}: ${{{name}:...}} calls no function that a config may call; those are oc.env, oc.select and "
            "the others of OmegaConf, hydra and now"
        )
    if isinstance(inner, InterpolationKeyError):
        name = (re.search(r"Interpolation key '([^']*)'", str(inner)) or ["", "?"])[1]
        return ConfigError(f"{key}{where} refers to ${{{name}}}, but there is no such key{mean(nearest_keys(name))}")
    if strange := re.search(r"Key (.+) \(\w+\) is incompatible with", text):
        owner = key.removesuffix(f".{strange[1]}")
        return ConfigError(
            f"{owner}{where}: the key {strange[1]} is no text; give the entries in a file, with quotes around this key"
        )
    if key or re.search(r"is not a subclass of|is not Optional", text):
        return _wrong_type(key, text, where)
    return ConfigError(f"{_first_line(text)}{where}")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _broken_yaml(error: MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark is not None else "a config file"
    remedy = "; indent with spaces" if "\\t" in str(error.problem) else ""
    return ConfigError(f"{place}: this is no valid YAML: {error.problem}{remedy}")


def _broken_override(error: OverrideParseException) -> ConfigError:
    if "=" not in error.override:
        return ConfigError(f"{error.override!r} is no option; options are written KEY=VALUE, e.g. lora.r=16")
    said = _first_line(str(error.__cause__ or error.message))
    reason = "" if "Exception" in said else f": {said}"
    return ConfigError(
        f"{error.override!r} cannot be read{reason}; put quotes around a value with special characters, "
        "e.g. 'data.path=\"my rows (1).jsonl\"'"
    )


def _file_of(name: str, config_dir: Path | str | None) -> str:
    """Returns the path of the YAML file that Hydra calls `name`, as far as it can be found."""
    for folder in (CONF_DIR, *([Path(config_dir)] if config_dir is not None else [])):
        if (file := folder / f"{name}.yaml").is_file():
            return str(file)
    return f"{name}.yaml"


def _not_utf8(config_dir: Path | str | None) -> str:
    for file in sorted(Path(config_dir).rglob("*.yaml")) if config_dir is not None else []:
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return str(file)
    return "a config file"


def _options(group: str) -> list[str]:
    folder = CONF_DIR / group
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []


def _key_of(text: str) -> str:
    found = re.search(r"Could not (?:override|append)(?: to)?(?: config group)? '([^'@]+)", text)
    return found[1] if found else ""


def _no_place_for(key: str, where: str) -> ConfigError:
    if key.startswith("hydra."):
        return _unknown_hydra_key(key, where)
    if key in _known_keys():
        return ConfigError(f"{key}{where} cannot be set here: what holds it is null, or another package is meant")
    return unknown_key(key, where)


def _unknown_hydra_key(key: str, where: str) -> ConfigError:
    """Returns the error for a key of Hydra's own, e.g. of a sweeper that was not chosen."""
    owner, _, name = key.rpartition(".")
    group = owner.removeprefix("hydra.")
    options = ConfigStore.instance().repo["hydra"].get(group, {})
    keys = {Path(option).stem: list(node.node or {}) for option, node in options.items()}
    if owners := [option for option, names in keys.items() if name in names]:
        return ConfigError(f"{key}{where} is a key of hydra/{group}={' and '.join(sorted(owners))}; choose that too")
    known = dict.fromkeys(other for names in keys.values() for other in names if not other.startswith("_"))
    near = [f"{owner}.{other}" for other in suggest(name, known)]
    return ConfigError(f"unknown key {key!r}{where}{mean(near)}; see `qlora --hydra-help`")


def _wrong_type(key: str, text: str, where: str) -> ConfigError:
    """Returns the error for a value that its field cannot hold: "KEY in FILE must be a whole number, got 'abc'"."""
    if not key and (found := re.search(r"not a subclass of (\w+)", text)):
        key = next((name for name in config_keys() if getattr(field_type(name), "__name__", "") == found[1]), "")
    value = _value_of(text)
    near = did_you_mean(value.strip("'"), field_type(key).__members__) if _is_enum(field_type(key)) else ""
    return ConfigError(f"{key}{where} must be {in_words(key)}, got {value}{near}")


def _value_of(text: str) -> str:
    """Returns the value that OmegaConf refused, from what it says."""
    if "is not Optional" in text:
        return "null"
    if said := re.search(r"[Vv]alue '(.*?)'(?: of type| is not|, expected)", text):
        return repr(said[1])
    if said := re.search(r"to string: '(.*)'|value: (.*)", text):
        return said[1] or said[2]
    if said := re.search(r"Error merging override [^=\s]+=(.*)", text):
        return said[1]
    said = re.search(r"(?:assign|assigned:) (\w+)", text)
    return {"int": "a number", "float": "a number", "str": "a text"}.get(said[1], said[1]) if said else "another type"


def field_type(key: str) -> Any:
    """Returns the annotation of the field `key` without its `| None`, or None where there is no such field."""
    node: Any = Config
    for name in key.split("."):
        hint = _hints(node).get(name)
        inner = [part for part in get_args(hint) if part is not NoneType]
        node = inner[0] if NoneType in get_args(hint) else hint
    return node


def _hints(schema: Any) -> dict[str, Any]:
    return field_types(schema) if isinstance(schema, type) and dataclasses.is_dataclass(schema) else {}


def may_be_null(key: str) -> bool:
    """Returns whether the field `key` takes null."""
    owner = field_type(key.rpartition(".")[0]) if "." in key else Config
    return NoneType in get_args(_hints(owner).get(key.rpartition(".")[2]))


def in_words(key: str) -> str:
    """Says what the field `key` holds: "a whole number or null", "one of nf4, fp4"."""
    hint = field_type(key)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Any: "any value"}
    if _is_enum(hint):
        text = f"one of {', '.join(hint.__members__)}"
    elif dataclasses.is_dataclass(hint):
        text = "a mapping of fields"
    else:
        either = "a text or a list of texts" if get_origin(hint) is UnionType else "valid"
        text = words.get(hint) or (shape_in_words(hint, key) if get_origin(hint) in SHAPES else either)
    return f"{text} or null" if may_be_null(key) else text


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _first_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if "raised while composing config" not in line]
    line = re.sub(r"^In '[^']*': ", "", lines[0].strip()) if lines else ""
    return line.rstrip(".") or "invalid config"


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns plain nested dicts, lists and strings, as YAML and JSON hold them."""
    plain = _to_plain(config)
    assert isinstance(plain, dict)
    return plain


def _to_plain(value: Any) -> Any:
    # As OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True), in a hundredth of the time.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _to_plain(getattr(value, name)) for name in _field_names(type(value))}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def _field_names(schema: Any) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(schema))


def dump_config(config: Config) -> str:
    """Returns the config as YAML that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads what `dump_config` wrote; None where there is no such file. Raises `DamagedFile`."""
    plain = _read_stored(path)
    if plain is None:
        return None
    if not isinstance(plain, dict) or not plain:
        raise DamagedFile(path, "it holds no config")
    for name, hint in field_types(Config).items():
        if dataclasses.is_dataclass(hint) and not isinstance(plain.get(name, {}), dict):
            raise DamagedFile(path, f"{name} is no group of keys")
    if not isinstance(plain.get("objective"), str | NoneType):
        raise DamagedFile(path, "objective is no text")
    return {str(key): value for key, value in plain.items()}


def read_overrides(path: Path) -> list[str] | None:
    """Reads the overrides that Hydra stored; None where there is no such file. Raises `DamagedFile`."""
    words = _read_stored(path)
    if not isinstance(words, list | NoneType):
        raise DamagedFile(path, "it holds no list of overrides")
    return None if words is None else [str(word) for word in words]


def _read_stored(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        fault = describe_fault(error) if mark is None else f"line {mark.line + 1}: it is no valid YAML"
        raise DamagedFile(path, fault) from error


def _as_text(tree: Any) -> Any:
    """Returns a tree whose texts OmegaConf reads as they are, `${` included."""
    if isinstance(tree, dict):
        return {key: _as_text(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_as_text(value) for value in tree]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree) if isinstance(tree, str) else tree


def restore_config(stored: dict[str, Any], file: Path | None = None) -> Config:
    """Returns the config that `read_config` read, of `file`, which errors name.

    A stored config is resolved: what looks like an interpolation is text, so that a folder of somebody else learns
    nothing of this machine. Raises `ConfigError` for a secret in it, and for one of another version's schema.
    """
    try:
        _refuse_secrets(_leaves(stored, ""))
        with trust.fixed_resolvers():
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _as_text(stored)))
    except (UserError, OmegaConfBaseException) as error:
        told = explain(error) if isinstance(error, OmegaConfBaseException) else error
        raise (ConfigError(f"{file}: {told}") if file is not None else told) from error
    assert isinstance(config, Config)
    return config


def with_trust_of(config: Config, stored: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns what `read_config` read of `file`, trusting the code that `config` does.

    Raises `ConfigError` for one that trusts more: what is trusted is said on the command line alone.
    """
    names, model = stored.get("trusted") or [], stored.get("model")
    if not isinstance(names, list) or not isinstance(model, dict):
        raise ConfigError(f"{file}: trusted must be a list and model a mapping, as a run stores them; it is damaged")
    more = [str(name) for name in names if name not in config.trusted]
    lacking = [f"trusted=[{','.join([*config.trusted, *more])}]"] if more else []
    if model.get("trust_remote_code") and not config.model.trust_remote_code:
        lacking.append(f"{trust.REMOTE_CODE}=true")
    if lacking:
        raise ConfigError(
            f"{file} sets {' and '.join(lacking)}, and what is trusted is said on the command line alone; if you know "
            f"what it does, add {' '.join(lacking)} to this command"
        )
    return {**stored, "trusted": list(config.trusted)}


@functools.cache
def model_presets() -> dict[str, dict[str, Any]]:
    """Returns the shipped models by option: `name`, and `architecture` with every field."""
    presets = {}
    for file in sorted((CONF_DIR / "model").glob("*.yaml")):
        node = OmegaConf.load(file)
        shape = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(ArchitectureConfig), node.architecture))
        presets[file.stem] = {"name": str(node.name), "architecture": shape}
    return presets
