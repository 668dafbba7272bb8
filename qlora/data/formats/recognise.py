"""Which format the rows of a set have: by their columns and by what the first few of them hold."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora.config.registries.data_formats import installed_format
from qlora.config.registries.objectives import WHOLE_TEXTS, RowKind
from qlora.config.schema import FUNCTION_PATH, Pairs
from qlora.config.user_code import import_function
from qlora.data.chat.conversations import Conversation, decode, is_empty, is_turn, split_inst
from qlora.data.formats import scores
from qlora.data.formats.cells import Row, is_missing, track
from qlora.data.formats.labels import LABELS, is_unlabelled, label_columns
from qlora.data.formats.preferences import ANSWER_COLUMNS, check_columns, describe_kind, of_kind
from qlora.data.formats.prompts import AnyExample, Example, sides
from qlora.data.formats.renderers import ASKED, FORMATS, GUANACO, WITH_REFORMULATIONS, Format, nested
from qlora.data.formats.whole_texts import choose_columns
from qlora.errors import ConfigError, DataError, UserError
from qlora.text import listed

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
REJECTED = ("reject", "bad", "negative", "worse", "dispreferred")
"""How the names of columns begin that hold answers not to be trained."""
CHATS = {"messages": "messages", "chosen": "chosen", "completion": "prompt-completion"}
"""Names under which a column that holds turns can be read, each with its format."""
WHOLE_TEXT = "text"
"""The name of the format of rows that a head reads."""
COLUMN = "COLUMN"
"""Stands for a column that only the user can name."""
CHOICES = ("choices", "choice0", "options", "A")
NOTES = {
    "human-bot": "whose texts read '<human>: ... <bot>: ...'",
    "inst": "whose texts read '[INST] ... [/INST] ...'",
    "unnatural": "with instruction_with_input",
    "self-instruct-tasks": "with several instances a row",
}
BY_NAME = ("alpaca-newline",)
"""Formats of the same columns as another one, which `auto` and hints leave to people who know that they mean it."""
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
    chosen: str = "auto"
    """What the config asks for: `auto`, a name of `FORMATS`, or a function of the user's that returned the rows."""
    kind: RowKind = RowKind.tokens
    """What its format is to render a row as."""
    pairs: Pairs = Pairs["best-worst"]
    """Which pairs rows with several scored answers give."""

    @property
    def listed(self) -> str:
        return listed(self.columns)

    def column_key(self, column: str) -> str:
        return f"{self.setting.removesuffix('format')}columns.{column}"


