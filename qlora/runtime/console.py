"""What a person reads during a run; libraries are silent unless asked.

Lines go to standard output and, through the logger, to `train.log`; with several processes only the first prints.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from qlora.errors import RunError
from qlora.runtime import distributed
from qlora.secrets import hide
from qlora.text import format_metric, prompt_core, shorten, terminal_width, visible, wrap, wrap_command

log = logging.getLogger(__name__)

# What stands in for a sign where the terminal's encoding lacks it.
PLAIN_SIGNS = str.maketrans("✓✗–…·→⟦⟧─⏎▁▂▃▄▅▆▇█", "+x-~|>[]-/_.:-=+*#")
ON_SCREEN = {"on_screen": True}  # marks log records whose text was printed already


class OwnLines(logging.Filter):
    """Lets this project's lines through to the console, and every library's errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether `record` belongs on the console; of several processes the first one warns."""
        if getattr(record, "on_screen", False) or not (
            distributed.is_main_process() or record.levelno >= logging.ERROR
        ):
            return False
        is_ours = record.name.split(".")[0] in ("qlora", "__main__")
        return is_ours or record.levelno >= logging.ERROR or logging.getLogger().level <= logging.DEBUG


class HidingFormatter(logging.Formatter):
    """Formats as another does, and takes secrets and control characters out: of messages and of tracebacks.

    With `wraps`, long lines wrap between words.
    """

    def __init__(self, inner: logging.Formatter, *, wraps: bool = False) -> None:
        super().__init__()
        self.inner, self.wraps = inner, wraps

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of `record`, to which a formatter may add colours of its own."""
        record = copy.copy(record)
        record.msg, record.args = visible(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = self.inner.formatException(record.exc_info)
        record.exc_text = record.exc_text and visible(record.exc_text)
        text = hide(self.inner.format(record))
        return wrap_sentences(text) if self.wraps and not record.exc_text else text


class LogFile(logging.FileHandler):
    """A log file that may lose lines while the disk is full; what matters waits for space."""

    def __init__(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Opens the file; raises `RunError` for a link, by which a folder that was sent could lead elsewhere."""
        if Path(filename).is_symlink():
            raise RunError(f"{filename} is a link to another file, which a run would write to; remove it")
        super().__init__(filename, *args, **kwargs)

    def handleError(self, record: logging.LogRecord) -> None:
        """Reports what is wrong with a record, unless it is the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def quiet_libraries(*, verbose: bool = False) -> None:
    """Sends warnings of libraries to the log, not to the screen; `verbose` (`hydra.verbose=true`) leaves them alone.

    No log holds a secret.
    """
    guard_logs()
    if not verbose:
        logging.captureWarnings(True)
        warnings.simplefilter("default")


@contextlib.contextmanager
def quiet_notebook() -> Iterator[None]:
    """Keeps libraries off the screen inside the block, where nobody has set up a log; so does the command line."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(OwnLines())
    level = root.level
    with warnings.catch_warnings():
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        quiet_libraries()
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.setLevel(level)
            root.removeHandler(handler)


def guard_logs() -> None:
    """Has no handler of the log write a secret or a control character."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, HidingFormatter):
            wraps = type(handler) is logging.StreamHandler  # which writes to the screen
            handler.setFormatter(HidingFormatter(handler.formatter or logging.Formatter(), wraps=wraps))


def take_over_handlers() -> None:
    """Sends what libraries print by handlers of their own, attached when they were imported, to `train.log` too."""
    for name in ("transformers", "datasets", "peft", "bitsandbytes", "huggingface_hub", "accelerate"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def is_live() -> bool:
    """Returns whether a person watches: a terminal that can redraw, and the first process."""
    console = screen()
    return distributed.is_main_process() and console.is_interactive and console.file.isatty()


def screen() -> Console:
    """Returns the console on standard output."""
    return _console_on(getattr(sys.stdout, "rich_proxied_file", sys.stdout))


@functools.lru_cache(maxsize=1)
def _console_on(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def say(line: str | Text = "", *, whole: bool = False, hang: int | None = None) -> None:
    """Prints a line, which stands whole in `train.log`; one that is wider than the terminal wraps between words.

    The rest of it begins at column `hang`, or two behind the line's own first. `whole`: it is wrapped already.
    """
    if not distributed.is_main_process():
        return
    text = Text(line) if isinstance(line, str) else line
    text.plain = printable(text.plain)
    screen().print(text if whole else _wrapped(text, hang), soft_wrap=True)
    if text.plain.strip():
        record(text.plain)


def say_command(command: str) -> None:
    """Prints a command that a person copies; a long one breaks between its words, with a backslash at each end."""
    if distributed.is_main_process():
        command = printable(command)
        screen().print(Text("\n".join(wrap_command(command, terminal_width()))), soft_wrap=True)
        record(command)


def _wrapped(text: Text, hang: int | None) -> Text:
    """Returns a text whose lines fit the terminal, the rest of one indented below it; no word is broken."""
    width = terminal_width()
    if all(cell_len(line) <= width for line in text.plain.split("\n")):
        return text
    lines: list[Text] = []
    for line in text.split("\n"):
        indent = len(line.plain) - len(line.plain.lstrip()) + 2 if hang is None else hang
        first, *rest = _lines_of(line, width) or [line]
        below = _lines_of(Text(" ").join(rest), max(width - indent, 20))
        lines += [first, *(Text(" " * indent) + part for part in below if part.plain)]
    return Text("\n").join(lines)


def _lines_of(text: Text, width: int) -> list[Text]:
    text.overflow = "ignore"  # a long word is neither broken nor cut; as an argument of `wrap` it would break nothing
    lines = [*text.wrap(screen(), width)]
    for line in lines:
        line.rstrip()
    return lines


def complain(text: str) -> None:
    """Prints what ended a run to standard error: on a terminal wrapped between words, else on a line for programs."""
    text = visible(hide(text))
    print(wrap_sentences(text) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def wrap_sentences(text: str) -> str:
    """Returns a text whose lines wrap between words at the width of the terminal; those that are indented stay whole.

    These are commands and lists, which a person copies.
    """
    lines = (([line] if line.startswith(" ") else wrap(line, terminal_width())) for line in text.split("\n"))
    return "\n".join(line for wrapped in lines for line in wrapped)


def say_colored(text: str) -> None:
    """Prints lines that may hold escape sequences for colours."""
    say(Text.from_ansi(text))


def record(line: str) -> None:
    """Writes a line to `train.log` only."""
    log.info("%s", line, extra=ON_SCREEN)


def printable(text: str) -> str:
    """Returns `text` as it may be shown: without secrets, without control characters, and with signs that the
    terminal's encoding lacks replaced; the last two one for one."""
    text = visible(hide(text))
    encoding = screen().encoding
    if encoding.lower().startswith("utf"):
        return text
    return text.translate(PLAIN_SIGNS).encode(encoding, "replace").decode(encoding)


def start_screen(lines: list[tuple[str, str]]) -> None:
    """Prints what is about to run: a title and a row for each label and value."""
    from qlora import __version__

    say(Text(f"qlora {__version__}", style="bold"))
    say_rows(lines)
    say()


def say_rows(rows: list[tuple[str, str]]) -> None:
    """Prints labels and values in two columns; a long value wraps between words under its column.

    Where the labels take more than half of the terminal, each value stands below its label.
    """
    if not rows:
        return
    indent, width = max(len(label) for label, _ in rows) + 4, terminal_width()
    if indent > width // 2:
        for label, value in rows:
            say(Text(f"  {label}", style="cyan"))
            say(f"      {value}", hang=6)
        return
    for label, value in rows:
        body = f"\n{' ' * indent}".join(wrap(value, width - indent))
        say(Text.assemble((f"  {label}".ljust(indent), "cyan"), body), whole=True)


def summary(
    title: str,
    before_after: list[tuple[str, float | None, float | None, str]],
    predictions: list[dict[str, Any]],
    files: list[tuple[str, str]],
    next_steps: list[str],
) -> None:
    """Prints the end of a run: metrics before and after, a few answers, the files written, what to type next.

    A metric is its name, both values and what is known of its certainty, in words.

    A prediction has `input` or `prompt`, `reference`, `prediction` and maybe `match`: true, false or None (not judged).
    """
    say()
    say(Text(title, style="bold"))
    _say_metrics(before_after)
    if predictions:
        say()
        say(Text("Held-out answers", style="bold"))
        for row in predictions:
            _say_prediction(row)
    if files:
        say()
        say(Text("Files", style="bold"))
        say_rows(files)
    if next_steps:
        say()
        say(Text("Next", style="bold"))
        for line in next_steps:
            say_command(line)


def _say_metrics(rows: list[tuple[str, float | None, float | None, str]]) -> None:
    if not rows:
        return
    compared = any(previous is not None for _, previous, _, _ in rows)
    cells = [(name.replace("_", " "), format_metric(name, previous), format_metric(name, after), certainty)
             for name, previous, after, certainty in rows]  # fmt: skip
    label, first, second, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    first, second = max(first, len("before")), max(second, len("after"))
    if compared:
        head = f"{'before'.rjust(first)}    {'after'.rjust(second)}"
        say(Text(" " * (label + 6) + head, style="dim"))
    for name, previous, after, certainty in cells:
        middle = f"{previous.rjust(first)} →  " if compared else ""
        note = f"   {certainty}" if certainty else ""
        line = Text.assemble((f"  {name.ljust(label)}    ", "cyan"), middle, (after.rjust(second), "bold"))
        say(Text.assemble(line, (note, "dim")), hang=len(line) + 3)


def _say_prediction(row: dict[str, Any]) -> None:
    is_answered = row.get("reference") is not None
    expected, got = str(row.get("reference") or ""), str(row.get("prediction", ""))
    same = " ".join(expected.split()) == " ".join(got.split())
    judged = row.get("match", same) if is_answered else None
    if isinstance(judged, str):  # as trackers write it
        judged = judged.lower() in ("true", "yes")
    room = min(terminal_width(), 120) - 18
    asked = str(row.get("input", row.get("prompt", "")))
    mark, style = ("·", "dim") if judged is None else ("✓", "green") if judged else ("✗", "red")
    say(Text.assemble("  ", (mark, style), " ", shorten(prompt_core(asked), room + 10)))
    if same and is_answered:
        say(Text.assemble(" " * 6, (shorten(got, room + 10), style)))
        return
    if is_answered:
        say(Text.assemble((" " * 6 + "expected  ", "dim"), shorten(expected, room)))
    say(Text.assemble((" " * 6 + "got       ", "dim"), (shorten(got, room) or "(nothing)", style)))


Update = Callable[..., None]
_live: list[Progress] = []  # the one display that may be at the foot of the terminal


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Update]:
    """Shows a bar while the block runs, and yields `update(done, note="", description=None, total=None)`.

    A bar within a bar shares its display. Without a terminal, or in a later process, nothing is shown.
    """
    if not is_live():
        yield lambda done, note="", description=None, total=None: None
        return
    with contextlib.nullcontext(_live[0]) if _live else _display() as display:
        task = display.add_task(printable(description), total=total, note="")

        def update(done: int, note: str = "", description: str | None = None, total: int | None = None) -> None:
            label = None if description is None else printable(description)
            display.update(task, completed=done, note=printable(note), description=label, total=total)

        try:
            yield update
        finally:
            display.remove_task(task)


def close_bars() -> None:
    """Ends the live display, if an error left one open, so that a message can be read."""
    while _live:
        _live.pop().stop()


@contextlib.contextmanager
def _display() -> Iterator[Progress]:
    # On a narrow terminal the bar shrinks and the numbers stay.
    columns = (
        TextColumn("{task.description:<10}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(max_width=24)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
    )
    display = Progress(*columns, console=screen(), transient=True, refresh_per_second=5)
    atexit.register(display.stop)  # gives the cursor back even after a crash
    _live.append(display)
    try:
        with display, _handlers_above(display.console):
            yield display
    finally:
        if display in _live:
            _live.remove(display)
        atexit.unregister(display.stop)


@contextlib.contextmanager
def _handlers_above(console: Console) -> Iterator[None]:
    """Lets log handlers that write to the terminal print above the bar instead of into it."""
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in logging.getLogger().handlers:
        stream = getattr(handler, "stream", None)
        if type(handler) is logging.StreamHandler and stream is not None and stream.isatty():
            handler.setStream(FileProxy(console, stream))
            moved.append((handler, stream))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
