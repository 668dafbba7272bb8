"""Nothing that a turn holds is left out of its text without a word, and each template is given the form it takes."""

import json
import re
from datetime import datetime

import pytest
from transformers import AddedToken

from qlora.config.schema import DataConfig, TrainOn
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.chat.chat_mask import ChatWriter
from qlora.data.chat.message_form import MARK, Piece, find_form
from qlora.data.chat.templates import Template, read_template
from qlora.data.formats.renderers import FORMATS
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

IM = ("<|im_start|>", "<|im_end|>")
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m.content }}" + TAIL
CALLS = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>CALL</call>{% endfor %}" + TAIL
STRIPS = HEAD + "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}" + TAIL
LAST = (
    HEAD
    + (
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    )
    + TAIL
)
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, name="weather"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages, **columns):
    (conversation,) = FORMATS["messages"].render({"messages": list(messages), **columns})
    return conversation


@pytest.fixture(scope="module")
def base():
    built = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    built.add_tokens([AddedToken(token, normalized=False, special=True) for token in IM])
    return built


@pytest.fixture(scope="module")
def write(base):
    def write(text, *messages, train_on=TrainOn.assistant, **columns):
        return ChatWriter(base, Template("mine.jinja", text), train_on).write(chat(*messages, **columns))

    return write


def spans(written):
    return [written.text[span.start : span.end] for span in written.trained]


CALLED = (user("Cold?"), assistant("", tool_calls=[call({"city": "Oslo"})]), {"role": "tool", "content": "3"})


# Calls


@pytest.mark.parametrize("text", [PLAIN, STRIPS, read_template("chatml").replace("message.tool_calls", "message.none")])
@pytest.mark.parametrize("content", ["", "Let me see.", None])
def test_a_call_that_the_template_does_not_write_is_refused(text, content, write):
    turn = assistant(content, tool_calls=[call({}, "first"), call({"a": 1}, "second")])
    with pytest.raises(UserError) as raised:
        write(text, user("Cold?"), turn, {"role": "tool", "content": "3"}, assistant("Yes."))
    assert str(raised.value) == (
        "data.template=mine.jinja: turn 2 of 4 holds a call (first and second), which the template does not write, so "
        "it would not be trained; data.template=chatml writes it"
    )


def test_a_template_that_writes_the_first_of_two_calls_is_refused(write):
    first = HEAD + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}" + TAIL
    assert "weather" in spans(write(first, *CALLED))[0]
    with pytest.raises(UserError, match=r"turn 2 of 2 holds a call \(weather and clock\)"):
        write(first, user("Cold?"), assistant("", tool_calls=[call({}), call({}, "clock")]))


def test_a_template_that_writes_the_name_of_a_call_alone_is_refused(write):
    text = CALLS.replace("CALL", "{{ c.function.name }}")
    assert spans(write(text, user("Cold?"), assistant("", tool_calls=[call({})]))) == ["<call>weather</call><|im_end|>"]
    with pytest.raises(UserError, match=r"turn 2 of 3 holds a call \(weather\)"):
        write(text, *CALLED)


@pytest.mark.parametrize("arguments", [{"a": 1}, {"on": True}, {"x": None}, {"l": [{"n": 2.5}]}, {"a": 0, "b": False}])
@pytest.mark.parametrize("as_text", ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '' }}"])
def test_arguments_without_any_text_are_missed_like_others(arguments, as_text, write):
    turn = assistant("", tool_calls=[call(arguments)])
    kept = CALLS.replace("CALL", "{{ c.function.name }}" + as_text)
    assert json.dumps(arguments) in spans(write(kept, user("Cold?"), turn))[0]
    for text in (
        CALLS.replace("CALL", "{{ c.function.name }}"),
        CALLS.replace("CALL", "{{ c.function.name | tojson }}()"),
    ):
        with pytest.raises(UserError, match=r"turn 2 of 2 holds a call \(weather\)"):
            write(text, user("Cold?"), turn)


def test_a_value_that_is_written_in_words_is_not_missed_and_one_beside_it_is(write):
    text = CALLS.replace("CALL", "{{ c.function.name }} {{ 'lit' if c.function.arguments.on else 'dark' }}")
    lit = assistant("", tool_calls=[call({"on": True})])
    assert spans(write(text, user("Cold?"), lit)) == ["<call>weather lit</call><|im_end|>"]
    with pytest.raises(UserError, match=r"turn 2 of 2 holds a call \(weather\)"):
        write(text, user("Cold?"), assistant("", tool_calls=[call({"on": True, "level": 3})]))


