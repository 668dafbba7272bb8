"""Rows of `data.eval_path` that ask and hold no answer, for `task=predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.data.chat.templates import Template, choose_template, prompt_template
from qlora.data.data_set import Questions
from qlora.data.formats.prompts import ALPACA
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer

ASKED = "What is the opposite of brave?"
USER = {"role": "user", "content": ASKED}
LAYOUTS: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": ASKED},
    "instruction and input": {"instruction": ASKED, "input": ""},
    "empty answer": {"instruction": ASKED, "output": ""},
    "null answer": {"instruction": ASKED, "input": None, "output": None},
    "question": {"question": ASKED, "category": "words"},
    "prompt": {"prompt": ASKED},
    "prompt of turns": {"prompt": [USER]},
    "input": {"input": ASKED},
    "text with an id": {"question_id": 1, "text": ASKED},
    "text": {"text": ASKED},
    "messages": {"messages": [USER]},
    "conversations": {"conversations": [{"from": "human", "value": ASKED}]},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(compose().model)


def read(path: Path, rows: list[dict[str, Any]], tokenizer: Any, template: Template | None, *overrides: str) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(["data=local", "data.path=unread.jsonl", f"data.eval_path={path}", *overrides])
    return build_data(config.data, tokenizer, need_train=False, questions=Questions(template)).eval


@pytest.mark.matrix(6)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_without_an_answer_asks(layout: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    saved = choose_template("guanaco", tokenizer)
    [row] = read(tmp_path / "rows.jsonl", [LAYOUTS[layout]], tokenizer, saved)
    assert row["reference"] is None
    assert row["trained"] == 0
    assert row["prompt_ids"] == row["input_ids"]
    assert ASKED in row["prompt"]
    assert row["prompt"].rstrip().endswith(("### Assistant:", "### Response:"))


@pytest.mark.matrix(3)
@pytest.mark.parametrize("layout", ["instruction", "question", "prompt", "text", "input"])
def test_a_question_is_asked_as_the_training_s_template_asks(
    layout: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    saved = prompt_template(ALPACA, tokenizer)
    [row] = read(tmp_path / "rows.jsonl", [LAYOUTS[layout]], tokenizer, saved)
    answered = {"instruction": ASKED, "input": "", "output": "timid"}
    [trained] = read(tmp_path / "answered.jsonl", [answered], tokenizer, saved)
    assert (trained["reference"], row["prompt_ids"]) == ("timid", trained["prompt_ids"])


def test_the_input_of_an_instruction_stands_where_the_training_s_did(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"instruction": "Give the last word.", "input": "piano cheese"}]
    [row] = read(tmp_path / "rows.jsonl", rows, tokenizer, prompt_template(ALPACA, tokenizer))
    [trained] = read(tmp_path / "answered.jsonl", [{**rows[0], "output": "cheese"}], tokenizer, None)
    assert row["prompt_ids"] == trained["prompt_ids"]


def test_without_a_saved_template_the_words_of_the_instruction_formats_ask(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    [row] = read(tmp_path / "rows.jsonl", [LAYOUTS["question"]], tokenizer, None)
    assert row["prompt"] == f"Question: {ASKED}\nAnswer: "
    [row] = read(tmp_path / "more.jsonl", [LAYOUTS["instruction"]], tokenizer, None)
    assert row["prompt"] == ALPACA.ask(ASKED)


def test_a_chat_that_ends_with_a_user_asks_for_the_answer_to_that(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [USER, {"role": "assistant", "content": "timid"}, {"role": "user", "content": "And of big?"}]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    asked, answered = read(tmp_path / "rows.jsonl", rows, tokenizer, None, "data.template=guanaco")
    assert asked["reference"] is None
    assert "timid" in asked["prompt"]
    assert "And of big?" in asked["prompt"]
    assert answered["reference"] == "timid"


def test_questions_and_rows_with_answers_stand_in_one_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": ASKED, "output": answer} for answer in ("timid", "", "weak")]
    data = read(tmp_path / "rows.jsonl", rows, tokenizer, None)
    assert list(data["reference"]) == ["timid", None, "weak"]
    assert len({tuple(ids) for ids in data["prompt_ids"]}) == 1


def test_the_columns_of_the_training_s_answers_may_be_missing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    columns = ["data.columns.instruction=ask", "data.columns.output=reply"]
    [row] = read(tmp_path / "rows.jsonl", [{"ask": ASKED}], tokenizer, None, *columns)
    assert row["prompt"] == ALPACA.ask(ASKED)
    with pytest.raises(UserError, match=r"data.columns.instruction=ask: .* has no column ask"):
        read(tmp_path / "others.jsonl", [{"question": ASKED}], tokenizer, None, *columns)


def test_a_long_question_loses_its_beginning(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [row] = read(tmp_path / "rows.jsonl", [{"prompt": f"brave {ASKED}"}], tokenizer, None, "data.max_length=4")
    assert len(row["prompt_ids"]) <= 4
    assert tokenizer.decode(row["prompt_ids"][1:]) in f"brave {ASKED}"


def test_rows_that_say_nothing_of_a_question_are_refused_as_ever(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match="recognises no format"):
        read(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}], tokenizer, None)
