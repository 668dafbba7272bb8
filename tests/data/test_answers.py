"""What becomes of an answer without text, in every form of rows, by `data.on_empty`; Alpaca's system and history."""

import json
import logging

import pytest

from qlora.config.schema import OnEmpty, OnTooLong, TrainOn
from qlora.data.formats.prompts import ALPACA
from qlora.data.formats.renderers import FORMATS
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

USER = {"role": "user", "content": "q"}
ROWS = {
    "alpaca": lambda text: {"instruction": "q", "output": text},
    "input-output": lambda text: {"input": "q", "output": text},
    "prompt-completion": lambda text: {"prompt": "q", "completion": text},
    "question-answer": lambda text: {"question": "q", "answer": text},
    "chosen": lambda text: {"prompt": "q", "chosen": text},
    "segments": lambda text: {"source": "q", "target": text or ""},
    "text": lambda text: {"text": text},
    "messages": lambda text: {"messages": [USER, {"role": "assistant", "content": text}]},
    "conversations": lambda text: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]},
    "inst": lambda text: {"text": f"<s>[INST] q [/INST] {text or ''} </s>"},
    "human-bot": lambda text: {"text": f"<human>: q\n<bot>: {text or ''}"},
    "turns": lambda text: {"prompt": [USER], "completion": [{"role": "assistant", "content": text}]},
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def trained(row):
    """Decodes what the loss counts, the end token as a full stop."""
    return "".join("." if label == 2 else chr(label - 3) for label in row["labels"] if label != -100)


def build(make_config, tokenizer, rows, **changes):
    """Trains and measures on all rows of a file."""
    config = make_config(rows, **({"template": "plain"} | changes))
    config.eval_path = config.path
    return build_data(config, tokenizer)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("empty", ["", "   ", "\n\t", None])
def test_a_row_whose_answer_is_empty_is_dropped_counted_and_said(name, empty, tokenizer, make_config, caplog):
    rows = [ROWS[name](text) for text in ("a", empty, "b", empty)]
    caplog.set_level(logging.INFO)
    data = build(make_config, tokenizer, rows)
    assert [[trained(row) for row in part] for part in (data.train, data.eval)] == [["a.", "b."]] * 2
    report = data.report
    assert (report.empty_rows, report.eval_empty_rows, report.lost_rows, report.eval_lost_rows) == (2, 2, 2, 2)
    assert "toy: of 4 rows: 2 rows dropped, their answers are empty (data.on_empty=drop)" in caplog.messages
    assert "toy: of 4 held-out rows: 2 dropped, their answers are empty (data.on_empty=drop)" in caplog.messages
    assert "toy: 4 answers are empty and are not trained (data.on_empty=drop)" in caplog.messages


@pytest.mark.parametrize("name", ROWS)
def test_the_end_token_of_an_empty_answer_is_trained_where_asked_for(name, tokenizer, make_config, caplog):
    rows = [ROWS[name](text) for text in ("a", "", "b")]
    data = build(make_config, tokenizer, rows, on_empty=OnEmpty.train)
    assert [trained(row) for row in data.train] == ["a.", ".", "b."]
    assert (data.report.empty_rows, data.report.empty_answers, data.report.stopping_rows) == (0, 2, 3)
    assert "toy: 2 answers are empty and are trained, an end token alone (data.on_empty=train)" in caplog.messages


@pytest.mark.parametrize("name", ROWS)
def test_an_empty_answer_stops_the_run_where_asked_for(name, tokenizer, make_config):
    with pytest.raises(
        UserError, match=r"row 2: .* (is empty|is an empty answer) \(data\.on_empty=error\); write one, "
    ):
        build(make_config, tokenizer, [ROWS[name]("a"), ROWS[name](" ")], on_empty=OnEmpty.error)


def say(*texts, **keys):
    turns = [turn for text in texts for turn in (USER, {"role": "assistant", "content": text, **keys})]
    return {"messages": turns}


