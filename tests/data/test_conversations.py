import json

import pytest

from qlora.data.chat.conversations import ROLES
from qlora.data.formats.cells import TrackedRow
from qlora.data.formats.renderers import FORMATS
from qlora.errors import UserError

CALL = {"name": "add", "arguments": {"a": 1}}
CALLS = [{"type": "function", "function": CALL}]
USER = {"role": "user", "content": "a"}


def messages(*turns, **columns):
    rendered = FORMATS["messages"].render({"messages": list(turns), **columns})
    assert len(rendered) == 1
    return rendered[0].messages


def conversations(*turns, **columns):
    rendered = FORMATS["conversations"].render({"conversations": list(turns), **columns})
    assert len(rendered) == 1
    return rendered[0].messages


def tools(cell):
    return FORMATS["messages"].render({"messages": [USER], "tools": cell})[0].tools


def test_messages_of_openai_stay_as_they_are():
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "b"}]
    assert messages(*turns) == turns


@pytest.mark.parametrize(("name", "role"), [("human", "user"), ("gpt", "assistant"), ("system", "system")])
def test_share_gpt_s_turns_become_messages(name, role):
    turn = {"from": name, "value": "x"}
    expected = {"role": role, "content": "x"}
    first = [] if role != "assistant" else [{"from": "human", "value": "a"}]
    assert conversations(*first, turn, {"from": "human", "value": "z"})[len(first)] == expected


def test_every_known_role_is_understood_in_any_case():
    for name, role in ROLES.items():
        turn = {"from": name.upper(), "value": json.dumps(CALL)}
        assert conversations({"from": "human", "value": "a"}, turn)[1]["role"] == role


def test_role_and_content_inside_conversations_and_the_other_way_round():
    assert conversations(USER) == [USER]
    assert messages({"from": "human", "value": "a"}) == [USER]


def test_keys_that_arrow_filled_with_null_are_dropped():
    turn = USER | {"tool_calls": None, "name": None, "tool_call_id": None, "from": None, "value": None}
    assert messages(turn) == [USER]


def test_content_of_null_is_empty_and_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages(USER, {"role": "assistant", "content": None})[1]["content"] == ""
    assert messages({"role": "user", "content": parts})[0]["content"] == "ab"


def test_a_part_that_is_no_text_is_an_error():
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(UserError) as caught:
        messages(USER, {"role": "user", "content": content})
    assert str(caught.value) == (
        "column messages, turn 2 of 2 holds a part of type image_url; qlora trains text only, so leave such rows out"
    )


@pytest.mark.parametrize("call", [CALLS[0], CALL, {"function": {"name": "add", "arguments": '{"a": 1}'}}])
def test_calls_get_openai_s_shape_with_arguments_as_an_object(call):
    for turn in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([call])},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "assistant", "tool_calls": [call]},
    ):
        assert messages(USER, turn)[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}


def test_an_id_of_a_call_stays_and_broken_arguments_stay_text():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": '}}
    assert messages(USER, {"role": "assistant", "content": "", "tool_calls": [call]})[1]["tool_calls"] == [call]


def test_a_call_without_arguments_has_none():
    call = {"function": {"name": "now", "arguments": ""}}
    read = messages(USER, {"role": "assistant", "content": "", "tool_calls": [call]})[1]["tool_calls"]
    assert read[0]["function"] == {"name": "now", "arguments": {}}


def test_share_gpt_s_function_calls_are_calls_of_the_assistant():
    value = json.dumps([CALL, {"name": "now", "arguments": "{}"}])
    asked = {"from": "human", "value": "a"}
    read = conversations(asked, {"from": "function_call", "value": value}, {"from": "observation", "value": "1"})
    assert read[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [*CALLS, {"type": "function", "function": {"name": "now", "arguments": {}}}],
    }
    assert read[2] == {"role": "tool", "content": "1"}


@pytest.mark.parametrize("value", ["add(1)", '{"arguments": {}}', None])
def test_a_function_call_that_is_no_json_is_an_error(value):
    with pytest.raises(UserError, match=r"turn 2 of 2 calls .*; a call of a function is JSON with name and"):
        conversations({"from": "human", "value": "a"}, {"from": "function_call", "value": value})


