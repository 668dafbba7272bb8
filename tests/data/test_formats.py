import json
import pickle

import pytest

from qlora.config.registries.data_formats import FORMAT_NAMES
from qlora.data.chat.conversations import Conversation
from qlora.data.formats.prompts import Segment
from qlora.data.formats.renderers import FORMATS, WITH_REFORMULATIONS
from qlora.errors import UserError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def pair(source, target):
    return [[Segment(source, False), Segment(target, True)]]


def chat(*turns):
    return [Conversation([{"role": role, "content": content} for role, content in turns], None)]


def render(name, **row):
    return FORMATS[name].render(row)


def test_the_config_knows_exactly_the_formats_of_the_table():
    assert set(FORMAT_NAMES) == {"auto", *FORMATS}


def test_every_format_can_go_to_other_processes():
    assert pickle.loads(pickle.dumps(FORMATS)) == FORMATS
    assert pickle.loads(pickle.dumps(WITH_REFORMULATIONS)).needs == FORMATS["unnatural"].needs


def test_alpaca_with_input_renders_the_prompt_with_context():
    prompt = f"{WITH_INPUT}### Instruction:\nAdd {{these}}.\n\n### Input:\n1, 2\n\n### Response: "
    assert render("alpaca", instruction="Add {these}.", input="1, 2", output="3") == pair(prompt, "3")
    assert render("alpaca", instruction="Add {these}.", context="1, 2", response="3", category="x") == pair(prompt, "3")


@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}, {"context": ""}, {"input": None, "context": None}])
def test_alpaca_without_input_renders_the_prompt_without_context(row):
    rendered = render("alpaca", instruction="Greet.", output="Hi", **row)
    assert rendered == pair(f"{WITHOUT_INPUT}### Instruction:\nGreet.\n\n### Response: ", "Hi")


def test_alpaca_takes_the_answer_column_that_is_filled():
    prompt = f"{WITHOUT_INPUT}### Instruction:\nGreet.\n\n### Response: "
    assert render("alpaca", instruction="Greet.", output="", response="Hi") == pair(prompt, "Hi")


def test_input_and_output_stay_verbatim():
    assert render("input-output", input=" a\n", output=" b ") == pair(" a\n", " b ")


def test_prompt_and_completion_stay_verbatim_but_for_the_set_s_own_end_mark():
    assert render("prompt-completion", prompt="a\n", completion=" b<|endoftext|>") == pair("a\n", " b")
    assert render("prompt-completion", prompt="a", completion="<|endoftext|> b") == pair("a", "<|endoftext|> b")


def test_prompt_and_completion_of_turns_are_a_chat():
    asked, answered = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    expected = chat(("user", "a"), ("assistant", "b"))
    assert render("prompt-completion", prompt=asked, completion=answered) == expected
    assert render("prompt-completion", prompt=json.dumps(asked), completion=json.dumps(answered)) == expected
    assert render("prompt-completion", prompt="a", completion=answered) == expected


def test_a_completion_that_is_json_but_no_chat_is_text():
    for text in ('[1, "b"]', "[]", '{"role": 1}', '[{"from": 1}]', "[broken"):
        assert render("prompt-completion", prompt="a", completion=text) == pair("a", text)
        assert render("chosen", prompt="a", chosen=text) == pair("a", text)


def test_rows_whose_label_is_false_are_left_out():
    assert render("prompt-completion", prompt="a", completion="b", label=False) == []
    assert render("prompt-completion", prompt="a", completion="b", label=True) == pair("a", "b")


def test_question_and_answer_are_named():
    assert render("question-answer", question="1 + 1?", answer="2") == pair("Question: 1 + 1?\nAnswer: ", "2")


def test_whole_texts_have_an_empty_source():
    assert render("text", text="### Human: a") == pair("", "### Human: a")
    dialogue = "\n\nHuman: a\n\nAssistant: b"
    assert render("chosen", chosen=dialogue, rejected="c") == pair("", dialogue)
    assert render("chosen", chosen=dialogue, prompt="\n\nHuman: a\n\nAssistant:") == pair("", dialogue)


def test_a_chosen_text_is_trained_after_its_prompt():
    assert render("chosen", prompt="a", chosen="b") == pair("a", "b")
    prompt = f"{WITH_INPUT}### Instruction:\nx\n\n### Input:\ny\n\n### Response: "
    assert render("chosen", instruction="x", input="y", chosen="b") == pair(prompt, "b")


ASKED, ANSWERED = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [ASKED], "chosen": ANSWERED, "rejected": ANSWERED},
        {"conversations": [ASKED], "chosen": "b"},
        {"conversations": json.dumps([ASKED]), "chosen": json.dumps(ANSWERED)},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "b"},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}]},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"question": "a", "chosen": "b"},
    ],
)
def test_chosen_turns_answer_the_turns_before_them(row):
    assert FORMATS["chosen"].render(row) == chat(("user", "a"), ("assistant", "b"))


def test_a_system_column_goes_before_a_chosen_chat():
    expected = chat(("system", "s"), ("user", "a"), ("assistant", "b"))
    assert render("chosen", system="s", question="a", chosen="b") == expected


