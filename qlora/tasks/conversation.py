"""A conversation and its commands, on the terminal or on plain input and output."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

from qlora.config.paths import expand_home
from qlora.errors import ConfigError, ResourceError, UserError, did_you_mean
from qlora.runtime import console

if TYPE_CHECKING:  # which import torch
    from qlora.data.chat.conversations import Message
    from qlora.tasks.chat_model import ChatModel, Reply

COMMANDS: Final = {
    "/help": ("", "this list"),
    "/reset": ("", "begin a new conversation; the system text stays"),
    "/system": ("[TEXT]", "put TEXT before the conversation; `/system none` takes it out, `/system` shows it"),
    "/base": ("", "let the untuned base answer, or the adapter again"),
    "/retry": ("", "answer the last question again"),
    "/save": ("FILE.jsonl", "add the conversation to a file that data=local can train on"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
"""Each command with what it takes and what it does."""
LEAVE: Final = ("exit", "quit", ":q", "/quit", "/q", "/bye")
"""What people type to leave, beside `/exit`; between quotes it is a message."""
QUOTE: Final = '"""'
HINT: Final = f"A line that ends in \\ continues, {QUOTE} opens and closes longer text, Ctrl-C stops an answer."


class Entered(NamedTuple):
    """What a person entered; `quoted` text is never a command."""

    text: str
    quoted: bool = False


class Place(NamedTuple):
    """Where a conversation was saved: a file, and the bytes [start, end) in it."""

    file: Path
    start: int
    end: int