def test_names_ids_reasoning_and_weights_are_kept():
    tool = {"role": "tool", "content": "1", "name": "add", "tool_call_id": "c1"}
    answer = {"role": "assistant", "content": "b", "reasoning_content": "r", "weight": 0}
    assert messages(USER, tool, answer) == [USER, tool, answer]


def test_a_tool_s_object_is_written_as_json():
    assert messages(USER, {"role": "function", "name": "f", "content": {"ä": 1}})[1] == {
        "role": "tool",
        "name": "f",
        "content": '{"ä": 1}',
    }


def test_a_cell_may_be_json():
    assert FORMATS["messages"].render({"messages": json.dumps([USER])})[0].messages == [USER]


def test_a_system_column_goes_first_unless_the_turns_have_one():
    system = {"role": "system", "content": "s"}
    assert conversations(USER, system="s") == [system, USER]
    assert conversations(system, USER, system="t") == [system, USER]
    assert conversations(USER, system="") == [USER]


def test_turns_of_one_role_after_another_are_kept():
    assert messages(USER, USER, {"role": "assistant", "content": "b"})[:2] == [USER, USER]


SCHEMA = {"name": "add", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}}
WRAPPED = [{"type": "function", "function": SCHEMA}]


def test_tools_get_openai_s_shape_from_lists_and_json():
    for cell in ([SCHEMA], WRAPPED, json.dumps([SCHEMA]), json.dumps(WRAPPED), json.dumps(SCHEMA)):
        assert tools(cell) == WRAPPED
    for cell in (None, "", [], "[]", "null"):
        assert tools(cell) is None
    assert FORMATS["messages"].render({"messages": [USER], "functions": [SCHEMA]})[0].tools == WRAPPED


@pytest.mark.parametrize("cell", ["add", ["add"], 5])
def test_broken_tools_are_shown(cell):
    with pytest.raises(UserError, match="column tools must hold a list of JSON schemas, or its JSON, but a row holds"):
        tools(cell)


def test_a_label_of_false_leaves_the_row_out():
    assert FORMATS["messages"].render({"messages": [USER], "label": False}) == []
    assert messages(USER, label=True) == [USER]


@pytest.mark.parametrize("cell", [[], None, "", "[]", [{"role": "system", "content": "s"}]])
def test_a_chat_in_which_nobody_speaks_is_left_out(cell):
    assert FORMATS["messages"].render({"messages": cell}) == []


def test_an_unknown_role_is_named_with_its_turn_and_the_known_ones():
    with pytest.raises(UserError) as caught:
        conversations({"from": "human", "value": "a"}, {"from": "narrator", "value": "b"})
    assert str(caught.value) == (
        "column conversations, turn 2 of 2 has the unknown role 'narrator'; known are system, developer, user, human, "
        "prompter, assistant, gpt, chatgpt, bing, bard, model, bot, tool, function, observation, function_response, "
        "tool_response, function_call, tool_call"
    )


def test_an_assistant_that_speaks_first_is_an_error():
    for first in ([], [{"role": "system", "content": "s"}]):
        with pytest.raises(UserError) as caught:
            messages(*first, {"role": "assistant", "content": "b"}, USER)
        assert str(caught.value) == (
            f"column messages, turn {len(first) + 1} of {len(first) + 2}: the assistant speaks before any user turn; "
            "take such turns out, or map the rows with a function of your own (data.format=module:function)"
        )


@pytest.mark.parametrize(
    ("turn", "sentence"),
    [
        ("hi", "turn 1 of 1 is 'hi'; each must be an object with role and content, or from and value"),
        ({"a": 1, "b": 2}, "turn 1 of 1 has the keys a, b; it needs role and content, or from and value"),
        ({"role": "user"}, "turn 1 of 1 has the keys role; it needs role and content, or from and value"),
        ({"role": "user", "content": {"a": 1}}, "turn 1 of 1 says {'a': 1}; content must be text, or a list of parts"),
    ],
)
def test_a_broken_turn_is_shown(turn, sentence):
    with pytest.raises(UserError) as caught:
        messages(turn)
    assert str(caught.value).startswith(f"column messages, {sentence}")


@pytest.mark.parametrize("cell", ["hello", {"role": "user"}, 5])
def test_a_cell_that_is_no_list_is_shown(cell):
    with pytest.raises(UserError, match=r"^data\.format=messages needs a list of turns in that column, but a row"):
        FORMATS["messages"].render({"messages": cell})


