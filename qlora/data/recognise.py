"""Which format the rows of a set have: by their columns and by what the first few of them hold."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora.data.conversations import Row, decode, is_turn, split_inst
from qlora.data.formats import FORMATS, GUANACO, WITH_REFORMULATIONS, Example, Format, nested
from qlora.errors import ConfigError
from qlora.functions import import_function
from qlora.schema import FUNCTION_PATH

log = logging.getLogger(__name__)

# Other names of the columns that formats want, to suggest one of those found.
PROMPTS = (
    *("instruction", "question", "prompt", "query", "input", "inputs", "problem", "source", "questions", "turns"),
    "context",
)
ANSWERS = ("output", "response", "answer", "completion", "target", "targets", "reply", "solution", "outputs", "answers")
TEXTS = ("text", "content", "document", "body", "story")
# Columns that are never an answer.
DETAILS = (
    *("id", "idx", "index", "name", "category", "source", "subset", "split", "lang", "language", "topic", "task"),
    *("type", "subject", "metadata", "meta", "url", "context", "system", "tree_state", "is_classification"),
)
CHOICES = ("choices", "choice0", "options", "A")
NOTES = {
    "chosen": "rejected is not read",
    "human-bot": "whose texts read '<human>: ... <bot>: ...'",
    "inst": "whose texts read '[INST] ... [/INST] ...'",
    "unnatural": "with instruction_with_input",
    "self-instruct-tasks": "with several instances a row",
}
ALIKE = {"alpaca": ("unnatural",)}
"""Formats that would render the same, and so are not worth a word."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of a set of rows."""

    name: str
    """A name of `FORMATS`, or the user's `module:function`."""
    why: str
    """What decided, for people."""
    format: Format


class _Rows(NamedTuple):
    """What is known of the rows, and how sentences call them."""

    columns: Sequence[str]
    sample: Sequence[Row]
    setting: str
    """The key that chooses the format, e.g. `data.format`."""
    subject: str
    """Who has the columns, e.g. "data.path has"."""

    @property
    def listed(self) -> str:
        return ", ".join(self.columns)

    def column_key(self, column: str) -> str:
        return f"{self.setting.removesuffix('format')}columns.{column}"


def choose_format(
    name: str, columns: Sequence[str], sample: Sequence[Row], *, key: str = "data.path", reformulations: bool = False
) -> Choice:
    """Returns the format `name`, or the one that `auto` recognises; logs what was decided and why.

    `columns` and `sample`, the first few rows, are as `data.columns` has renamed them. `key` is where the rows come
    from: `data.path`, `data.eval_path`, `data.mix.NAME.path`. Raises `ConfigError` where the columns do not fit.
    """
    setting = f"{key.removesuffix('path')}format" if key.endswith(".path") else "data.format"
    rows = _Rows(columns, sample, setting, f"{key} has")
    if name == "auto":
        choice = recognise(rows)
        log.info("%s=auto: %s, by %s", setting, choice.name, choice.why)
    elif FUNCTION_PATH.fullmatch(name):
        choice = _choose_own(name, rows)
        log.info("%s=%s: %s", setting, name, choice.why)
    else:
        choice = Choice(name, f"{setting}={name}", FORMATS[name])
        if choice.format.lacks(columns):
            raise ConfigError(f"{setting}={name} needs the columns {choice.format.describe_needs()}; "
                              f"{rows.subject} {rows.listed}. {_way_out(rows)}")  # fmt: skip
    if reformulations and choice.name != "unnatural":
        raise ConfigError(f"data.reformulations=true is only read by the format unnatural, but {key} is read as "
                          f"{choice.name}; leave it out")  # fmt: skip
    if reformulations:
        if "reformulations" not in columns:
            raise ConfigError(f"data.reformulations=true needs the column reformulations; {rows.subject} {rows.listed}")
        return Choice(choice.name, f"{choice.why}; with its reformulations", WITH_REFORMULATIONS)
    return choice


