"""What becomes of conversations of every shape with published chat templates; run as a program it prints the table.

The templates are those that TRL carries (`pip install 'qlora[templates]'`), and a few of our own in the shape of
published ones that no package carries.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from transformers import AddedToken

from qlora.data.chat.chat_mask import ChatWriter
from qlora.data.chat.conversations import THOUGHTS, Conversation, Message
from qlora.data.chat.templates import Template
from qlora.data.formats.renderers import FORMATS
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

TOKENS = re.compile(
    r"<\|[\w./-]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|?(?:turn|channel|tool_call|tool_response)\|?>|\[gMASK\]|<sop>|<\|?[\w]*turn\|?>|\[/?INST\]|<\|?channel\|?>"
)
"""What families spell as tokens of their own; tags such as <think> are added tokens too, but plain ones."""

# Published templates that no small package carries, in their shape.
MISTRAL = """{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}{% set ns = namespace(asks=true) %}
{%- for m in turns if m.role in ('user', 'assistant') and not m.tool_calls %}
  {%- if (m.role == 'user') != ns.asks %}{{ raise_exception('roles must alternate') }}{% endif %}
  {%- set ns.asks = not ns.asks %}
{%- endfor %}
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in turns %}
  {%- if m.role == 'user' %}
    {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
  {%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
      {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
      {{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
  {%- else %}{{- '[TOOL_RESULTS] {"content": ' + m.content | tojson + '}[/TOOL_RESULTS]' }}{% endif %}
{%- endfor %}"""
PHI_4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
PHI_4_MINI = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
SMOLLM_3 = """{%- set ns = namespace(thinks=true, system='') %}
{%- if messages[0].role == 'system' %}
  {%- set ns.thinks = '/no_think' not in messages[0].content %}
  {%- set ns.system = messages[0].content.replace('/no_think', '').rstrip() %}{% endif %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if ns.thinks else '/no_think') + '\\n\\n' + ns.system }}
{%- for tool in tools or [] %}{{- '\\n' + tool | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
  {%- if m.role == 'user' or m.role == 'tool' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' + ('' if ns.thinks else '<think>\\n\\n</think>\\n\\n') }}
    {{- m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' + ('' if ns.thinks else '<think>\\n\\n</think>\\n\\n') }}{% endif %}"""


class Family(NamedTuple):
    """A published template: its file in TRL, or its text where it is of our own, and its end-of-sequence token."""

    file: str
    eos: str
    text: str | None = None


FAMILIES = {
    "Cohere": Family("cohere", "<|END_OF_TURN_TOKEN|>"),
    "Cohere 2": Family("cohere2", "<|END_OF_TURN_TOKEN|>"),
    "DeepSeek V3": Family("deepseekv3", "<｜end▁of▁sentence｜>"),
    "DeepSeek R1 distilled": Family("deepseek_r1_distill", "<｜end▁of▁sentence｜>"),
    "Gemma 1, 2": Family("gemma", "<eos>"),
    "Gemma 3": Family("gemma3", "<eos>"),
    "Gemma 4": Family("gemma4_v5", "<eos>"),
    "GLM 4.5": Family("glm4moe", "<|endoftext|>"),
    "gpt-oss": Family("gptoss", "<|return|>"),
    "LFM2": Family("lfm2_v2", "<|im_end|>"),
    "LFM2.5": Family("lfm2_2_5_v2", "<|im_end|>"),
    "Llama 3": Family("llama3", "<|eot_id|>"),
    "Llama 3.1": Family("llama3_1", "<|eot_id|>"),
    "Llama 3.2": Family("llama3_2", "<|eot_id|>"),
    "Mistral 0.3": Family("", "</s>", MISTRAL),
    "Nemotron 3 Nano": Family("nemotron_3_nano", "<|im_end|>"),
    "Nemotron 3 Super": Family("nemotron_3_super", "<|im_end|>"),
    "Phi-3": Family("phi3", "<|endoftext|>"),
    "Phi-3.5": Family("phi3_5", "<|endoftext|>"),
    "Phi-4": Family("", "<|im_end|>", PHI_4),
    "Phi-4 mini": Family("", "<|endoftext|>", PHI_4_MINI),
    "Qwen 2.5": Family("qwen2_5", "<|im_end|>"),
    "Qwen 3": Family("qwen3", "<|im_end|>"),
    "Qwen 3 Instruct 2507": Family("qwen3_instruct_2507", "<|im_end|>"),
    "Qwen 3.5": Family("qwen3_5_think", "<|im_end|>"),
    "Qwen 3.5 without thoughts": Family("qwen3_5_nothink", "<|im_end|>"),
    "SmolLM3": Family("", "<|im_end|>", SMOLLM_3),
}


NOTES = {
    "must alternate": "\u00b2",
    "System role not supported": "\u00b3",
    "holds a call": "\u2074",
    "only supports single tool-calls": "\u2074",
    "beside a call": "\u2075",
    "otherwise when more turns follow": "\u2076",
}
"""Why a template is refused, and the mark of the note below the table."""


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, **arguments):
    return {"id": f"{name:a<9}"[:9], "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content, name="weather"):
    return {"role": "tool", "name": name, "tool_call_id": f"{name:a<9}"[:9], "content": content}


SYSTEM = {"role": "system", "content": "Be brief, please."}
WEATHER = call("weather", city="Oslo", days=3, exact=True, note='a "b"\nc')
CLOCK = call("clock", zone="Zürich 世界")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": []}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Tells it", "parameters": PARAMETERS}}
    for name in ("weather", "clock")
]
COLD = result("minus 3")
SHAPES = {
    "system": [SYSTEM, user("Is it cold?"), answer("Yes, it is.")],
    "turns": [user("One?"), answer("First."), user("Two?"), answer("Second."), user("Three?"), answer("Third.")],
    "two questions": [user("One?"), user("Two?"), answer("Both.")],
    "two answers": [user("One?"), answer("First."), answer("Second.")],
    "empty answer": [user("One?"), answer(""), user("Two?"), answer("Second.")],
    "unicode": [user("Grüße, 世界?"), answer("😀 née 世界\n\n— “so”."), user("e\u0301?"), answer("ﬁn e\u0301")],
    "call": [user("Cold?"), answer("", tool_calls=[WEATHER]), COLD, answer("It is.")],
    "two calls": [
        user("Cold? Late?"), answer("", tool_calls=[WEATHER, CLOCK]), COLD, result("9 pm", "clock"), answer("Both.")
    ],
    "text, call": [user("Cold?"), answer("Let me see.", tool_calls=[WEATHER]), COLD, answer("It is.")],
    "thought": [user("Cold?"), answer("It is.", reasoning_content="Snow lies outside.")],
    "thought in text": [user("Cold?"), answer("<think>\nSnow lies outside.\n</think>\n\nIt is.")],
    "thoughts": [
        user("Cold?"), answer("It is.", thinking="Snow lies."), user("Why?"), answer("Winter.", reasoning="It is May.")
    ],
    "thought, call": [
        user("Cold?"), answer("", tool_calls=[WEATHER], reasoning="I must look."), COLD,
        answer("It is.", reasoning="So cold."),
    ],
}  # fmt: skip
"""Conversations by what is particular in them."""


def trl_folder() -> Path | None:
    """Returns where TRL keeps its templates; None: it is not installed."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) / "chat_templates" if folders else None


def read_template(family: str, suffix: str = "") -> str | None:
    """Returns a family's template; None where TRL is not installed, or has no such template."""
    known, folder = FAMILIES[family], trl_folder()
    if known.text is not None:
        return known.text if not suffix else None
    path = folder / f"{known.file}{suffix}.jinja" if folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else None


def build_encoder(family: str, text: str):
    """Returns a tokenizer of bytes with the tokens that a template writes, those of a family's vocabulary."""
    eos = FAMILIES[family].eos
    base = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokens = dict.fromkeys([eos, *TOKENS.findall(text)])
    base.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    base.eos_token = eos
    return base


def build_conversation(shape: str) -> Conversation:
    tools = TOOLS if "call" in shape else None
    (conversation,) = FORMATS["messages"].render({"messages": SHAPES[shape], "tools": tools})
    return conversation


@cache
def build_writer(family: str, suffix: str = "") -> ChatWriter:
    """Returns what writes with a family's template; `suffix` names a variant of it."""
    text = read_template(family, suffix)
    assert text is not None
    return ChatWriter(build_encoder(family, text), Template("the tokenizer's own", text))


def describe(family: str, shape: str) -> str:
    """Returns a cell of the table."""
    try:
        written = build_writer(family).write(build_conversation(shape))
    except UserError as error:
        return f"no{NOTES[next(reason for reason in NOTES if reason in str(error))]}"
    if written.lost_thoughts:
        thinking = sum(1 for message in build_conversation(shape).messages if has_thought(message))
        return "warns" if written.lost_thoughts == thinking else "warns in part"
    return "yes\u00b9" if written.lost_messages else "yes"


def has_thought(message: Message) -> bool:
    return bool(message.get(THOUGHTS)) or "</think>" in message["content"]


def build_table() -> str:
    """Returns the table of docs/data.md."""
    head = ["template", *SHAPES]
    rows = [
        [family + ("" if known.text is None else "\u2070"), *(describe(family, shape) for shape in SHAPES)]
        for family, known in FAMILIES.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(build_table())
