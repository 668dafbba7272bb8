"""Whose config a file is: told by the keys that only one project has, never by one key alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.config.saved_config import read_yaml
from qlora.errors import DataError
from qlora.migrate.axolotl import AXOLOTL
from qlora.migrate.commands import read_command
from qlora.migrate.llama_factory import FACTORY
from qlora.migrate.ms_swift import OF_COMMAND, SWIFT
from qlora.migrate.original import QLORA
from qlora.migrate.torchtune import TORCHTUNE
from qlora.migrate.torchtune_data import COMPONENT
from qlora.migrate.translation import Dialect
from qlora.migrate.trl import TRL
from qlora.migrate.trl_preferences import METHODS, dialect_of
from qlora.migrate.vocabulary import TRAINING_ARGUMENTS
from qlora.text import listed

DIALECTS = (QLORA, AXOLOTL, FACTORY, TORCHTUNE, TRL, *METHODS.values(), SWIFT)
IN_YAML, IN_ARGUMENTS = (AXOLOTL, FACTORY, TRL, SWIFT), (QLORA, TRL, SWIFT, FACTORY)
"""Torchtune's YAML is told by its components."""
OTHERS = {
    "dataset_mixer": "the alignment handbook",
    "model_class": "LLaMA-Factory's next version",
    "train_dataset": "LLaMA-Factory's next version",
    "input_features": "Ludwig",
    "merge_method": "mergekit",
    "lora_parameters": "MLX",
    "base_model_name_or_path": "PEFT, which describes a finished adapter",
    "architectures": "transformers, which describes a model",
    "checkpoint_dir": "LitGPT",
    "bits_and_bytes": "NeMo",
}
"""Keys by which configs of tools that are not read tell themselves."""
ROWS = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt.gz", ".jsonl.gz", ".csv.gz")
NOTEBOOKS = (".py", ".ipynb")
READ = (
    "a command of qlora.py nor a YAML of Axolotl (base_model), LLaMA-Factory or TRL (model_name_or_path) or torchtune "
    f"({COMPONENT}), nor arguments of `trl sft` or `swift sft`"
)
BY_HAND = "docs/migrate.md lists the keys of other tools beside ours"


def recognise(path: Path) -> tuple[Dialect, dict[str, Any]]:
    """Returns the dialect of a file and what it sets, by key; raises `DataError` for a file of no dialect."""
    if path.name.endswith(ROWS):
        raise DataError(f"from={path} holds rows, not a config; train on them with data=local data.path={path}")
    if path.suffix in NOTEBOOKS:
        raise DataError(f"from={path} is a program, which is not read; {BY_HAND}, those of Unsloth and TRL among them")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"from={path} is not UTF-8 text; give a script or a YAML") from None
    if path.suffix not in (".yaml", ".yml", ".json") and (command := read_command(text)) is not None:
        owner, start, arguments = command
        dialect = next((dialect for dialect in DIALECTS if dialect.name == owner), None)
        dialect = dialect or _by_keys(path, arguments, IN_ARGUMENTS)
        more = OF_COMMAND.get(start, {})
        return dialect, {**more, **_switches(dialect, arguments)}
    tree = read_yaml(path)
    if isinstance(tree, list) and tree and all(isinstance(row, dict) for row in tree):
        raise DataError(f"from={path} holds rows, not a config; train on them with data=local data.path={path}")
    if not isinstance(tree, dict):
        raise DataError(f"from={path} is neither {READ}; {BY_HAND}")
    flat = _flat(tree)
    if any(key.endswith(COMPONENT) for key in flat):
        return TORCHTUNE, flat
    settings = {str(key): value for key, value in tree.items()}
    return _by_keys(path, settings, IN_YAML), settings


def _by_keys(path: Path, settings: Mapping[str, Any], dialects: Sequence[Dialect]) -> Dialect:
    """Returns the dialect that knows most of the keys: at least half, and more than any other does."""
    if other := next((key for key in OTHERS if key in settings), None):
        raise DataError(f"from={path} is a config of {OTHERS[other]} ({other}), which is not read; {BY_HAND}")
    known = {dialect.name: sum(map(dialect.knows, settings)) for dialect in dialects if _is_of(dialect, settings)}
    most = max(known.values(), default=0)
    best = [dialect for dialect in dialects if known.get(dialect.name) == most]
    if not best or 2 * most < len(settings) or (most < 2 and best[0] is AXOLOTL):
        raise DataError(f"from={path} is neither {READ}; {BY_HAND}")
    if len(best) > 1:
        names = [dialect.name for dialect in best]
        raise DataError(
            f"from={path} may be of {listed(names)}: its keys are theirs; begin the command with its program, or "
            f"add a key that only one of them has, such as {listed([SIGNS[name] for name in names])}"
        )
    return dialect_of(settings) if best[0] is TRL else best[0]


SIGNS = {"qlora.py": "bits", "TRL": "dataset_name", "LLaMA-Factory": "finetuning_type", "ms-swift": "tuner_type",
         "Axolotl": "adapter"}  # fmt: skip
OPTIONAL_MODEL = (QLORA,)
"""Those that have a default model."""


def _is_of(dialect: Dialect, settings: Mapping[str, Any]) -> bool:
    """Tells whether a model is named as the project names it, beside one of the keys that transformers has not."""
    signs = dialect.keys - TRAINING_ARGUMENTS - {dialect.model_key, "dataset", "max_length", "seed"}
    names_model = dialect.model_key in settings or dialect in OPTIONAL_MODEL
    return names_model and (dialect is not SWIFT or not signs.isdisjoint(settings))


def _switches(dialect: Dialect, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments with `--no_NAME`, by which transformers turns a switch off, as NAME=false."""
    off = {name: name.removeprefix("no_") for name in arguments if name.startswith("no_") and name != "no_cuda"}
    off = {name: switch for name, switch in off.items() if not dialect.knows(name) and dialect.knows(switch)}
    return {off.get(name, name): False if name in off else value for name, value in arguments.items()}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns values by full keys; the entries of a list of mappings get their indices as keys."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
