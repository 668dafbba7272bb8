"""Which characters and tokens of a conversation are trained, with the templates of well-known models.

White space, precisely: a template may trim what is said; the blank that it writes between its prompt and the answer
("[/INST] Yes") and before its end token belongs to the answer. Nothing else does, but what the model must write before
its text, such as empty thoughts.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AddedToken, AutoTokenizer

import qlora
from qlora.config.registries.chat_templates import TEMPLATE_NAMES, TEMPLATES
from qlora.config.schema import DataConfig, TrainOn
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.chat.chat_mask import ChatWriter
from qlora.data.chat.conversations import Conversation
from qlora.data.chat.templates import Template, read_template
from qlora.data.formats.renderers import FORMATS
from qlora.errors import UserError
from tests.data.byte_tokenizer import build_byte_tokenizer

NO = -100
REAL = Path(__file__).parents[3] / "shared" / "data"
PLACES = {
    "embedded": Path(qlora.__file__).parent / "demo" / "model",
    "llama": REAL / "tokenizers" / "llama",
    "gpt2": REAL / "tokenizers" / "gpt2",
    "pythia": REAL / "tokenizers" / "pythia",
    "stories260K": REAL / "models" / "stories260K",
    "TinyStories-656K": REAL / "models" / "TinyStories-656K",
}

LLAMA_3_1 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + ('Environment: ipython\\n' if tools else '') }}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- if tools %}
  {{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions, please respond with JSON.\\n\\n' }}
  {%- for t in tools %}{{- t | tojson(indent=4) + '\\n\\n' }}{% endfor %}
  {{- messages[0].content | trim + '<|eot_id|>' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}
      {{- raise_exception('This model only supports single tool-calls!') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson + '}<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
QWEN_3 = """{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages[::-1] %}{% set index = messages | length - 1 - loop.index0 %}
  {%- if ns.open and message.role == 'user' and not message.content.startswith('<tool_response>') %}
    {%- set ns.open = false %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content %}{% set thoughts = message.reasoning_content or '' %}
  {%- if message.role == 'assistant' %}
    {%- if '</think>' in content %}
      {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
      {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}{{- content }}{% endif %}
    {{- '<|im_end|>\\n' }}
  {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
MISTRAL_V3 = """{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('After the optional system message, conversation roles must alternate') }}{% endif %}
  {%- if message.role == 'user' %}
    {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
  {%- else %}{{- ' ' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate') }}{% endif %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
PHI_3 = """{% for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
DEEPSEEK = """{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'system' %}{{- message.content }}
  {%- elif message.role == 'user' %}{{- '<｜User｜>' + message.content }}
  {%- else %}{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""
CHATML = """{% for message in messages %}
{%- if loop.first and message.role != 'system' %}
  {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
WITHOUT_PROMPTS = CHATML[: CHATML.index("{%- if add_generation_prompt")]
GENERATION = """{% for message in messages %}{% if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
COMMAND_R = """{{ bos_token }}
{%- for message in messages %}
  {%- set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message.role] %}
  {{- '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + message.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
  {%- set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- for message in turns %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
  {%- set content = message['content'] %}
  {%- if loop.index0 == 0 and system %}
    {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif %}
  {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- else %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
IM = ("<|im_start|>", "<|im_end|>")
COMMAND_R_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
LLAMA_3_TOKENS = TEMPLATES["llama-3"]


class Family(NamedTuple):
    """A published template, as its model came with it, in a shorter form."""

    text: str
    end: str
    tokens: tuple[str, ...] = ()
    lead: str = ""
    trims: bool = True
    system: bool = True
    prompts: bool = True
    """Whether the template can write the prompt that precedes an answer."""


THOUGHTS = "<think>\n\n</think>\n\n"
FAMILIES = {
    "Llama 3.1": Family(LLAMA_3_1, "<|eot_id|>", LLAMA_3_TOKENS),
    "Qwen 3": Family(QWEN_3, "<|im_end|>", IM, trims=False),
    "Mistral 0.3": Family(MISTRAL_V3, "</s>", lead=" "),
    "Gemma 2": Family(GEMMA, "<end_of_turn>", TEMPLATES["gemma"], system=False),
    "Phi 3": Family(PHI_3, "<|end|>", TEMPLATES["phi-3"], trims=False),
    "Zephyr": Family(ZEPHYR, "</s>", trims=False),
    "DeepSeek": Family(
        DEEPSEEK, "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), trims=False,
        prompts=False,
    ),
    "SmolLM 2": Family(CHATML, "<|im_end|>", IM, trims=False),
    "without prompts": Family(WITHOUT_PROMPTS, "<|im_end|>", IM, trims=False, prompts=False),
    "generation blocks": Family(GENERATION, "<|im_end|>", IM, trims=False),
    "Command R": Family(
        COMMAND_R, "<|END_OF_TURN_TOKEN|>", COMMAND_R_TOKENS
    ),
    "Llama 2": Family(LLAMA_2, " </s>", lead=" "),
    "chatml": Family(read_template("chatml"), "<|im_end|>", IM),
    "chatml-thoughts": Family(read_template("chatml-thoughts"), "<|im_end|>", IM),
    "qwen": Family(read_template("qwen"), "<|im_end|>", IM),
    "gemma": Family(read_template("gemma"), "<end_of_turn>", TEMPLATES["gemma"]),
    "llama-3": Family(read_template("llama-3"), "<|eot_id|>", LLAMA_3_TOKENS),
    "phi-3": Family(read_template("phi-3"), "<|end|>", TEMPLATES["phi-3"]),
    "llama-2": Family(read_template("llama-2"), " </s>", lead=" "),
    "alpaca": Family(read_template("alpaca"), "</s>"),
    "guanaco": Family(read_template("guanaco"), "</s>", lead=" "),
    "mistral": Family(read_template("mistral"), "</s>", lead=" "),
    "plain": Family(read_template("plain"), "</s>"),
    "vicuna": Family(read_template("vicuna"), "</s>", lead=" "),
    "zephyr": Family(read_template("zephyr"), "</s>"),
}  # fmt: skip
PLAIN = "guanaco"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}]

WORDS = (
    *("Hi", "hi", "Yes, of course!", "Grüße, 世界 😀👩‍👩‍👧", "a\nb\n\nc", "  spaced  ", "\nlines\n", "1", "11"),
    *("assistant", "user", "system", "model", "\u00a0nbsp\u00a0", "tab\there", "```python\nprint(1)\n```", "e\u0301"),
    *("### Assistant:", "### Human: x", "[/INST]", "[INST] a [/INST] b", "USER: a ASSISTANT:", "{{ bos_token }}"),
    *("<|im_start|>assistant\nI", "", " \n"),
)
SPELLED = ("</s>", "<s>", "a</s>b", "</s></s>", "<|im_end|>", "<|im_end|>\n<|im_start|>user\ny", "<|eot_id|>")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*messages, tools=None):
    return Conversation(list(messages), tools)


def with_tokens(base, tokens, **flags):
    base.add_tokens([AddedToken(token, normalized=False, special=True, **flags) for token in tokens])
    return base


@pytest.fixture(scope="session")
def bytes_of():
    """Returns a tokenizer of bytes with the tokens of a family."""
    known = {}

    def build(tokens=()):
        if tokens not in known:
            known[tokens] = with_tokens(build_byte_tokenizer(bos_token="<s>", eos_token="</s>"), tokens)
        return known[tokens]

    return build


@pytest.fixture(scope="session")
def load():
    """Returns a real tokenizer with the tokens of a family; skips where its folder is absent."""
    known = {}

    def build(name, tokens=(), **flags):
        if not PLACES[name].is_dir():
            pytest.skip("no shared/data beside the checkout")
        key = (name, tokens, *flags)
        if key not in known:
            known[key] = with_tokens(AutoTokenizer.from_pretrained(PLACES[name]), tokens, **flags)
        return known[key]

    return build


def draw(rng, sayings, *, system=True, trims=True):
    """Draws a conversation of one to six turns that alternates, as most templates demand."""
    messages = [{"role": "system", "content": rng.choice(sayings)}] if system and rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages += [user(rng.choice(sayings)), assistant(rng.choice(sayings))]
    return chat(*(messages[:-1] if rng.random() < 0.2 and len(messages) > 3 else messages))


def encoder(base, family, **config):
    return build_encoder(DataConfig(name="toy", path="toy.json", **NO_LIMITS | config), base, template(family))


NO_LIMITS = {"source_max_len": None, "target_max_len": None, "max_length": None}


def template(family):
    return Template(family if family in TEMPLATE_NAMES else "the tokenizer's own", FAMILIES[family].text)


def said(conversation, family):
    """Returns what the model writes: text and end, by the definition of the family."""
    known, messages = FAMILIES[family], conversation.messages
    texts = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            text = message["content"].strip() if known.trims else message["content"]
            lead = known.lead
            if family == "Qwen 3" and index == len(messages) - 1:
                lead, text = THOUGHTS, text.lstrip("\n")
            texts.append(lead + text + known.end)
    return texts


def runs(row):
    """Returns the stretches of tokens that the loss counts."""
    matches, previous = [], NO
    for label in row.labels:
        if label != NO:
            matches = [*matches, [label]] if previous == NO else [*matches[:-1], [*matches[-1], label]]
        previous = label
    return matches


def written_as(base, conversation, family, **more):
    return base.apply_chat_template(
        conversation.messages, tools=conversation.tools, chat_template=FAMILIES[family].text, tokenize=False, **more
    )


def assert_as_sent(base, row, example, family):
    """The tokens are those of a server: of the prompt before the first answer, and of the whole text but for blanks.

    Blanks before an answer are those of the prompt, where a tokenizer writes them otherwise at the end of a text.
    """
    text = written_as(base, example, family)
    whole, prompts = ids(text, base), []
    for index, message in enumerate(example.messages):
        if message["role"] == "assistant" and FAMILIES[family].prompts:
            begun = replace(example, messages=example.messages[:index])
            prompts.append(written_as(base, begun, family, add_generation_prompt=True))
    sent = [ids(prompt, base) for prompt in prompts if text.startswith(prompt)]
    if sent and text.startswith(prompts[0]):
        assert row.input_ids[: len(sent[0])] == sent[0]
    # A token of blanks alone that follows is one that the tokenizer has stripped from the prompt.
    alike = (whole[: len(prompt)] == prompt and base.decode(whole[len(prompt)]).strip() for prompt in sent)
    if FAMILIES[family].prompts and all(alike):
        assert row.input_ids == whole
    assert [token for token in row.input_ids if base.decode(token).strip()] == [
        token for token in whole if base.decode(token).strip()
    ]


def ids(text, base):
    """The ids of a text, by the definition of the byte tokenizer."""
    return base(text, add_special_tokens=False)["input_ids"]


def by_bytes(tokens, base):
    """Decodes ids of the byte tokenizer: each byte stays as it is."""
    chunks = [bytes([i - 3]) if 3 <= i < 259 else base.convert_ids_to_tokens(i).encode() for i in tokens]
    return b"".join(chunks).decode()


# Which text is trained


def test_every_named_template_is_here():
    assert set(TEMPLATE_NAMES) - {"auto"} <= set(FAMILIES)


@pytest.mark.matrix(12)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistant_s_texts_with_their_ends_are_trained_and_nothing_else(family, bytes_of):
    known, rng = FAMILIES[family], random.Random(family)
    base = bytes_of(known.tokens)
    encode = encoder(base, family)
    for _ in range(60):
        example = draw(rng, (*WORDS, *SPELLED), system=known.system)
        expected = said(example, family)
        written = ChatWriter(base, template(family)).write(example)
        assert written.text == written_as(base, example, family)
        assert [written.text[span.start : span.end] for span in written.trained] == expected
        (row,) = encode.encode([example])
        assert [by_bytes(run, base) for run in runs(row)] == expected
        assert by_bytes(row.input_ids, base) == written.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said_last", ["", " \n"])
def test_an_answer_without_text_is_not_trained(family, said_last, bytes_of):
    base = bytes_of(FAMILIES[family].tokens)
    (row,) = encoder(base, family).encode([chat(user("a"), assistant("b"), user("c"), assistant(said_last))])
    first = said(chat(user("a"), assistant("b"), user("c")), family)
    assert [by_bytes(run, base) for run in runs(row)] == first


@pytest.mark.parametrize("family", [name for name, known in FAMILIES.items() if known.prompts])
def test_what_precedes_an_answer_is_the_prompt_that_a_server_gives(family, bytes_of):
    known, rng = FAMILIES[family], random.Random(family)
    base = bytes_of(known.tokens)
    for _ in range(30):
        # Mistral's own template shows the system text only where a question comes last.
        sayings = [word for word in WORDS if word.strip() and not any(token in word for token in known.tokens)]
        example = draw(rng, sayings, system=known.system and family != "Mistral 0.3")
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        (row,) = encoder(base, family).encode([chat(*example.messages[: last + 1])])
        asked = chat(*example.messages[:last])
        assert row.turns[-1].prompt == written_as(base, asked, family, add_generation_prompt=True)
        prompt = base.apply_chat_template(
            asked.messages, chat_template=known.text, add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids[: row.turns[-1].start] == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_message_spells_becomes_no_token_of_the_template_s(family, bytes_of):
    known = FAMILIES[family]
    base = bytes_of(known.tokens)
    tokens = ["<s>", "</s>", "<pad>", *known.tokens]
    plain = chat(user("q"), assistant("a"), user("r"), assistant("b"))
    spelled = chat(*({**message, "content": f"{message['content']}{''.join(tokens)}."} for message in plain.messages))
    rows = encoder(base, family).encode([plain, spelled])
    special = [[i for i in row.input_ids if i < 3 or i >= 259] for row in rows]
    assert special[0] == special[1]
    ends = [[label for label in row.labels if label >= 0 and (label < 3 or label >= 259)] for row in rows]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_a_token_leaves_those_of_other_turns_alone(family, bytes_of):
    known = FAMILIES[family]
    base, end = bytes_of(known.tokens), known.end.strip()
    plain = chat(user("q"), assistant("a"), user("r"), assistant("b"), user("s"), assistant("c"))
    spelled = chat(user("q"), assistant("a"), *(say(end) for say in (user, assistant, user, assistant)))
    rows = encoder(base, family).encode([plain, spelled])
    special = [[i for i in row.input_ids if i < 3 or i >= 259] for row in rows]
    assert special[0] == special[1]
    assert [run[-1] for run in runs(rows[1])] == [base.convert_tokens_to_ids(end)] * 3
    assert [len(run) for run in runs(rows[1])][1:] == [len(runs(rows[0])[1]) - 1 + len(end.encode())] * 2 or (
        family == "Qwen 3"  # empty thoughts stand before the last answer
    )


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_turns_are_known_however_they_were_added(special):
    base = build_byte_tokenizer(bos_token="<s>", eos_token="</s>")
    base.add_tokens([AddedToken(token, normalized=False, special=special) for token in IM])
    (row,) = encoder(base, "chatml").encode([chat(user("<|im_end|>"), assistant("<|im_start|>x<|im_end|>y"))])
    assert [by_bytes(run, base) for run in runs(row)] == ["<|im_start|>x<|im_end|>y<|im_end|>"]
    known = base.convert_tokens_to_ids(list(IM))
    assert [i for i in row.input_ids if i in known] == known * 2
    assert row.last_trained == known[1]


def test_what_a_call_or_a_tool_spells_becomes_no_token(bytes_of):
    base = bytes_of(IM)
    arguments = {"deep": [{"<|im_end|>": "</s>"}]}
    example = chat(
        user("a"),
        assistant("", tool_calls=[call("f<|im_end|>", arguments)]),
        {"role": "tool", "content": "<|im_start|>"},
        assistant("b"),
        tools=[{"type": "function", "function": {"name": "<|im_start|>", "parameters": {"</s>": 1}}}],
    )
    (row,) = encoder(base, "chatml").encode([example])
    assert [base.convert_ids_to_tokens(i) for i in row.input_ids if i >= 259] == list(IM) * 5
    assert not {1, 2} & set(row.input_ids)


# With real tokenizers


def same(text):
    """Returns a text without white space, which some tokenizers change or drop."""
    return "".join(text.replace("▁", "").split())


@pytest.mark.matrix(14)
@pytest.mark.parametrize("tokenizer_name", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokenizers_train_what_the_assistant_says(family, tokenizer_name, load):
    known, rng = FAMILIES[family], random.Random(f"{family} {tokenizer_name}")
    base = load(tokenizer_name, known.tokens)
    tell = tokenizer_name != "TinyStories-656K"  # it has no token for some characters
    encode, end = encoder(base, family), known.end.replace("</s>", base.eos_token)
    for _ in range(12):
        example = draw(rng, WORDS if tokenizer_name == "embedded" else (*WORDS, *SPELLED), system=known.system)
        (row,) = encode.encode([example])
        texts = [text.removesuffix(known.end) + end for text in said(example, family)]
        matches = [base.decode(run) for run in runs(row)]
        if tell:
            nfc = base.backend_tokenizer.normalizer.normalize_str if tokenizer_name == "pythia" else str
            assert [same(text) for text in matches] == [same(nfc(text)) for text in texts]
        assert [same(text).endswith(same(end)) for text in matches] == [True] * len(texts)
        # A row without an answer keeps an empty one, for evaluation.
        assert [turn.reference for turn in row.turns] == [text.removesuffix(end).strip() for text in texts or [""]]


@pytest.mark.matrix(50)
@pytest.mark.parametrize(
    "tokenizer_name", [tokenizer_name for tokenizer_name in PLACES if tokenizer_name != "TinyStories-656K"]
)  # its tokens span words
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_the_tokens_that_a_server_gives_it(family, tokenizer_name, load):
    known, rng = FAMILIES[family], random.Random(f"{family} {tokenizer_name} server")
    base = load(tokenizer_name, known.tokens)
    sayings = ("Hi", "Yes, of course!", "Grüße, 世界 😀👩‍👩‍👧 !", "a\nb\n\nc", "a  b   c", "```python\nprint(1)\n```")
    for _ in range(8):
        example = draw(rng, sayings, system=known.system)
        (row,) = encoder(base, family).encode([example])
        assert_as_sent(base, row, example, family)


@pytest.mark.matrix(6)
@pytest.mark.parametrize("tokenizer_name", PLACES)
@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"rstrip": True, "lstrip": True}])
def test_end_tokens_that_swallow_blanks_are_trained_and_change_no_token(flags, tokenizer_name, load):
    base = load(tokenizer_name, IM, **flags)
    example = chat(user("a b"), assistant("c d"), user("e"), assistant("f"))
    (row,) = encoder(base, "chatml").encode([example])
    if tokenizer_name != "TinyStories-656K":  # it is cut at every border
        assert_as_sent(base, row, example, "chatml")
    assert [run[-1] for run in runs(row)] == [base.convert_tokens_to_ids(IM[1])] * 2
    assert [same(base.decode(run)) for run in runs(row)] == ["cd<|im_end|>", "f<|im_end|>"]


@pytest.mark.parametrize("tokenizer_name", ["llama", "gpt2", "pythia", "stories260K"])
def test_text_that_spells_a_token_keeps_all_its_characters(tokenizer_name, load):
    base = load(tokenizer_name, IM)
    text = "one </s> two<|im_end|>three <|endoftext|>four"
    (row,) = encoder(base, "chatml").encode([chat(user(text), assistant(text))])
    assert base.decode(runs(row)[0]) == f"{text}<|im_end|>"
    assert base.decode(row.input_ids).count(text) == 2


@pytest.mark.parametrize("tokenizer_name", PLACES)
def test_a_token_over_a_border_is_cut_there_and_nowhere_else(tokenizer_name, load):
    base = load(tokenizer_name)
    glued = Template("glued", "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}"
                              "{% endfor %}")  # fmt: skip
    encode = build_encoder(DataConfig(name="toy", path="toy.json"), base, glued)
    (row,) = encode.encode([chat(user("The answ"), assistant("er is three and more"))])
    assert base.decode(runs(row)[0]) == f"er is three and more{base.eos_token}"
    assert same(base.decode(row.input_ids)) == f"Theansweristhreeandmore{base.eos_token}"


# Calls of tools

CALLED = chat(
    user("add"),
    assistant("Let me see.", tool_calls=[call("add", {"a": 1, "b": "</s>"}), call("add", {"a": 2})]),
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "4"},
    assistant("3 and 4"),
    user("again"),
    assistant("", tool_calls=[call("add", "{broken")]),
    {"role": "tool", "content": "5"},
    assistant("5"),
    tools=TOOLS,
)
TAGGED = [
    'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "</s>"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
    "3 and 4<|im_end|>",
    '\n<tool_call>\n{"name": "add", "arguments": "{broken"}\n</tool_call><|im_end|>',
    "5<|im_end|>",
]
CALLS = {
    "chatml": [TAGGED[0], TAGGED[1], TAGGED[2].removeprefix("\n"), TAGGED[3]],
    "chatml-thoughts": [TAGGED[0], TAGGED[1], TAGGED[2].removeprefix("\n"), TAGGED[3]],
    "qwen": [TAGGED[0], TAGGED[1], TAGGED[2].removeprefix("\n"), TAGGED[3]],
    "llama-3": [
        'Let me see.\n{"name": "add", "parameters": {"a": 1, "b": "</s>"}}\n{"name": "add", "parameters": {"a": 2}}'
        "<|eot_id|>",
        "3 and 4<|eot_id|>",
        '{"name": "add", "parameters": "{broken"}<|eot_id|>',
        "5<|eot_id|>",
    ],
    "guanaco": [
        ' Let me see. ### Call: {"name": "add", "arguments": {"a": 1, "b": "</s>"}}'
        ' ### Call: {"name": "add", "arguments": {"a": 2}}</s>',
        " 3 and 4</s>",
        ' ### Call: {"name": "add", "arguments": "{broken"}</s>',
        " 5</s>",
    ],
}


@pytest.mark.parametrize("family", CALLS)
def test_calls_are_trained_and_what_tools_answer_is_not(family, bytes_of):
    base = bytes_of(FAMILIES[family].tokens)
    (row,) = encoder(base, family).encode([CALLED])
    assert [by_bytes(run, base) for run in runs(row)] == CALLS[family]
    assert by_bytes(row.input_ids, base) == written_as(base, CALLED, family)
    assert not {0, 1} & set(row.input_ids[1:])
    prompt = written_as(base, chat(*CALLED.messages[:-1], tools=TOOLS), family, add_generation_prompt=True)
    assert row.turns[-1].prompt == prompt


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("family", CALLS)
def test_a_turn_of_weight_0_is_not_trained(family, index, bytes_of):
    base = bytes_of(FAMILIES[family].tokens)
    answers = [number for number, message in enumerate(CALLED.messages) if message["role"] == "assistant"]
    messages = [
        {**message, "weight": 0 if number == answers[index] else 1} for number, message in enumerate(CALLED.messages)
    ]
    (row,) = encoder(base, family).encode([chat(*messages, tools=TOOLS)])
    assert [by_bytes(run, base) for run in runs(row)] == CALLS[family][:index] + CALLS[family][index + 1 :]


@pytest.mark.parametrize("name", ["alpaca", "gemma", "llama-2", "mistral", "phi-3", "plain", "vicuna", "zephyr"])
def test_a_template_without_tools_says_so(name, bytes_of):
    roles = " ".join(message["role"] for message in CALLED.messages)
    sentence = f"data.template={name}: the template cannot write a conversation of the roles {roles} "
    with pytest.raises(UserError, match=rf"^{sentence}\(.*{name} has no form for tool calls\); choose another"):
        encoder(bytes_of(FAMILIES[name].tokens), name).encode([CALLED])


def test_llama_3_1_puts_tools_into_the_first_question_and_takes_one_call_a_turn(bytes_of):
    base = bytes_of(LLAMA_3_TOKENS)
    encode = encoder(base, "Llama 3.1")
    example = chat(
        {"role": "system", "content": "Be brief."},
        user("add"),
        assistant("", tool_calls=[call("add", {"a": 1})]),
        {"role": "tool", "content": "3"},
        assistant("3"),
        tools=TOOLS,
    )
    (row,) = encode.encode([example])
    expected = ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "3<|eot_id|>"]
    assert [by_bytes(run, base) for run in runs(row)] == expected
    with pytest.raises(UserError, match="This model only supports single tool-calls!"):
        encode.encode([chat(user("a"), assistant("", tool_calls=[call("f", {}), call("g", {})]), tools=TOOLS)])


# Thoughts


def test_thoughts_are_trained_where_the_template_writes_them(bytes_of):
    base = bytes_of(IM)
    early, late = assistant("b", reasoning_content="early"), assistant("d", reasoning_content="late")
    (row,) = encoder(base, "Qwen 3").encode([chat(user("a"), early, user("c"), late)])
    assert [by_bytes(run, base) for run in runs(row)] == ["b<|im_end|>", "<think>\nlate\n</think>\n\nd<|im_end|>"]
    (row,) = encoder(base, "Qwen 3").encode([chat(user("a"), assistant("<think>\nx\n</think>\n\nb"))])
    assert [by_bytes(run, base) for run in runs(row)] == ["<think>\nx\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize(
    "spelling",
    [
        {"content": "b", "reasoning_content": "x"},
        {"content": "<think>x</think>\n\nb"},
        {"content": "<think>\nx\n</think>\n\nb"},
        {"content": "x\n</think>\n\nb"},
    ],
)
def test_a_thought_that_a_later_turn_hides_is_counted_however_it_is_spelled(spelling, bytes_of):
    base = bytes_of(IM)
    example = chat(user("a"), {"role": "assistant", **spelling}, user("c"), assistant("d"))
    (row,) = encoder(base, "Qwen 3").encode([example])
    assert [by_bytes(run, base) for run in runs(row)] == ["b<|im_end|>", f"{THOUGHTS}d<|im_end|>"]
    assert row.lost_thoughts == 1
    (last,) = encoder(base, "Qwen 3", train_on=TrainOn.last).encode([example])
    assert [by_bytes(run, base) for run in runs(last)] == [f"{THOUGHTS}d<|im_end|>"]
    assert last.lost_thoughts == 0
    (whole,) = encoder(base, "Qwen 3", train_on=TrainOn.all).encode([example])
    assert whole.labels == [NO, *whole.input_ids[1:]]


def test_a_turn_that_the_template_rewrites_is_refused_unless_it_is_not_needed(bytes_of):
    base = bytes_of(IM)
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ '' if loop.last else ' and more' }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    example = chat(user("a"), assistant("b"), user("c"), assistant("d"))
    sentence = (
        "data.template=mine.jinja: the template writes turn 2 otherwise when more turns follow, so the tokens "
        "to train cannot be told; set data.train_on=last or data.train_on=all, or choose another data.template"
    )

    def build(train_on):
        config = DataConfig(name="toy", path="toy.json", train_on=train_on)
        return build_encoder(config, base, Template("mine.jinja", text))

    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        build(TrainOn.assistant).encode([example])
    (last,) = build(TrainOn.last).encode([example])
    assert [by_bytes(run, base) for run in runs(last)] == ["d<|im_end|>"]
    (whole,) = build(TrainOn.all).encode([example])
    assert whole.labels == [NO, *whole.input_ids[1:]]


