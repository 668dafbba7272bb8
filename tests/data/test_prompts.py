"""The chat template of a set asks a question exactly as training did: same words, same tokens, in every format."""

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import qlora
from qlora.config.schema import DataConfig
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.chat.templates import Template, prompt_template, read_template
from qlora.data.formats.prompts import ALPACA, PROMPTS, QUESTION, VERBATIM, Segment, find_prompt
from qlora.data.formats.renderers import FORMATS
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
GUANACO, HH = PROMPTS[3:5]


def load(name):
    if name == "bytes":
        return build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    if name == "no begin":
        return build_byte_tokenizer(eos_token="</s>")
    if name == "embedded":
        return AutoTokenizer.from_pretrained(Path(qlora.__file__).parent / "demo" / "model")
    folder = REAL / ("llama" if name == "newer llama" else name)
    if not folder.is_dir():
        pytest.skip("no shared/data beside the checkout")
    loaded = AutoTokenizer.from_pretrained(folder)
    if name == "newer llama":  # as Llama's `legacy=False`: a blank before a text, but none behind <s>
        loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return loaded


@pytest.fixture(scope="module", params=["bytes", "no begin", "embedded", "llama", "newer llama", "gpt2", "pythia"])
def any_tokenizer(request):
    return load(request.param)


ASKED = "What is a fjord? "
BOTH = "Count the words.\n\n### Input:\none two  three"
TURNS = [{"role": "user", "content": "What is a fjord?"}, {"role": "assistant", "content": "An inlet."}]

# Format: rows, and for each example of them what a person types to ask the same.
CASES = {
    "alpaca": (
        [
            {"instruction": ASKED, "input": "", "output": "An inlet."},
            {"instruction": "Count the words.", "input": "one two  three", "output": "3"},
        ],
        [ASKED, BOTH],
    ),
    "alpaca-newline": (
        [
            {"instruction": ASKED, "input": "", "output": "An inlet."},
            {"instruction": "Count the words.", "input": "one two  three", "output": "3"},
        ],
        [ASKED, BOTH],
    ),
    "self-instruct-tasks": (
        [{"instruction": "Count the words.", "instances": [{"input": "", "output": "0"},
                                                           {"input": "one two  three", "output": "3"}]}],
        ["Count the words.", BOTH],
    ),
    "unnatural": (
        [{"instruction": "x", "instances": [{"instruction_with_input": "Name it.\nInput: bay", "output": "fjord"}]}],
        ["Name it.\nInput: bay"],
    ),
    "question-answer": ([{"question": ASKED, "answer": "An inlet."}], [ASKED]),
    "input-output": ([{"input": "  Name\nit: ", "output": "fjord"}], ["  Name\nit: "]),
    "prompt-completion": ([{"prompt": "Name it.\n\nOutput:", "completion": " fjord"}], ["Name it.\n\nOutput:"]),
    "human-bot": ([{"text": "<human>: What is a fjord?\n<bot>: An inlet."}], ["What is a fjord?"]),
    "segments": ([{"segments": [["Q: a\nA:", False], [" b", True], [" c", False]]}], ["Q: a\nA:"]),
    "chosen": ([{"instruction": ASKED, "chosen": "An inlet.", "rejected": "No."}], [ASKED]),
    "scored": ([{"prompt": ASKED, "completions": ["No.", "An inlet."], "scores": [1, 9]}], [ASKED]),
    "messages": ([{"messages": TURNS}], ["What is a fjord?"]),
    "conversations": ([{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}], ["a?"]),
    "inst": ([{"text": "<s>[INST] a? [/INST] b </s>"}], ["a?"]),
    "guanaco": ([{"text": "### Human: a?### Assistant: b"}], ["a?"]),
    "text": ([{"text": "### Human: a?### Assistant: b"}], None),
}  # fmt: skip


def build(rows, name, base, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_data(DataConfig(name="toy", path=str(path), eval_path=str(path), format=name), base)


def send(base, data, message, **arguments):
    """Returns the ids that a server sends."""
    said = [{"role": "user", "content": message}]
    return base.apply_chat_template(
        said, chat_template=data.template.text, add_generation_prompt=True, return_dict=False, **arguments
    )


def test_every_format_is_a_case():
    assert CASES.keys() == FORMATS.keys()


@pytest.mark.matrix(15)
@pytest.mark.parametrize("name", [name for name, (_, messages) in CASES.items() if messages])
def test_what_chat_sends_is_what_training_saw(name, any_tokenizer, tmp_path):
    rows, messages = CASES[name]
    data = build(rows, name, any_tokenizer, tmp_path)
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), any_tokenizer, data.template)
    for trained, message in zip(data.eval.to_list(), messages, strict=True):
        assert send(any_tokenizer, data, message) == trained["prompt_ids"]
        assert encoder.encode_prompt([{"role": "user", "content": message}]) == trained["prompt_ids"]


@pytest.mark.parametrize("prompt", [GUANACO, HH], ids=lambda prompt: prompt.name)
def test_a_text_that_is_trained_as_a_whole_begins_as_chat_does(prompt, any_tokenizer, tmp_path):
    whole = prompt.prefix + "What is a fjord?" + prompt.behind + " An inlet." + prompt.prefix + "Thanks!"
    data = build([{"text": whole}], "text", any_tokenizer, tmp_path)
    assert data.template.name == f"the prompt of {prompt.name}"
    sent = send(any_tokenizer, data, "What is a fjord?")
    assert data.train[0]["input_ids"][: len(sent)] == sent
    further = [*TURNS, {"role": "user", "content": "Thanks!"}]
    text = any_tokenizer.apply_chat_template(further, chat_template=data.template.text, tokenize=False)
    assert text.replace(any_tokenizer.bos_token or "", "").strip(" ") == (whole + prompt.behind).strip(" ")


