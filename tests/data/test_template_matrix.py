"""Published chat templates: what the loss counts of every shape of conversation, against what is said, sent and marked.

TRL marks in its training templates what an assistant writes. Where it counts more than we do, that is by one of these
rules: it counts what the generation prompt has already written; the white space behind an end token, and what stands
behind the end of the last turn only, which no one generates; and turns that say nothing.
"""

import re
from itertools import groupby
from pathlib import Path

import pytest
from template_matrix import FAMILIES, SHAPES, build_conversation, build_table, build_writer, read_template, trl_folder

from qlora.config.options import CONF_DIR
from qlora.data.chat.message_form import read_speech
from qlora.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
CHATTING = {
    file.stem: match.groups()
    for file in sorted((CONF_DIR / "model").glob("*.yaml"))
    if (match := re.search(r"^# Its chat template is that of (.+); a turn ends with (\S+)$", file.read_text(), re.M))
}
"""The presets of models that learned to chat, with their template and the token that ends a turn."""


@pytest.fixture(params=FAMILIES)
def family(request):
    if read_template(request.param) is None:
        pytest.skip("TRL is not installed: pip install 'qlora[templates]'")
    return request.param


def written_shapes(writer):
    """Yields each conversation that a template can write, with its text."""
    for shape in SHAPES:
        conversation = build_conversation(shape)
        try:
            yield shape, conversation, writer.write(conversation)
        except UserError:
            continue


def send(writer, messages, tools, *, prompt=True):
    return writer.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=writer.template.text, add_generation_prompt=prompt, tokenize=False
    )


def shape_messages(writer, conversation):
    """Returns the messages in the form that the template takes."""
    return list(map(writer.form.plain, conversation.messages))


def bare(text):
    """Returns letters and digits alone, for some templates escape what they write, or write True for true."""
    return re.sub(r"[\W_]+", "", text.replace("\\n", "\n").replace("\\", "")).casefold()


def test_a_turn_holds_what_was_said_and_called_and_ends_with_an_end_token(family):
    writer = build_writer(family)
    tokens = [str(token) for token in writer.tokenizer.added_tokens_decoder.values()]
    shapes = 0
    for shape, conversation, written in written_shapes(writer):
        shapes += 1
        answers = [turn for turn in conversation.messages if turn["role"] == "assistant"]
        answers = [turn for turn in answers if turn["content"] or turn.get("tool_calls")]
        assert len(written.trained) == len(answers), shape
        thoughts = 0
        for span, turn in zip(written.trained, answers, strict=True):
            text = written.text[span.start : span.end]
            speech = read_speech(turn)
            assert bare(speech.content) in bare(text), shape
            thoughts += bare(speech.thought) in bare(text) if speech.thought else 0
            for function in (call["function"] for call in turn.get("tool_calls") or []):
                assert all(
                    bare(str(item)) in bare(text) for item in (function["name"], *function["arguments"].values())
                )
            others = [other["content"] for other in conversation.messages if other["role"] != "assistant"]
            assert not any(other in text for other in others), shape
            followed = written.text[span.end :].strip()
            assert any(text.endswith(token) for token in tokens) or not followed or "GLM" in family, shape
        thinking = sum(1 for turn in answers if read_speech(turn).thought)
        assert thinking - thoughts == written.lost_thoughts, shape
    assert shapes > 5


def test_the_prompt_of_the_last_turn_is_what_a_server_sends(family):
    writer = build_writer(family)
    for shape, conversation, written in written_shapes(writer):
        messages = shape_messages(writer, conversation)
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        sent = send(writer, messages[:last], conversation.tools)
        asked = written.asked.text if written.asked else written.text[: written.turns[-1].span.start]
        assert asked == sent, shape
        assert writer.ask(conversation.messages[:last]).text == send(writer, messages[:last], None), shape


TRAINING = [family for family in FAMILIES if read_template(family, "_training")]


@pytest.mark.skipif(not TRAINING, reason="TRL is not installed: pip install 'qlora[templates]'")
@pytest.mark.parametrize("family", TRAINING)
def test_the_loss_counts_what_trl_s_training_template_marks(family):
    writer = build_writer(family, "_training")
    compared = 0
    for shape, conversation, written in written_shapes(writer):
        spans, text = list(written.trained), written.text
        prompts = list(prompts_behind_messages(writer, conversation))
        for start, end in marked_runs(writer, conversation):
            inside = [spans.pop(0) for span in list(spans) if start <= span.start and span.end <= end]
            if not inside:  # TRL counts a turn that says nothing
                assert shape == "empty answer"
                assert text.index("One?") < start < text.index("Two?")
                continue
            bounds = [start, *(border for span in inside for border in span), end]
            *leads, behind = (text[first:last] for first, last in zip(bounds[::2], bounds[1::2], strict=True))
            assert all(any(lead in prompt for prompt in prompts) for lead in leads), (shape, leads)
            assert not behind.strip() or (behind.strip() == writer.tokenizer.eos_token and end == len(text)), shape
        assert not spans, shape
        compared += 1
    assert compared > 5


def prompts_behind_messages(writer, conversation):
    """Returns what stands behind the last message in the prompt of each turn."""
    messages = shape_messages(writer, conversation)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            earlier = messages[:index]
            yield send(writer, earlier, conversation.tools).rpartition(earlier[-1]["content"] or "\0")[2]


def marked_runs(writer, conversation):
    """Yields start and end of the characters that a template marks as the assistant's."""
    messages = shape_messages(writer, conversation)
    output = writer.tokenizer.apply_chat_template(
        messages, tools=conversation.tools, chat_template=writer.template.text, return_dict=True,
        return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False},
    )  # fmt: skip
    tokens = writer.tokenizer.convert_ids_to_tokens(output["input_ids"])
    sizes = [1 if re.fullmatch(r"<0x..>", token) else len(token.encode()) for token in tokens]
    flags = [flag for size, flag in zip(sizes, output["assistant_masks"], strict=True) for flag in [flag] * size]
    whole = send(writer, messages, conversation.tools, prompt=False).encode()
    start = 0
    for flag, run in groupby(flags):
        end = start + len(list(run))
        if flag:
            yield len(whole[:start].decode()), len(whole[:end].decode())
        start = end


# The table


@pytest.mark.skipif(trl_folder() is None, reason="TRL is not installed: pip install 'qlora[templates]'")
def test_the_table_of_the_docs_is_what_the_code_does():
    text = DOCS.read_text(encoding="utf-8")
    assert build_table() in text, "write it anew: python tests/data/template_matrix.py"


@pytest.mark.parametrize("name", CHATTING)
def test_a_preset_of_a_model_that_chats_names_its_template_and_the_token_that_ends_a_turn(name):
    published, end = CHATTING[name]
    if read_template(published) is None:
        pytest.skip("TRL is not installed: pip install 'qlora[templates]'")
    writer = build_writer(published)
    assert writer.tokenizer.convert_ids_to_tokens(writer.end_id) == end
