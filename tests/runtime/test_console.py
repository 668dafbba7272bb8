"""What people read: complete, copyable, quiet where it should be."""

import contextlib
import io
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.runtime import console
from qlora.text import format_duration, format_metric, higher_is_better, prompt_core, shorten, wrap_command

LONG_PATH = "outputs/runs/" + "a-long-folder-name-" * 12 + "end"
COMMAND = f"qlora lora.r=16 adapter={LONG_PATH} task=evaluate"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response: "
)


def print_everything() -> None:
    console.start_screen([("model", "tiny: 3.0 M parameters"), ("folder", LONG_PATH), ("data", "many words " * 20)])
    console.summary(
        "finished",
        [("loss", 3.2144, 0.4123, ""), ("exact_match", 0.02, 0.9733, "95 %: 94.9 to 98.7 %")],
        [
            {
                "input": ALPACA.format("What is the second word?", "tea rice"),
                "prompt": "<s> cut",
                "reference": "rice",
                "prediction": "rice",
            },
            {
                "prompt": ALPACA.format("Reverse the list.", "a b"),
                "reference": "b a",
                "prediction": "a b",
                "match": False,
            },
        ],
        [("adapter", LONG_PATH)],
        [COMMAND],
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def standing_in(self) -> contextlib.AbstractContextManager[Any]:
        """Makes this the standard output."""
        return contextlib.redirect_stdout(self)


@pytest.fixture(params=[80, 120])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(request.param))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_paths_and_commands_stand_whole_on_one_line_where_it_is_wide_enough(capsys: pytest.CaptureFixture[str]) -> None:
    print_everything()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert f"  {COMMAND}" in printed.splitlines()
    assert printed.count(LONG_PATH) == 3
    assert "many words " * 19 in printed


def test_a_terminal_breaks_no_path_and_no_command(terminal: Terminal) -> None:
    with terminal.standing_in():
        print_everything()
    printed = terminal.getvalue()
    assert "\x1b[" in printed
    assert COMMAND in printed.replace(" \\\n    ", " ")
    assert printed.count(LONG_PATH) == 3


def test_a_command_that_is_too_long_breaks_between_its_words_and_runs_when_it_is_copied() -> None:
    command = shlex.join(["qlora", "chat", "outputs/runs/mine", "data.path='my rows.jsonl'", *["lora.r=16"] * 9])
    lines = wrap_command(command, 40)
    assert max(map(len, lines)) <= 46  # a word that is longer stands on a line of its own
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == shlex.split(command)


@pytest.mark.parametrize("width", [30, 80])
def test_what_is_printed_fits_80_columns_where_no_terminal_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width)) if width != 80 else monkeypatch.delenv("COLUMNS")
    console.say("many words " * 20)
    console.say_rows([("a label of some length", "many words " * 20), ("b", "x")])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_long_values_wrap_under_their_column_on_a_terminal(terminal: Terminal) -> None:
    with terminal.standing_in():
        console.say_rows([("data", "many words " * 20)])
    lines = terminal.getvalue().rstrip().splitlines()
    assert len(lines) > 1
    assert all(line.startswith(" " * 8) for line in lines[1:])


def test_the_end_shows_shares_in_percent_and_answers_with_their_mark(capsys: pytest.CaptureFixture[str]) -> None:
    print_everything()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["loss", "3.214", "→", "0.412"] for line in lines)
    assert "  exact match     2.0 % →  97.3 %   95 %: 94.9 to 98.7 %" in lines
    assert "  ✓ What is the second word? · tea rice" in lines
    wrong = lines.index("  ✗ Reverse the list. · a b")
    assert [line.split() for line in lines[wrong + 1 : wrong + 3]] == [["expected", "b", "a"], ["got", "a", "b"]]