def test_text_beside_a_call_that_the_template_leaves_out_is_refused(write):
    text = HEAD + "{{ m.tool_calls[0].function | tojson if m.tool_calls else m.content }}" + TAIL
    assert spans(write(text, *CALLED)) == ['{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>']
    with pytest.raises(UserError, match="turn 2 of 2 holds what the assistant says beside a call, which the template"):
        write(text, user("Cold?"), assistant("Let me see.", tool_calls=[call({"city": "Oslo"})]))


def test_an_answer_that_the_template_leaves_out_is_refused(write):
    text = HEAD + "{{ m.content if m.role == 'user' or loop.last else '...' }}" + TAIL
    assert spans(write(text, user("a"), assistant("b"))) == ["b<|im_end|>"]
    with pytest.raises(UserError, match="turn 2 of 4 holds what the assistant says, which the template does not write"):
        write(text, user("a"), assistant("b"), user("c"), assistant("d"))


def test_an_answer_that_the_template_cuts_is_refused(write):
    text = HEAD + "{{ m.content[:12] }}" + TAIL
    assert spans(write(text, user("a"), assistant("short"))) == ["short<|im_end|>"]
    with pytest.raises(UserError, match="turn 2 of 2 holds what the assistant says"):
        write(text, user("a"), assistant("much longer than twelve"))


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("{{ c.function.arguments | tojson }}", '{"a": "Zürich \\"x\\"\\n", "n": 1.0, "d": {"l": [true, null]}}'),
        (
            "{% for k, v in c.function.arguments.items() %}<p={{ k }}>{{ v if v is string else v | tojson }}</p>"
            "{% endfor %}",
            '<p=a>Zürich "x"\n</p><p=n>1.0</p><p=d>{"l": [true, null]}</p>',
        ),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={% if v is string %}'{{ v | replace('\n', '\\\\n') "
            "}}'{% else %}{{ v }}{% endif %} {% endfor %}",
            "a='Zürich \"x\"\\n' n=1.0 d={'l': [True, None]} ",
        ),
    ],
    ids=["JSON", "parameters", "Python"],
)
def test_calls_are_found_however_their_arguments_are_written(form, written, write):
    text = CALLS.replace("CALL", "{{ c.function.name }} " + form)
    arguments = {"a": 'Zürich "x"\n', "n": 1.0, "d": {"l": [True, None]}}
    for given in (arguments, json.dumps(arguments)):
        trained = spans(write(text, user("Cold?"), assistant("See:", tool_calls=[call(given)])))
        assert trained == [f"See:<call>weather {written}</call><|im_end|>"]


@pytest.mark.parametrize("joined", ["{{ 'f ' + c.function.arguments }}", "{{ 'f ' ~ c.function.arguments }}"])
def test_a_template_that_takes_arguments_as_text_is_given_their_json(joined, write):
    text = CALLS.replace("CALL", "{{ c.function.name }} " + joined)
    expected = '<call>weather f {"city": "Zürich", "warm": true}</call><|im_end|>'
    for given in ({"city": "Zürich", "warm": True}, '{"city": "Zürich", "warm": true}'):
        assert spans(write(text, user("Cold?"), assistant("", tool_calls=[call(given)]))) == [expected]


def test_a_call_whose_name_comes_again_with_its_result_is_trained_once(write):
    text = CALLS.replace("CALL", "{{ c.function | tojson }}").replace(
        "{{ m.role }}\n",
        "{{ m.role }}{{ ' ' + messages[1].tool_calls[0].function.name if m.role == 'tool' }}\n",
    )
    trained = spans(write(text, *CALLED, assistant("Yes.")))
    assert trained == ['<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call><|im_end|>', "Yes.<|im_end|>"]


@pytest.mark.parametrize("index", [0, 1, 99])
def test_a_key_that_spells_a_mark_changes_nothing(index, write):
    called = assistant("", tool_calls=[call({MARK.format(index): "Oslo"})])
    text = CALLS.replace("CALL", "{{ c.function | tojson }}")
    trained = spans(write(text, user("Cold?"), called, {"role": "tool", "content": "3"}, assistant("Yes.")))
    written = f'<call>{{"name": "weather", "arguments": {{"{MARK.format(index)}": "Oslo"}}}}</call><|im_end|>'
    assert trained == [written, "Yes.<|im_end|>"]


