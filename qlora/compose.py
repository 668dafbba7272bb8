"""The border between Hydra's `DictConfig` and the dataclasses of `schema`; finds every unknown key.

Nothing here or below imports torch, so a mistake in a config is answered in well under a second.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.errors import ConfigError, did_you_mean
from qlora.schema import Config

_PACKAGE = Path(__file__).parent
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

# Names that people bring along from the original script, PEFT and transformers, and ours.
FOREIGN_NAMES = {
    "model_name_or_path": "model.name",
    "lora.rank": "lora.r",
    "lora.lora_alpha": "lora.alpha",
    "lora.lora_dropout": "lora.dropout",
    "lora.modules": "lora.target_modules",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "bits": "quantization.bits",
    "quant_type": "quantization.quant_type",
    "double_quant": "quantization.double_quant",
    "full_finetune": "lora=none",
    "adam8bit": "trainer.optim=paged_adamw_8bit",
    "max_memory_MB": "model.max_memory",
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
    "output_dir": "hydra.run.dir",
    "run_name": "name",
    "report_to": "tracking",
    "learning_rate": "trainer.learning_rate",
    "lr": "trainer.learning_rate",
    "trainer.lr": "trainer.learning_rate",
    "max_steps": "trainer.max_steps",
    "trainer.steps": "trainer.max_steps",
    "trainer.epochs": "trainer.num_train_epochs",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
    "gradient_accumulation_steps": "trainer.gradient_accumulation_steps",
    "trainer.warmup_ratio": "trainer.warmup_steps",
    "trainer.bf16": "quantization.compute_dtype=bf16",
    "trainer.fp16": "quantization.compute_dtype=fp16",
    "quantization.dtype": "quantization.compute_dtype",
    "max_new_tokens": "generation.max_new_tokens",
}


def register() -> None:
    """Tells Hydra the root schema and the resolver of `config.yaml`; may be called many times."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver(
        "qlora.folder",
        lambda name: name or f"{datetime.now():%Y-%m-%d_%H-%M-%S}",
        use_cache=True,
        replace=True,
    )