def test_without_a_baseline_only_the_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console.summary("finished", [("loss", None, 0.5, "")], [], [], [])
    printed = capsys.readouterr().out
    assert "before" not in printed
    assert printed.split() == ["finished", "loss", "0.500"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_only_the_first_process_prints(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    print_everything()
    assert capsys.readouterr().out == ""


def test_brackets_in_answers_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("[bold]x[/bold] :smile: [1, 2]")
    assert capsys.readouterr().out == "[bold]x[/bold] :smile: [1, 2]\n"


def test_what_is_on_screen_goes_to_the_log_file_but_not_to_the_console_handler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="qlora"):
        console.start_screen([("model", "tiny")])
        logging.getLogger("qlora.data").info("own line")
        logging.getLogger("transformers").warning("chatter")
        logging.getLogger("transformers").error("trouble")
    assert "  model  tiny" in caplog.messages
    own_lines = [record.getMessage() for record in caplog.records if console.OwnLines().filter(record)]
    assert own_lines == ["own line", "trouble"]


def test_an_ascii_terminal_gets_ascii() -> None:
    code = "import test_console; test_console.print_everything()"
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert b"  + What is the second word? | tea rice" in done.stdout.splitlines()


def test_the_console_needs_no_torch() -> None:
    code = "import sys, qlora.runtime.console; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lines_and_log_records_stand_above_a_live_bar(terminal: Terminal) -> None:
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with terminal.standing_in(), console.progress("training", 10) as update:
            update(3, note="loss 1.5")
            console.say("a line")
            logging.getLogger("qlora.data").warning("a record")
        assert handler.stream is terminal
    finally:
        root.removeHandler(handler)
    printed = terminal.getvalue()
    for text in ("a line", "a record"):
        assert f"\x1b[2K{text}\n" in printed  # the bar's line is erased first
    assert printed.rstrip().endswith("\x1b[2K\x1b[?25h")  # and nothing of it stays


def test_the_cursor_is_shown_again_after_an_error_within_a_bar(terminal: Terminal) -> None:
    with pytest.raises(RuntimeError), terminal.standing_in(), console.progress("training", 10):
        raise RuntimeError
    printed = terminal.getvalue()
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l")
    with terminal.standing_in(), console.progress("again", 1):
        pass
    assert "again" in terminal.getvalue()


def test_a_display_that_an_error_left_open_can_be_closed(terminal: Terminal) -> None:
    with terminal.standing_in():
        left_open = contextlib.ExitStack()
        left_open.enter_context(console.progress("training", 10))
        console.close_bars()
        printed = terminal.getvalue()
        assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l")
        assert printed.endswith("\x1b[2K")
        with console.progress("next", 1) as update:
            left_open.close()
            update(1)
    assert "next" in terminal.getvalue()


def test_a_bar_within_a_bar_shares_its_display(terminal: Terminal) -> None:
    with terminal.standing_in(), console.progress("training", 10) as outer, console.progress("answering", 5) as inner:
        outer(1)
        inner(5)
    assert "answering" in terminal.getvalue()


def test_a_pipe_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("training", 10) as update:
        update(3, note="loss 1.5", description="evaluating")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompt", "core"),
    [
        (ALPACA.format("Add.", "1 2"), "Add. · 1 2"),
        ("### Human: Hi### Assistant: Hello### Human: Bye?### Assistant:", "Bye?"),
        ("\n\nHuman: How are you?\n\nAssistant:", "How are you?"),
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "Why?"),
        ("<s>[INST] Name a river. [/INST]", "Name a river."),
        ("Translate:\nthe user\ncame home", "Translate: the user came home"),
        ("", ""),
    ],
)
def test_a_prompt_is_shown_by_what_it_asks(prompt: str, core: str) -> None:
    assert prompt_core(prompt) == core


def test_shortened_text_keeps_both_ends_and_the_width() -> None:
    short = shorten("begin " + "x" * 500 + " end", 40)
    assert len(short) <= 40
    assert short.startswith("begin")
    assert short.endswith("end")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 1.23456, "1.235"),
        ("perplexity", 24.9, "24.90"),
        ("perplexity", 123456.0, "123,456"),
        ("loss", float("inf"), "inf"),
        ("eval_exact_match", 0.5, "50.0 %"),
        ("accuracy", 1.0, "100.0 %"),
        ("lm_eval_arc_easy_acc", 0.25, "25.0 %"),
        ("lm_eval_arc_easy_acc_norm", 0.25, "25.0 %"),
        ("lm_eval_gsm8k_exact_match_flexible_extract", 0.25, "25.0 %"),
        ("lm_eval_wikitext_word_perplexity", 0.25, "0.250"),
        ("train_mfu", 0.431, "43.1 %"),
        ("train_data_wait", 0.02, "2.0 %"),
        ("learning_rate", 2e-5, "2e-05"),
        ("loss", None, "–"),
        ("loss", 0.0, "0.000"),
    ],
)
def test_numbers_show_what_matters(name: str, value: float | None, text: str) -> None:
    assert format_metric(name, value) == text


def test_a_search_wants_more_speed_and_less_waiting() -> None:
    included, unwanted = ("train_mfu", "train_tokens_per_second"), ("train_data_wait", "train_runtime")
    assert [higher_is_better(name) for name in (*included, *unwanted)] == [True, True, False, False]


def test_durations_read_like_a_clock() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 41, 725, 11220)] == ["0:00", "0:41", "12:05", "3:07:00"]
