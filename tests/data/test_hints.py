"""Each remedy that a message names works: it is applied, and the rows are read."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.config.schema import DataConfig, OnEmpty, OnTooLong, TrainOn
from qlora.data.pipeline import build_data
from qlora.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SETTING = re.compile(r"(data\.[a-z_.]+)=([^\s;,()]+(?: or [a-z]+\b(?!=))?)")
CHOICES = {"data.on_empty": OnEmpty, "data.on_too_long": OnTooLong, "data.train_on": TrainOn}
TEXTS = {"inputs": "q", "targets": "a"}

# What the rows are like, and what is set: each is refused.
REFUSED = {
    "chosen turns without their question": (
        {"prompt": "q", "chosen_messages": [ANSWER], "rejected_messages": [{"role": "assistant", "content": "bad"}]},
        {},
    ),
    "rejected chats first": (
        {"rejected_chat": [USER, {"role": "assistant", "content": "bad"}], "chosen_chat": [USER, ANSWER]},
        {},
    ),
    "turns under another name": ({"id": 1, "dialogue": [USER, ANSWER]}, {}),
    "turns as JSON under another name": ({"id": 1, "dialogue": json.dumps([USER, ANSWER])}, {}),
    "turns of an answer under another name": ({"prompt": "q", "reply_turns": [ANSWER]}, {}),
    "columns of FLAN": (TEXTS, {}),
    "capitals": ({"Question": "q", "Answer": "a"}, {}),
    "an unknown answer": ({"prompt": "q", "verdict": "a"}, {}),
    "another name of the answer": ({"instruction": "q", "input": "i", "answer": "a"}, {}),
    "several names of the prompt": ({"query": "q", "response": "a", "context": "c"}, {}),
    "an answer that is a list": ({"question": "q", "answers": ["a", "b"], "solution": "a"}, {}),
    "prompts only": ({"instruction": "q"}, {}),
    "questions only": ({"question": "q", "id": 1}, {}),
    "prompts with a category": ({"prompt": "q", "category": "c"}, {}),
    "queries only": ({"query": "q"}, {}),
    "texts of questions": ({"question_id": 1, "text": "q", "category": "c"}, {}),
    "a multiple-choice test": ({"question": "q", "choices": ["a", "b"], "answer": "a"}, {}),
    "text as alpaca": ({"text": "q"}, {"format": "alpaca"}),
    "questions as messages": ({"question": "q", "answer": "a"}, {"format": "messages"}),
    "another name of the answer, as messages": ({"question": "q", "reply": "a"}, {"format": "messages"}),
    "another name of the answer, as alpaca": ({"question": "q", "response": "a"}, {"format": "alpaca"}),
    "messages as conversations": ({"messages": [USER, ANSWER]}, {"format": "conversations"}),
    "turns under another name, as alpaca": ({"dialogue": [USER, ANSWER]}, {"format": "alpaca"}),
    "prompts only, as messages": ({"prompt": "q"}, {"format": "messages"}),
    "empty answers": ({"input": "q", "output": " "}, {}),
    "some empty answers": ([{"input": "q", "output": ""}, {"input": "q", "output": "a"}], {"on_empty": OnEmpty.error}),
    "rows too long": ({"input": "q" * 50, "output": "a"}, {"max_length": 20, "on_too_long": OnTooLong.drop}),
    "some rows too long": (
        [{"input": "q" * 50, "output": "a"}, {"input": "q", "output": "a"}],
        {"max_length": 20, "on_too_long": OnTooLong.error},
    ),
    "a switch off beside all": (
        {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER]},
        {"train_on": TrainOn.all},
    ),
    "a switch on at a user's turn": ({"messages": [USER | {"loss": 1}, ANSWER]}, {}),
}  # fmt: skip


HELD_OUT = {
    "more rows than there are": 1024,
    "all of six rows": 6,
    "nearly all rows": 0.999,
    "one": 1,
}


def refuse(config, tokenizer):
    with pytest.raises(UserError) as caught:
        build_data(DataConfig(**config), tokenizer)
    return str(caught.value)


def find_hints(sentence, config):
    """Returns the hints of a sentence: settings that stand together and are not what is set already."""
    values = {f"data.{item.name}": getattr(DataConfig(**config), item.name) for item in fields(DataConfig)}
    hints, end = [], -1
    for match in SETTING.finditer(sentence):
        key, value = match[1], match[2].rstrip(".:")
        together, end = sentence[end : match.start()] == " ", match.end()
        current = values.get(key)
        if "module:function" in value or value in (str(current), str(getattr(current, "value", current))):
            continue
        if together and hints:
            hints[-1][key] = value
        else:
            hints += [{key: option} for option in value.split(" or ")]
    return hints


def follow(hint, rows, config):
    """Returns the config with what a hint says; answers that only a person can name are added to the rows."""
    changes = {}
    for key, value in hint.items():
        name = key.removeprefix("data.")
        if value == "COLUMN":
            rows, value = [row | {"spare": "a"} for row in rows], "spare"
        if name.startswith("columns."):
            changes.setdefault("columns", dict(config.get("columns", {})))[name.removeprefix("columns.")] = value
        elif key in CHOICES:
            changes[name] = CHOICES[key](value)
        else:
            changes[name] = {"eval_path": config["path"]}.get(name) or (float(value) if "size" in name else value)
    write(config["path"], rows)
    return config | changes


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("case", REFUSED)
def test_the_remedy_that_a_message_names_works(case, tokenizer, tmp_path):
    odd, changes = REFUSED[case]
    rows = odd * 8 if isinstance(odd, list) else [odd] * 16
    config = {
        "name": "toy",
        "path": str(tmp_path / "rows.jsonl"),
        "eval_dataset_size": 9,
        "template": "plain",
    } | changes
    write(config["path"], rows)
    sentence = refuse(config, tokenizer)
    hints = find_hints(sentence, config)
    assert hints
    for hint in hints:
        assert build_data(DataConfig(**follow(hint, rows, config)), tokenizer).report.train_rows, f"{sentence}: {hint}"


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("case", HELD_OUT)
def test_what_is_told_where_no_row_is_left_works(case, count, tokenizer, tmp_path):
    rows = [{"input": f"q{number}", "output": "a"} for number in range(count)]
    config = {"name": "toy", "path": str(tmp_path / "rows.jsonl"), "eval_dataset_size": HELD_OUT[case]}
    write(config["path"], rows)
    if HELD_OUT[case] < count and HELD_OUT[case] != 0.999:
        assert build_data(DataConfig(**config), tokenizer).report.train_rows
        return
    sentence = refuse(config, tokenizer)
    hints = find_hints(sentence, config)
    assert len(hints) == (1 if count == 1 else 2), sentence
    for hint in hints:
        assert build_data(DataConfig(**follow(hint, rows, config)), tokenizer).report.train_rows, f"{sentence}: {hint}"


@pytest.mark.parametrize(
    ("row", "ending"),
    [
        ({"id": 1, "calls": [USER, USER]}, "calls holds turns of a chat, but none of a whole one: map the rows with "),
        ({"question": "q", "answers": ["a", "b"]}, "question-answer, which lacks answer (data.columns.answer=COLUMN);"),
        ({"a": "x", "answers": ["a", "b"]}, "Name the columns of a format with data.columns.NAME=COLUMN: unnatural "),
    ],
)
def test_a_hint_that_would_not_work_is_not_given(row, ending, tokenizer, tmp_path):
    config = {"name": "toy", "path": str(tmp_path / "rows.jsonl"), "eval_dataset_size": 1, "template": "plain"}
    write(config["path"], [row] * 6)
    sentence = refuse(config, tokenizer)
    assert ending in sentence
    assert not [hint for hint in find_hints(sentence, config) if "COLUMN" not in hint.values()]


def test_a_column_whose_name_is_no_word_is_quoted_for_the_command_line(tokenizer, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    write(path, [{"id": 1, "chat history": [USER, ANSWER]}] * 6)
    base = ["data=local", f"data.path={path}", "data.eval_dataset_size=1", "data.template=plain", "recipe=none"]
    with pytest.raises(UserError) as caught:
        build_data(compose(base).data, tokenizer)
    told = shlex.split(str(caught.value).partition("a chat: ")[2])
    assert told == ['data.columns.messages="chat history"']
    assert build_data(compose([*base, *told]).data, tokenizer).report.train_rows == 5
