"""What a row says about itself: numbers that are missing, labels, switches of turns, and keys that nothing reads."""

import datetime
import decimal
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qlora.config.schema import DataConfig, TrainOn
from qlora.data.cache import Cache
from qlora.data.formats.cells import OPPOSITES, SWITCHES, TrackedRow, read_truth, take_rows
from qlora.data.formats.renderers import FORMATS
from qlora.data.ingest.sources import load_rows
from qlora.data.pipeline import build_data
from qlora.errors import UserError

USER = {"role": "user", "content": "q"}
NAN = float("nan")


def texts(rows):
    """Decodes rows of the byte tokenizer, special tokens left out."""
    return [bytes(i - 3 for i in ids if i > 2).decode() for ids in rows["input_ids"][:]]


def trained(row):
    """Decodes what the loss counts, the end token as a full stop."""
    return "".join("." if label == 2 else chr(label - 3) for label in row["labels"] if label != -100)


def answer(content="a", **keys):
    return {"role": "assistant", "content": content, **keys}


def build_whole(config, tokenizer):
    """Trains and measures on all rows of a file."""
    config.eval_path = config.path
    return build_data(config, tokenizer)


def refuse(config, tokenizer):
    with pytest.raises(UserError) as caught:
        build_data(config, tokenizer)
    return str(caught.value)


# Truths


@pytest.mark.parametrize("value", [True, 1, 1.0, decimal.Decimal(1), "true", "True", " YES ", "on", "1", "1.0", "t"])
def test_a_yes_is_read_in_any_spelling(value):
    assert read_truth(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, -0.0, "false", "False", "NO", "off", "0", "0.0", "f", " n"])
def test_a_no_is_read_in_any_spelling(value):
    assert read_truth(value) is False


@pytest.mark.parametrize("value", [None, "", "  ", []])
def test_nothing_is_neither_yes_nor_no(value):
    assert read_truth(value) is None


@pytest.mark.parametrize("value", ["maybe", 0.5, 2, -1, "nan", "inf", [1], {"a": 1}])
def test_what_is_neither_yes_nor_no_is_an_error(value):
    with pytest.raises((ValueError, TypeError)):
        read_truth(value)


# Labels

ANSWERED = {
    "messages": {"messages": [USER, answer()]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "turns of prompt and completion": {"prompt": [USER], "completion": [answer()]},
}


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("row", ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "0", "no"])
def test_an_answer_that_a_label_calls_bad_is_never_trained(row, label, column):
    name = next((name for name in FORMATS if name in row), "prompt-completion")
    assert FORMATS[name].render(row | {column: label}) == []
    for good in (True, 1, "true", None):
        assert FORMATS[name].render(row | {column: good}) == FORMATS[name].render(row) != []


def test_alpaca_s_rows_are_labelled_too_also_as_chats(tokenizer, make_config):
    rows = [{"instruction": f"q{i}", "output": i, "kto_tag": str(i % 2 == 0)} for i in range(4)]
    for name in ("alpaca", "qlora.data.formats.as_chat:from_alpaca"):
        data = build_whole(make_config(rows, format=name, template="plain"), tokenizer)
        assert list(map(trained, data.train)) == ["0.", "2."]
        assert data.report.left_out_rows == 2