@pytest.mark.parametrize("template", ["plain", "guanaco", "vicuna", "zephyr", "llama-2", "mistral", "alpaca"])
@pytest.mark.parametrize(("on_empty", "expected"), [("drop", ["a.b.", "b.", "a."]), ("train", ["a..b.", ".b.", "a.."])])
def test_an_empty_turn_of_a_chat_is_counted(template, on_empty, expected, tokenizer, make_config):
    rows = [say("a", "", "b"), say(" ", "b"), say("a", None), say("", "")]
    data = build(make_config, tokenizer, rows, template=template, on_empty=OnEmpty(on_empty))
    said = [trained(row).replace(" ", "").replace("\n", "") for row in data.train]
    assert said == [*expected, *([".."] if on_empty == "train" else [])]
    assert data.report.empty_rows == (1 if on_empty == "drop" else 0)
    assert data.report.empty_answers == 2 * (3 if on_empty == "drop" else 5)


def test_a_turn_that_calls_or_is_switched_off_is_no_empty_answer(tokenizer, make_config):
    calls = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    rows = [calls, say("", train=False), say("a")]
    report = build(make_config, tokenizer, rows, template="guanaco", on_empty=OnEmpty.error).report
    assert (report.train_rows, report.dropped_rows, report.empty_rows) == (2, 1, 0)


def test_an_earlier_answer_does_not_take_the_place_of_an_empty_last_one(tokenizer, make_config):
    data = build(make_config, tokenizer, [say("a", ""), say("", "b")], train_on=TrainOn.last)
    assert [trained(row) for row in data.train] == ["b."]
    assert (data.report.empty_rows, data.report.empty_answers) == (1, 0)


@pytest.mark.parametrize("name", ["alpaca", "text", "messages"])
def test_a_row_with_an_empty_answer_is_dropped_where_all_is_trained(name, tokenizer, make_config):
    data = build(make_config, tokenizer, [ROWS[name]("a"), ROWS[name]("")], train_on=TrainOn.all)
    assert (len(data.train), data.report.empty_rows) == (1, 1)


def test_rows_that_are_all_empty_name_the_way_out_and_it_works(tokenizer, make_config):
    rows = [{"input": f"q{i}", "output": " "} for i in range(3)]
    with pytest.raises(UserError) as caught:
        build(make_config, tokenizer, rows)
    assert str(caught.value).endswith(
        "none of the 3 rows has a token to train on: 3 with empty answers (check which column holds the answers, or "
        "set data.on_empty=train)"
    )
    assert build(make_config, tokenizer, rows, on_empty=OnEmpty.train).report.train_rows == 3


def test_a_held_out_row_that_is_empty_is_said_to_be_held_out(tokenizer, make_config, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"input": "q", "output": ""}')
    with pytest.raises(UserError) as caught:
        build_data(make_config([{"input": "q", "output": "a"}], eval_path=str(held_out)), tokenizer)
    assert f"data.eval_path={held_out}: none of the 1 held-out rows has a token to measure: 1 with empty" in str(
        caught.value
    )


def test_the_only_held_out_row_that_is_dropped_names_ways_out_that_work(tokenizer, make_config):
    rows = [{"input": f"q{i}", "output": "" if i % 2 else "a"} for i in range(6)]
    said = {}
    for seed in range(8):
        try:
            build_data(make_config(rows, eval_dataset_size=1, split_seed=seed), tokenizer)
        except UserError as error:
            said[seed] = str(error)
    assert 0 < len(said) < 8  # another data.split_seed helps
    for seed, sentence in said.items():
        assert "none of the 1 held-out rows has a token to measure: 1 with empty answers" in sentence
        assert sentence.endswith(
            "; hold out another number of rows with data.eval_dataset_size (0: none), or draw others with "
            "data.split_seed"
        )
        build_data(make_config(rows, eval_dataset_size=4, split_seed=seed), tokenizer)