def recognise(rows: _Rows) -> Choice:
    """Returns the first format that the columns and the sample fit; raises `ConfigError` where none does."""
    fitting = [name for name in FORMATS if _fits(name, rows)]
    if not fitting:
        raise ConfigError(f"{rows.setting}=auto recognises no format: {rows.subject} the columns {rows.listed}. "
                          f"{_way_out(rows)}")  # fmt: skip
    name = fitting[0]
    if name == "text" and "question_id" in rows.columns:
        raise ConfigError(_prompts_only(rows, "text"))
    if name == "question-answer" and (found := [column for column in CHOICES if column in rows.columns]):
        raise ConfigError(
            f"{rows.setting}=auto: {rows.subject} the columns {rows.listed}, a multiple-choice test; the answers mean "
            f"little without {found[0]}. Write them into the question with a function of your own "
            f"({rows.setting}=module:function), or leave them out with {rows.setting}=question-answer"
        )
    return Choice(name, f"the columns {rows.listed}{_notes(name, rows)}{_others(name, fitting, rows)}", FORMATS[name])


def _fits(name: str, rows: _Rows) -> bool:
    if FORMATS[name].lacks(rows.columns):
        return False
    if name in LOOKS:
        return bool(rows.sample) and all(LOOKS[name](row) for row in rows.sample)
    return True


def _looks_marked(row: Row, first: str, second: str) -> bool:
    text = row.get("text")
    return isinstance(text, str) and first in text and second in text


def _looks_inst(row: Row) -> bool:
    return isinstance(row.get("text"), str) and split_inst(row["text"]) is not None


def _looks_guanaco(row: Row) -> bool:
    text = row.get("text")
    return isinstance(text, str) and set(GUANACO.findall(text)) == {"Human", "Assistant"}


def _looks_unnatural(row: Row) -> bool:
    if "instances" not in row:
        return bool(row.get("instruction_with_input"))
    try:
        tasks = nested(row, "instances", "unnatural")
    except ConfigError:
        return False
    return bool(tasks) and "instruction_with_input" in tasks[0]


# Formats whose columns alone say too little: what every row of the sample must look like.
LOOKS: dict[str, Callable[[Row], bool]] = {
    "unnatural": _looks_unnatural,
    "human-bot": functools.partial(_looks_marked, first="<human>: ", second="\n<bot>: "),
    "inst": _looks_inst,
    "guanaco": _looks_guanaco,
}


def _notes(name: str, rows: _Rows) -> str:
    notes = [NOTES[name]] if name in NOTES and (name != "chosen" or "rejected" in rows.columns) else []
    if name in ("messages", "prompt-completion") and any(isinstance(row.get("label"), bool) for row in rows.sample):
        notes.append("rows whose label is false are left out")
    if name == "alpaca" and "prompt" in rows.columns:
        notes.append("prompt is not read, the prompt is Alpaca's")
    return f" ({'; '.join(notes)})" if notes else ""


def _others(name: str, fitting: list[str], rows: _Rows) -> str:
    others = [other for other in fitting if other != name and other not in ALIKE.get(name, ())]
    if name == "text" and "guanaco" in others:
        return f" (trained as a whole; {rows.setting}=guanaco counts the loss on the answers alone)"
    return f"; {', '.join(others)} would fit too, set {rows.setting} to choose" if others else ""


def _prompts_only(rows: _Rows, prompt: str) -> str:
    whole = f", or train on the text as a whole with {rows.setting}=text" if prompt == "text" else ""
    return (
        f"{rows.setting}=auto: {rows.subject} the columns {rows.listed}, prompts only: there is nothing to train on. "
        f"Name the column of answers ({rows.column_key('output')}=COLUMN), use rows that have answers{whole}"
    )


def _way_out(rows: _Rows) -> str:
    """Says which format is nearest, and how to name the columns that it lacks."""
    fitting = [name for name in FORMATS if _fits(name, rows)]
    if fitting:
        return f"They fit {rows.setting}={fitting[0]}"
    if chat := next((c for c in rows.columns if any(_holds_turns(row.get(c)) for row in rows.sample)), None):
        return f"{chat} holds the turns of a chat: {rows.column_key('messages')}={chat}"
    asked = [column for column in rows.columns if column.lower() in PROMPTS]
    if any(
        isinstance(row.get(column), Mapping) and "replies" in row[column] for column in asked for row in rows.sample
    ):
        return f"{asked[0]} holds trees of messages: turn each into rows with {rows.setting}=module:function"
    if asked and all(c in asked or c.lower() in DETAILS or c.lower().endswith("_id") for c in rows.columns):
        return f"They are prompts only: there is nothing to train on. {_name_answers(rows)}"
    nearest = _nearest(rows)
    if nearest:
        return f"Closest: {'; '.join(nearest)}; or map the rows with {rows.setting}=module:function"
    known = "; ".join(f"{name} ({layout.describe_needs()})" for name, layout in FORMATS.items())
    return f"Name the columns of a format with {rows.column_key('NAME')}=COLUMN: {known}"


