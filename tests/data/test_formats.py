import logging

import pytest

from qlora.data.formats import FORMATS, choose_format, recognise
from qlora.errors import ConfigError
from qlora.schema import FORMAT_NAMES


def test_the_config_knows_exactly_the_formats_of_the_table():
    assert set(FORMAT_NAMES) == {"auto", *FORMATS}


def test_alpaca_with_input_renders_the_prompt_with_context():
    row = {"instruction": "Add {these}.", "input": "1, 2", "output": "3"}
    assert FORMATS["alpaca"].render(row) == [
        (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {these}.\n\n### Input:\n1, 2\n\n### Response: ",
            False,
        ),
        ("3", True),
    ]


@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input_renders_the_prompt_without_context(row):
    rendered = FORMATS["alpaca"].render({"instruction": "Greet.", "output": "Hi", **row})
    assert rendered == [
        (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nGreet.\n\n### Response: ",
            False,
        ),
        ("Hi", True),
    ]


def test_input_and_output_stay_verbatim():
    assert FORMATS["input-output"].render({"input": " a\n", "output": " b "}) == [(" a\n", False), (" b ", True)]


def test_whole_texts_have_an_empty_source():
    assert FORMATS["text"].render({"text": "### Human: a"}) == [("", False), ("### Human: a", True)]
    assert FORMATS["chosen"].render({"chosen": "b", "rejected": "c"}) == [("", False), ("b", True)]


def test_segments_are_taken_as_pairs_or_as_source_and_target():
    render = FORMATS["segments"].render
    assert render({"segments": [["a", True], ["b", False]]}) == [("a", True), ("b", False)]
    assert render({"source": "a", "target": "b"}) == [("a", False), ("b", True)]


@pytest.mark.parametrize("pairs", ["ab", [["a"]], [["a", 1]], 5, [[None, True]]])
def test_broken_segments_are_shown(pairs):
    with pytest.raises(ConfigError, match=r"data\.format=segments: a row holds .* as segments; each must be a pair"):
        FORMATS["segments"].render({"segments": pairs})


def test_a_number_is_text_and_an_object_is_an_error():
    assert FORMATS["input-output"].render({"input": 2, "output": 0.5}) == [("2", False), ("0.5", True)]
    with pytest.raises(ConfigError, match=r"needs text in column chosen, but a row holds \{'value': 'x'\}"):
        FORMATS["chosen"].render({"chosen": {"value": "x"}})


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["output", "instruction", "id"], "alpaca"),
        (["input", "output"], "input-output"),
        (["text"], "text"),
        (["chosen", "rejected"], "chosen"),
        (["segments"], "segments"),
        (["source", "target", "task"], "segments"),
    ],
)
def test_auto_recognises_the_format_by_the_columns(columns, name):
    assert choose_format("auto", columns) == name


def test_auto_says_what_it_decided_and_what_else_would_fit(caplog):
    caplog.set_level(logging.INFO)
    recognise(["text", "input", "output"])
    assert caplog.messages == [
        "data.format=auto: input-output, by the columns text, input, output; text would fit too, set data.format to "
        "choose"
    ]


def test_auto_names_the_closest_format_and_what_it_lacks():
    with pytest.raises(ConfigError) as caught:
        recognise(["instruction", "input", "response"])
    assert str(caught.value) == (
        "data.format=auto recognises no format: data.path has the columns instruction, input, response. "
        "Closest is alpaca, which lacks output; rename the columns in the data"
    )


def test_auto_lists_all_formats_when_none_is_close():
    with pytest.raises(ConfigError, match=r"columns question, answer\. Rename them to the columns of a format: alpaca"):
        recognise(["question", "answer"])


def test_an_unfit_format_names_its_needs_and_the_one_that_fits():
    with pytest.raises(ConfigError) as caught:
        choose_format("alpaca", ["text"], key="data.eval_path")
    assert str(caught.value) == (
        "data.format=alpaca needs the columns instruction and output; data.eval_path has text. "
        "They fit data.format=text"
    )