OPEN = {
    "guanaco": {"text": "### Human: q### Assistant:"},
    "guanaco, later": {"text": "### Human: q### Assistant: a### Human: r### Assistant: "},
    "hh-rlhf": {"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "x"},
    "prompt": {"prompt": "Why? ", "chosen": "Why? ", "rejected": "x"},
}


@pytest.mark.parametrize("name", OPEN)
def test_a_whole_text_that_ends_where_its_answer_would_begin_has_an_empty_answer(name, tokenizer, make_config):
    rows = [OPEN[name], {key: f"{text} b" for key, text in OPEN[name].items() if key != "prompt"}]
    report = build(make_config, tokenizer, rows).report
    assert (report.train_rows, report.empty_rows, report.eval_empty_rows) == (1, 1, 1)
    data = build(make_config, tokenizer, rows, on_empty=OnEmpty.train)
    assert trained(data.train[0]) == "."
    with pytest.raises(UserError, match="row 1: the answer is empty"):
        build(make_config, tokenizer, rows, on_empty=OnEmpty.error)


def test_an_open_answer_of_guanaco_s_turns_is_counted(tokenizer, make_config):
    rows = [{"text": f"### Human: q### Assistant: a### Human: r### Assistant:{text}"} for text in ("", " b")]
    data = build(make_config, tokenizer, rows, format="guanaco")
    assert ([trained(row) for row in data.train], data.report.empty_answers) == (["a.", "a.b."], 2)


# Every row is counted, the held-out ones too


@pytest.mark.parametrize("size", [7, 11, 15])
def test_rows_read_are_rows_trained_held_out_and_lost(size, tokenizer, make_config):
    long, bad = "w" * 60, {"label": False}
    rows = [{"prompt": "q", "completion": text} for text in ("a", "", "b", long, "c", long, "d", " ", "e", "f")]
    rows += [{"prompt": "q", "completion": "x"} | bad, {"prompt": "r", "completion": "y"} | bad]
    rows += [{"prompt": f"p{number}", "completion": "a"} for number in range(10)]
    rows = [{"label": True} | row for row in rows]
    for seed in range(6):
        config = make_config(rows, eval_dataset_size=size, max_length=20, on_too_long=OnTooLong.drop, split_seed=seed)
        report = build_data(config, tokenizer).report
        assert report.train_rows + report.lost_rows == len(rows) - size
        assert report.eval_rows + report.eval_lost_rows == size


def test_held_out_rows_that_are_too_long_are_counted_and_said(tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"input": "w" * (60 * (i % 2)) + str(i), "output": "a"} for i in range(12)]
    config = make_config(rows, eval_dataset_size=6, max_length=20, on_too_long=OnTooLong.drop)
    report = build_data(config, tokenizer).report
    assert report.eval_rows + report.eval_too_long_rows == 6 == report.train_rows + report.too_long_rows
    assert report.eval_too_long_rows > 0
    assert (
        f"toy: of 6 held-out rows: {report.eval_too_long_rows} dropped as too long (data.on_too_long=drop)"
        in caplog.messages
    )
    lost = report.eval_too_long_rows
    assert report.describe_held_out() == f"{report.eval_rows} held out (6, but {lost} are dropped)"


# A system text and earlier rounds before an instruction

HISTORY = [["Say 1", "one"], ["Say 2", "two"]]
ROW = {"instruction": "Say 3", "output": "three", "system": "Be brief.", "history": HISTORY}


@pytest.mark.parametrize("history", [HISTORY, json.dumps(HISTORY)])
def test_alpaca_s_system_and_history_stand_before_the_instruction(history, tokenizer, make_config):
    row = build(make_config, tokenizer, [ROW | {"history": history}], target_max_len=None).train[0]
    text = "".join("|" if token == 2 else chr(token - 3) for token in row["input_ids"] if token != 1)
    rounds = [ALPACA.ask(asked) + answer for asked, answer in (*HISTORY, ("Say 3", "three"))]
    assert text == "Be brief.\n\n" + "".join(f"{part}|" for part in rounds)
    assert trained(row) == "one.two.three."
    assert row["cut_source"] is False