def test_a_text_of_no_layout_is_continued(any_tokenizer, tmp_path):
    data = build([{"text": "Once upon a time, there was a fox."}], "text", any_tokenizer, tmp_path)
    sent = send(any_tokenizer, data, "Once upon a time,")
    assert data.train[0]["input_ids"][: len(sent)] == sent


def test_a_message_that_spells_the_end_token_is_text_as_in_training(any_tokenizer, tmp_path):
    message = f"What does {any_tokenizer.eos_token} mean?"
    data = build([{"instruction": message, "output": "the end"}], "alpaca", any_tokenizer, tmp_path)
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), any_tokenizer, data.template)
    ids = encoder.encode_prompt([{"role": "user", "content": message}])
    assert any_tokenizer.eos_token_id not in ids[1:]
    assert any_tokenizer.decode(ids[1:]).strip() == any_tokenizer.decode(data.eval[0]["prompt_ids"][1:]).strip()


def encode(*texts):
    return [[Segment(source, False), Segment(target, True)] for source, target in texts]


def test_the_words_of_a_prompt_are_found_in_rendered_rows():
    both = ALPACA.ask("a", "b")
    assert find_prompt(encode((ALPACA.ask("a"), "x"), (both, "y"))) is ALPACA
    assert find_prompt(encode((both, "y"))) is ALPACA
    assert find_prompt(encode((QUESTION.ask("a"), "x"))) is QUESTION
    assert find_prompt(encode((HH.ask("a"), " x"))) is HH
    assert find_prompt(encode(("", HH.ask("a") + " x"))) is HH
    assert find_prompt(encode(("", GUANACO.ask("a") + " x"))) is GUANACO


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [[]],
        encode((ALPACA.ask("a"), "x"), ("a", "y")),
        encode(("", "### Human: a")),
        encode((GUANACO.ask("a") + " ", "x")),
        encode(("a", "x")),
        encode(("", "")),
    ],
)
def test_rows_of_no_known_words_are_asked_verbatim(examples):
    assert find_prompt(examples) is VERBATIM


def test_rows_that_hold_a_rendered_prompt_are_asked_with_its_words(tokenizer, make_config):
    rows = [{"prompt": ALPACA.ask(f"q{i}"), "completion": "a"} for i in range(4)]
    assert build_data(make_config(rows), tokenizer).template.name == "the prompt of alpaca"


def test_earlier_turns_stand_as_rows_one_behind_the_other(tokenizer):
    turns = [*TURNS, {"role": "user", "content": "Thanks!"}]
    text = prompt_template(QUESTION, tokenizer).text
    written = tokenizer.apply_chat_template(turns, chat_template=text, add_generation_prompt=True, tokenize=False)
    assert written == "<s>Question: What is a fjord?\nAnswer: An inlet.</s>Question: Thanks!\nAnswer: "


def test_a_system_text_stands_before_all(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"}]
    text = prompt_template(QUESTION, tokenizer).text
    written = tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)
    assert written == "<s>Be brief.\n\nQuestion: a?\nAnswer: "


def test_calls_of_tools_have_no_form(tokenizer):
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), tokenizer, prompt_template(VERBATIM, tokenizer))
    with pytest.raises(UserError, match=r"an instruction format has no form for tool calls"):
        encoder.encode_prompt([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])


STOPS = [
    (prompt_template(VERBATIM, load("bytes")), ""),
    (prompt_template(ALPACA, load("bytes")), ""),
    (prompt_template(GUANACO, load("bytes")), "### Human:"),
    (prompt_template(HH, load("bytes")), "\n\nHuman:"),
    (Template("guanaco", read_template("guanaco")), ""),
    (Template("mine", "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"), "\nuser:"),
    (Template("between", "{% for m in messages %}{{ m.content + ('' if loop.last else '</s>') }}{% endfor %}"), ""),
]  # fmt: skip


@pytest.mark.parametrize(("template", "expected"), STOPS, ids=[template.name for template, _ in STOPS])
def test_the_next_question_stops_an_answer_only_where_no_token_does(template, expected, tokenizer):
    writer = build_encoder(DataConfig(name="toy", path="toy.json"), tokenizer, template).writer
    assert writer.stop_text == expected


def test_of_several_sets_the_template_of_the_conversations_is_saved(tokenizer, tmp_path):
    chats, questions, pairs = (tmp_path / f"{name}.jsonl" for name in ("chats", "questions", "pairs"))
    chats.write_text((json.dumps({"messages": TURNS}) + "\n") * 4)
    questions.write_text((json.dumps({"question": "a", "answer": "b"}) + "\n") * 4)
    pairs.write_text((json.dumps({"input": "a", "output": "b"}) + "\n") * 4)

    def build_mix(*paths):
        mix = {path.stem: {"path": str(path)} for path in paths}
        return build_data(DataConfig(name="mix", path=None, mix=mix, eval_dataset_size=2), tokenizer)

    assert build_mix(pairs, chats).template.name == "guanaco"
    assert build_mix(questions, pairs).template.name == "the prompt of question-answer"
    assert build_mix(pairs, questions).template.name == "the prompt of verbatim"


def test_the_template_says_where_an_answer_ends(tokenizer, make_config):
    assert build_data(make_config([{"question": "a", "answer": "b"}] * 3), tokenizer).end_id == tokenizer.eos_token_id
    whole = [{"text": GUANACO.ask("a") + " b"}] * 3
    assert build_data(make_config(whole), tokenizer).end_id is None
