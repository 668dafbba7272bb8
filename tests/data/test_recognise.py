import csv
import gzip
import json
import logging
import pickle
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from qlora.data.chat.conversations import Conversation
from qlora.data.formats.prompts import Segment
from qlora.data.formats.recognise import choose_format
from qlora.data.formats.renderers import FORMATS
from qlora.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the checkout")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def choose(name, *rows, columns=None, **options):
    return choose_format(name, columns or list(rows[0]), rows, **options)


def refuse(name, *rows, **options):
    with pytest.raises(UserError) as caught:
        choose(name, *rows, **options)
    return str(caught.value)


def row(*columns):
    return dict.fromkeys(columns, "x")


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["output", "instruction", "id"], "alpaca"),
        (["instruction", "context", "response", "category"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["input", "output"], "input-output"),
        (["input", "output", "source", "subset"], "input-output"),
        (["text"], "text"),
        (["chosen", "rejected"], "chosen"),
        (["prompt", "chosen", "rejected"], "chosen"),
        (["conversations", "chosen", "rejected"], "chosen"),
        (["segments"], "segments"),
        (["source", "target", "task"], "segments"),
        (["prompt", "completion"], "prompt-completion"),
        (["question", "answer"], "question-answer"),
        (["messages"], "messages"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["conversations", "tools"], "conversations"),
        (["id", "instruction", "instances"], "self-instruct-tasks"),
    ],
)
def test_auto_recognises_the_format_by_the_columns(columns, name):
    assert choose("auto", row(*columns)).name == name
    assert choose_format("auto", columns, []).name == name


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        ({"text": "<human>: a\n<bot>: b", "metadata": {}}, "human-bot"),
        ({"text": "<s>[INST] a [/INST] b </s>"}, "inst"),
        ({"text": "### Human: a### Assistant: b"}, "text"),
        ({"instruction": "a", "instances": [{"instruction_with_input": "b", "output": "c"}]}, "unnatural"),
        ({"instruction": "a", "instances": [{"input": "b", "output": "c"}]}, "self-instruct-tasks"),
        ({"instruction": "a", "instruction_with_input": "b", "input": "c", "output": "d"}, "unnatural"),
    ],
)
def test_auto_looks_at_the_first_rows_where_columns_say_too_little(cells, name):
    assert choose("auto", cells, cells).name == name


def test_a_mark_in_some_texts_alone_makes_no_layout():
    assert choose("auto", {"text": "<s>[INST] a [/INST] b </s>"}, {"text": "about [INST] and [/INST]"}).name == "text"


def test_auto_says_what_it_decided_and_what_else_would_fit(caplog):
    caplog.set_level(logging.INFO)
    choose("auto", row("text", "input", "output"))
    choose("auto", row("instruction", "output", "prompt"), key="data.mix.mine.path")
    choose("auto", {"text": "### Human: a### Assistant: b"})
    choose("auto", {"messages": TURNS, "label": True})
    choose("auto", row("chosen", "rejected"))
    choose("auto", {"text": "<human>: a\n<bot>: b"}, key="data.eval_path")
    assert caplog.messages == [
        "data.format=auto: input-output, by the columns text, input, output; text would fit too, set data.format to "
        "choose",
        "data.mix.mine.format=auto: alpaca, by the columns instruction, output, prompt",
        "data.format=auto: text, by the column text (trained as a whole; data.format=guanaco counts the loss on the "
        "answers alone)",
        "data.format=auto: messages, by the columns messages, label (rows whose label is false are left out)",
        "data.format=auto: chosen, by the columns chosen, rejected",
        "data.format=auto: human-bot, by the column text (whose texts read '<human>: ... <bot>: ...'); text would fit "
        "too, set data.format to choose",
    ]


def test_auto_names_the_closest_formats_and_the_columns_to_name():
    assert refuse("auto", row("instruction", "input", "answer")) == (
        "data.format=auto recognises no format: data.path has the columns instruction, input, answer. Closest: alpaca, "
        "which lacks output (data.columns.output=answer); input-output, which lacks output "
        "(data.columns.output=answer); or map the rows with data.format=module:function"
    )
    assert "(data.columns.question=Question data.columns.answer=Answer)" in refuse("auto", row("Question", "Answer"))
    assert "lacks input and output (data.mix.a.columns.input=inputs data.mix.a.columns.output=targets)" in refuse(
        "auto", row("inputs", "targets"), key="data.mix.a.path"
    )
    assert "which lacks completion (data.columns.completion=COLUMN)" in refuse("auto", row("prompt", "verdict"))