def test_a_template_that_changes_all_texts_is_read_by_its_beginnings(bytes_of):
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{{ eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% endif %}"
    encode = build_encoder(DataConfig(name="toy", path="toy.json"), bytes_of(), Template("loud", text))
    (row,) = encode.encode([chat(user("a"), assistant("b"), user("c"), assistant("d"))])
    assert [by_bytes(run, bytes_of()) for run in runs(row)] == ["B</s>", "D</s>"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{% for m in messages %", r"the template cannot write a conversation of the roles user assistant \("),
        ("{{ raise_exception('not today') }}", r"the roles user assistant \(not today\); choose another data.template"),
        ("{{ messages[0].nothing.at_all }}", "the template cannot write a conversation of the roles user assistant"),
        ("{{ messages[0].content * 2 }}", "does not write what a question and an answer say once each"),
        ("hello", "does not write what a question and an answer say once each"),
    ],
)
def test_a_broken_template_is_named(text, sentence, tokenizer):
    encode = build_encoder(DataConfig(name="toy", path="toy.json"), tokenizer, Template("mine.jinja", text))
    with pytest.raises(UserError, match=f"^data.template=mine.jinja: .*{sentence}"):
        encode.encode([chat(user("a"), assistant("b"))])


def test_a_template_that_demands_turns_names_the_roles(bytes_of):
    twice = chat(user("a"), user("b"), assistant("c"))
    with pytest.raises(UserError, match=r"of the roles user user assistant .*must alternate"):
        encoder(bytes_of(), "Llama 2").encode([twice])
    with pytest.raises(UserError, match=r"of the roles system user assistant .*System role not supported"):
        encoder(bytes_of(TEMPLATES["gemma"]), "Gemma 2").encode(
            [chat({"role": "system", "content": "s"}, user("a"), assistant("c"))]
        )


# Which turns are trained


def test_train_on_chooses_the_turns(bytes_of):
    base = bytes_of(IM)
    example = chat(user("a"), assistant("b"), user("c"), assistant("d"), user("e"))
    rows = {train_on: encoder(base, "chatml", train_on=train_on).encode([example])[0] for train_on in TrainOn}
    assert [by_bytes(run, base) for run in runs(rows[TrainOn.assistant])] == ["b<|im_end|>", "d<|im_end|>"]
    assert [by_bytes(run, base) for run in runs(rows[TrainOn.last])] == ["d<|im_end|>"]
    assert rows[TrainOn.all].labels == [NO, *rows[TrainOn.all].input_ids[1:]]
    assert len({tuple(row.input_ids) for row in rows.values()}) == 1
    assert len({tuple(row.turns) for row in rows.values()}) == 1


@pytest.mark.parametrize("name", sorted(set(TEMPLATE_NAMES) - {"auto"}))
def test_two_users_in_a_row_and_two_answers_in_a_row_are_told(name, bytes_of):
    known = FAMILIES[name]
    base = bytes_of(known.tokens)
    (row,) = encoder(base, name).encode([chat(user("a"), user("b"), assistant("c"), assistant("d"))])
    matches = by_bytes([label for run in runs(row) for label in run], base)
    assert matches == f"{known.lead}c{known.end}{known.lead}d{known.end}"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_answer_nothing_is_trained(family, bytes_of):
    base = bytes_of(FAMILIES[family].tokens)
    (row,) = encoder(base, family).encode([chat(user("a"))])
    assert row.trained == 0
    (row,) = encoder(base, family, train_on=TrainOn.all).encode([chat(user("a"))])
    assert row.labels == [NO, *row.input_ids[1:]]
    assert row.turns[-1].start == len(row.input_ids)


def test_a_template_without_an_end_token_gets_the_tokenizer_s(bytes_of):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    encode = build_encoder(DataConfig(name="toy", path="toy.json"), bytes_of(), Template("bare", text))
    (row,) = encode.encode([chat(user("a"), assistant("b"))])
    assert row.last_trained == 2
    (row,) = encode.encode([chat(user("a"), assistant("b"), user("c"))])
    assert [by_bytes(run, bytes_of()) for run in runs(row)] == ["b"]


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "s"}], []])
def test_nothing_said_makes_no_conversation(messages):
    assert list(FORMATS["messages"].render({"messages": messages})) == []