def test_arguments_that_json_cannot_write_are_refused():
    with pytest.raises(UserError, match=r"turn 2 of 2 calls weather with arguments that JSON cannot write"):
        chat(user("a"), assistant("", tool_calls=[call({"day": datetime(2026, 1, 2)})]))


# Thoughts


@pytest.mark.parametrize("key", THOUGHT_KEYS)
@pytest.mark.parametrize("read", THOUGHT_KEYS)
def test_thoughts_reach_the_template_under_the_key_that_it_reads(read, key, write):
    text = HEAD + f"{{% if m.{read} %}}[{{{{ m.{read} }}}}]{{% endif %}}{{{{ m.content }}}}" + TAIL
    written = write(text, user("1+1?"), assistant("2", **{key: "Add one."}))
    assert (spans(written), written.lost_thoughts) == (["[Add one.]2<|im_end|>"], 0)


@pytest.mark.parametrize(
    "turn",
    [
        assistant("2", thinking="Add one."),
        assistant("<think>Add one.</think>2"),
        assistant("<think>\nAdd one.\n</think>\n\n2"),
        assistant([{"type": "thinking", "thinking": "Add one."}, {"type": "text", "text": "2"}]),
        assistant([{"type": "reasoning", "text": "Add one."}, {"type": "text", "text": "2"}]),
        assistant("<think>Add one.</think>2", reasoning_content="Add one."),
    ],
)
def test_a_thought_is_the_same_wherever_it_stands(turn, write):
    assert spans(write(LAST, user("1+1?"), turn)) == ["<think>\nAdd one.\n</think>\n2<|im_end|>"]
    twice = write(LAST, user("1+1?"), turn, user("Sure?"), turn)
    assert spans(twice) == ["2<|im_end|>", "<think>\nAdd one.\n</think>\n2<|im_end|>"]
    assert twice.lost_thoughts == 1


def test_different_thoughts_of_one_turn_are_refused():
    with pytest.raises(UserError, match="turn 2 of 2 holds different thoughts under thinking and reasoning; keep one"):
        chat(user("a"), assistant("b", thinking="c", reasoning="d"))


@pytest.mark.parametrize("setting", [True, False, 1, 0.5, None, "", []])
def test_a_setting_under_a_key_of_thoughts_is_no_thought(setting, write):
    assert spans(write(LAST, user("a"), assistant("b", thinking=setting))) == ["<think>\n\n</think>\nb<|im_end|>"]


def test_a_part_of_thoughts_without_text_is_refused():
    parts = [{"type": "reasoning", "summary": [{"text": "x"}]}, {"type": "text", "text": "b"}]
    with pytest.raises(UserError, match=r"turn 2 of 2 holds a part .* without a text of thoughts"):
        chat(user("a"), assistant(parts))


def test_a_template_that_strips_thoughts_loses_them_with_a_count_and_keeps_the_answer(write):
    turns = (user("a"), assistant("<think>x</think>b"), user("c"), assistant("d"), user("e"), assistant("f</think>g"))
    written = write(STRIPS, *turns)
    assert (spans(written), written.lost_thoughts) == (["b<|im_end|>", "d<|im_end|>", "g<|im_end|>"], 2)
    assert write(STRIPS, *turns, train_on=TrainOn.last).lost_thoughts == 1


def test_a_template_that_knows_no_thoughts_writes_those_of_a_content_as_text(write):
    written = write(PLAIN, user("a"), assistant("<think>\nx\n</think>\n\nb"))
    assert (spans(written), written.lost_thoughts) == (["<think>\nx\n</think>\n\nb<|im_end|>"], 0)
    assert write(PLAIN, user("a"), assistant("b", reasoning="x")).lost_thoughts == 1


def test_tags_of_thoughts_stay_tokens_and_spelled_tokens_do_not():
    base = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    base.add_tokens([AddedToken(t, normalized=False, special=True) for t in (*IM, "<think>", "</think>")])
    encode = build_encoder(DataConfig(name="toy", path="toy.json"), base, Template("mine.jinja", STRIPS))
    (row,) = encode.encode([chat(user("<think>q</think>"), assistant("<think>x</think>the tag <think>"))])
    assert row.lost_thoughts == 1
    assert not {base.convert_tokens_to_ids(t) for t in ("<think>", "</think>")} & set(row.input_ids)
    kept = build_encoder(DataConfig(name="toy", path="toy.json"), base, Template("mine.jinja", PLAIN))
    (row,) = kept.encode([chat(user("q"), assistant("<think>x</think>y"))])
    assert row.labels.count(base.convert_tokens_to_ids("</think>")) == 1


