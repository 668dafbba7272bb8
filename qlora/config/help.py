"""What `qlora --help` and `qlora --help GROUP` print, and the reference of docs/configuration.md: all read from
the schema's docstrings and the first comment of each YAML file, so that nothing is written twice."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from qlora.config import schema
from qlora.config.command_words import REPORT, REPORT_KEY, SUBJECTS
from qlora.config.default_values import default_options
from qlora.config.fields import config_keys, field_type, in_words
from qlora.config.foreign_names import ORIGINAL_FLAGS
from qlora.config.options import CONF_DIR, group_names, option_names
from qlora.config.search_path import option_folder
from qlora.errors import ConfigError, did_you_mean
from qlora.text import terminal_width, wrap

MANY_OPTIONS = 30
"""A group with more options stands by families on its page."""

WIDEST = 100
"""Columns of a page on a wider terminal."""
SCHEMA = Path(schema.__file__).parent

# Groups that choose values for several dataclasses, or hold the user's own objects.
OTHER_GROUPS = {
    "callbacks": "Objects that listen to the training loop.",
    "recipe": "Numbers that belong to a model, or to a model with a data set; they win over options.",
    "experiment": "A named, reproducible run.",
    "sweep": "A named sweep: many runs, one after another.",
}

EXAMPLES = {
    "qlora": "fine-tune the embedded model on the embedded data: about a minute on two CPU cores",
    "qlora model=llama-7b data=oasst1 seed=1": "the paper's numbers for that pair, with another seed",
    "qlora data=rows.jsonl lora.r=16": "your own rows, a smaller adapter",
    "qlora -m lora.r=8,64 quantization=nf4,fp4": "a sweep: four runs",
    "qlora sweep=lora-rank seed=0,1": "a named sweep, crossed with two seeds",
    "qlora experiment=guanaco-7b name=mine": "a named experiment in outputs/runs/mine",
    "qlora chat outputs/runs/mine": "talk with a finished run: task=chat adapter=outputs/runs/mine",
    "qlora task=evaluate adapter=outputs/runs/mine": "measure a finished run; none: the untuned base",
    "qlora task=predict adapter=outputs/runs/mine generation=nucleus": "let it answer",
    "qlora model=llama-33b --cfg job": "print the composed config, run nothing",
    "qlora --config-dir my_conf data=mine": "your own options: my_conf/data/mine.yaml",
    'eval "$(qlora -sc install=bash)"': "complete groups, options and keys with the tab key",
}

MORE = {
    "qlora --help GROUP": "the options of a group, and its fields with type and meaning",
    "qlora chat --help": "what a task does and takes; the tasks are the options of the group task",
    "qlora --explain KEY": "the value of a key, what set it, its type and meaning",
    "qlora --schema": "all keys as a JSON schema, for editors",
    "qlora --version": "the versions of qlora and of its libraries",
    "qlora --info defaults": "which files a command reads, in which order (the last wins)",
    "qlora --hydra-help": "the flags of Hydra, which composes the configuration",
}
"""Other pages, and what they show."""


def print_help(argv: list[str]) -> None:
    """Prints the help page, or that of the group in `argv` (`qlora --help lora`)."""
    config_dir, names = _read_argv(argv)
    print("\n".join(_pages(names[0], config_dir) if names else _main_page(config_dir)))


def _pages(name: str, config_dir: Path | None) -> Iterator[str]:
    """Yields the page of a task, of a group, or of both, as of `merge` and `plan`."""
    is_task = name in option_names("task")
    if is_task:
        yield from _task_page(name)
    if is_task and name in _all_groups(config_dir):
        yield ""
    if not is_task or name in _all_groups(config_dir):
        yield from _group_page(name, config_dir)


def _read_argv(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Returns the folder of `--config-dir` and the words that are neither flags nor overrides."""
    folder, names, rest = None, [], iter(argv)
    for word in rest:
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            folder = option_folder(value or next(rest, ""), "--config-dir")
        elif name in ("--config-name", "-cn", "--cfg", "-c", "--package", "-p"):
            next(rest, None)
        elif not word.startswith("-") and "=" not in word:
            names.append(word)
    return folder, names


def _main_page(config_dir: Path | None) -> Iterator[str]:
    yield from wrapped(
        "qlora fine-tunes quantized language models: a frozen 4-bit base, a small trained adapter (QLoRA).", "", 0
    )
    yield ""
    yield from wrapped(
        "Usage: qlora [TASK] [GROUP=OPTION ...] [KEY=VALUE ...] [-m] [--config-dir FOLDER] [--cfg job]", "", 13
    )
    yield "\nGroups (* is the default):"
    chosen = default_options()
    for group in _all_groups(config_dir):
        yield ""
        yield from wrapped(group_meaning(group), f"  {group:<14}", 16)
        names = [f"{name}*" if chosen.get(group) == name else name for name in options(group, config_dir)]
        if names:  # `manifest` and `sweep` have fields only
            yield from wrapped(", ".join(names), " " * 16, 16)
    yield "\nOther keys:\n"
    groups = _all_groups(config_dir)
    for key, text in field_docs()["Config"].items():
        if key not in groups:
            yield from wrapped(text, f"  {key:<14}", 16)
    yield "\nExamples:\n"
    for command, meaning in EXAMPLES.items():
        yield f"  {command}"
        yield from wrapped(meaning, " " * 6, 6)
    yield "\nMore:\n"
    for command, meaning in MORE.items():
        yield from wrapped(meaning, f"  {command:<23}", 25)


