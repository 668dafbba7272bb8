"""Rows of preference: two answers to one prompt, or an answer with a label, in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora.config.registries.objectives import RowKind
from qlora.config.schema import DataConfig, Pairs
from qlora.data.pipeline import Data, build_data
from qlora.errors import ConfigError, DataError

MakeConfig = Callable[..., DataConfig]
ASKED = [{"role": "user", "content": "two?"}]


@pytest.fixture
def read(make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Data]:
    def read(rows: list[dict[str, Any]], kind: RowKind = RowKind.pairs, **changes: Any) -> Data:
        config = make_config(rows, **{"eval_dataset_size": 0, **changes})
        return build_data(config, tokenizer, need_eval=bool(config.eval_dataset_size), kind=kind)

    return read


def answers(data: Data, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, str]]:
    """Returns the prompt, the chosen and the rejected answer of each pair, as text."""
    assert data.train is not None
    parts = []
    for row in data.train:
        start = row["answer_start"]
        assert row["input_ids"][:start] == row["rejected_ids"][:start]
        for ids, labels in ((row["input_ids"], row["labels"]), (row["rejected_ids"], row["rejected_labels"])):
            assert labels == [-100] * start + ids[start:]
        ids = row["input_ids"][:start], row["input_ids"][start:], row["rejected_ids"][start:]
        parts.append(tuple(tokenizer.decode(part, skip_special_tokens=True) for part in ids))
    return parts


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "two? ", "chosen": "2", "rejected": "three"},
        {"prompt": "two? ", "chosen": "two? 2", "rejected": "two? three"},
    ],
)
def test_a_prompt_of_its_own_or_at_the_beginning_of_both_texts_is_the_prompt(
    row: dict[str, Any], read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert answers(read([row]), tokenizer) == [("two? ", "2", "three")]


def test_texts_that_share_their_beginning_part_behind_the_last_mark_of_an_answer(
    read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{start} I am", "rejected": f"{start} I do"}
    assert answers(read([row]), tokenizer) == [(start, " I am", " I do")]


def test_texts_without_a_mark_part_behind_their_last_common_word(
    read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"chosen": "Q: colour?\nA: green", "rejected": "Q: colour?\nA: grey"}
    assert answers(read([row]), tokenizer) == [("Q: colour?\nA:", " green", " grey")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*ASKED, said("assistant", "2")], "rejected": [*ASKED, said("assistant", "three")]},
        {"prompt": ASKED, "chosen": [said("assistant", "2")], "rejected": [said("assistant", "three")]},
        {"prompt": "two?", "chosen": [said("assistant", "2")], "rejected": [said("assistant", "three")]},
        {"conversations": [{"from": "human", "value": "two?"}], "chosen": {"from": "gpt", "value": "2"},
         "rejected": {"from": "gpt", "value": "three"}},
    ],
)  # fmt: skip
def test_turns_of_every_layout_become_a_pair(
    row: dict[str, Any], read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    ((prompt, chosen, rejected),) = answers(read([row], template="guanaco"), tokenizer)
    assert "two?" in prompt
    assert (chosen.strip(), rejected.strip()) == ("2", "three")


def test_an_answer_that_both_sides_share_belongs_to_the_prompt(
    read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    shared = [said("user", "a"), said("assistant", "first"), said("user", "b")]
    row = {"chosen": [*shared, said("assistant", "yes")], "rejected": [*shared, said("assistant", "no")]}
    ((prompt, chosen, rejected),) = answers(read([row], template="guanaco"), tokenizer)
    assert "first" in prompt
    assert ("yes" in chosen, "no" in rejected) == (True, True)


def test_both_sides_are_cut_alike(read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "0123456789", "chosen": "a" * 20, "rejected": "b"}
    data = read([row], max_length=12)
    assert answers(data, tokenizer) == [("56789", "a" * 6, "b")]
    assert (data.report.cut_sources, data.report.cut_targets) == (1, 1)
    assert data.train is not None
    assert data.train[0]["length"] == 12 + 8


def test_pairs_of_equal_sides_are_dropped_and_counted(read: Callable[..., Data]) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = read([good, {**good, "rejected": "a"}, {**good, "rejected": ""}])
    assert (data.report.train_rows, data.report.equal_rows, data.report.empty_rows) == (1, 1, 1)


def test_a_changed_rejected_side_is_another_set_of_rows(read: Callable[..., Data]) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read([row]).report.fingerprint != read([{**row, "rejected": "c"}]).report.fingerprint


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        *((True, False), ("yes", "No"), (1, 0), ("True", "0.0"), (1, -1), ("+1", "-1"), (1.0, -1.0), ("good", "bad")),
        *(("Desirable", "undesirable"), ("chosen", "rejected"), ("thumbs up", "thumbs down"), ("👍", "👎🏽")),
        *(("thumbs_up", "Thumbs-Down"), ("like", "dislike"), ("upvote", "downvote"), ("positive", "negative")),
        *(("accepted", "rejected"), ("up", "down"), (" GOOD ", "Bad\n")),
    ],
)
def test_labels_in_any_spelling_say_whether_an_answer_is_good(good: Any, bad: Any, read: Callable[..., Data]) -> None:
    rows = [{"prompt": "p", "completion": "a", "label": good}, {"prompt": "p", "completion": "b", "label": bad}]
    data = read(rows, RowKind.labelled)
    assert data.train is not None
    assert (data.train["desirable"][:], data.train["answer_start"][:]) == ([True, False], [2, 2])
    assert data.report.unread == {}


@pytest.mark.parametrize("label", ["meh", 2, 0.5, "4 stars", "neutral", -2])
def test_another_label_is_refused_with_its_row_and_value(label: Any, read: Callable[..., Data]) -> None:
    rows = [{"prompt": "p", "completion": "a", "label": label if index == 30 else "bad"} for index in range(40)]
    if not isinstance(label, str):
        rows = [{**row, "label": row["label"] if row["label"] == label else 0} for row in rows]
    with pytest.raises(DataError, match=r"row 31: column label holds .*, and the label of an answer is true, yes"):
        read(rows, RowKind.labelled)


def test_zero_beside_minus_one_is_refused(read: Callable[..., Data]) -> None:
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (1, -1, 0)]
    with pytest.raises(
        DataError, match=r"row 3: column label holds 0 where row 2 holds -1, so that 0 may mean bad or "
    ):
        read(rows, RowKind.labelled)


def test_the_answers_of_pairs_are_good_and_bad_ones(read: Callable[..., Data]) -> None:
    data = read([{"prompt": "p", "chosen": "a", "rejected": "b"}], RowKind.labelled)
    assert data.train is not None
    assert data.train["desirable"][:] == [True, False]


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"instruction": "a", "output": "b"}], RowKind.pairs,
         r"data\.path: it has the columns instruction, output and no rejected, and this loss compares two answers; "
         r"name the column of the worse ones with data\.columns\.rejected=COLUMN, or choose loss=sft"),
        ([{"instruction": "a", "chosen_response": "b", "rejected_response": "c"}], RowKind.pairs,
         r"the columns of both with data\.columns\.chosen=chosen_response data\.columns\.rejected=rejected_resp"),
        ([{"question": "a", "accepted": "b", "rejected": "c"}], RowKind.pairs,
         r"no chosen, and this loss .*; name the column of the better ones with data\.columns\.chosen=accepted, or"),
        ([{"prompt": "a", "completions": ["b", "c"]}], RowKind.pairs,
         r"data\.path: column completions holds answers without scores; put these into a column scores"),
        ([{"prompt": "a", "completions": ["b", "c"], "scores": [1]}], RowKind.pairs,
         r"data\.path: column scores holds 1 scores of 2 answers in column completions"),
        ([{"instruction": "a", "output": "b"}], RowKind.labelled,
         r"it has the columns instruction, output and no label, and this loss needs answers that are labelled"),
        ([{"chosen": "yes it is", "rejected": "no"}], RowKind.pairs,
         r"row 1: chosen and rejected share no prompt: the texts begin with different words; put the prompt into"),
        ([{"chosen": [*ASKED, said("assistant", "x")], "rejected": [said("user", "b"), said("assistant", "y")]}],
         RowKind.pairs, r"row 1: chosen and rejected share no prompt: they part at turn 1, which is of the role user"),
        ([{"prompt": ASKED, "chosen": [said("assistant", "2")], "rejected": "three"}], RowKind.pairs, None),
        ([{"prompt": "p", "completion": "a", "label": True}] * 2, RowKind.labelled,
         r"all 2 answers to train on are labelled good, and this loss learns from good ones against bad ones; add"),
        ([{"prompt": "p", "completion": "a", "label": True, "kto_tag": False}], RowKind.labelled,
         r"row 1: its labels contradict each other; label the answer true or false in one of the columns label and"),
    ],
)  # fmt: skip
def test_rows_that_hold_no_preference_are_refused_in_one_sentence(
    rows: list[dict[str, Any]], kind: RowKind, message: str | None, read: Callable[..., Data]
) -> None:
    if message is None:
        read(rows, kind, template="guanaco")
        return
    with pytest.raises(DataError, match=message):
        read(rows, kind)


SCORED = [
    {"response": "bad", "overall_score": 2.0},
    {"response": "best", "overall_score": 9.5},
    {"response": "middling", "overall_score": 5.0},
]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completions": SCORED},
        {"prompt": "p", "completions": [{"text": a["response"], "score": str(a["overall_score"])} for a in SCORED]},
        {"prompt": "p", "completions": [{"response": a["response"], "annotations": {
            "truth": {"Rating": str(int(a["overall_score"]))}, "help": {"Rating": "N/A"}}} for a in SCORED]},
        {"prompt": "p", "generations": [a["response"] for a in SCORED], "ratings": [2, 9, 5]},
        {"prompt": "p", "responses": [a["response"] for a in SCORED], "scores": [0.1, 0.9, 0.5]},
        {"prompt": "p", "completions": str([{"response": "bad", "rating": 1}, {"response": "middling", "rating": 2},
                                            {"response": "best", "rating": 3}]).replace("'", '"')},
    ],
)  # fmt: skip
def test_scored_answers_give_the_best_against_the_worst_or_all_pairs(
    row: dict[str, Any], read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = read([row])
    assert data.report.format == "scored"
    assert answers(data, tokenizer) == [("p", "best", "bad")]
    pairs = answers(read([row], pairs=Pairs.all), tokenizer)
    assert sorted(pairs) == [("p", "best", "bad"), ("p", "best", "middling"), ("p", "middling", "bad")]
    assert data.report.unread == {}


def test_scored_answers_are_read_as_instructions_and_chats_too(
    read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    ((prompt, *said_),) = answers(read([{"instruction": "do it", "completions": SCORED}]), tokenizer)
    assert ("### Instruction:\ndo it" in prompt, said_) == (True, ["best", "bad"])
    turns = [{**said("assistant", str(a["response"])), "score": a["overall_score"]} for a in SCORED]
    ((prompt, *said_),) = answers(read([{"prompt": ASKED, "completions": turns}], template="guanaco"), tokenizer)
    assert ("two?" in prompt, [text.strip() for text in said_]) == (True, ["best", "bad"])


def test_sft_trains_the_best_of_scored_answers_and_kto_the_best_and_the_worst(
    make_config: MakeConfig, read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "p", "completions": SCORED}]
    data = read(rows, RowKind.tokens)
    assert data.train is not None
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in data.train["input_ids"]] == ["pbest"]
    data = read(rows, RowKind.labelled)
    assert data.train is not None
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in data.train["input_ids"]]
    assert list(zip(texts, data.train["desirable"], strict=True)) == [("pbest", True), ("pbad", False)]


def test_ties_and_scores_that_contradict_are_dropped_and_counted(read: Callable[..., Data]) -> None:
    tied = {"prompt": "p", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 1}]}
    one = {"prompt": "p", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": None}]}
    data = read([{"prompt": "p", "completions": SCORED}, tied, one])
    assert (data.report.train_rows, data.report.unordered_rows, data.report.left_out_rows) == (1, 1, 1)
    for names in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"),
                  ("chosen_avg_rating", "rejected_avg_rating"), ("rating_chosen", "rating_rejected")):  # fmt: skip
        scores = ((5.0, 1.0), (3.0, 3.0), (1.0, 5.0), (None, None))
        rows = [{"prompt": "p", "chosen": "a", "rejected": "b", **dict(zip(names, two, strict=True))} for two in scores]
        data = read(rows)
        assert (data.report.train_rows, data.report.unordered_rows, data.report.unread) == (2, 2, {})
        data = read(rows, RowKind.labelled)
        assert (data.report.train_rows, data.report.unordered_rows) == (4, 2)


def test_equal_and_blank_answers_are_counted_in_every_layout(read: Callable[..., Data]) -> None:
    def turn(text: str) -> list[dict[str, str]]:
        return [said("assistant", text)]

    for rows in (
        [{"prompt": "p", "chosen": a, "rejected": b} for a, b in (("x", "y"), ("x", "x"), ("", "y"), ("x", " "))],
        [{"chosen": f"p\n\nAssistant: {a}", "rejected": f"p\n\nAssistant: {b}"}
         for a, b in (("x", "y"), ("x", "x"), ("", "y"), ("x", ""))],
        [{"prompt": ASKED, "chosen": turn(a), "rejected": turn(b)}
         for a, b in (("x", "y"), ("x", "x"), ("", "y"), ("x", ""))],
    ):  # fmt: skip
        report = read(rows, template="guanaco").report
        assert (report.train_rows, report.equal_rows, report.empty_rows) == (1, 1, 2), rows
        report = read(rows, RowKind.labelled, template="guanaco").report
        assert (report.train_rows, report.equal_rows, report.empty_rows) == (4, 1, 2), rows


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4", "history": [["hi", "ho"]]},
        {"messages": [said("user", "add")], "chosen": said("assistant", "3"), "rejected": said("assistant", "4")},
        {"instruction": "add", "chosen": [said("assistant", "3")], "rejected": [said("assistant", "4")]},
        {"system": "s", "question": "add", "chosen": "3", "rejected": "4"},
        {"input": "add", "chosen": "3", "rejected": "4"},
        {"query": "add", "chosen": "3", "rejected": "4"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"},
                           {"from": "human", "value": "add"}],
         "chosen": {"from": "gpt", "value": "3"}, "rejected": {"from": "gpt", "value": "4"}},
    ],
)  # fmt: skip
def test_published_layouts_of_pairs_keep_all_that_was_asked(
    row: dict[str, Any], read: Callable[..., Data], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = read([row], template="plain")
    ((prompt, *said_),) = answers(data, tokenizer)
    assert [text.strip().removesuffix("<|im_end|>") for text in said_] == ["3", "4"]
    assert "add" in prompt
    assert all(word in prompt for word in (["hi", "ho"] if "history" in row or "conversations" in row else []))
    assert ("s" in row.get("system", "")) <= prompt.count("s\n")
    assert data.report.unread == {}


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, RowKind.pairs,
         r"data\.pairs=all is read in rows of several answers with scores, and data\.path is read as chosen; leave"),
        ({"prompt": "p", "completions": SCORED}, RowKind.labelled,
         r"data\.pairs=all makes pairs for a loss that compares two answers, such as loss=dpo; leave it out"),
    ],
)  # fmt: skip
def test_all_pairs_are_refused_where_scores_give_none(
    row: dict[str, Any], kind: RowKind, message: str, read: Callable[..., Data]
) -> None:
    with pytest.raises(ConfigError, match=message):
        read([row], kind, pairs=Pairs.all)