def test_of_a_history_only_the_last_answer_is_trained_where_asked_for(tokenizer, make_config):
    data = build(make_config, tokenizer, [ROW], train_on=TrainOn.last, source_max_len=None, target_max_len=None)
    assert trained(data.train[0]) == "three."
    (held_out,) = data.eval.to_list()
    assert held_out["reference"] == "three"
    assert held_out["prompt"].endswith(ALPACA.ask("Say 3"))
    assert held_out["input_ids"][: len(held_out["prompt_ids"])] == held_out["prompt_ids"]


def test_an_empty_answer_of_a_history_carries_no_loss(tokenizer, make_config):
    limits = {"source_max_len": None, "target_max_len": None}
    rows = [
        ROW | {"history": [["Say 1", ""], ["Say 2", "two"]]},
        ROW | {"history": [["Say 1", "one"]], "output": ""},
        ROW | {"history": [["Say 1", None]], "output": " "},
    ]
    data = build(make_config, tokenizer, rows, **limits)
    assert [trained(row) for row in data.train] == ["two.three.", "one."]
    assert (data.report.empty_rows, data.report.empty_answers) == (1, 4)
    data = build(make_config, tokenizer, rows, on_empty=OnEmpty.train, **limits)
    assert [trained(row).replace(" ", "") for row in data.train] == [".two.three.", "one..", ".."]


@pytest.mark.parametrize("history", ["Say 1", [["Say 1"]], [["Say 1", 5]], [{"a": "b"}], 5])
def test_a_history_that_is_no_list_of_pairs_is_refused(history):
    with pytest.raises(UserError, match=r"needs pairs \[question, answer\] in column history, but a row holds "):
        FORMATS["alpaca"].render(ROW | {"history": history})


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_an_empty_history_and_system_change_nothing(history):
    plain = FORMATS["alpaca"].render({"instruction": "a", "output": "b"})
    assert FORMATS["alpaca"].render({"instruction": "a", "output": "b", "system": "", "history": history}) == plain


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("input-output", {"input": "q", "output": "a"}),
        ("prompt-completion", {"prompt": "q", "completion": "a"}),
        ("question-answer", {"question": "q", "answer": "a"}),
        ("chosen", {"prompt": "q", "chosen": "a"}),
    ],
)
def test_a_system_column_stands_before_the_prompt_as_chat_sends_it(name, row, tokenizer, make_config):
    data = build(make_config, tokenizer, [row | {"system": "Be brief."}], template="auto")
    assert data.report.unread == {}
    (held_out,) = data.eval.to_list()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    sent = tokenizer.apply_chat_template(
        turns, chat_template=data.template.text, add_generation_prompt=True, return_dict=False
    )
    assert held_out["prompt_ids"] == sent
    alone = build(make_config, tokenizer, [row], template="auto")
    assert alone.template == data.template


def test_the_system_of_turns_that_have_one_is_named_as_not_read(tokenizer, make_config):
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "a"}]
    report = build(make_config, tokenizer, [{"messages": turns, "system": "other"}]).report
    assert report.unread == {"system": 2}
    with pytest.raises(UserError, match="column system must hold text, but a row holds 5"):
        FORMATS["messages"].render({"messages": turns[1:], "system": 5})


# Rows that teach to stop


def test_a_row_that_ends_with_the_template_s_own_end_of_turn_teaches_to_stop(make_config):
    tokenizer = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    for train_on in TrainOn:
        data = build(make_config, tokenizer, [say("a", "b")] * 3, template="chatml", train_on=train_on)
        assert data.report.stopping_rows == data.report.train_rows == 3
    cut = build(make_config, tokenizer, [say("a" * 20)] * 3, template="chatml", target_max_len=12)
    assert cut.report.stopping_rows == 0