def compose(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Config:
    """Returns the checked config of `overrides`, as the command line would read them.

    `config_dir` holds the user's own groups and options (`--config-dir`). Raises `ConfigError` for every mistake.
    """
    return to_config(compose_dict(overrides, config_dir))


def compose_dict(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> DictConfig:
    """Composes `overrides` into the `DictConfig` that Hydra hands to a job, the `hydra` node included."""
    register()
    instance = GlobalHydra.instance()
    outer = instance.hydra
    instance.clear()
    try:
        hydra = Hydra.create_main_hydra2("qlora", _search_path(config_dir))
        check_choices(overrides, hydra)
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    finally:
        instance.clear()
        if outer is not None:
            instance.initialize(outer)


def check_overrides(overrides: Sequence[str], config_dir: Path | str | None = None, *, multirun: bool = False) -> None:
    """Raises `ConfigError` if any job that these overrides start would be refused; starts nothing.

    A sweep's values come from the command line and from `hydra.sweeper.params` of a `sweep=` file.
    """
    jobs = expand_sweep(overrides) if multirun else iter([list(overrides)])
    composed = compose_dict(first := next(jobs), config_dir)
    to_config(composed)
    if composed.hydra.mode is RunMode.MULTIRUN or multirun:
        given = {OverridesParser.create().parse_override(text).get_key_element() for text in overrides}
        params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
        swept = [f"{key}={value}" for key, value in params.items() if key not in given]
        jobs = itertools.islice(expand_sweep([*overrides, *swept]), 0 if swept else 1, None)
    for job in jobs:
        if job != first:
            to_config(compose_dict(job, config_dir))


def _search_path(config_dir: Path | str | None) -> Any:
    search_path = create_config_search_path(str(CONF_DIR))
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: no such folder ({folder})")
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return search_path


def to_config(composed: DictConfig) -> Config:
    """Turns a composed config into dataclasses; raises `ConfigError` for unknown keys and impossible values."""
    if "hydra" in composed:
        composed = composed.copy()
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
    for key in unknown_keys(composed):
        raise unknown_key(key)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(f"{missing[0]} is not set; choose an option for its group or give {missing[0]}=VALUE")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(config, Config)
    return config


def unknown_keys(composed: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the full names of keys that no dataclass field declares, such as `+` on the command line adds."""
    declared = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(declared):
        return
    names = {item.name for item in dataclasses.fields(declared)}
    for key in composed:
        full = f"{prefix}{key}"
        if key not in names:
            yield full
        elif not OmegaConf.is_missing(composed, key) and isinstance(child := composed._get_node(key), DictConfig):
            if not child._is_none() and not child._is_interpolation():
                yield from unknown_keys(child, f"{full}.")


def unknown_key(key: str, where: str = "") -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that do."""
    return ConfigError(f"{where}unknown key {key!r}{_hint(key)}; `qlora --help` lists the groups and their fields")


def _hint(key: str) -> str:
    if key in FOREIGN_NAMES:
        return f"; did you mean {FOREIGN_NAMES[key]}?"
    keys = list(config_keys())
    siblings = [name for name in keys if name.rpartition(".")[0] == key.rpartition(".")[0]]
    return did_you_mean(key, siblings) or did_you_mean(key, [*keys, *group_names()]) or _same_last_name(key, keys)


def _same_last_name(key: str, keys: list[str]) -> str:
    same = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean {' or '.join(same)}?" if same else ""


def config_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Yields the full names of all fields: `lora.r`, `model.architecture.hidden_size`, ..."""
    from typing import get_args, get_type_hints

    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                yield from config_keys(inner, f"{prefix}{name}.")


def group_names(conf_dir: Path = CONF_DIR) -> list[str]:
    """Returns the config groups a user chooses from, in alphabetical order."""
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir() and path.name != "hydra")


def check_choices(overrides: Sequence[str], hydra: Hydra) -> None:
    """Raises `ConfigError` for a group's option that no folder of the search path has.

    Hydra finds most of these itself, but not in an `optional` entry of the defaults list (`recipe`).
    """
    loader = hydra.config_loader
    groups = set(loader.list_groups(""))
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group not in groups or group == "hydra":
            continue
        if override.is_delete():
            raise ConfigError(f"~{group}: a run needs every group; choose an option instead, e.g. {group}=none")
        options = loader.get_group_options(group)
        for value in _values(override):
            for choice in value if isinstance(value, list) else [value]:
                if choice is not None and str(choice) not in options:
                    raise unknown_option(group, str(choice), options)


def unknown_option(group: str, choice: str, options: Sequence[str]) -> ConfigError:
    """Returns the error for an option that a group does not have."""
    return ConfigError(
        f"{group}={choice}: unknown option of {group!r}{did_you_mean(choice, options)}; "
        f"options: {', '.join(sorted(options))}"
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
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        if override.is_sweep_override() and override.is_discrete_sweep():
            key = override.get_key_element()
            alternatives.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            alternatives.append([text])
    first = [options[0] for options in alternatives]
    yield first
    for place, options in enumerate(alternatives):
        for option in itertools.islice(options, 1, None):
            yield [*first[:place], option, *first[place + 1 :]]


def explain(error: Exception) -> ConfigError:
    """Turns what Hydra or OmegaConf says into one clear sentence with the way out."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = "\n".join(str(item) for item in chain)
    inner = next((item for item in chain if isinstance(item, OmegaConfBaseException) and item.full_key), None)
    for item in chain:
        if isinstance(item, ConfigError):
            return item
    found = re.search(r"In '([^']+)'|Error merging '([^']+)'", text)
    where = f"in {found[1] or found[2]}.yaml: " if found else ""
    if missing := re.search(r"Could not find '([\w.@/-]+)/([^/']+)'[\s\S]*?Available options in '[^']+':\n((?:\t.+\n?)*)", text):
        group, choice = missing[1], missing[2]
        return unknown_option(group, choice, missing[3].split())
    if re.search(r"not in struct|Key '[^']*' not in|is not in struct|Could not (override|append)", text) and (
        key := _key_of(text, inner)
    ):
        if key in set(config_keys()):
            return ConfigError(f"{where}{_first_line(text)}")
        return unknown_key(key, where)
    if inner is not None:
        rule = _first_line(str(inner)).rstrip(".")
        return ConfigError(f"{where}{inner.full_key}: {rule}{_type_hint(str(inner.full_key))}")
    return ConfigError(_first_line(str(error)) if isinstance(error, HydraException) else str(error))


def _key_of(text: str, inner: OmegaConfBaseException | None) -> str | None:
    if inner is not None and inner.full_key:
        return str(inner.full_key)
    found = re.search(r"Could not (?:override|append)(?: to)?(?: config group)? '([^'@]+)", text)
    return found[1] if found else None


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "invalid config"


def _type_hint(key: str) -> str:
    """Returns what the field `key` expects, for the end of an error message."""
    from typing import get_type_hints

    node: Any = Config
    for name in key.split("."):
        hints = get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        node = hints.get(name)
        if node is None:
            return ""
    return f"; {key} is of type {getattr(node, '__name__', None) or node}"