def _task_page(task: str) -> Iterator[str]:
    """Yields what a task does, what its words are, and the keys that it alone reads."""
    yield from wrapped(f"{task}: {options('task')[task]}", "", 2)
    keys = SUBJECTS.get(task, (REPORT_KEY,) if task == REPORT else ())
    usage = " ".join(["qlora", task, *map(str.upper, keys), *(["..."] if task == REPORT else [])])
    spelled = " ".join([f"task={task}", *(f"{key}={key.upper()}" for key in keys)])
    yield ""
    yield from wrapped(f"Usage: {usage} [GROUP=OPTION ...] [KEY=VALUE ...]", "", 13)
    yield from wrapped(f"which is qlora {spelled}", " " * 7, 13)
    read = [key for key, tasks in schema.TASK_KEYS.items() if schema.TaskName(task.replace("-", "_")) in tasks]
    if read:
        yield "\nKeys:"
    for key in read:
        owner, _, name = key.rpartition(".")
        yield ""
        yield from wrapped(f"{in_words(key)}{_default(key)}", f"  {'from' if key == 'source' else key}: ", 6)
        yield from wrapped(field_docs()["TaskConfig" if owner else "Config"][name], " " * 6, 6)
    yield "\nAll other keys: qlora --help"


def _group_page(group: str, config_dir: Path | None) -> Iterator[str]:
    groups = _all_groups(config_dir)
    group = group.rstrip(".").partition(".")[0]
    if group not in groups:
        near = did_you_mean(group, [*groups, *option_names("task")])
        raise ConfigError(f"--help {group}: there is no such group{near}; choose one of those of `qlora --help`")
    yield from wrapped(f"{group}: {group_meaning(group)}", "", 2)
    chosen = default_options().get(group)
    if listed := options(group, config_dir):
        yield f"\nOptions ({group}=OPTION):\n"
    width, family = max(map(len, listed), default=0) + 3, ""
    for name, comment in listed.items():
        if len(listed) > MANY_OPTIONS and preset_family(name) != family:
            yield from ([""] if family else [])
            family = preset_family(name)
        mark = "*" if name == chosen else " "
        yield from wrapped(comment, f"  {name + mark:<{width}}", width + 2)
    if chosen in listed:
        yield "\n  * is the default"
    if fields := list(group_fields(group)):
        yield f"\nFields ({group}.FIELD=VALUE):"
    for key, text in fields:
        yield ""
        yield from wrapped(f"{in_words(key)}{_default(key)}", f"  {key}: ", 6)
        yield from wrapped(text, " " * 6, 6)


def wrapped(text: str, first: str, indent: int) -> list[str]:
    """Returns a text as lines of a page: the first begins with `first`, the others are indented."""
    return wrap(text.replace("`", ""), min(terminal_width(), WIDEST), first, " " * indent)


def _all_groups(config_dir: Path | None) -> list[str]:
    """Returns our groups in the order of the schema, then those that only the user's folder has."""
    ours = [name for name in [*field_docs()["Config"], *OTHER_GROUPS] if name in group_names()]
    return list(dict.fromkeys([*_schema_groups(), *ours, *(group_names(config_dir) if config_dir else [])]))


def _schema_groups() -> list[str]:
    return [item.name for item in dataclasses.fields(schema.Config) if dataclasses.is_dataclass(field_type(item.name))]


def group_meaning(group: str) -> str:
    """Returns what a group is for, in one sentence."""
    hint = field_type(group)
    if dataclasses.is_dataclass(hint):
        return " ".join((hint.__doc__ or "").split())
    return OTHER_GROUPS.get(group, "Your own group.")


def options(group: str, config_dir: Path | None = None) -> dict[str, str]:
    """Returns the options of a group, the user's included, each with the first comment of its file."""
    folders = [CONF_DIR / group, *([config_dir / group] if config_dir is not None else [])]
    files = sorted(file for folder in folders for file in folder.glob("*.yaml"))
    by_size = sorted({file.stem: file for file in reversed(files)}.items(), key=lambda item: _natural(item[0]))
    return {name: _comment(file) for name, file in by_size}