@pytest.mark.parametrize("row", ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("label", ["maybe", 0.5, 3, -1, "science"])
def test_an_unclear_label_is_refused(row, label):
    name = next((name for name in FORMATS if name in row), "prompt-completion")
    with pytest.raises(UserError) as caught:
        FORMATS[name].render(row | {"label": label})
    assert str(caught.value) == (
        f"column label holds {label!r}, and the label of an answer is true, yes, 1, good, desirable, chosen or thumbs "
        "up, or false, no, 0, bad, undesirable, rejected or thumbs down (false: not trained); write it so, or leave "
        "the column out (with a function of your own: data.format=module:function)"
    )


def test_labels_of_numbers_and_words_in_one_file_leave_bad_answers_out(tokenizer, make_config):
    labels = [1, 0, True, False, "yes", "no"]
    rows = [{"prompt": f"q{i}", "completion": "a", "label": label} for i, label in enumerate(labels)]
    data = build_whole(make_config(rows), tokenizer)
    assert texts(data.train) == ["q0a", "q2a", "q4a"]
    assert (data.report.left_out_rows, data.report.eval_left_out_rows) == (3, 3)


def test_a_label_of_another_format_is_named_as_not_read(tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    build_data(make_config([{"text": f"film {i}", "label": i % 2} for i in range(6)]), tokenizer)
    assert "toy: not read: label" in caplog.messages


# Switches of turns


@pytest.mark.parametrize("key", SWITCHES)
@pytest.mark.parametrize("off", [False, 0, 0.0, "False", "0", "no"])
def test_a_turn_that_is_switched_off_carries_no_loss(key, off, tokenizer, make_config):
    turns = [USER, answer("x", **{key: off}), USER, answer("y", **{key: 1}), USER, answer("z")]
    data = build_data(make_config([{"messages": turns}] * 2, template="plain"), tokenizer)
    assert trained(data.train[0]) == "y.z."


@pytest.mark.parametrize("on", [True, 1, "true", "yes"])
def test_a_turn_that_is_masked_carries_no_loss(on, tokenizer, make_config):
    turns = [USER, answer("x", masked=on), USER, answer("y", masked=False)]
    data = build_data(make_config([{"messages": turns}] * 2, template="plain"), tokenizer)
    assert trained(data.train[0]) == "y."


@pytest.mark.parametrize("key", [*SWITCHES, *OPPOSITES])
@pytest.mark.parametrize("value", [0.5, 2, -1, "maybe", [1]])
def test_a_switch_that_is_neither_on_nor_off_is_refused(key, value):
    with pytest.raises(UserError) as caught:
        FORMATS["messages"].render({"messages": [USER, answer(**{key: value})]})
    assert str(caught.value) == (
        f"column messages, turn 2 of 2 has {key}={value!r}; a turn is trained whole or not at all, so it must be true, "
        "yes, on or 1, or false, no, off or 0"
    )


@pytest.mark.parametrize(
    "switches", [{"train": True, "weight": 0}, {"loss": "no", "trainable": 1}, {"train": True, "masked": True}]
)
def test_switches_that_contradict_each_other_are_refused(switches):
    with pytest.raises(UserError, match=r"turn 2 of 2 has .* and .*, which contradict each other; leave one") as caught:
        FORMATS["messages"].render({"messages": [USER, answer(**switches)]})
    assert all(f"{key}={value!r}" in str(caught.value) for key, value in switches.items())


def test_switches_that_agree_are_one():
    chat = FORMATS["messages"].render({"messages": [USER, answer(train=False, weight=0, masked=True)]})[0]
    assert chat.messages[1] == answer(weight=0)


@pytest.mark.parametrize("key", ["mask", "train_detail", "training_detail"])
def test_a_switch_that_cannot_be_followed_is_refused(key):
    with pytest.raises(UserError, match=f"^column messages, turn 2 of 2 has the key {key}, which "):
        FORMATS["messages"].render({"messages": [USER, answer(**{key: [{"begin_offset": 0}]})]})
    assert FORMATS["messages"].render({"messages": [USER, answer(**{key: None})]})[0].messages == [USER, answer()]


def test_a_switch_of_a_part_is_refused():
    turn = answer([{"type": "text", "text": "a", "loss_weight": 0.0}])
    with pytest.raises(UserError, match=r"turn 2 of 2 holds a part with loss_weight=0\.0; a turn is trained whole"):
        FORMATS["messages"].render({"messages": [USER, turn]})


def test_a_switch_that_arrow_filled_with_null_or_nan_says_nothing(tokenizer, tmp_path):
    turns = [USER | {"weight": None}, answer("x", weight=0.0), USER | {"weight": NAN}, answer("y", weight=NAN)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": turns}] * 3), path)
    data = build_data(DataConfig(name="toy", path=str(path), eval_dataset_size=1, template="plain"), tokenizer)
    assert trained(data.train[0]) == "y."


def test_a_user_s_turn_that_asks_to_be_trained_is_refused(tokenizer, make_config):
    config = make_config([{"messages": [USER | {"train": True}, answer()]}] * 2, template="plain")
    assert refuse(config, tokenizer).partition(": turn ")[2] == (
        "1 of 2, of the role user, asks to be trained (weight 1, train=true or the like), but data.train_on=assistant "
        "trains turns of the assistant alone; take the switch out, or set data.train_on=all"
    )
    config.train_on = TrainOn.all
    assert build_data(config, tokenizer).report.train_rows == 1


def test_a_turn_that_is_switched_off_is_refused_where_all_is_trained(tokenizer, make_config):
    turns = [USER, answer("x", train=False), USER, answer("y")]
    config = make_config([{"messages": turns}] * 2, template="plain", train_on=TrainOn.all)
    assert refuse(config, tokenizer).partition(": turn ")[2] == (
        "2 of 4 asks not to be trained (weight 0, train=false or the like), but data.train_on=all trains every token; "
        "set data.train_on=assistant, or take the switch out"
    )


def test_an_earlier_answer_does_not_take_the_place_of_a_last_one_that_is_switched_off(tokenizer, make_config):
    rows = [{"messages": [USER, answer("x"), USER, answer("y", train=i > 0)]} for i in range(4)]
    data = build_data(make_config(rows, template="plain", train_on=TrainOn.last, split_seed=2), tokenizer)
    assert set(map(trained, data.train)) == {"y."}
    assert data.report.dropped_rows + data.report.eval_dropped_rows == 1


# Numbers that are missing


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("cell", ["nan", "NaN", "-nan", ""])
def test_nan_in_a_table_of_text_is_a_missing_value(suffix, cell, tokenizer, tmp_path):
    path, mark = tmp_path / f"rows.{suffix}", "," if suffix == "csv" else "\t"
    lines = [("input", "output"), ("a", "b"), ("c", cell), (cell, "d"), ("e", "Nan"), ("f", "None")]
    path.write_text("".join(mark.join(line) + "\n" for line in lines))
    report = build_data(DataConfig(name="toy", path=str(path), eval_path=str(path)), tokenizer)
    assert texts(report.train) == ["ab", "d", "eNan", "fNone"]
    assert report.report.empty_rows == 1


def test_nan_in_json_is_a_missing_value_however_deep(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": NaN}\n{"prompt": NaN, "completion": "b"}\n'
        '{"prompt": "c", "completion": [{"role": "assistant", "content": NaN}, {"role": "user", "content": "d"},'
        ' {"role": "assistant", "content": "e", "weight": NaN}]}\n{"prompt": "f", "completion": "nan"}\n'
    )
    data = build_data(DataConfig(name="toy", path=str(path), eval_path=str(path), template="plain"), tokenizer)
    assert list(map(trained, data.train)) == ["b.", "e.", "nan."]
    assert (data.report.empty_rows, data.report.eval_empty_rows) == (1, 1)


def test_nan_in_json_inside_a_cell_of_text_is_a_missing_value():
    turns = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": NaN, "weight": NaN}]'
    assert FORMATS["messages"].render({"messages": turns})[0].messages == [USER, answer("")]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_nan_in_parquet_is_a_missing_value(kind, tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    numbers = pa.array(np.array([1.5, np.nan, 2.0], dtype=kind.to_pandas_dtype()), type=kind)
    pq.write_table(pa.table({"input": ["a", "b", "c"], "output": numbers}), path)
    data = build_data(DataConfig(name="toy", path=str(path), eval_path=str(path)), tokenizer)
    assert texts(data.train) == ["a1.5", "c2.0"]


def test_nan_in_saved_rows_is_a_missing_value_in_objects_and_lists(tmp_path):
    rows = [{"a": NAN, "b": {"c": NAN, "d": [1.0, NAN]}, "e": "nan", "f": 1}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert take_rows(Dataset.load_from_disk(tmp_path / "saved"), slice(1)) == [
        {"a": None, "b": {"d": [1.0, None]}, "e": "nan", "f": 1}
    ]


def test_calls_and_tools_in_parquet_have_the_keys_that_they_have(tmp_path):
    calls = [{"city": "Bern"}, {"zone": "utc", "days": [1, None]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": dict.fromkeys(call, "x")}} for call in calls]
    rows = [
        {"messages": [USER, answer("", tool_calls=[{"function": {"name": "f", "arguments": call}}])], "tools": [tool]}
        for call, tool in zip(calls, tools, strict=True)
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    loaded = load_rows(str(path), cache=Cache(tmp_path / "cache"))
    chats = [FORMATS["messages"].render(row)[0] for row in take_rows(loaded, slice(2))]
    assert [chat.messages[1]["tool_calls"][0]["function"]["arguments"] for chat in chats] == calls
    assert [chat.tools for chat in chats] == [[tool] for tool in tools]


# Cells that are no text


def test_true_and_false_are_written_as_json_has_them(tokenizer, make_config):
    rows = [{"input": "a", "output": True}, {"input": "b", "output": False}, {"input": False, "output": 1e20}]
    data = build_whole(make_config(rows), tokenizer)
    assert texts(data.train) == ["atrue", "bfalse", "false1e+20"]
    chat = FORMATS["messages"].render({"messages": [USER, answer(True)]})[0]
    assert chat.messages[1]["content"] == "true"


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (datetime.date(2024, 2, 29), "write it as text (pandas: rows['output'].astype(str)), or"),
        (datetime.datetime(2024, 2, 29, 1, 2), "write it as text (pandas: rows['output'].astype(str)), or"),
        (datetime.time(1, 2, 3), "write it as text (pandas: rows['output'].astype(str)), or"),
        (datetime.timedelta(hours=1), "write it as text (pandas: rows['output'].astype(str)), or"),
        (decimal.Decimal("1.25"), "write it as text (pandas: rows['output'].astype(str)), or"),
        (b"text", "write the text that the bytes encode (pandas: rows['output'].str.decode('utf-8')), or"),
        ({"a": 1}, "make text of it"),
        (["a"], "make text of it"),
    ],
)
def test_a_column_that_holds_no_text_names_a_remedy_that_works(value, way_out, tokenizer, tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table({"input": ["a", "b"], "output": pa.array([value, value])})
    pq.write_table(table, path)
    config = DataConfig(name="toy", path=str(path), eval_dataset_size=1)
    sentence = refuse(config, tokenizer)
    assert "row 1: data.format=input-output needs text in column output, but a row holds " in sentence
    assert way_out in sentence
    if "pandas" in sentence:
        rows = table.to_pandas()
        remedy = sentence.split("pandas: ")[1].split("), or")[0]
        rows["output"] = eval(remedy, {"rows": rows})
        rows.to_parquet(path)
        assert build_data(config, tokenizer).report.train_rows == 1


def test_infinity_is_no_text(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a", "output": Infinity}\n{"input": "b", "output": 1e999}\n')
    assert "needs text in column output, but a row holds inf" in refuse(
        DataConfig(name="toy", path=str(path), eval_dataset_size=1), tokenizer
    )


# Keys that nothing reads


@pytest.mark.parametrize("name", ["auto", "input-output"])
def test_columns_that_nothing_reads_are_named_once(name, tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {"id": i, "input": f"q{i}", "output": "a", "source": "web", "note": "x" if i == 3 else None} for i in range(9)
    ]
    report = build_data(make_config(rows, format=name), tokenizer).report
    assert report.unread == {"id": 9, "source": 9, "note": 1}
    assert [line for line in caplog.messages if "not read" in line] == [
        "toy: not read: id, source, note (in 1 of 9 rows)"
    ]


def test_columns_beside_a_mapped_one_are_named(tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"input": f"q{i}", "output": "a", "reply": "b", "extra": "c"} for i in range(4)]
    config = make_config(rows, columns={"output": "reply"})
    build_data(config, tokenizer)
    assert [line for line in caplog.messages if "not read" in line] == [
        f"data.path={config.path}: not read, for data.columns puts others in their place: output",
        "toy: not read: extra",
    ]


def test_a_column_is_named_where_another_one_was_taken(tokenizer, make_config):
    rows = [{"instruction": "q", "input": "i", "context": "c" * i, "output": "a"} for i in range(4)]
    assert build_data(make_config(rows), tokenizer).report.unread == {"context": 3}


def test_keys_of_turns_and_instances_that_nothing_reads_are_named(tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    turns = [USER | {"lang": "en"}, answer("a", refusal=None, annotations=[], mood="calm")]
    rows = [{"messages": turns}, {"messages": json.dumps(turns)}, {"messages": [USER, answer("b")]}]
    report = build_data(make_config(rows, template="plain", eval_dataset_size=1), tokenizer).report
    assert report.unread == {"messages.lang": 2, "messages.mood": 2}
    assert "toy: not read: messages.lang (in 2), messages.mood (in 2)" in caplog.messages
    row = TrackedRow({"instruction": "a", "instances": [{"input": "b", "output": "c", "constraints": "None."}]})
    FORMATS["self-instruct-tasks"].render(row)
    assert list(row.unread()) == ["instances.constraints"]


def test_columns_of_a_function_s_rows_are_named(tokenizer, make_config, tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "def turn(row):\n    return {'input': row['q'], 'output': row['a'], 'why': 'x'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"q": f"q{i}", "a": "b", "rest": "c"} for i in range(4)]
    assert build_data(make_config(rows, format="own_rows:turn"), tokenizer).report.unread == {"why": 4}


def test_a_name_in_data_columns_that_no_format_reads_is_refused(tokenizer, make_config):
    rows = [{"instruction": "q", "output": "a", "reply": "b"} for _ in range(4)]
    assert refuse(make_config(rows, columns={"outptu": "reply"}), tokenizer) == (
        "data.columns.outptu=reply: the format alpaca reads no column outptu (did you mean output?); it needs "
        "instruction and output or instruction and response"
    )


# Labels of preference

LABELLED = {
    "prompt-completion": ({"prompt": "q", "completion": "a"}, ["label", "Label", "LABEL", "kto_tag"]),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ["label", "Label", "KTO_TAG"],
    ),
    "alpaca": ({"instruction": "q", "output": "a"}, ["kto_tag", "KTO_tag"]),
    "input-output": ({"input": "q", "output": "a"}, ["kto_tag"]),
    "question-answer": ({"question": "q", "answer": "a"}, ["kto_tag"]),
}


@pytest.mark.parametrize(("name", "column"), [(name, column) for name in LABELLED for column in LABELLED[name][1]])
def test_a_label_of_preference_is_read_and_one_that_is_missing_among_others_is_refused(
    name, column, tokenizer, make_config
):
    row = LABELLED[name][0]
    config = make_config([row | {column: label} for label in (True, False, True)])
    config.eval_path = config.path
    data = build_data(config, tokenizer)
    assert (data.report.left_out_rows, data.report.eval_left_out_rows) == (1, 1)
    assert data.report.unread == {}
    for missing in (None, "", " "):
        rows = [row | {column: label} for label in ("true", missing, "false")]
        with pytest.raises(UserError, match=rf"row 2: column {column} holds no label, which 2 of 3 rows have; label"):
            build_data(make_config(rows), tokenizer)


def test_a_column_without_any_label_is_no_label(tokenizer, make_config):
    rows = [LABELLED["messages"][0] | {"label": None} for _ in range(3)]
    assert build_data(make_config(rows), tokenizer).report.train_rows == 2


def test_a_label_of_nan_or_of_no_items_is_missing(tokenizer, make_config, tmp_path):
    row = LABELLED["prompt-completion"][0]
    for labels in ([1.0, float("nan"), 0.0], [[True], [], [False]]):
        pq.write_table(pa.Table.from_pylist([row | {"label": label} for label in labels]), tmp_path / "a.parquet")
        with pytest.raises(UserError, match="column label holds "):
            build_data(make_config([], path=str(tmp_path / "a.parquet")), tokenizer)