def choose_format(
    name: str,
    columns: Sequence[str],
    sample: Sequence[Row],
    *,
    key: str = "data.path",
    reformulations: bool = False,
    kind: RowKind = RowKind.tokens,
    pairs: Pairs = Pairs["best-worst"],
    label: Sequence[str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> Choice:
    """Returns the format `name`, or the one that `auto` recognises; logs what was decided and why.

    `columns` and `sample`, the first few rows, are as `data.columns` has renamed them. `key` is where the rows come
    from: `data.path`, `data.eval_path`, `data.mix.NAME.path`. The format renders rows as examples of `kind`. Raises
    `ConfigError` where the columns do not fit, and `DataError` where they hold none of that kind.
    """
    setting = f"{key.removesuffix('path')}format" if key.endswith(".path") else "data.format"
    if kind in WHOLE_TEXTS:
        return _choose_whole_texts(name, columns, sample, kind, setting, key=key, label=label, names=class_names or {})
    rows = _Rows(columns, sample, setting, f"{key} has", name, kind, pairs)
    choice = _choose(name, rows, reformulations=reformulations)
    if ":" in choice.name or installed_format(name) is not None:
        return choice  # which renders what the user's function returns
    try:
        check_columns(kind, columns, choice.name)
        return replace(choice, format=of_kind(kind, choice.name, choice.format, pairs))
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _choose_whole_texts(
    name: str,
    columns: Sequence[str],
    sample: Sequence[Row],
    kind: RowKind,
    setting: str,
    *,
    key: str,
    label: Sequence[str] | None,
    names: Mapping[str, Sequence[str]],
) -> Choice:
    """Returns the format of rows of whole texts: by their columns, or those that the user's function returns."""
    function = name if FUNCTION_PATH.fullmatch(name) else installed_format(name)
    if function is not None:
        mapped = [row for given in sample for row in _map(function, given, setting)]
        returned = list(dict.fromkeys(column for row in mapped for column in row))
        layout, why = choose_columns(kind, returned, key=f"{setting}={function}", label=label, names={})
        render = functools.partial(_render_mapped, path=function, setting=setting, render=layout.render)
        return Choice(name, f"{why} of what it returns", Format(render, needs=((),)))
    if name not in ("auto", WHOLE_TEXT):
        raise ConfigError(
            f"{setting}={name} says what is asked and answered, and a head reads a whole text; leave it out, or give a "
            "function of your own (module:function) that returns rows of a text and a label"
        )
    layout, why = choose_columns(kind, columns, key=key, label=label, names=names)
    log.info("%s: whole texts, by the %s", setting, why)
    return Choice(WHOLE_TEXT, why, layout)


def _render_mapped(
    row: Row, *, path: str, setting: str, render: Callable[[Row], Sequence[AnyExample]]
) -> list[AnyExample]:
    return [example for mapped in _map(path, row, setting) for example in render(track(row, mapped, ""))]


def _choose(name: str, rows: _Rows, *, reformulations: bool) -> Choice:
    """Returns the format as it renders rows to train on."""
    setting, columns, key = rows.setting, rows.columns, rows.subject.removesuffix(" has")
    if name == "auto":
        choice = recognise(rows)
        log.info("%s=auto: %s, by the %s", setting, choice.name, choice.why)
    elif (function := name if FUNCTION_PATH.fullmatch(name) else installed_format(name)) is not None:
        choice = _choose_own(function, rows._replace(chosen=function))
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


def _columns(rows: _Rows) -> str:
    return f"column{'' if len(rows.columns) == 1 else 's'} {rows.listed}"


def recognise(rows: _Rows) -> Choice:
    """Returns the first format that the columns and the sample fit; raises `ConfigError` where none does."""
    fitting = [name for name in FORMATS if name not in BY_NAME and _fits(name, rows)]
    if rows.kind is RowKind.pairs or (rows.kind is RowKind.labelled and not label_columns(rows.columns, LABELS)):
        first = "chosen" if set(ANSWER_COLUMNS) <= set(rows.columns) else scores.NAME
        fitting = [first] if first in fitting else fitting
    if not fitting and rows.kind is not RowKind.tokens:
        _check_answers(rows)
    if not fitting:
        raise DataError(f"{rows.setting}=auto recognises no format: {rows.subject} the columns {rows.listed}. "
                          f"{_way_out(rows)}")  # fmt: skip
    name = fitting[0]
    if _is_prompt_only(name, rows):
        raise DataError(_prompts_only(rows))
    if left := _left_choices(name, rows):
        way_out = f", or leave them out with {rows.setting}={name}" if _works(rows, name, {}) else ""
        raise DataError(
            f"{rows.setting}=auto: {rows.subject} the columns {rows.listed}, a multiple-choice test; the answers mean "
            f"little without {left[0]}. Write them into the question with a function of your own "
            f"({rows.setting}=module:function){way_out}"
        )
    return Choice(name, f"{_columns(rows)}{_notes(name, rows)}{_others(name, fitting, rows)}", FORMATS[name])


def _check_answers(rows: _Rows) -> None:
    """Raises `DataError` that says what rows lack of two answers, or of a label."""
    try:
        for row in rows.sample if any(column in rows.columns for column in scores.LISTS) else ():
            scores.read_answers(row)
        check_columns(rows.kind, rows.columns, "")
    except DataError as error:
        raise DataError(f"{rows.subject.rpartition(' ')[0]}: {error}") from None


def _is_prompt_only(name: str, rows: _Rows) -> bool:
    return name == "text" and "question_id" in rows.columns


def _left_choices(name: str, rows: _Rows) -> list[str]:
    """Returns the columns that hold the choices of a multiple-choice test, which its format does not read."""
    return [column for column in CHOICES if column in rows.columns] if name == "question-answer" else []


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
    except UserError:
        return False
    return bool(tasks) and "instruction_with_input" in tasks[0]


def _looks_scored(row: Row) -> bool:
    return any(not is_missing(row.get(column)) for column in ASKED) and scores.holds_scores(row)


# Formats whose columns alone say too little: what every row of the sample must look like.
LOOKS: dict[str, Callable[[Row], bool]] = {
    "unnatural": _looks_unnatural,
    "human-bot": functools.partial(_looks_marked, first="<human>: ", second="\n<bot>: "),
    "inst": _looks_inst,
    "guanaco": _looks_guanaco,
    scores.NAME: _looks_scored,
}


def _notes(name: str, rows: _Rows) -> str:
    notes = [NOTES[name]] if name in NOTES else []
    named = label_columns(rows.columns, FORMATS[name].labels)
    labels = [column for column in named if not all(is_unlabelled(row.get(column)) for row in rows.sample)]
    if labels and rows.kind is RowKind.tokens:
        notes.append(f"rows whose {labels[0]} is false are left out")
    notes += describe_kind(rows.kind, name, labels, rows.pairs)
    return f" ({'; '.join(notes)})" if notes else ""


def _others(name: str, fitting: list[str], rows: _Rows) -> str:
    others = [other for other in fitting if other != name and other not in ALIKE.get(name, ())]
    if name == "text" and "guanaco" in others:
        return f" (trained as a whole; {rows.setting}=guanaco counts the loss on the answers alone)"
    return f"; {', '.join(others)} would fit too, set {rows.setting} to choose" if others else ""


def _prompts_only(rows: _Rows) -> str:
    whole = f", or train on the text as a whole with {rows.setting}=text" if _works(rows, "text", {}) else ""
    return (
        f"{rows.setting}=auto: {rows.subject} the columns {rows.listed}, prompts only: there is nothing to train on. "
        f"{_name_answers(rows, 'text')}, use rows that have answers{whole}"
    )


# Ways out: each is tried on the sample before it is named


def _way_out(rows: _Rows) -> str:
    """Says which format is nearest, and how to name the columns that it lacks."""
    known = "; ".join(f"{name} ({layout.describe_needs()})" for name, layout in FORMATS.items())
    function = f"{rows.setting}=module:function"
    if FUNCTION_PATH.fullmatch(rows.chosen):  # data.columns names what the function reads, not what it returns
        return f"Let it return the columns of a format: {known}"
    if fitting := next((name for name in FORMATS if _fits(name, rows) and _works(rows, name, {})), None):
        return f"They fit {rows.setting}={fitting}"
    chats = [column for column in rows.columns if any(_holds_turns(row.get(column)) for row in rows.sample)]
    for chat in (column for column in chats if not column.lower().startswith(REJECTED)):
        for needed, name in CHATS.items():
            if _works(rows, _format_for(rows, name), {needed: chat}):
                return f"{chat} holds the turns of a chat: {_settings(rows, name, {needed: chat})}"
    if chats:
        return f"{chats[0]} holds turns of a chat, but none of a whole one: map the rows with {function}"
    asked = [column for column in rows.columns if column.lower() in PROMPTS]
    if any(
        isinstance(row.get(column), Mapping) and "replies" in row[column] for column in asked for row in rows.sample
    ):
        return f"{asked[0]} holds trees of messages: turn each into rows with {function}"
    if asked and all(c in asked or c.lower() in DETAILS or c.lower().endswith("_id") for c in rows.columns):
        return f"They are prompts only: there is nothing to train on. {_name_answers(rows, asked[0])}, or use rows " \
               "that have answers"  # fmt: skip
    if nearest := _nearest(rows):
        return f"Closest: {'; '.join(nearest)}; or map the rows with {function}"
    return f"Name the columns of a format with {rows.column_key('NAME')}=COLUMN: {known}"


def _name_answers(rows: _Rows, prompt: str) -> str:
    """Says how to name the column of answers, of rows whose column of prompts is known."""
    for columns, name in (
        ({"output": COLUMN}, "alpaca"),
        ({"output": COLUMN}, "input-output"),
        ({"completion": COLUMN}, "prompt-completion"),
        ({"answer": COLUMN}, "question-answer"),
        ({"input": prompt, "output": COLUMN}, "input-output"),
    ):
        if _works(rows, _format_for(rows, name), columns):
            return f"Name the column of answers ({_settings(rows, name, columns)})"
    return f"Map the rows with {rows.setting}=module:function"


def _format_for(rows: _Rows, name: str) -> str:
    """Returns the format that a run asks for if it follows a hint: the config's where that is `auto` or the same."""
    return "auto" if rows.chosen == "auto" else name


def _settings(rows: _Rows, name: str, columns: Mapping[str, str]) -> str:
    """Returns what to set, so that the rows are read as format `name` with these columns."""
    settings = [f"{rows.setting}={name}"] if rows.chosen not in ("auto", name) else []
    for needed, source in columns.items():
        is_word = source.isascii() and source.replace("-", "_").isidentifier()
        settings.append(
            f"{rows.column_key(needed)}={source}" if is_word else f"'{rows.column_key(needed)}=\"{source}\"'"
        )
    return " ".join(settings)


def _works(rows: _Rows, name: str, columns: Mapping[str, str]) -> bool:
    """Tells whether the sample can be trained on as a format (or `auto`), with columns renamed."""
    renamed = {source: needed for needed, source in columns.items()}

    def rename(row: Row) -> Row:
        kept = {column: cell for column, cell in row.items() if column in renamed or column not in columns}
        cells = {renamed.get(column, column): cell for column, cell in kept.items()}
        return cells | ({renamed[COLUMN]: "text"} if COLUMN in renamed else {})

    sample = [rename(row) for row in rows.sample]
    named = rows._replace(columns=list(rename(dict.fromkeys(rows.columns))), sample=sample)
    if name == "auto":
        name = next((candidate for candidate in FORMATS if _fits(candidate, named)), "")
        if not name or _is_prompt_only(name, named) or _left_choices(name, named):
            return False
    if FORMATS[name].lacks(named.columns):
        return False
    try:
        examples = [example for row in sample for example in FORMATS[name].render(row)]
    except UserError:
        return False
    return not sample or any(map(_says_something, examples))


def _says_something(example: AnyExample) -> bool:
    return any(map(_side_says_something, sides(example)))


def _side_says_something(example: Example) -> bool:
    if isinstance(example, Conversation):
        return any(turn["role"] == "assistant" and not is_empty(turn) for turn in example.messages)
    return any(segment.trained and segment.text.strip() for segment in example)


def _holds_turns(cell: Any) -> bool:
    value = decode(cell)
    return isinstance(value, list) and bool(value) and all(map(is_turn, value))


def _nearest(rows: _Rows) -> list[str]:
    """Returns at most two formats that lack least, each with the settings that would fix it."""
    scored: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, layout in FORMATS.items():
        for needed in layout.needs if name not in (*LOOKS, *BY_NAME) else ():
            lacking = [column for column in needed if column not in rows.columns]
            guesses = _guess(lacking, [column for column in rows.columns if column not in needed])
            if not _works(rows, _format_for(rows, name), {c: guesses[c] or COLUMN for c in lacking}):
                guesses = dict.fromkeys(lacking)
            columns = {column: guesses[column] or COLUMN for column in lacking}
            unknown = sum(guess is None for guess in guesses.values())
            if unknown > 1 or unknown == len(needed) or not _works(rows, _format_for(rows, name), columns):
                continue
            unlike = sum(guess is not None and guess.lower()[:4] != column[:4] for column, guess in guesses.items())
            listed = _settings(rows, name, columns)
            entry = (unknown, len(lacking), unlike), f"{name}, which lacks {' and '.join(lacking)} ({listed})"
            if name not in scored or entry[0] < scored[name][0]:
                scored[name] = entry
    best = min((score for score, _ in scored.values()), default=None)
    return [sentence for score, sentence in scored.values() if score == best][:2]


def _guess(lacking: Iterable[str], columns: Iterable[str]) -> dict[str, str | None]:
    """Returns, for each column that a format lacks, one of the others that seems to mean the same."""
    free, guesses = list(columns), dict[str, str | None]()
    for needed in lacking:
        alike = next((names for names in (PROMPTS, ANSWERS, TEXTS) if needed in names), (needed,))
        guesses[needed] = next((c for name in alike for c in free if c.lower() == name), None)
        free = [column for column in free if column != guesses[needed]]
    return guesses


def _choose_own(path: str, rows: _Rows) -> Choice:
    """Chooses by what the user's function returns for the sample; its rows are recognised as `auto` does."""
    mapped = [row for given in rows.sample for row in _map(path, given, rows.setting)]
    if not mapped:
        why = "it left out the whole sample, so that each of its rows is recognised by itself"
        return Choice(path, why, _own_format(path, rows, None))
    columns = list(dict.fromkeys(column for row in mapped for column in row))
    inner = _recognised(path, rows.setting, columns, mapped, rows.kind, rows.pairs)
    why = f"its rows are read as {inner.name}, by the {inner.why}"
    return Choice(path, why, _own_format(path, rows, inner.format.render))


def _recognised(
    path: str, setting: str, columns: Sequence[str], mapped: Sequence[Row], kind: RowKind, pairs: Pairs
) -> Choice:
    """Returns the format of what the user's function returned."""
    inner = recognise(_Rows(columns, mapped, setting, f"{path} returns", path, kind, pairs))
    try:
        check_columns(kind, columns, inner.name)
        return replace(inner, format=of_kind(kind, inner.name, inner.format, pairs))
    except DataError as error:
        raise DataError(f"{setting}={path}: of what it returns, {error}") from None


def _own_format(path: str, rows: _Rows, render: Callable[[Row], Sequence[AnyExample]] | None) -> Format:
    renders = functools.partial(
        _render_own, path=path, setting=rows.setting, render=render, kind=rows.kind, pairs=rows.pairs
    )
    return Format(renders, needs=((),))


def _render_own(
    row: Row,
    *,
    path: str,
    setting: str,
    render: Callable[[Row], Sequence[AnyExample]] | None,
    kind: RowKind,
    pairs: Pairs,
) -> list[AnyExample]:
    examples: list[AnyExample] = []
    for mapped in _map(path, row, setting):
        reader = render or _recognised(path, setting, list(mapped), [mapped], kind, pairs).format.render
        examples += reader(track(row, mapped, ""))
    return examples


def _map(path: str, row: Row, setting: str) -> list[Row]:
    """Calls the user's function on one row; it may return a row, a list of rows, or None."""
    # By name and not as an object, so that a format goes to other processes whatever the function is.
    result = import_function(path, setting)(dict(row))
    mapped = [] if result is None else result if isinstance(result, list) else [result]
    if wrong := next((item for item in mapped if not isinstance(item, Mapping)), None):
        label = f"a list with {type(wrong).__name__}" if isinstance(result, list) else type(wrong).__name__
        raise DataError(f"{setting}={path}: returned {label} for a row; it must return a row (dict), a list of rows, "
                          "or None to leave the row out")  # fmt: skip
    return mapped