def preset_family(name: str) -> str:
    """Returns the family of a model's preset, the letters that its name begins with: `llama` of `llama-3.1-8b`."""
    match = re.match(r"[a-z]+(-oss)?", name.lower())
    return match[0] if match else name


def _natural(name: str) -> list[tuple[int, float | str]]:
    """Sorts llama-7b before llama-13b."""
    parts: list[tuple[int, float | str]] = []
    for part in name.replace("_", "-_").split("-"):
        number = part.removesuffix("b").removesuffix("m")
        scale = 1e-3 if part.endswith("m") else 1.0
        parts.append((1, float(number) * scale) if number.replace(".", "", 1).isdigit() else (0, part))
    return parts


def _comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ")
    return ""


@functools.cache
def field_docs() -> dict[str, dict[str, str]]:
    """Returns the docstring below each field, by class and field, in the order of the source."""
    modules = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(SCHEMA.glob("*.py"))]
    classes = [node for module in modules for node in module.body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_fields_with_docs(node)) for node in classes}


def _fields_with_docs(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield field.target.id, _docstring(below)


def _docstring(node: ast.stmt | None) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(str(node.value.value).split()) if is_text else ""  # type: ignore[union-attr]


def group_fields(group: str) -> Iterator[tuple[str, str]]:
    """Yields the full name and the docstring of each field of a group, nested ones below their parent."""
    hint = field_type(group)
    if not dataclasses.is_dataclass(hint):
        return
    assert isinstance(hint, type)
    for key in config_keys(hint, f"{group}."):
        owner = field_type(key.rpartition(".")[0])
        yield key, field_docs()[owner.__name__][key.rpartition(".")[2]]


def _default(key: str) -> str:
    """Returns the schema's default as text: " = 0.9", or a note that an option chooses it."""
    owner: Any = field_type(key.rpartition(".")[0]) if "." in key else schema.Config
    item = next(item for item in dataclasses.fields(owner) if item.name == key.rpartition(".")[2])
    value = item.default_factory() if callable(item.default_factory) else item.default
    if value is MISSING or value is dataclasses.MISSING or value == MISSING:
        return " (an option chooses it)"
    if isinstance(value, enum.Enum):
        value = value.name
    if dataclasses.is_dataclass(value):
        value = {}  # the rows of its fields say theirs
    return f" = {OmegaConf.to_yaml(OmegaConf.create({'x': value})).partition(': ')[2].strip()}"


def describe_default(key: str) -> str:
    """Returns the schema's default of a key; "": an option chooses it, or no dataclass declares it."""
    owner: Any = field_type(key.rpartition(".")[0]) if "." in key else schema.Config
    names = [item.name for item in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    if key.rpartition(".")[2] not in names:
        return ""
    return _default(key).removeprefix(" = ") if _default(key).startswith(" = ") else ""


def field_meaning(key: str) -> str:
    """Returns the docstring of a field, or of the mapping or list that a key lies in; "": there is none."""
    key = key.partition("[")[0]
    while key:
        parent, _, name = key.rpartition(".")
        owner: Any = field_type(parent) if parent else schema.Config
        if dataclasses.is_dataclass(owner):
            return field_docs()[owner.__name__].get(name, "")  # type: ignore[union-attr]
        key = parent
    return ""


def reference() -> str:
    """Returns the reference of every field and every original flag as Markdown."""
    lines = ["## Every key", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    docs = field_docs()["Config"]
    lines += [_row(key, text) for key, text in docs.items() if key not in _all_groups(None)]
    for group in _schema_groups():
        lines += ["", f"### {group}", "", group_meaning(group), ""]
        if options(group):
            lines += [_pointer(group), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(key, text) for key, text in group_fields(group)]
    lines += ["", "### callbacks", "", docs["callbacks"], "", _pointer("callbacks")]
    for group in ("recipe", "experiment", "sweep"):
        lines += ["", f"### {group}", "", group_meaning(group), "", _pointer(group)]
    lines += ["", "## Coming from qlora.py", "", "| flag | here |", "|---|---|"]
    lines += [f"| `--{flag}` | `{ours}` |" for flag, ours in ORIGINAL_FLAGS.items()]
    return "\n".join(lines) + "\n"


def _pointer(group: str) -> str:
    """Names the command that lists the options of a group: a new file in `conf/` is in no table."""
    return f"`qlora --help {group}` lists its options."


def _row(key: str, text: str) -> str:
    default = _default(key).removeprefix(" = ")
    default = "by option" if default.startswith(" (") else f"`{default}`"
    cells = (f"`{key}`", in_words(key), default, text.replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


def write_reference(path: Path) -> None:
    """Replaces everything below the reference's first heading in a Markdown file."""
    head = path.read_text(encoding="utf-8").partition("## Every key")[0]
    path.write_text(head + reference(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_reference(Path(sys.argv[1]))
    else:
        print(reference(), end="")