def test_an_assistant_that_speaks_first_is_refused():
    with pytest.raises(UserError, match="turn 1 of 1: the assistant speaks before any user turn"):
        FORMATS["messages"].render({"messages": [assistant("a")]})


# Published rows

FILES = {
    "chat_messages_tools.jsonl": "messages",
    "glaive_toolcall_en_demo.json": "conversations",
    "sharegpt_fastchat.json": "conversations",
    "dpo_en_demo.json": "chosen",
    "kto_en_demo.json": "messages",
    "guanaco_text.jsonl": "guanaco",
    "guanaco_llama2_inst.parquet": "inst",
}


def read_rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]


def expected_call(function, family):
    inner = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
    inner += f"{json.dumps(function['arguments'], ensure_ascii=False)}}}"
    return f"<tool_call>\n{inner}\n</tool_call>" if family == "chatml" else f"### Call: {inner}"


def expected_turn(message, family):
    between = "\n" if family == "chatml" else " "
    calls = [expected_call(call["function"], family) for call in message.get("tool_calls") or []]
    return between.join(part for part in (message["content"].strip(), *calls) if part)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("family", ["guanaco", "chatml"])
def test_every_trained_span_of_published_rows_is_an_answer(family, file, load):
    known = FAMILIES[family]
    base = load("llama", known.tokens)
    if not (REAL / file).is_file():
        pytest.skip("no shared/data beside the checkout")
    examples = [example for row in read_rows(REAL / file) for example in FORMATS[FILES[file]].render(row)]
    chats = [example for example in examples if isinstance(example, Conversation)]
    assert len(chats) > 20
    writer = ChatWriter(base, template(family))
    for example, row in zip(chats, encoder(base, family).encode(chats), strict=True):
        answers = [
            expected_turn(message, family)
            for message in example.messages
            if message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
        ]
        written = writer.write(example)
        spans = [written.text[span.start : span.end] for span in written.trained]
        assert spans == [f"{known.lead}{answer}{known.end}" for answer in answers]
        assert [base.decode(run).strip() for run in runs(row)] == [f"{answer}{known.end}" for answer in answers]
        if not written.raw:
            assert row.input_ids == base(written.text, add_special_tokens=False)["input_ids"]


NO_PROMPT = "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
GAP = (
    "{% for m in messages %}{{ m.role + ':\n\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
)


@pytest.mark.matrix(30)
@pytest.mark.parametrize("tokenizer_name", PLACES)
@pytest.mark.parametrize(
    "text", [*(read_template(name) for name in TEMPLATES), NO_PROMPT, GAP], ids=[*TEMPLATES, "none", "gap"]
)
def test_every_answer_is_asked_for_by_the_tokens_that_stand_before_it(text, tokenizer_name, load):
    base = load(tokenizer_name)
    mine = build_encoder(DataConfig(name="toy", path="toy.json", **NO_LIMITS), base, Template("mine", text))
    messages = [user("What is 5 plus 5?"), assistant("10"), user("And 6?"), assistant("\n11"), user("Why?"),
                assistant(" so")]  # fmt: skip
    (row,) = mine.encode([chat(*messages)])
    for index, turn in enumerate(row.turns):
        sent = messages[: 2 * index + 1]
        assert mine.encode_prompt(sent) == row.input_ids[: turn.start]
        assert mine.encode_question(chat(*sent)).input_ids == row.input_ids[: turn.start]