def test_one_question_and_answer_of_human_and_bot_are_split_as_in_the_original():
    text = "Background: x\n<human>: a?\nYes?\n<bot>: b <bot>: c"
    expected = (text.split("\n<bot>: ")[0].replace("<human>: ", ""), text.split("\n<bot>: ")[1])
    assert render("human-bot", text=text) == pair(*expected)


def test_more_turns_of_human_and_bot_are_a_chat():
    text = "Be kind.\n<human>: a\n<bot>: b\nb\n<human>: c\n<bot>: d"
    expected = chat(("system", "Be kind."), ("user", "a"), ("assistant", "b\nb"), ("user", "c"), ("assistant", "d"))
    assert render("human-bot", text=text) == expected
    assert render("human-bot", text="<human>: a\n<bot>: b\n<human>: c") == chat(
        ("user", "a"), ("assistant", "b"), ("user", "c")
    )


def test_guanaco_texts_are_a_chat():
    text = "### Human: a### Assistant: b\n### c ### Human: d### Assistant:"
    assert render("guanaco", text=text) == chat(
        ("user", "a"), ("assistant", "b\n### c"), ("user", "d"), ("assistant", "")
    )


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("<s>[INST] a [/INST] b </s>", [("user", "a"), ("assistant", "b")]),
        (
            "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>",
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            "[INST]a[/INST]b</s> <s>[INST]c[/INST]",
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")],
        ),
    ],
)
def test_llama_2_texts_are_a_chat(text, turns):
    assert render("inst", text=text) == chat(*turns)


@pytest.mark.parametrize(
    ("name", "text", "marks"),
    [
        ("human-bot", "a", "'<human>: ' and '<bot>: '"),
        ("guanaco", "a", "'### Human: ' and '### Assistant: '"),
        ("inst", "a", r"'\[INST\]' and '\[/INST\]'"),
        ("inst", "b [INST] a [/INST] c", r"'\[INST\]' and '\[/INST\]'"),
    ],
)
def test_a_text_without_the_marks_of_its_format_is_shown(name, text, marks):
    with pytest.raises(UserError, match=rf"^data\.format={name} needs {marks} in column text, but a row holds '"):
        render(name, text=text)


def test_nested_tasks_give_an_example_an_instance():
    instances = [{"input": "", "output": "x"}, {"input": "i", "output": "y"}]
    expected = [
        *render("alpaca", instruction="Do.", output="x"),
        *render("alpaca", instruction="Do.", input="i", output="y"),
    ]
    columns = {"input": ["", "i"], "output": ["x", "y"]}
    for cell in (instances, json.dumps(instances), columns):
        assert render("self-instruct-tasks", instruction="Do.", instances=cell) == expected
    assert render("self-instruct-tasks", instruction="Do.", instances=[]) == []


@pytest.mark.parametrize("cell", ["x", 5, ["x"]])
def test_broken_instances_are_shown(cell):
    with pytest.raises(UserError, match="needs a list of objects in column instances, but a row holds"):
        render("self-instruct-tasks", instruction="Do.", instances=cell)


UNNATURAL = {
    "instruction": "Do.",
    "instances": [{"instruction_with_input": "Do. i", "input": "i", "constraints": "None.", "output": "x"}],
    "reformulations": [{"instruction": "Act.", "instruction_with_input": "Act: i", "input": "i", "output": "y"}],
}


def test_unnatural_instructions_stay_verbatim_and_leave_reformulations_out():
    assert FORMATS["unnatural"].render(UNNATURAL) == pair("Do. i", "x")
    assert FORMATS["unnatural"].render({"instruction_with_input": "Do. i", "output": "x"}) == pair("Do. i", "x")


def test_reformulations_are_rendered_where_asked_for():
    assert WITH_REFORMULATIONS.render(UNNATURAL) == pair("Do. i", "x") + pair("Act: i", "y")
    assert WITH_REFORMULATIONS.render(UNNATURAL | {"reformulations": None}) == pair("Do. i", "x")


def test_flattened_unnatural_instructions_are_rendered_as_alpaca():
    row = {"instruction": "Do.", "input": "i", "output": "x"}
    assert FORMATS["unnatural"].render(row) == FORMATS["alpaca"].render(row)


def test_segments_are_taken_as_pairs_or_as_source_and_target():
    expected = [[Segment("a", True), Segment("b", False)]]
    assert render("segments", segments=[["a", True], ["b", False]]) == expected
    assert render("segments", segments='[["a", true], ["b", false]]') == expected
    assert render("segments", source="a", target="b") == pair("a", "b")


@pytest.mark.parametrize("pairs", ["ab", [["a"]], [["a", 1]], 5, [[None, True]]])
def test_broken_segments_are_shown(pairs):
    with pytest.raises(UserError, match=r"data\.format=segments: a row holds .* as segments; each must be a pair"):
        render("segments", segments=pairs)


def test_a_number_is_text_and_an_object_or_a_list_is_an_error():
    assert render("input-output", input=2, output=0.5) == pair("2", "0.5")
    with pytest.raises(UserError) as caught:
        render("alpaca", instruction="a", output=["b"])
    assert str(caught.value) == (
        "data.format=alpaca needs text in column output, but a row holds ['b']; make text of it with a function of "
        "your own (data.format=module:function)"
    )
    with pytest.raises(UserError, match=r"data\.format=chosen needs text in column chosen, but a row holds \{'value'"):
        render("chosen", chosen={"value": "x"})
