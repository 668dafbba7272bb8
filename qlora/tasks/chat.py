"""`task=chat`: a conversation in the terminal, with what was trained or with the untuned base beneath it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from peft import PeftModel
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora.adapters import adapter_off
from qlora.config.paths import expand_home
from qlora.config.schema import GenerationConfig
from qlora.data.batching.row_encoder import RowEncoder
from qlora.data.chat.conversations import Message
from qlora.data.chat.templates import Template, choose_template
from qlora.errors import ConfigError, UserError, did_you_mean
from qlora.evaluation.generation import build_settings, community_code, end_token_ids, left_pad, own_settings_aside
from qlora.evaluation.measure import evaluation_mode
from qlora.runtime import console

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
QUOTE: Final = '"""'
HINT: Final = f"A line that ends in \\ goes on, {QUOTE} opens and closes longer text, Ctrl-C stops an answer."


class Reply(NamedTuple):
    """An answer: its text, its tokens, and whether it came to its end, to the limit, or to Ctrl-C."""

    text: str
    tokens: int
    finish: str
    """`stop`, `length` or `interrupted`."""


class Stream(BaseStreamer):
    """Takes an answer's tokens as they come and shows their text, but for an end that the next token may change."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], stop_text: str, show: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.end_ids, self.stop_text, self.show = tokenizer, end_ids, stop_text, show
        self.ids: list[int] = []
        self.shown = ""
        self._spoken = ""
        self._asked = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the tokens of a step; the first call brings the prompt."""
        if self._asked:
            self.take(value.flatten().tolist())
        self._asked = True

    def end(self) -> None:
        """Does nothing: `close` shows the rest, after an interruption too."""

    def take(self, ids: list[int]) -> None:
        """Adds tokens and shows what they settle."""
        self.ids += ids[: next((place + 1 for place, token in enumerate(ids) if token in self.end_ids), None)]
        self._spoken = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        settled = self.text.rstrip("\ufffd")  # half a character
        begun = (size for size in range(len(self.stop_text), 0, -1) if settled.endswith(self.stop_text[:size]))
        self._show(settled[: len(settled) - next(begun, 0)].rstrip())

    def close(self, *, interrupted: bool = False) -> Reply:
        """Shows the rest and returns the answer."""
        self._show(self.text)
        tokens = len(self.ids) - self._ended
        return Reply(self.text, tokens, "interrupted" if interrupted else "stop" if self.stops else "length")

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text

    @property
    def text(self) -> str:
        """What was said, up to the text that opens the next question."""
        said = self._spoken.split(self.stop_text)[0] if self.stop_text else self._spoken
        return said.strip()

    @property
    def stops(self) -> bool:
        """Whether the answer has come to its end."""
        return self._ended or (bool(self.stop_text) and self.stop_text in self._spoken)

    @property
    def _ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.end_ids