class Chat:
    """A conversation and its commands; it reads no keyboard, so that a test can hold one.

    `show` writes parts of answers, `say` a line about the conversation.
    """

    def __init__(self, model: ChatModel, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        self.model, self.show, self.say = model, show, say
        self.system = ""
        self.turns: list[Message] = []
        """Questions and answers in turn; an answer follows every question."""
        self.first = 0
        """Where the part of the turns begins that fits into the model's context."""
        self.base = False
        """Whether the adapter is off."""
        self.ended = False
        self.replies: list[Reply] = []
        self.seconds = 0.0
        self.file: Path | None = None
        """The file that was saved to last."""
        self._saved: Place | None = None

    @property
    def prompt(self) -> str:
        """What asks for the next message, and says who answers it."""
        return "base> " if self.base else "> "

    def hear(self, entered: Entered) -> None:
        """Does a command or answers a message; raises a `UserError` where it cannot, and then nothing has changed."""
        if entered.text.strip().lower() in LEAVE and not entered.quoted:
            self._exit()
        elif entered.text.startswith("/") and not entered.quoted:
            self._do(*entered.text.split(None, 1))
        elif entered.text.strip():
            self._ask({"role": "user", "content": entered.text})

    def _ask(self, question: Message) -> bool:
        """Answers a question; returns whether anything was said."""
        prompt = self._fit(question)
        started = time.monotonic()
        reply = self.model.answer(prompt, self.show, base=self.base)
        self.seconds += time.monotonic() - started
        self.replies.append(reply)
        self.show("\n" if reply.text or reply.finish == "interrupted" else "(nothing)\n")
        if reply.finish == "interrupted" and not reply.text:
            self.say("stopped before the first word; the question is taken back")
            return False
        self.turns += [question, {"role": "assistant", "content": reply.text}]
        if reply.finish == "interrupted":
            self.say("stopped; what was said stays in the conversation")
        elif reply.finish == "length":
            self.say(f"cut off after {reply.tokens:,} tokens (generation.max_new_tokens, or the end of the context)")
        return True

    def _fit(self, question: Message) -> list[int]:
        """Returns the prompt; the oldest turns are left out of one that outgrows the model's context."""
        room, first = self.model.room, self.first
        while True:
            prompt = self._encode([*self.turns[first:], question])
            if room is None or len(prompt) <= room:
                break
            if first >= len(self.turns):
                raise ConfigError(
                    f"this message takes {len(prompt):,} tokens with its template, but the model's context of "
                    f"{self.model.context:,} has room for {room:,} before an answer; shorten it, or set a smaller "
                    "generation.max_new_tokens"
                )
            first += 2
        if first > self.first:
            self.say(f"the context is full: your oldest messages are left out ({first // 2:,} so far)")
        self.first = first
        return prompt

    def _encode(self, turns: list[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.model.encoder.encode_prompt([*system, *turns])

    # Commands

    def _do(self, name: str, argument: str = "") -> None:
        if name not in COMMANDS:
            raise UserError(
                f"there is no command {name}{did_you_mean(name, COMMANDS)}; /help lists them, and a message that "
                f"begins with / goes between {QUOTE} and {QUOTE}"
            )
        takes, _ = COMMANDS[name]
        if argument and not takes:
            raise UserError(f"{name} takes nothing behind it, got {argument!r}")
        getattr(self, f"_{name[1:]}")(*([argument] if takes else []))

    def _help(self) -> None:
        width = max(len(f"{name} {takes}") for name, (takes, _) in COMMANDS.items()) + 2
        for name, (takes, does) in COMMANDS.items():
            self.say(f"{f'{name} {takes}'.ljust(width)}{does}")
        self.say(HINT)

    def _reset(self) -> None:
        self.turns, self.first, self._saved = [], 0, None
        self.say("a new conversation" + ("; the system text stays" if self.system else ""))

    def _system(self, text: str) -> None:
        if not text:
            self.say(self.system or "there is no system text; /system TEXT sets one")
            return
        previous, self.system = self.system, "" if text == "none" else text
        try:
            self._encode([{"role": "user", "content": "?"}])
        except UserError as error:
            self.system = previous
            raise UserError(f"/system: this chat template has no place for a system text ({error})") from error
        self.say("the system text is set" if self.system else "there is no system text any more")

    def _base(self) -> None:
        if not self.model.has_adapter:
            raise UserError(
                "/base: there is no adapter to switch off; adapter=FOLDER of an adapter brings one, a fully finetuned "
                "model has none"
            )
        self.base = not self.base
        self.say(f"{'the untuned base' if self.base else 'the adapter'} answers from here on; /retry compares")

    def _retry(self) -> None:
        if not self.turns:
            raise UserError("/retry: nothing was asked yet")
        last, answered = self.turns[-2:], False
        del self.turns[-2:]
        self.first = min(self.first, len(self.turns))
        try:
            answered = self._ask(last[0])
        finally:
            if not answered:
                self.turns += last

    def _save(self, name: str) -> None:
        if not self.turns:
            raise UserError("/save: nothing was said yet")
        path = expand_home(name, "/save")
        if path.suffix != ".jsonl":
            raise UserError("/save adds the conversation as a line of JSON; name a file FILE.jsonl")
        system = [{"role": "system", "content": self.system}] if self.system else []
        line = json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False) + "\n"
        try:
            self._saved = _write_line(path, line.encode(), self._saved)
        except OSError as error:
            raise ResourceError(f"/save: {path} cannot be written ({error.strerror}); choose another file") from error
        self.file = path
        self.say(f"saved to {path}; train on it with data=local data.path={path}")

    def _exit(self) -> None:
        self.ended = True


def _write_line(path: Path, line: bytes, previous: Place | None) -> Place:
    """Adds a line to a file, or puts it in place of the file's last line where that is an earlier state of it."""
    with path.open("ab+") as file:
        start = file.seek(0, io.SEEK_END)
        if previous is not None and (previous.file, previous.end) == (path, start):
            start = file.truncate(previous.start)
        if start:
            file.seek(start - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        return Place(path, start, start + len(line))


# The terminal


def talk(chat: Chat, read: Callable[[str], str]) -> None:
    """Reads and answers until `/exit`, the end of the input, or Ctrl-C where a message would begin."""
    while not chat.ended:
        try:
            entered = read_message(read, chat.prompt)
        except (EOFError, KeyboardInterrupt):
            return
        try:
            chat.hear(entered)
        except UserError as error:
            chat.say(f"error: {error}")
        except KeyboardInterrupt:
            chat.say("stopped")


def read_message(read: Callable[[str], str], prompt: str) -> Entered:
    """Reads a message of one line or more; Ctrl-C in a later line gives up the message, the end of the input ends it.

    `read` shows a prompt and returns a line; it raises `EOFError` at the end of the input.
    """
    text = read(prompt)
    quoted = text.lstrip().startswith(QUOTE)
    if quoted:
        text = text.lstrip().removeprefix(QUOTE)
    try:
        while not text.rstrip().endswith(QUOTE) if quoted else text.endswith("\\"):
            text = f"{text if quoted else text[:-1]}\n{read('. ')}"
    except EOFError:
        text = text if quoted else text.removesuffix("\\")
    except KeyboardInterrupt:
        return Entered("")
    return Entered(text.rstrip().removesuffix(QUOTE).strip("\n"), True) if quoted else Entered(text.strip())


def is_terminal() -> bool:
    """Returns whether a person types and reads."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_line(prompt: str) -> str:
    """Asks for a line on a terminal, and takes the next one of a file or a pipe; raises `EOFError` at the end."""
    if is_terminal():
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()  # neither key ends the line
            raise
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def write(text: str) -> None:
    """Writes a part of an answer at once."""
    sys.stdout.write(console.printable(text))
    sys.stdout.flush()


def say(line: str) -> None:
    """Writes a line about the conversation, apart from what is said in it."""
    console.say(Text(line, style="dim"))


def run_chat(model: ChatModel) -> Chat:
    """Runs a conversation on standard input and output; returns it when it has ended."""
    chat = Chat(model, write, say)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if is_terminal():
        with contextlib.suppress(ImportError):  # not on every system; with it, `input` edits lines and knows the last
            import readline  # noqa: F401
        say(f"/help lists the commands, /exit leaves. {HINT}")
    talk(chat, read_line)
    return chat
