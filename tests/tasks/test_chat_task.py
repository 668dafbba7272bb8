"""`task=chat`: what a person sees, what goes to the model, and what stays of it."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.config.schema import DataConfig
from qlora.data.chat.templates import choose_saved_template
from qlora.data.formats.prompts import ALPACA
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from qlora.models.model_files import EMBEDDED
from qlora.run import Run
from qlora.tasks.chat_model import ChatModel, Reply, Stream
from qlora.tasks.conversation import Chat, Entered, read_message, talk

EXACT = ["quantization=fp32", "generation.max_new_tokens=12"]
QUESTION = "What is the opposite of brave?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter has learned a little, so that it answers otherwise than its base."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    steps = ["trainer.max_steps=30", "trainer.warmup_steps=1", "trainer.lr_scheduler_kwargs.num_decay_steps=2"]
    chosen = [*EXACT, *steps, "trainer.per_device_train_batch_size=8", "lora.r=8", "lora.dropout=0"]
    skipped = ["task.evaluate=false", "task.predict=false", "trainer.eval_steps=null", "data.max_train_samples=200"]
    Run(compose([*chosen, *skipped]), folder).execute()
    return folder


# The conversation, with a model that says what it is told to


class Told:
    """Stands for a model: each character of a message is a token, and what it answers is given beforehand."""

    context = 40
    has_adapter = True

    def __init__(self, *answers: str | BaseException, room: int | None = None) -> None:
        self.answers, self.room, self.prompts = list(answers), room, []
        self.encoder = SimpleNamespace(encode_prompt=self.encode)

    def encode(self, messages: list[dict[str, str]]) -> list[str]:
        if messages[0]["content"] == "refused":
            raise UserError("system is no role")
        return list("|".join(message["content"] for message in messages))

    def answer(self, prompt: list[str], show: Callable[[str], None], *, base: bool) -> Reply:
        self.prompts.append(("base: " if base else "") + "".join(prompt))
        said = self.answers.pop(0)
        if isinstance(said, BaseException):
            raise said
        text, _, finish = said.partition("/")
        show(text)
        return Reply(text, len(text), finish or "stop")


def converse(*entered: str, told: Told) -> tuple[Chat, str]:
    """Returns the chat and all that was shown after these messages and commands."""
    out = io.StringIO()
    chat = Chat(told, out.write, lambda line: print(f"[{line}]", file=out))  # type: ignore[arg-type]
    lines = iter(entered)

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    talk(chat, read)
    return chat, out.getvalue()


def test_the_conversation_is_asked_as_a_whole() -> None:
    told = Told("one", "two")
    chat, printed = converse("a", "b", told=told)
    assert told.prompts == ["a", "a|one|b"]
    assert [turn["content"] for turn in chat.turns] == ["a", "one", "b", "two"]
    assert printed == "one\ntwo\n"


def test_empty_lines_ask_nothing() -> None:
    told = Told()
    assert converse("", "  ", '""""""', told=told)[1] == ""


def test_reset_forgets_what_was_said_but_not_the_system_text() -> None:
    told = Told("one", "two")
    _, printed = converse("/system s", "a", "/reset", "b", told=told)
    assert told.prompts == ["s|a", "s|b"]
    assert "[a new conversation; the system text stays]" in printed


def test_a_system_text_is_set_shown_and_taken_out() -> None:
    told = Told("one")
    _, printed = converse("/system", "/system Be\\", "brief.", "/system", "/system none", "a", told=told)
    assert printed.splitlines() == [
        "[there is no system text; /system TEXT sets one]", "[the system text is set]", "[Be", "brief.]",
        "[there is no system text any more]", "one",
    ]  # fmt: skip
    assert told.prompts == ["a"]


def test_a_system_text_that_the_template_cannot_write_is_refused_and_not_kept() -> None:
    told = Told("one")
    _, printed = converse("/system refused", "a", told=told)
    assert "[error: /system: this chat template has no place for a system text (system is no role)]" in printed
    assert told.prompts == ["a"]


def test_the_base_answers_until_it_is_switched_back() -> None:
    told = Told("one", "two", "three")
    chat, printed = converse("a", "/base", "/retry", "/base", "b", told=told)
    assert told.prompts == ["a", "base: a", "a|two|b"]
    assert "[the untuned base answers from here on; /retry compares]" in printed
    assert "[the adapter answers from here on; /retry compares]" in printed
    assert chat.prompt == "> "
    chat.hear(Entered("/base"))
    assert chat.prompt == "base> "


def test_without_an_adapter_there_is_nothing_to_switch_off() -> None:
    told = Told()
    told.has_adapter = False
    chat, printed = converse("/base", told=told)
    assert printed.startswith("[error: /base: there is no adapter to switch off; ")
    assert not chat.base


def test_a_stopped_answer_stays_as_far_as_it_was_said() -> None:
    told = Told("on/interrupted", "two")
    _, printed = converse("a", "b", told=told)
    assert told.prompts[1] == "a|on|b"
    assert printed == "on\n[stopped; what was said stays in the conversation]\ntwo\n"


def test_a_question_that_was_stopped_before_the_first_word_is_taken_back() -> None:
    told = Told("/interrupted", "two", "/interrupted")
    chat, printed = converse("a", "b", "/retry", told=told)
    assert told.prompts == ["a", "b", "b"]
    assert [turn["content"] for turn in chat.turns] == ["b", "two"]
    assert "[stopped before the first word; the question is taken back]" in printed


def test_an_answer_that_was_cut_off_says_so() -> None:
    _, printed = converse("a", told=Told("one/length"))
    assert printed == "one\n[cut off after 3 tokens (generation.max_new_tokens, or the end of the context)]\n"
    assert converse("a", told=Told(""))[1] == "(nothing)\n"


def test_the_oldest_turns_give_way_in_pairs() -> None:
    told = Told("1", "2", "3", "4", room=9)
    chat, printed = converse("aaa", "bbb", "ccc", "d", told=told)
    assert told.prompts == ["aaa", "aaa|1|bbb", "bbb|2|ccc", "ccc|3|d"]
    assert "[the context is full: your oldest messages are left out (1 so far)]\n3\n" in printed
    assert len(chat.turns) == 8


def test_a_message_that_never_fits_is_refused_and_the_conversation_continues() -> None:
    told = Told("1", "2", room=9)
    _, printed = converse("aaa", "x" * 10, "bbb", told=told)
    assert (
        "[error: this message takes 10 tokens with its template, but the model's context of 40 has room for 9 before "
        "an answer; shorten it, or set a smaller generation.max_new_tokens]"
    ) in printed
    assert told.prompts == ["aaa", "aaa|1|bbb"]


def test_a_misspelt_command_is_corrected() -> None:
    _, printed = converse("/sav x", "/help me", "/retry", "/save", "/save a.txt", "/save a.jsonl", told=Told())
    assert printed.splitlines() == [
        '[error: there is no command /sav (did you mean /save?); /help lists them, and a message that begins with / '
        'goes between """ and """]',
        "[error: /help takes nothing behind it, got 'me']",
        "[error: /retry: nothing was asked yet]",
        *["[error: /save: nothing was said yet]"] * 3,
    ]  # fmt: skip


def test_help_names_every_command_and_exit_ends() -> None:
    chat, printed = converse("/help", "/exit", "a", told=Told())
    assert chat.ended
    for name in ("/help", "/reset", "/system", "/base", "/retry", "/save FILE.jsonl", "/exit", "Ctrl-C"):
        assert name in printed


@pytest.mark.parametrize("entered", ["exit", "EXIT ", "quit", "/quit", "/q", "/bye", ":q"])
def test_what_people_type_to_leave_leaves(entered: str) -> None:
    told = Told()
    assert converse(entered, "a", told=told)[0].ended
    assert not told.prompts
    told = Told("well")
    converse('"""exit"""', told=told)
    assert told.prompts == ["exit"]


def test_ctrl_c_outside_of_an_answer_ends_nothing() -> None:
    told = Told(KeyboardInterrupt(), "one")
    assert converse("a", "b", told=told)[1] == "[stopped]\none\n"


# Files


def test_a_saved_conversation_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    save = f"/save {path}"
    _, printed = converse(
        "/system s", "a", save, "b", save, "/reset", "/system none", "c", save, told=Told("1", "2", "3")
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    said = [[turn["content"] for turn in line["messages"]] for line in lines]
    assert said == [["s", "a", "1", "b", "2"], ["c", "3"]]
    assert f"[saved to {path}; train on it with data=local data.path={path}]" in printed
    data = build_data(DataConfig(name="mine", path=str(path), eval_dataset_size=1), tiny())
    assert data.report.format == "messages"


def test_saving_adds_to_a_file_and_never_replaces_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"messages": []}')
    chat, _ = converse("a", f"/save {path}", told=Told("1"))
    with path.open("a") as file:
        file.write("{}\n")
    chat.hear(Entered(f"/save {path}"))
    saved = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]}'
    assert path.read_text().splitlines() == ['{"messages": []}', saved, "{}", saved]
    assert chat.file == path


def test_a_file_is_named_jsonl_and_one_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    _, printed = converse("a", "/save a.txt", f"/save {tmp_path}/no/a.jsonl", told=Told("1"))
    assert "[error: /save adds the conversation as a line of JSON; name a file FILE.jsonl]" in printed
    assert f"[error: /save: {tmp_path}/no/a.jsonl cannot be written (No such file or directory); choose" in printed


# Messages of several lines


def lines_of(*lines: str | type[BaseException]) -> Callable[[str], str]:
    waiting = iter(lines)

    def read(prompt: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, type):
            raise line
        return line

    return read


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([" a "], Entered("a")),
        (["a\\", "b\\", "c"], Entered("a\nb\nc")),
        (["a\\"], Entered("a")),
        (['"""', "  a", "", "b", '"""'], Entered("  a\n\nb", True)),
        (['"""a"""'], Entered("a", True)),
        (['"""/a', 'b"""'], Entered("/a\nb", True)),
        (['"""a', "b"], Entered("a\nb", True)),
        (["a\\", KeyboardInterrupt], Entered("")),
        (['"""a', KeyboardInterrupt], Entered("")),
        (['"""pasted\nat once"""'], Entered("pasted\nat once", True)),
    ],
)
def test_a_message_of_several_lines(lines: list[Any], expected: Entered) -> None:
    assert read_message(lines_of(*lines), "> ") == expected


