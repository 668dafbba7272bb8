"""Writes the `Modelfile` that Ollama serves a merged model by, with the chat template as a Go template.

The Jinja template is not translated but asked: what it writes around the messages of one conversation gives the form
below, and the form is taken only if it gives the same tokens for conversations of every other kind.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora.config.schema import GenerationConfig
from qlora.errors import OF_CODE
from qlora.runtime.atomic_files import write_text
from qlora.text import brief, visible

Message = dict[str, str]

MARKS: Final = tuple(f"\ue0a0{number}\ue0a1" for number in range(4))
"""Stand for messages; the characters are for private use, so no template acts on them."""
SYSTEM, QUESTION, ANSWER, NEXT = MARKS

SAMPLE_SYSTEM: Final = "Be brief.\n\nNo lists."
SAMPLES: Final = (
    "What is 2 + 2?",
    'It is "4".',
    "And twice\n  that?",
    "8 – naturally",
    "Danke, schön!",
    "Bitte",
    "…",
    "",
)
"""Questions and answers in turn, to compare by."""

WITH_SYSTEM: Final = """\
{{- if .System }}{{ %(before_system)s }}{{ .System }}{{ %(after_system)s }}{{ else }}{{ %(start)s }}{{ end }}"""
WITHOUT_SYSTEM: Final = "{{- %(start)s }}"
TURNS: Final = """
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}{{ .Content }}{{ if $last }}{{ %(prompt)s }}{{ end }}
{{- else if eq .Role "assistant" }}{{ %(before_answer)s }}{{ .Content }}
{{- if not $last }}{{ %(after_answer)s }}{{ end }}
{{- end }}
{{- end }}"""
"""The model continues a conversation that ends with the assistant."""


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes around the messages of a conversation."""

    start: str
    """Before the first question, where there is no system message."""
    before_system: str | None
    """Before a system message; None: the template has no place for one."""
    after_system: str
    """Between a system message and the first question."""
    before_answer: str
    """Between a question and its answer."""
    after_answer: str
    """Between an answer and the next question."""
    prompt: str
    """After the last question, where the model continues."""
    adds_bos: bool = False
    """Whether the server puts the begin token before the text, which then must not spell it."""

    def render(self, messages: Sequence[Message]) -> str:
        """Returns what the Go template writes for a conversation."""
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        with_system = self.before_system is not None and system
        text = f"{self.before_system}{system}{self.after_system}" if with_system else self.start
        for number, message in enumerate(messages, 1):
            last = number == len(messages)
            if message["role"] == "user":
                text += message["content"] + (self.prompt if last else "")
            elif message["role"] == "assistant":
                text += self.before_answer + message["content"] + ("" if last else self.after_answer)
        return text

    def go_template(self) -> str:
        """Returns the form in the language of Go's text/template; everything it writes stands in quotes."""
        template = TURNS if self.before_system is None else WITH_SYSTEM + TURNS
        template = (WITHOUT_SYSTEM if self.before_system is None else "") + template
        return template % {name: json.dumps(text, ensure_ascii=False) for name, text in asdict(self).items()}


