"""Bare words of a command line: `qlora chat RUN` is `task=chat adapter=RUN`; a KEY=VALUE with spaces is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import NoReturn

from qlora.config.fields import known_keys
from qlora.config.foreign_names import FOREIGN_OPTIONS, FOREIGN_TASKS, known_value
from qlora.config.options import group_names, option_names
from qlora.config.overrides import write_override
from qlora.config.paths import is_row_file
from qlora.config.typed_forms import Reading
from qlora.errors import ConfigError, mean, suggest
from qlora.text import brief_text

SUBJECTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("chat", "evaluate", "predict", "merge", "export", "verify", "serve"), ("adapter",)),
    "push": ("adapter", "repo"),
    "replay": ("run",),
    "migrate": ("from",),
    "plan": ("model",),
    "preview": ("data",),
}
"""What the words behind a task name, in turn: `qlora push RUN me/mine`. Others take none, `report` any number."""
REPORT, REPORT_KEY = "report", "runs"
BOARD, OUTPUTS = "board", "outputs"
ANSWERS, QUESTIONS = ("evaluate", "predict"), "data.eval_path={}"
"""Tasks that measure or answer rows, and what names other rows than those held out."""
PROGRAMS = ("qlora", "python", "python3")
ASSIGNED = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@\[\]-]*=")
"""How an override begins."""
NUMBER = re.compile(r"[+-]?\d[\d_.]*(?:[eE][+-]?\d+)?")


def read_words(args: Sequence[str]) -> Reading:
    """Returns the overrides of a command line's words; raises `ConfigError` for words that are none."""
    _check_torn(args)
    bare = [text for text in args if _is_bare(text)]
    if not bare:
        return Reading([*args])
    chosen = [text.removeprefix("task=") for text in args if text.startswith("task=")]
    task, *subjects = bare if bare[0] in option_names("task") or not chosen else [chosen[-1], *bare]
    if task not in option_names("task"):
        raise _no_task(task)
    given = [] if subjects == bare else [f"task={task}"]
    read = [*given, *_subjects(task, subjects)]
    previous = args[: args.index(bare[0])]
    rest = [text for text in args[len(previous) :] if text not in bare]
    return Reading([*previous, *read, *rest], {" ".join(bare): " ".join(read)})


def _is_bare(text: str) -> bool:
    """Returns whether a word is no override: a folder of a sweep's job may have a = in its name."""
    key, equals, _ = text.partition("=")
    is_path = "/" in key and not key.lstrip("+~").startswith("hydra/") and Path(text).exists()
    return is_path or not (equals or text.startswith("~"))


def _subjects(task: str, bare: Sequence[str]) -> list[str]:
    """Returns the overrides of what a task is about."""
    if task == REPORT and bare:
        return [write_override(REPORT_KEY, bare[0] if len(bare) == 1 else [*bare])]
    keys = SUBJECTS.get(task, ())
    if len(bare) > len(keys):
        word = brief_text(bare[len(keys)], 60)
        if keys:
            usage = " ".join(["qlora", task, *map(str.upper, keys)])
            written = QUESTIONS.format(word) if task in ANSWERS and is_row_file(word) else _meant(word)[8:]
            meant = f"for {word} write {written}" if written else f"see `qlora {task} --help`"
            raise ConfigError(f"{task} does not take {word!r} as well: write `{usage}`, or {meant}")
        if task == BOARD:
            raise ConfigError(f"board shows the runs below {OUTPUTS}; start it where that folder is, as `qlora board`")
        _check_rows(word)
        remedy = _meant(word) or f"; see `qlora {task} --help`"
        raise ConfigError(f"{task} does not take {word!r} by itself, only KEY=VALUE{remedy}")
    if keys[:1] == ("adapter",) and bare and is_row_file(bare[0]) and not Path(bare[0]).is_dir():
        example = f"write qlora {task} RUN" + (f" {QUESTIONS.format(bare[0])}" if task in ANSWERS else "")
        raise ConfigError(f"{task} takes a run first, and {brief_text(bare[0], 60)} is a file of rows; {example}")
    return [write_override(key, word) for key, word in zip(keys, bare, strict=False)]


def _check_rows(word: str) -> None:
    """Raises `ConfigError` for what looks like a file of rows, and does not exist."""
    path = Path(word)
    if not is_row_file(word) or "*" in word or path.exists() or "://" in word:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"there is no file {word}: no folder {path.parent}; give your rows as data=FILE")
    near = suggest(word, [str(path.parent / file.name) for file in path.parent.iterdir() if is_row_file(file.name)])
    remedy = f"write data={quote(near[0])}" if near else "give your rows as data=FILE"
    raise ConfigError(f"there is no file {word} here{mean(near)}; {remedy}")