@pytest.mark.parametrize("ended", [EOFError, KeyboardInterrupt])
def test_where_a_message_would_begin_the_end_is_the_end(ended: type[BaseException]) -> None:
    with pytest.raises(ended):
        read_message(lines_of(ended), "> ")


def test_quoted_text_is_never_a_command() -> None:
    told = Told("one")
    converse('"""/exit"""', told=told)
    assert told.prompts == ["/exit"]


# The answer as it comes


def tiny() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"])


def stream(text: str, stop: str = "", *, end: bool = True) -> tuple[list[str], Reply]:
    """Returns what is shown, and the reply, when the tokens of a text come one by one."""
    tokenizer, printed = tiny(), list[str]()
    answer = Stream(tokenizer, [tokenizer.eos_token_id], stop, printed.append)
    answer.put(torch.tensor([[1, 5]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end:
        answer.put(torch.tensor([token]))
        if answer.stops:
            break
    answer.end()
    return printed, answer.close()


def test_tokens_are_shown_as_they_come() -> None:
    printed, reply = stream("The old hammer is brave.")
    assert len(printed) > 3
    assert "".join(printed) == "The old hammer is brave."
    assert reply.text == "The old hammer is brave."
    assert reply.finish == "stop"


def test_a_character_is_shown_whole() -> None:
    printed, reply = stream("naïve ☕ 日本")
    assert "".join(printed) == reply.text == "naïve ☕ 日本"
    assert "\ufffd" not in "".join(printed)


def test_an_answer_ends_where_the_next_question_would_begin() -> None:
    printed, reply = stream("brave## not yet ### Human: why", stop="### Human:")
    assert "".join(printed) == reply.text == "brave## not yet"
    assert reply.finish == "stop"


def test_an_end_token_that_the_model_spells_ends_the_answer_and_is_not_shown() -> None:
    tokenizer, printed = tiny(), list[str]()
    spelled = tokenizer("The end.</s> of it", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    answer = Stream(tokenizer, [tokenizer.eos_token_id], "", printed.append)
    for token in spelled:
        answer.take([token])
        if answer.stops:
            break
    reply = answer.close()
    assert "".join(printed) == reply.text == "The end."
    assert reply.finish == "stop"
    assert len(answer.ids) < len(spelled)


def test_an_answer_without_an_end_was_cut_off() -> None:
    printed, reply = stream("brave ###", stop="### Human:", end=False)
    assert "".join(printed) == reply.text == "brave ###"
    assert reply.finish == "length"


# The model


def chat_run(folder: Path, *overrides: str) -> Run:
    return Run(compose(["task=chat", *EXACT, *overrides]), folder)


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    run = chat_run(tmp_path_factory.mktemp("model"), f"adapter={trained}")
    session, device = run.session, run.session.placement
    return ChatModel(
        session.load_trained(),
        session.chat_encoder,
        run.config.generation,
        session.pad_token_id,
        device.device,
        device.autocast,
    )


def message_of(prompt: str) -> str:
    """Returns what a person types to ask what a row asked."""
    prefix = ALPACA.prefix if prompt.startswith(ALPACA.prefix) else ALPACA.prefix_both
    return prompt.removeprefix(prefix).removesuffix(ALPACA.behind)


@pytest.mark.full
def test_chat_answers_as_predict_does(trained: Path, model: ChatModel, tmp_path: Path) -> None:
    options = ["task=predict", *EXACT, f"adapter={trained}", "data.max_eval_samples=12", "evaluation=loss"]
    predicted = Run(compose(options), tmp_path / "predicted")
    lines = Path(predicted.execute()["paths"]["predictions"]).read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len({answer["prediction"] for answer in answers}) > 1
    for row, answer in zip(predicted.session.data.eval.to_list(), answers, strict=True):
        prompt = model.encoder.encode_prompt([{"role": "user", "content": message_of(row["prompt"])}])
        reply = model.answer(prompt, lambda text: None)
        assert (reply.text, reply.finish, reply.tokens) == (
            answer["prediction"], answer["finish"], answer["answer_tokens"],
        )  # fmt: skip


def test_the_base_answers_without_its_adapter_and_the_adapter_comes_back(model: ChatModel) -> None:
    prompt = model.encoder.encode_prompt([{"role": "user", "content": QUESTION}])
    first, base, again = (model.answer(prompt, lambda text: None, base=base) for base in (False, True, False))
    assert first == again != base


def test_beams_are_shown_at_their_end(model: ChatModel) -> None:
    printed: list[str] = []
    settings = compose([*EXACT, "generation.num_beams=2"]).generation
    reply = replace(model, generation=settings).answer(
        model.encoder.encode_prompt([{"role": "user", "content": QUESTION}]), printed.append
    )
    assert printed == [reply.text]


def test_an_answer_never_outgrows_the_context(model: ChatModel) -> None:
    settings = compose([*EXACT, "generation.max_new_tokens=500", "generation.min_new_tokens=490"]).generation
    long = replace(model, generation=settings)
    assert (long.context, long.room) == (512, 256)
    assert model.room == 500
    reply = long.answer([5] * 505, lambda text: None)
    assert (reply.tokens, reply.finish) == (7, "length")


def test_chat_needs_no_rows_and_speaks_without_a_terminal(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora.session.build_data", lambda *_, **__: pytest.fail("rows are read"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n/base\n/retry\n/save {tmp_path}/mine.jsonl\n"))
    run = chat_run(tmp_path / "chat", f"adapter={trained}", "data=alpaca")
    result = run.execute()
    assert not (tmp_path / "chat").exists()
    assert {key: result[key] for key in ("status", "task", "objective")} == {
        "status": "finished", "task": "chat", "objective": None,
    }  # fmt: skip
    assert result["paths"] == {"conversation": f"{tmp_path}/mine.jsonl"}
    assert result["metrics"]["chat_answers"] == 2
    printed = capsys.readouterr().out
    assert "saved by the training run" in printed
    answers = printed.split("\n\n", 1)[1].splitlines()
    assert answers[1] == "the untuned base answers from here on; /retry compares"
    assert answers[0] != answers[2]
    assert not [line for line in answers if line.startswith(">")]


def test_the_untuned_base_can_be_talked_to_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/base\nHello\n"))
    chat_run(tmp_path, "adapter=none").execute()
    printed = capsys.readouterr().out
    assert re.search(r"template +guanaco", printed)
    assert "error: /base: there is no adapter to switch off" in printed


def test_the_template_saved_by_the_training_goes_before_the_base_s_own() -> None:
    here, saved = tiny(), tiny()
    here.chat_template, saved.chat_template = "the base's own", "as trained"
    assert choose_saved_template(saved, here, "auto") == ("saved by the training run", "as trained")
    saved.chat_template = None
    assert choose_saved_template(saved, here, "auto") == ("the tokenizer's own", "the base's own")
    assert choose_saved_template(None, here, "plain").name == "plain"


def test_an_answer_of_the_model_stops_at_the_next_question(model: ChatModel) -> None:
    prompt = model.encoder.encode_prompt([{"role": "user", "content": QUESTION}])
    endless = replace(model, generation=compose([*EXACT, "generation.min_new_tokens=12"]).generation)
    whole = endless.answer(prompt, lambda text: None)
    word = whole.text.split()[3]
    writer = SimpleNamespace(stop_text=word)
    encoder: Any = SimpleNamespace(base=model.encoder.base, writer=writer)
    printed: list[str] = []
    reply = replace(endless, encoder=encoder).answer(prompt, printed.append)
    assert "".join(printed) == reply.text == whole.text.split(word)[0].strip()
    assert reply.finish == "stop"
    assert reply.tokens < whole.tokens == 12


def test_an_adapter_carries_the_template_of_its_training(trained: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    rows = Run(compose(["task=predict", "adapter=none", "data.max_eval_samples=12"]), tmp_path).session.data.eval
    for row in rows.to_list():
        said = [{"role": "user", "content": message_of(row["prompt"])}]
        sent = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert sent == row["prompt_ids"]


@pytest.mark.full
def test_a_fully_finetuned_model_carries_it_too_and_has_no_adapter_to_switch_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["trainer.max_steps=1", "trainer.warmup_steps=0", "trainer.lr_scheduler_kwargs.num_decay_steps=1"]
    skipped = ["task.evaluate=false", "task.predict=false", "trainer.eval_steps=null", "data.max_train_samples=16"]
    Run(compose(["lora=none", *EXACT, *steps, *skipped]), tmp_path / "full").execute()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/base\n{QUESTION}\n"))
    result = chat_run(tmp_path / "chat", "lora=none", f"adapter={tmp_path / 'full'}").execute()
    printed = capsys.readouterr().out
    assert re.search(r"template +saved by the training run", printed)
    assert "error: /base: there is no adapter to switch off" in printed
    assert result["metrics"]["chat_answers"] == 1


@pytest.mark.full
def test_new_tokens_come_with_the_tokenizer_of_the_adapter(tmp_path: Path) -> None:
    folder, new = tmp_path / "run", 'model.new_tokens=["<call>"]'
    steps = ["trainer.max_steps=2", "trainer.warmup_steps=0", "trainer.lr_scheduler_kwargs.num_decay_steps=1"]
    few = ["data.max_train_samples=16", "data.max_eval_samples=4", "evaluation=loss", "evaluation.baseline=false"]
    chosen = [*EXACT, *few]
    Run(compose([*chosen, *steps, new, "trainer.eval_steps=null", "task.predict=false"]), folder).execute()
    expected = json.loads((folder / "metrics.json").read_text())["eval_loss"]

    def measure(*overrides: str) -> float:
        options = [*chosen, "task=evaluate", f"adapter={folder}", *overrides]
        return Run(compose(options), tmp_path / "evaluated").execute()["metrics"]["eval_loss"]

    assert measure() == pytest.approx(expected, rel=1e-5)
    without = "model.new_tokens=[]"
    assert measure(without, f"model.tokenizer={folder}/adapter") == pytest.approx(expected, rel=1e-5)
    for task in ("evaluate", "predict", "chat"):
        with pytest.raises(UserError, match=r"token '<call>' is 1570 there and missing here; give the base"):
            Run(compose([*chosen, f"task={task}", f"adapter={folder}", without]), tmp_path / task).execute()


# A person at a terminal

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A pseudo-terminal in which `python -m qlora` runs, and what a person has seen there."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.raw, self.read_to = b"", 0
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
            os.execve(sys.executable, [sys.executable, "-m", "qlora", *overrides], environment)

    @property
    def seen(self) -> str:
        return ESCAPES.sub("", self.raw.decode(errors="replace"))

    def _read(self, seconds: float) -> bool:
        if not select.select([self.screen], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.screen, 2**16)
        except OSError:  # the program has ended
            return False
        self.raw += data
        return bool(data)

    def expect(self, text: str, seconds: float = 240) -> str:
        """Waits for a text behind what was waited for before; returns what came up to its end."""
        until = time.monotonic() + seconds
        while text not in self.seen[self.read_to :]:
            assert self._read(until - time.monotonic()), f"{text!r} did not come:\n{self.seen}"
        start, self.read_to = self.read_to, self.seen.index(text, self.read_to) + len(text)
        return self.seen[start : self.read_to]

    def type(self, text: str, then: str) -> str:
        os.write(self.screen, text.encode())
        return self.expect(then)

    def ask(self, line: str, prompt: str = "\n> ") -> str:
        """Types a line and returns what comes between it and the next prompt."""
        self.type(f"{line}\n", f"{line}\n")
        return self.expect(prompt).removesuffix(prompt)

    def interrupt(self, prompt: str) -> None:
        """Presses Ctrl-C, and after 20 s once more: readline misses one between its prompt and its wait for a key."""
        os.write(self.screen, b"\x03")
        until = time.monotonic() + 20
        while prompt not in self.seen[self.read_to :] and self._read(until - time.monotonic()):
            pass
        if prompt not in self.seen[self.read_to :]:
            os.write(self.screen, b"\x03")
        self.expect(prompt)

    def wait(self) -> int:
        while self._read(60):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(trained: Path, tmp_path: Path) -> Iterator[Terminal]:
    overrides = ["generation.max_new_tokens=200", "generation.min_new_tokens=200", "quantization=fp32"]
    opened = Terminal(tmp_path, "task=chat", f"adapter={trained}", "hydra.run.dir=out", *overrides)
    yield opened
    os.close(opened.screen)


@pytest.mark.full
def test_a_person_talks_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    start = terminal.expect("\n> ")
    assert "adapter   " in start
    assert "/help lists the commands, /exit leaves." in start
    answer = terminal.ask(QUESTION)
    assert "cut off after 200 tokens" in answer
    assert terminal.ask("/base", "\nbase> ") == "the untuned base answers from here on; /retry compares"
    assert terminal.ask("/retry", "\nbase> ") != answer
    assert terminal.ask("/base") == "the adapter answers from here on; /retry compares"
    assert terminal.ask("/sav") == (
        'error: there is no command /sav (did you mean /save?); /help lists them, and a message that begins with / '
        'goes between """ and """'
    )  # fmt: skip
    terminal.ask("/reset")
    terminal.type("What category does this\\\n", "\n. ")
    terminal.type("word belong to?\n", "\n")
    printed = terminal.type("", " ")  # the first word
    stopped = terminal.type("\x03", "\n> ")
    assert "stopped; what was said stays in the conversation" in stopped
    assert terminal.ask("/save mine.jsonl").startswith("saved to mine.jsonl; train on it with data=local")
    [question, answered] = json.loads((tmp_path / "mine.jsonl").read_text())["messages"]
    assert question == {"role": "user", "content": "What category does this\nword belong to?"}
    assert answered["content"]
    assert answered["content"].startswith(printed.strip())
    assert len(answered["content"].split()) < 180
    assert terminal.ask("/reset") == "a new conversation"
    terminal.type("half a message\\\n", "\n. ")
    terminal.interrupt("\n> ")  # gives it up
    os.write(terminal.screen, b"\x04")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.seen
    assert not (tmp_path / "out").exists()