def test_a_list_as_python_prints_it_names_the_way_out():
    with pytest.raises(UserError) as caught:
        FORMATS["messages"].render({"messages": str([USER])})
    assert str(caught.value).endswith("; write lists as JSON (json.dumps), not as Python prints them")
    assert messages(*json.loads(json.dumps([USER]))) == [USER]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_key_that_stands_twice_in_turns_of_json_is_an_error(column):
    for cell in (
        '[{"role": "user", "content": "a", "content": "b"}]',
        '[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "name": "g"}]}]',
    ):
        with pytest.raises(UserError, match=r"^in the turns .*, the key '(content|name)' stands twice in one object"):
            FORMATS[column].render({column: cell})


def test_text_of_json_with_a_key_that_stands_twice_stays_text():
    row = {"prompt": '{"a": 1, "a": 2}', "completion": "[" * 5000}
    rendered = FORMATS["prompt-completion"].render(row)[0]
    assert [segment.text for segment in rendered] == list(row.values())


# Nothing that a turn holds is lost without a word


def unread(*turns, role="assistant"):
    """Returns the messages of turns behind a question, and the keys that nothing read."""
    row = TrackedRow({"messages": [USER, *({"role": role} | turn for turn in turns)]})
    return FORMATS["messages"].render(row)[0].messages[1:], sorted(row.unread())


@pytest.mark.parametrize("key", ["arguments", "parameters", "input"])
@pytest.mark.parametrize("value", [{"a": 1}, '{"a": 1}'])
def test_the_arguments_of_a_call_are_read_under_every_name(key, value):
    bare = {"name": "add", key: value}
    for call in (bare, {"function": bare}, {"function": {"name": "add"}, key: value}, bare | {"arguments": {"a": 1}}):
        (message,), left = unread({"tool_calls": [call]})
        assert (message["tool_calls"], left) == (CALLS, [])


def test_different_arguments_of_one_call_are_refused():
    call = {"name": "add", "parameters": {"a": 1}, "input": {"a": 2}}
    with pytest.raises(UserError) as caught:
        unread({"tool_calls": [call]})
    assert str(caught.value) == (
        "column messages, turn 2 of 2 calls add with different arguments under parameters and input; keep one of them"
    )


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_keys_of_a_call_that_nothing_reads_are_named(key):
    call = {"id": "c", "type": "function", "index": 1, "function": {"name": "f", "strict": True, "none": None}}
    (message,), left = unread({key: [call]})
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert left == [f"messages.{key}.function.strict", f"messages.{key}.index"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(
    ("value", "left"),
    [
        ({"text": "t"}, ""),
        ({"content": "t"}, ""),
        ({"content": [{"type": "text", "text": "t"}]}, ""),
        ({"thinking": "t", "signature": "s"}, ".signature"),
        ([{"type": "thinking", "thinking": "t"}], ""),
        ([{"type": "reasoning", "text": "t", "id": "x"}], ".id"),
        ([{"text": "t"}], ""),
    ],
)
def test_thoughts_are_read_from_objects_and_parts(key, value, left):
    (message,), named = unread({"content": "b", key: value})
    assert message["reasoning_content"] == "t"
    assert named == ([f"messages.{key}{left}"] if left else [])


@pytest.mark.parametrize("value", [5, 0.5, True, {"effort": "high"}, {"type": "enabled", "budget_tokens": 9}])
def test_a_setting_under_a_key_of_thoughts_is_named_as_not_read(value):
    (message,), left = unread({"content": "b", "thinking": value})
    assert "reasoning_content" not in message
    assert left == ["messages.thinking"]


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ({"type": "text", "text": "a"}, []),
        ({"text": "a"}, []),
        ([{"text": "a"}], []),
        ([{"type": "text", "text": "a", "extra": "b"}], ["messages.content.extra"]),
        ([{"type": "text", "text": "a", "value": "b", "none": None}], ["messages.content.value"]),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_what_a_part_of_a_content_holds_beside_its_text_is_named(role, content, left):
    assert unread({"content": content}, role=role) == ([{"role": role, "content": "a"}], left)


def test_the_object_that_a_tool_returns_stays_json():
    for content in ({"text": "a"}, [{"text": "a", "b": {"c": 1}}]):
        (message,), left = unread({"content": content}, role="tool")
        assert (json.loads(message["content"]), left) == (content, [])