def _name_answers(rows: _Rows) -> str:
    return f"Name the column of answers ({rows.column_key('output')}=COLUMN), or use rows that have answers"


def _holds_turns(cell: Any) -> bool:
    value = decode(cell)
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def _nearest(rows: _Rows) -> list[str]:
    """Returns at most two formats that lack least, each with the settings that would mend it."""
    scored: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, layout in FORMATS.items():
        for needed in layout.needs if name not in LOOKS else ():
            lacking = [column for column in needed if column not in rows.columns]
            guesses = _guess(lacking, [column for column in rows.columns if column not in needed])
            if len(lacking) == len(needed) and None in guesses.values():
                continue
            keys = " ".join(f"{rows.column_key(column)}={guesses[column] or 'COLUMN'}" for column in lacking)
            unknown = sum(guess is None for guess in guesses.values())
            unlike = sum(guess is not None and guess.lower()[:4] != column[:4] for column, guess in guesses.items())
            entry = (unknown, len(lacking), unlike), f"{name}, which lacks {' and '.join(lacking)} ({keys})"
            if name not in scored or entry[0] < scored[name][0]:
                scored[name] = entry
    best = min((score for score, _ in scored.values()), default=None)
    return [sentence for score, sentence in scored.values() if score == best][:2]


def _guess(lacking: Iterable[str], columns: Iterable[str]) -> dict[str, str | None]:
    """Returns, for each column that a format lacks, one of the others that seems to mean the same."""
    free, guesses = list(columns), dict[str, str | None]()
    for wanted in lacking:
        alike = next((names for names in (PROMPTS, ANSWERS, TEXTS) if wanted in names), (wanted,))
        guesses[wanted] = next((c for name in alike for c in free if c.lower() == name), None)
        free = [column for column in free if column != guesses[wanted]]
    return guesses


def _choose_own(path: str, rows: _Rows) -> Choice:
    """Chooses by what the user's function returns for the sample; its rows are recognised as `auto` does."""
    mapped = [row for given in rows.sample for row in _map(path, given, rows.setting)]
    if not mapped:
        why = "it left out the whole sample, so that each of its rows is recognised by itself"
        return Choice(path, why, _own_format(path, rows.setting, None))
    columns = list(dict.fromkeys(column for row in mapped for column in row))
    inner = recognise(rows._replace(columns=columns, sample=mapped, subject=f"{path} returns"))
    why = f"its rows are read as {inner.name}, by {inner.why}"
    return Choice(path, why, _own_format(path, rows.setting, inner.format.render))


def _own_format(path: str, setting: str, render: Callable[[Row], Sequence[Example]] | None) -> Format:
    return Format(functools.partial(_render_own, path=path, setting=setting, render=render), needs=((),))


def _render_own(
    row: Row, *, path: str, setting: str, render: Callable[[Row], Sequence[Example]] | None
) -> list[Example]:
    examples: list[Example] = []
    for mapped in _map(path, row, setting):
        reader = render or recognise(_Rows(list(mapped), [mapped], setting, f"{path} returns")).format.render
        examples += reader(mapped)
    return examples


def _map(path: str, row: Row, setting: str) -> list[Row]:
    """Calls the user's function on one row; it may return a row, a list of rows, or None."""
    # By name and not as an object, so that a format goes to other processes whatever the function is.
    result = import_function(path, setting)(dict(row))
    found = [] if result is None else result if isinstance(result, list) else [result]
    if wrong := next((item for item in found if not isinstance(item, Mapping)), None):
        shown = f"a list with {type(wrong).__name__}" if isinstance(result, list) else type(wrong).__name__
        raise ConfigError(f"{setting}={path}: returned {shown} for a row; it must return a row (dict), a list of rows, "
                          "or None to leave the row out")  # fmt: skip
    return found