def test_auto_lists_all_formats_when_none_is_close():
    sentence = refuse("auto", row("a", "b"))
    assert sentence.startswith(
        "data.format=auto recognises no format: data.path has the columns a, b. Name the columns of a format with "
        "data.columns.NAME=COLUMN: unnatural (instruction and instances or "
    )
    assert all(f"{name} (" in sentence for name in FORMATS)


def test_turns_under_another_name_are_found():
    sentence = refuse("auto", {"task_id": 1, "traj": TURNS})
    assert sentence.endswith("traj holds the turns of a chat: data.columns.messages=traj")


def test_trees_of_messages_are_named():
    tree = {"message_tree_id": "1", "tree_state": "ready", "prompt": {"text": "a", "replies": []}}
    assert refuse("auto", tree).endswith(
        "prompt holds trees of messages: turn each into rows with data.format=module:function"
    )


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (["instruction"], "data.columns.output=COLUMN"),
        (["question", "id"], "data.columns.answer=COLUMN"),
        (["prompt", "category"], "data.columns.completion=COLUMN"),
        (["input", "task_id"], "data.columns.output=COLUMN"),
        (["query", "id"], "data.columns.input=query data.columns.output=COLUMN"),
    ],
)
def test_prompts_without_answers_are_an_error(columns, named):
    assert refuse("auto", row(*columns)) == (
        f"data.format=auto recognises no format: data.path has the columns {', '.join(columns)}. They are prompts "
        f"only: there is nothing to train on. Name the column of answers ({named}), or use rows that have answers"
    )


def test_texts_with_a_question_id_are_prompts():
    assert refuse("auto", row("question_id", "text", "category")) == (
        "data.format=auto: data.path has the columns question_id, text, category, prompts only: there is nothing to "
        "train on. Name the column of answers (data.columns.input=text data.columns.output=COLUMN), use rows that have "
        "answers, or train on the text as a whole with data.format=text"
    )
    assert choose("text", row("question_id", "text", "category")).name == "text"


def test_a_multiple_choice_test_is_not_trained_without_its_choices():
    sentence = refuse("auto", row("question", "choice0", "answer"))
    assert "a multiple-choice test; the answers mean little without choice0." in sentence
    assert choose("question-answer", row("question", "choice0", "answer")).name == "question-answer"


def test_an_unfit_format_names_its_needs_and_the_one_that_fits():
    assert refuse("alpaca", row("text"), key="data.eval_path") == (
        "data.format=alpaca needs the columns instruction and output or instruction and response; data.eval_path has "
        "text. They fit data.format=text"
    )


def test_a_fit_format_is_taken_as_it_is():
    choice = choose("guanaco", row("text"))
    assert (choice.name, choice.why, choice.format) == ("guanaco", "data.format=guanaco", FORMATS["guanaco"])


NESTED = {
    "instruction": "a",
    "instances": [{"instruction_with_input": "b", "output": "c"}],
    "reformulations": [{"instruction_with_input": "d", "output": "e"}],
}


@pytest.mark.parametrize("name", ["auto", "unnatural"])
def test_reformulations_are_added_where_asked_for(name):
    assert len(choose(name, NESTED).format.render(NESTED)) == 1
    choice = choose(name, NESTED, reformulations=True)
    assert choice.why.endswith("; with its reformulations")
    assert len(choice.format.render(NESTED)) == 2


def test_reformulations_of_another_format_are_refused():
    assert refuse("text", row("text"), reformulations=True) == (
        "data.reformulations=true is only read by the format unnatural, but data.path is read as text; leave it out"
    )