def test_a_turn_that_only_thinks_is_not_trained_where_its_thought_is_lost(write):
    turns = (user("a"), assistant("", reasoning="x"), user("b"), assistant("c"))
    assert spans(write(PLAIN, *turns)) == ["c<|im_end|>"]
    assert spans(write(read_template("chatml-thoughts"), *turns)) == [
        "<think>\nx\n</think>\n\n<|im_end|>",
        "c<|im_end|>",
    ]


def test_chatml_thoughts_writes_the_thoughts_of_every_turn(write):
    turns = (
        user("a"),
        assistant("<think>x</think>b"),
        user("c"),
        assistant("", thinking="y", tool_calls=[call({"city": "Oslo"})]),
        {"role": "tool", "content": "3"},
        assistant("d"),
    )
    written = write(read_template("chatml-thoughts"), *turns)
    assert written.lost_thoughts == 0
    assert spans(written) == [
        "<think>\nx\n</think>\n\nb<|im_end|>",
        '<think>\ny\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        "<|im_end|>",
        "d<|im_end|>",
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_lost_thoughts_are_warned_of_once_with_their_count(processes, base, tmp_path, caplog):
    rows = [
        {"messages": [user(f"{i}?"), assistant("b", reasoning="x"), user("c"), assistant("d", thinking="y")]}
        for i in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "last.jinja"
    template.write_text(LAST)
    config = DataConfig(
        name="toy",
        path=str(path),
        eval_dataset_size=2,
        template=str(template),
        num_proc=processes,
        cache_dir=str(tmp_path / "cache"),
    )
    for _ in ("tokenized", "from the cache"):
        caplog.clear()
        data = build_data(config, base)
        assert [record.getMessage() for record in caplog.records if "thoughts" in record.getMessage()] == [
            f"data.path={path}: the chat template ({template}) leaves out the thoughts of 12 turns, so the model "
            "learns to answer without them; data.template=chatml-thoughts writes all of them"
        ]
        assert data.report.lost_thoughts == 10


def test_the_template_that_writes_thoughts_is_named_with_the_tokens_it_needs(tokenizer, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": [user("a"), assistant("b", thinking="x")]}) + "\n" for _ in range(3))
    )
    build_data(
        DataConfig(name="toy", path=str(path), eval_dataset_size=1, cache_dir=str(tmp_path / "cache")), tokenizer
    )
    hint = 'data.template=chatml-thoughts with \'model.new_tokens=["<|im_start|>","<|im_end|>"]\' writes all of them'
    assert sum(hint in message for message in caplog.messages) == 1


def test_a_message_that_the_template_leaves_out_is_counted(write):
    text = "{% for m in messages if m.role != 'system' %}" + PLAIN.removeprefix("{% for m in messages %}")
    system = {"role": "system", "content": "Be brief."}
    assert write(text, system, user("a"), assistant("b")).lost_messages == 1
    assert write(PLAIN, system, user("a"), assistant("b")).lost_messages == 0


# Forms


def test_a_template_that_takes_parts_is_given_parts(write):
    text = HEAD + "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}" + TAIL
    assert spans(write(text, user("a"), assistant("b"), user("c"), assistant("d"))) == ["b<|im_end|>", "d<|im_end|>"]


def test_the_form_of_a_template_is_what_its_samples_show():
    def write(messages, tools):
        return "".join(f"{m['content']}{m.get('thinking', '')}" for m in messages)

    form = find_form(write)
    assert (form.thoughts, form.arguments_as_text, form.content_as_parts) == ("thinking", False, False)
    message = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    shaped = form.shape(message, lambda piece, text: MARK.format(piece is Piece.thought))
    assert shaped == {"role": "assistant", "content": MARK.format(False), "thinking": MARK.format(True)}


SHORT_IDS = (
    HEAD
    + (
        "{% for c in m.tool_calls or [] %}{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('9!') }}"
        "{% endif %}{{ c.function | tojson }}#{{ c.id }}{% endfor %}"
        "{{ m.content }}{% if m.role == 'tool' %}#{{ m.tool_call_id }}{% endif %}"
    )
    + TAIL
)


@pytest.mark.parametrize("labels", [("call_Kx8pQvZ1", "call_2"), ("abcdefghi", "123456789"), ("x", "abcdefghi"), None])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_template_that_demands_short_ids_gets_some_and_results_stay_with_their_calls(labels, backwards, write):
    calls = [call({"a": 1}, "first"), call({"a": 2}, "second")]
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    if labels:
        calls = [{**item, "id": label} for item, label in zip(calls, labels, strict=True)]
        results = [{**item, "tool_call_id": label} for item, label in zip(results, labels, strict=True)]
        results = results[::-1] if backwards else results
    written = write(SHORT_IDS, user("a"), assistant("", tool_calls=calls), *results, assistant("b"))
    (called, _) = spans(written)
    ids = re.findall(r"#([0-9A-Za-z]{9})", called)
    assert len(set(ids)) == 2
    expected = [f"{item['content']}#{ids[int(item['content']) - 1]}<|im_end|>" for item in results]
    assert all(text in written.text for text in expected)
    assert [label in ids for label in labels or ()] == [len(label) == 9 and "_" not in label for label in labels or ()]


def test_a_template_that_takes_any_id_keeps_it(write):
    text = CALLS.replace("CALL", "{{ c.function.name }}#{{ c.id }}")
    called = {**call({"a": "b"}), "id": "call_Kx8pQvZ1abc"}
    text = text.replace("#", " {{ c.function.arguments | tojson }}#")
    trained = spans(write(text, user("a"), assistant("", tool_calls=[called])))
    assert trained == ['<call>weather {"a": "b"}#call_Kx8pQvZ1abc</call><|im_end|>']


# Parts of a content


@pytest.mark.parametrize("key", ["text", "value", "content"])
@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text_are_joined_whatever_their_key(kind, key):
    other = {"text": "value", "value": "text", "content": "text"}[key]
    parts = [{"type": kind, key: "a ", other: None}, {"type": kind, key: "b"}]
    assert chat(user(parts), assistant("c")).messages[0]["content"] == "a b"


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "audio", "input_audio", "video", "file"])
def test_parts_that_are_no_text_are_refused(kind):
    sentence = f"turn 1 of 2 holds a part of type {kind}; qlora trains text only, so leave such rows out"
    with pytest.raises(UserError, match=sentence):
        chat(user([{"type": "text", "text": "a"}, {"type": kind, kind: "x.png", "text": "y"}]), assistant("c"))


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios"])
@pytest.mark.parametrize("cell", ["a.png", ["a.png"], [{"bytes": b"x", "path": None}], {"bytes": b"x", "path": None}])
def test_rows_with_pictures_sound_or_films_are_refused(column, cell):
    with pytest.raises(UserError, match=rf"^column {column} holds .*; qlora trains text only"):
        chat(user("a"), assistant("b"), **{column: cell})