def find_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm | str:
    """Returns the form of a tokenizer's chat template, or the reason why there is none."""
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    if "strftime_now" in str(tokenizer.chat_template):
        return "the chat template writes the date of the day"
    try:
        form = _ask(tokenizer)
        with_system = form is not None and form.before_system is not None
        samples = [(messages, _write(tokenizer, messages)) for messages in _conversations(system=with_system)]
    except (TemplateError, *OF_CODE) as error:
        return f"the chat template cannot write a plain conversation ({' '.join(str(error).split())})"
    if form is None or any(form.render(messages) != text for messages, text in samples):
        return "what the chat template writes around a message depends on more than its role"
    short = _without_bos(form, tokenizer)
    # Some tokenizers split the text behind a begin token otherwise than one that they put it before themselves.
    same = short is not None and all(
        tokenizer(short.render(messages))["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        for messages, text in samples
    )
    return short if short is not None and same else form


def _write(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


def _ask(tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
    """Returns the form that marked messages show; None: they are not written once each and in order."""

    def around(*marks: str) -> list[str] | None:
        """Returns the texts before, between and after the marks."""
        roles = [*(["system"] if SYSTEM in marks else []), "user", "assistant", "user"]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        parts = re.split(f"({'|'.join(MARKS)})", _write(tokenizer, messages))
        return parts[::2] if parts[1::2] == list(marks) else None

    plain = around(QUESTION, ANSWER, NEXT)
    if plain is None:
        return None
    start, before_answer, after_answer, prompt = plain
    form = ChatForm(start, None, "", before_answer, after_answer, prompt)
    try:
        with_system = around(*MARKS)
    except TemplateError:  # some templates refuse a system message
        with_system = None
    return replace(form, before_system=with_system[0], after_system=with_system[1]) if with_system else form


def _conversations(*, system: bool) -> Iterator[list[Message]]:
    """Yields conversations of one to four questions, and if there is a place for it each with a system message too."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, SAMPLES, strict=False)]
    for end in range(1, len(turns) + 1, 2):
        yield turns[:end]
        if system:
            yield [{"role": "system", "content": SAMPLE_SYSTEM}, *turns[:end]]


def _without_bos(form: ChatForm, tokenizer: PreTrainedTokenizerBase) -> ChatForm | None:
    """Returns the form for a server that adds the begin token as the tokenizer does; None where neither writes it."""
    begin, ids = tokenizer.bos_token, tokenizer("x")["input_ids"]
    starts = [form.start, *([] if form.before_system is None else [form.before_system])]
    if not begin or ids[:1] != [tokenizer.bos_token_id] or not all(text.startswith(begin) for text in starts):
        return None
    start, *before_system = (text.removeprefix(begin) for text in starts)
    return replace(form, start=start, before_system=before_system[0] if before_system else None, adds_bos=True)


def write_modelfile(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    form: ChatForm,
    generation: GenerationConfig,
    *,
    end_ids: Sequence[int],
    name: str,
) -> Path | str:
    """Writes `Modelfile` into the folder of a model with its tokenizer, and returns its path, or why it is not written.

    The tokenizer's config there says whether a server adds the begin token, which transformers itself reads
    from another file. `end_ids` are the tokens that end an answer; `name` is what the model is called in the comment.
    """
    lines = modelfile_lines(tokenizer, form, generation, end_ids=end_ids, name=name, source=".")
    if isinstance(lines, str):
        return lines
    config_path = folder / "tokenizer_config.json"
    settings = json.loads(config_path.read_text(encoding="utf-8"))
    settings |= {"add_bos_token": form.adds_bos, "add_eos_token": False}
    write_text(config_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    path = folder / "Modelfile"
    write_text(path, "\n".join(lines) + "\n")
    return path


def modelfile_lines(
    tokenizer: PreTrainedTokenizerBase,
    form: ChatForm,
    generation: GenerationConfig,
    *,
    end_ids: Sequence[int],
    name: str,
    source: str,
) -> list[str] | str:
    """Returns the lines of a Modelfile for the weights in `source`, seen from its folder, or why there is none."""
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids]
    if not any(stop in form.after_answer for stop in stops):  # the next question begins without a token of its own
        stops += [text for text in [form.after_answer.strip()] if text]
    if strange := [stop for stop in stops if not _is_quotable(stop)]:
        return f"a Modelfile has no way to write {brief(strange[0])}, which ends an answer"
    return [
        f"# ollama create {shlex.quote(' '.join(visible(name).split()))} -f Modelfile",
        f"FROM {source}",
        f'TEMPLATE """{form.go_template()}"""',
        *(f"PARAMETER {key} {value:g}" for key, value in _parameters(generation).items()),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops)),
    ]


def _parameters(generation: GenerationConfig) -> dict[str, float]:
    """Returns the settings of the run in Ollama's names; its own defaults are others."""
    sampling = {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    return {
        **(sampling if generation.do_sample else {"temperature": 0}),
        "repeat_penalty": generation.repetition_penalty,
        "num_predict": generation.new_tokens,
    }


def _is_quotable(text: str) -> bool:
    """Returns whether a text cannot end the quotes that a Modelfile puts around it."""
    return '"""' not in text and not text.endswith('"') and visible(text) == text


def _quoted(text: str) -> str:
    """Returns a text as a Modelfile holds it, which knows no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