def _meant(word: str) -> str:
    """Returns what a bare word may stand for: "; write model=NAME"."""
    groups = [group for group in group_names() if word in option_names(group) and group != "recipe"]
    written = [f"{group}={word}" for group in groups[:2]]
    if Path(word).suffix in (".yaml", ".yml"):
        return f"; a file of options goes into a folder: {experiment_of(word)}"
    if not written and (is_row_file(word) or Path(word).exists() or "/" in word):
        is_rows = is_row_file(word) or Path(word).is_file()
        written = [f"data={quote(word)}"] if is_rows else [f"model={quote(word)}", f"adapter={quote(word)}"]
    return f"; write {' or '.join(written)}" if written else ""


def experiment_of(file: str) -> str:
    """Returns what reads a YAML file of the user's, in words."""
    return f"my_conf/experiment/{Path(file).name}, then --config-dir my_conf experiment={Path(file).stem}"


def _no_task(word: str) -> ConfigError:
    """Returns the error for a bare word that is no task."""
    if word.lower() in FOREIGN_TASKS:
        return ConfigError(f"there is no task {word!r}; instead, {FOREIGN_TASKS[word.lower()]}")
    if (ours := FOREIGN_OPTIONS["task"].get(word.lower())) is not None:
        return ConfigError(
            f"there is no task {word!r}; write {ours.replace('task=', 'qlora ')}, or see `qlora --help task`"
        )
    if word in PROGRAMS:
        return ConfigError(f"{word!r} stands before the options already; leave it out, e.g. qlora train")
    _check_rows(word)
    label, meant = brief_text(word, 60), _meant(word)
    near = [] if meant else suggest(word, [*option_names("task"), "help", "version"])
    if near:
        return ConfigError(f"there is no task {label!r}{mean(near)}; write qlora {near[0]}")
    remedy = meant or "; options are written KEY=VALUE, e.g. lora.r=16"
    return ConfigError(f"{label!r} is not an option{remedy}")


def _check_torn(args: Sequence[str]) -> None:
    """Raises `ConfigError` for the parts of an override with spaces in it, put together as one word."""
    tasks = {*option_names("task")}
    for index, text in enumerate(args):
        if text.lower() in FOREIGN_OPTIONS["task"]:
            continue
        previous, behind = args[index - 1] if index else "", args[index + 1 :]
        if text.startswith("=") and previous:
            _refuse_spaces([previous, text, *(behind[:1] if text == "=" else [])])
        if ASSIGNED.match(text) and len(parts := [text, *_continued(text, behind)]) > 1:
            _refuse_spaces(parts)
        if NUMBER.fullmatch(text) and ASSIGNED.match(previous):
            raise ConfigError(
                f"{text!r} stands alone; commas stand between the values of a sweep: -m {previous},{text}"
            )
        is_subject = "." not in text and tasks & {*args[:index]}  # a folder may be called `data`
        is_torn = "=" in text or "".join(behind[:1]).startswith("=")
        if (key := text.partition(":")[0]) in known_keys() - tasks and not (is_subject or is_torn):
            value = text.partition(":")[2] or next((word for word in behind[:1] if "=" not in word), "VALUE")
            written = known_value(key, value) or f"{key}={quote(value)}"
            raise ConfigError(f"{text!r} is not an option; options are written KEY=VALUE: write {written}")


def _continued(text: str, behind: Sequence[str]) -> Iterator[str]:
    """Yields the words that continue an override, because it ends in the middle of a value."""
    for word in behind:
        if ASSIGNED.match(word) or not (text.endswith((",", "=")) or word.startswith(",") or _is_open(text)):
            return
        yield word
        text += word


def _is_open(text: str) -> bool:
    """Returns whether a bracket in a value waits for its end."""
    return any(text.count(opening) > text.count(closing) for opening, closing in ("[]", "{}", "()"))


def _refuse_spaces(parts: Sequence[str]) -> NoReturn:
    whole = "".join(parts)
    is_sweep = "," in whole and not re.search(r"[\[{(]", whole)
    where = "around =" if "=" in (parts[0][-1:], parts[1][:1]) else "behind a comma"
    written = f"-m {whole}" if is_sweep else quote(whole) if re.search(r"[\[{(]", whole) else whole
    raise ConfigError(f"{' '.join(parts)!r}: no space {where}; write {written}")