@dataclass(frozen=True)
class ChatModel:
    """A model that answers one prompt at a time."""

    model: PreTrainedModel | PeftModel
    encoder: RowEncoder
    generation: GenerationConfig
    pad_token_id: int
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[None]]

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be switched off."""
        return isinstance(self.model, PeftModel)

    @cached_property
    def context(self) -> int | None:
        """The most tokens that the model takes, prompt and answer together; None: it names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def room(self) -> int | None:
        """The longest prompt in tokens: what an answer of `generation.max_new_tokens` leaves, at least half."""
        if self.context is None:
            return None
        return max(self.context - self.generation.max_new_tokens, self.context // 2)

    def answer(self, prompt: list[int], show: Callable[[str], None], *, base: bool = False) -> Reply:
        """Returns the answer to a prompt (token ids) and shows it as it comes; Ctrl-C ends it early.

        `base` switches the adapter off. Beams are known at their end only, so what they find is shown at once.
        """
        config, model, tokenizer = self.generation, self.model, self.encoder.base
        stream = Stream(tokenizer, end_token_ids(model, tokenizer), self.encoder.writer.stop_text, show)
        settings = build_settings(config, pad_token_id=self.pad_token_id, end_ids=list(stream.end_ids))
        if self.context is not None:
            settings.max_new_tokens = min(config.max_new_tokens, self.context - len(prompt))
            settings.min_new_tokens = min(config.min_new_tokens or 0, settings.max_new_tokens) or None
        options: dict[str, Any] = community_code(config)
        as_it_comes = config.num_beams == 1 and not options
        if as_it_comes:
            options = {"streamer": stream, "stopping_criteria": StoppingCriteriaList([_stops(stream)])}
        inputs = left_pad([prompt], self.pad_token_id, self.device)
        try:
            switch = adapter_off(model) if base else contextlib.nullcontext()
            with switch, torch.inference_mode(), evaluation_mode(model), self.autocast(), own_settings_aside(model):
                output = model.generate(**inputs, generation_config=settings, **options)
            if not as_it_comes:
                stream.take(output[0, len(prompt) :].tolist())
        except KeyboardInterrupt:
            return stream.close(interrupted=True)
        return stream.close()


def _stops(stream: Stream) -> Callable[..., torch.Tensor]:
    def stopped(input_ids: torch.Tensor, scores: Any, **unread: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stream.stops, device=input_ids.device)

    return stopped


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

    def __init__(self, speaker: ChatModel, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        self.speaker, self.show, self.say = speaker, show, say
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
        """Does a command or answers a message; raises `ConfigError` where it cannot, and then nothing has changed."""
        if entered.text.startswith("/") and not entered.quoted:
            self._do(*entered.text.split(None, 1))
        elif entered.text.strip():
            self._ask({"role": "user", "content": entered.text})

    def _ask(self, question: Message) -> bool:
        """Answers a question; returns whether anything was said."""
        prompt = self._fit(question)
        started = time.monotonic()
        reply = self.speaker.answer(prompt, self.show, base=self.base)
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
        room, first = self.speaker.room, self.first
        while True:
            prompt = self._encode([*self.turns[first:], question])
            if room is None or len(prompt) <= room:
                break
            if first >= len(self.turns):
                raise ConfigError(
                    f"this message takes {len(prompt):,} tokens with its template, but the model's context of "
                    f"{self.speaker.context:,} has room for {room:,} before an answer; shorten it, or set a smaller "
                    "generation.max_new_tokens"
                )
            first += 2
        if first > self.first:
            self.say(f"the context is full: your oldest messages are left out ({first // 2:,} so far)")
        self.first = first
        return prompt

    def _encode(self, turns: list[Message]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.speaker.encoder.encode_prompt([*system, *turns])

    # Commands

    def _do(self, name: str, argument: str = "") -> None:
        if name not in COMMANDS:
            raise ConfigError(
                f"there is no command {name}{did_you_mean(name, COMMANDS)}; /help lists them, and a message that "
                f"begins with / goes between {QUOTE} and {QUOTE}"
            )
        takes, _ = COMMANDS[name]
        if argument and not takes:
            raise ConfigError(f"{name} takes nothing behind it, got {argument!r}")
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
        before, self.system = self.system, "" if text == "none" else text
        try:
            self._encode([{"role": "user", "content": "?"}])
        except UserError as error:
            self.system = before
            raise ConfigError(f"/system: this chat template has no place for a system text ({error})") from error
        self.say("the system text is set" if self.system else "there is no system text any more")

    def _base(self) -> None:
        if not self.speaker.has_adapter:
            raise ConfigError(
                "/base: there is no adapter to switch off; adapter=FOLDER of an adapter brings one, a fully finetuned "
                "model has none"
            )
        self.base = not self.base
        self.say(f"{'the untuned base' if self.base else 'the adapter'} answers from here on; /retry compares")

    def _retry(self) -> None:
        if not self.turns:
            raise ConfigError("/retry: nothing was asked yet")
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
            raise ConfigError("/save: nothing was said yet")
        path = expand_home(name, "/save")
        if path.suffix != ".jsonl":
            raise ConfigError("/save adds the conversation as a line of JSON; name a file FILE.jsonl")
        system = [{"role": "system", "content": self.system}] if self.system else []
        line = json.dumps({"messages": [*system, *self.turns]}, ensure_ascii=False) + "\n"
        try:
            self._saved = _write_line(path, line.encode(), self._saved)
        except OSError as error:
            raise ConfigError(f"/save: {path} cannot be written ({error.strerror}); choose another file") from error
        self.file = path
        self.say(f"saved to {path}; train on it with data=local data.path={path}")

    def _exit(self) -> None:
        self.ended = True


def _write_line(path: Path, line: bytes, before: Place | None) -> Place:
    """Adds a line to a file, or puts it in place of the file's last line where that is an earlier state of it."""
    with path.open("ab+") as file:
        start = file.seek(0, io.SEEK_END)
        if before is not None and (before.file, before.end) == (path, start):
            start = file.truncate(before.start)
        if start:
            file.seek(start - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        return Place(path, start, start + len(line))


def choose_saved_template(
    saved: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase, name: str
) -> Template:
    """Returns the template that a training saved; where it saved none, what `data.template` means for the tokenizer."""
    if saved is not None and saved.chat_template:
        return choose_template("auto", saved)._replace(name="saved by the training")
    return choose_template(name, tokenizer)


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


def hold(speaker: ChatModel) -> Chat:
    """Holds a conversation on standard input and output; returns it when it has ended."""
    chat = Chat(speaker, write, say)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if is_terminal():
        with contextlib.suppress(ImportError):  # not on every system; with it, `input` edits lines and knows the last
            import readline  # noqa: F401
        say(f"/help lists the commands, /exit leaves. {HINT}")
    talk(chat, read_line)
    return chat