@pytest.mark.parametrize("cell", [None, [], "", [None], {"bytes": None, "path": None}])
def test_rows_without_a_picture_in_their_column_are_kept(cell):
    assert len(chat(user("a"), assistant("b"), images=cell, image=cell).messages) == 2


# Where a turn begins and ends

CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAST_ONLY = NO_END.replace("{{ m.content }}", "{{ m.content }}<|end|>\n").replace(
    "{% if", "{% if not add_generation_prompt %}</s>{% endif %}{% if"
)
SWITCHED = (
    "{% set quiet = messages[0].role == 'system' and '/quiet' in messages[0].content %}"
    + HEAD
    + "{{ '<think></think>' if quiet and m.role == 'assistant' }}{{ m.content }}"
    + TAIL.replace("assistant\n", "assistant\n{{ '<think></think>' if quiet }}")
)
MARKED = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>", "<|system|>")
TURNS = (user("a"), assistant("b"), user("c"), assistant("d", thinking="x"))
QUIET = {"role": "system", "content": "/quiet please"}


@pytest.mark.parametrize(
    ("text", "turns", "expected"),
    [
        (
            CHANNELS,
            TURNS,
            [
                "<|channel|>final<|message|>b<|end|>",
                "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>",
            ],
        ),
        (TWO_ENDS, TURNS, ["b<|return|><|end|>", "d<|return|><|end|>"]),
        (NO_END, TURNS, ["b<|user|>", "d"]),
        (NO_END, (user("a"), assistant("b"), assistant("c"), user("d"), assistant("e")), ["b", "c<|user|>", "e"]),
        (LAST_ONLY, TURNS, ["b<|end|>", "d<|end|>"]),
        (SWITCHED, TURNS, ["b<|im_end|>", "d<|im_end|>"]),
        (SWITCHED, (QUIET, *TURNS), ["b<|im_end|>", "d<|im_end|>"]),
        (SWITCHED.replace("if quiet }}{% endif %}", "if not quiet }}{% endif %}"), (QUIET, *TURNS),
         ["<think></think>b<|im_end|>", "<think></think>d<|im_end|>"]),
    ],
    ids=["channels", "two ends", "no end", "two answers", "last only", "not switched", "switched", "off in the prompt"],
)  # fmt: skip
def test_a_turn_reaches_from_its_prompt_to_its_end(text, turns, expected):
    base = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    base.add_tokens([AddedToken(token, normalized=False, special=True) for token in (*IM, *MARKED)])
    written = ChatWriter(base, Template("mine.jinja", text)).write(chat(*turns))
    assert spans(written) == expected
    assert written.turns[0].reference in ("b", "finalb", "<think></think>b")