def test_reformulations_that_are_not_there_are_an_error():
    assert refuse("unnatural", row("instruction", "instances"), reformulations=True) == (
        "data.reformulations=true needs the column reformulations; data.path has instruction, instances"
    )


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes a module of the user's and returns its name."""
    names = []

    def write(text):
        names.append(f"own_{len(names)}_{tmp_path.name.replace('-', '_')}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_function_of_the_user_s_maps_rows_to_another_format(write_module, caplog):
    caplog.set_level(logging.INFO)
    path = write_module("def to_row(row):\n    return {'question': row['q'], 'answer': row['a']}\n") + ":to_row"
    choice = choose(path, {"q": "1 + 1?", "a": "2"})
    assert choice.name == path
    assert caplog.messages == [
        f"data.format={path}: its rows are read as question-answer, by the columns question, answer"
    ]
    assert choice.format.lacks([]) == []
    reader = pickle.loads(pickle.dumps(choice.format))
    assert reader.render({"q": "2 + 2?", "a": "4"}) == [
        [Segment("Question: 2 + 2?\nAnswer: ", False), Segment("4", True)]
    ]


def test_a_function_may_return_several_rows_or_none(write_module):
    path = write_module("def f(row):\n    return [{'input': i, 'output': i} for i in row['n']] or None\n") + ":f"
    render = choose(path, {"n": []}, {"n": ["a"]}).format.render
    assert len(render({"n": ["a", "b"]})) == 2
    assert render({"n": []}) == []


def test_a_function_that_leaves_out_the_sample_is_read_row_by_row(write_module):
    path = write_module("def f(row):\n    return {'text': row['n']} if row['n'] else None\n") + ":f"
    choice = choose(path, {"n": ""}, {"n": ""})
    assert choice.why == "it left out the whole sample, so that each of its rows is recognised by itself"
    assert choice.format.render({"n": "a"}) == [[Segment("", False), Segment("a", True)]]


@pytest.mark.parametrize(
    ("returned", "kind"),
    [("'a'", "str"), ("5", "int"), ("[{'text': 'a'}, 'b']", "a list with str"), ("('a',)", "tuple")],
)
def test_a_function_that_returns_no_row_is_an_error(write_module, returned, kind):
    path = write_module(f"def f(row):\n    return {returned}\n") + ":f"
    assert refuse(path, {"n": 1}) == (
        f"data.format={path}: returned {kind} for a row; it must return a row (dict), a list of rows, or None to "
        "leave the row out"
    )


def test_rows_of_a_function_that_fit_nothing_are_an_error(write_module):
    path = write_module("def f(row):\n    return {'a': 1}\n") + ":f"
    assert f"recognises no format: {path} returns the columns a. " in refuse(path, {"n": 1})


def test_a_function_that_is_not_there_is_an_error(write_module):
    module = write_module("def to_row(row):\n    return row\n")
    assert refuse(f"{module}:to_rwo", {"n": 1}) == (
        f"data.format={module}:to_rwo: module {module} has no function to_rwo (did you mean to_row?)"
    )
    assert refuse("no_such_module:f", {"n": 1}, key="data.mix.a.path") == (
        "data.mix.a.format=no_such_module:f: there is no module no_such_module; it must be installed or lie on "
        "PYTHONPATH"
    )


def load(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    if ".csv" in path.name or ".tsv" in path.name:
        return list(csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if ".tsv" in path.name else ","))
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


KINDS = {
    "alpaca_data.json": "alpaca",
    "alpaca_gpt4_en.jsonl": "alpaca",
    "c4.jsonl": "text",
    "chat_messages_tools.jsonl": "messages",
    "code_alpaca.json": "alpaca",
    **{
        f"containers/alpaca_300.{end}": "alpaca"
        for end in ("csv", "csv.gz", "json", "jsonl", "jsonl.gz", "parquet", "tsv")
    },
    "dolly_15k.jsonl": "alpaca",
    "dolly_alpaca_prompt.jsonl": "alpaca",
    "dpo_en_demo.json": "chosen",
    "glaive_toolcall_en_demo.json": "conversations",
    "gpteacher_toolformer.json": "alpaca",
    "gsm8k_train.jsonl": "question-answer",
    "guanaco_eval_text.jsonl": "text",
    "guanaco_llama2_inst.parquet": "inst",
    "guanaco_text.jsonl": "text",
    "hh_rlhf_harmless.jsonl.gz": "chosen",
    "kto_en_demo.json": "messages",
    "mmlu/five_shot_mmlu_val.jsonl.gz": "input-output",
    "mmlu/zero_shot_mmlu_val.json": "input-output",
    "oasst1_validation.jsonl": "input-output",
    "oig_layout_from_dolly.jsonl": "human-bot",
    "self_instruct_p3.jsonl": "prompt-completion",
    "self_instruct_seed_tasks.jsonl": "self-instruct-tasks",
    "sharegpt_fastchat.json": "conversations",
    "tinystories.jsonl": "text",
    "unnatural_instructions.jsonl": "alpaca",
}
REFUSED = {
    "oasst_message_trees.jsonl": "holds trees of messages",
    "tau_bench_airline.jsonl": "data.columns.messages=traj",
    "vicuna_questions.jsonl": "prompts only: there is nothing to train on",
    "mmlu/csv/test/anatomy_test.csv": "a multiple-choice test",
}


def render_all(rows, **options):
    choice = choose("auto", *rows[:8], **options)
    return choice, [choice.format.render(row) for row in rows]


@needs_real
@pytest.mark.parametrize(("file", "kind"), KINDS.items())
def test_a_published_file_is_recognised_and_every_row_rendered(file, kind):
    rows = load(REAL / file)
    choice, rendered = render_all(rows)
    assert choice.name == kind
    left_out = sum(row.get("label") is False for row in rows)
    assert sum(not examples for examples in rendered) == left_out
    examples = [example for examples in rendered for example in examples]
    answered = sum(map(is_answered, examples))
    # Alpaca and HH-RLHF hold a few questions whose answer is empty.
    assert answered >= 0.97 * len(examples) if kind in ("alpaca", "chosen") else answered == len(examples)


def is_answered(example):
    if isinstance(example, Conversation):
        return any(turn["role"] == "assistant" for turn in example.messages)
    return any(segment.trained and segment.text for segment in example)


@needs_real
@pytest.mark.parametrize(("file", "sentence"), REFUSED.items())
def test_a_published_file_that_cannot_be_trained_on_is_refused(file, sentence):
    assert sentence in refuse("auto", *load(REAL / file)[:8])


@needs_real
def test_every_published_file_of_rows_is_tried():
    files = {str(path.relative_to(REAL)) for path in REAL.rglob("*.*") if path.is_file()}
    rest = ("models/", "tokenizers/", "mmlu/csv/", "README", "tinyshakespeare")
    assert {file for file in files if not file.startswith(rest)} == {*KINDS, *REFUSED} - {
        "mmlu/csv/test/anatomy_test.csv"
    }


@needs_real
def test_agents_of_tau_bench_are_chats_under_another_name():
    rows = [{"messages": row["traj"]} for row in load(REAL / "tau_bench_airline.jsonl")]
    choice, rendered = render_all(rows)
    assert choice.name == "messages"
    calls = [c for (chat,) in rendered for turn in chat.messages for c in turn.get("tool_calls", ())]
    assert calls
    assert all(isinstance(call["function"]["arguments"], dict) and call["id"] for call in calls)


@needs_real
@pytest.mark.parametrize("file", ["guanaco_text.jsonl", "guanaco_eval_text.jsonl"])
def test_guanaco_texts_can_be_read_as_chats(file):
    rows = load(REAL / file)
    format_ = choose("guanaco", *rows[:8]).format
    for row in rows:
        (chat,) = format_.render(row)
        assert [turn["role"] for turn in chat.messages[:2]] == ["user", "assistant"]
        assert "### Human:" not in "".join(turn["content"] for turn in chat.messages)


@needs_real
def test_tools_and_calls_of_glaive_are_in_openai_s_shape():
    _, rendered = render_all(load(REAL / "glaive_toolcall_en_demo.json"))
    tools = [tool for (chat,) in rendered for tool in chat.tools or ()]
    assert all(tool["type"] == "function" and tool["function"]["name"] for tool in tools)
    calls = [c for (chat,) in rendered for turn in chat.messages for c in turn.get("tool_calls", ())]
    assert len(calls) >= 137
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