def test_generation_stops_at_the_token_that_ends_a_turn():
    base = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    base.add_tokens([AddedToken(token, normalized=False, special=True) for token in MARKED])
    ends = {CHANNELS: "<|return|>", TWO_ENDS: "<|end|>", NO_END: "<|user|>", LAST_ONLY: "<|end|>"}
    for text, token in ends.items():
        writer = ChatWriter(base, Template("mine.jinja", text))
        assert (writer.end_id, writer.stop_text) == (base.convert_tokens_to_ids(token), "")


@pytest.mark.parametrize("weight", [0, 1])
def test_a_weight_asks_for_an_empty_turn_or_forbids_a_full_one(weight, write):
    turns = (user("a"), assistant("", weight=weight), user("b"), assistant("c", weight=1 - weight))
    assert spans(write(PLAIN, *turns)) == (["<|im_end|>"] if weight else ["c<|im_end|>"])
    assert spans(write(PLAIN, user("a"), assistant("", weight=weight))) == ["<|im_end|>"] * weight
    thinking = write(LAST, user("a"), assistant("", weight=weight))
    assert spans(thinking) == ["<think>\n\n</think>\n<|im_end|>"] * weight


# Prompts of evaluation


def test_evaluation_asks_as_a_server_does(base, tmp_path):
    opens = HEAD + "{{ m.content }}" + TAIL.replace("assistant\n", "assistant\n<think>\n")
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [user("a"), assistant("b"), user(f"c{i}"), assistant("d")]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = tmp_path / "opens.jinja"
    template.write_text(opens)
    config = DataConfig(
        name="toy", path=str(path), eval_path=str(path), template=str(template), cache_dir=str(tmp_path / "c")
    )
    data = build_data(config, base)
    for row, source in zip(data.eval.to_list(), rows, strict=True):
        asked = {"conversation": source["messages"][:-1], "chat_template": opens, "add_generation_prompt": True}
        assert row["prompt"] == base.apply_chat_template(**asked, tokenize=False)
        assert row["prompt"].endswith("assistant\n<think>\n")
        assert row["prompt_ids"] == base.apply_chat_template(**asked, return_dict=False)
        assert row["reference"] == "d"
        encoder = build_encoder(config, base, Template("opens", opens))
        assert encoder.encode_prompt(source["messages"][:-1]) == row["prompt_ids"]


@pytest.mark.parametrize("limit", [12, 20, 40])
def test_a_prompt_of_its_own_is_cut_as_the_row_is(limit, base):
    opens = HEAD + "{{ m.content }}" + TAIL.replace("assistant\n", "assistant\n<think>\n")
    config = DataConfig(name="toy", path="toy.json", source_max_len=limit, target_max_len=None)
    free = DataConfig(name="toy", path="toy.json", source_max_len=None, target_max_len=None)
    example = chat(user("question" * 4), assistant("b"))
    encoders = [build_encoder(settings, base, Template("opens", opens)) for settings in (free, config)]
    whole, cut = (encoder.encode([example])[0] for encoder in encoders)
    gone = len(whole.input_ids) - len(cut.input_ids)
    asked = encoders[0].encode_asked(whole)
    assert encoders[1].encode_asked(cut) == asked[gone:]
    assert base.decode(asked).endswith("<think>\n")
    assert gone > 0


def test_the_last_turn_that_is_trained_is_asked_for_with_its_own_prompt(base):
    opens = HEAD + "{{ m.content }}" + TAIL.replace("assistant\n", "assistant\n<think>\n")
    encoder = build_encoder(DataConfig(name="toy", path="toy.json"), base, Template("opens", opens))
    example = chat(user("a"), assistant("b"), user("c"), assistant("", reasoning="x"))
    (row,) = encoder.encode([example])
    assert row.lost_thoughts == 1
    assert row.turns[-1].prompt == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert row.turns[-1].reference == "b"
