"""Where the endpoint listens, who may ask it, and what is refused before anything is loaded."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.schema import GenerationConfig, ServeConfig
from qlora.config.schema.generation import Loop
from qlora.errors import ConfigError, ResourceError, UserError
from qlora.serving.capacity import check_answers, choose_context
from qlora.serving.production import production_lines
from qlora.serving.server import check_packages, is_loopback, listen, read_token
from qlora.tasks.serve import signals

TOKEN = "QLORA_SERVE_TOKEN"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_the_loopback_needs_no_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert is_loopback(host)
    assert read_token(ServeConfig(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_any_other_address_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError) as error:
        read_token(ServeConfig(host=host))
    assert str(error.value).startswith(f"serve.host={host} can be reached from other machines, and {TOKEN} holds no")
    monkeypatch.setenv(TOKEN, "short and weak")
    with pytest.raises(ConfigError) as error:
        read_token(ServeConfig(host=host))
    assert "must be 16 or more characters of ASCII" in str(error.value)
    assert "short" not in str(error.value)
    monkeypatch.setenv("MY_TOKEN", "a" * 32)
    assert read_token(ServeConfig(host=host, token_variable="MY_TOKEN")) == "a" * 32


def test_a_token_in_place_of_its_variable_is_not_shown() -> None:
    with pytest.raises(ConfigError) as error:
        ServeConfig(token_variable="s3cret-token")
    assert str(error.value).startswith("serve.token_variable must be the name of a variable, never the token")
    assert "s3cret" not in str(error.value)


def test_a_port_in_use_is_one_sentence() -> None:
    with listen(ServeConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError) as error:
            listen(ServeConfig(port=port))
    assert str(error.value) == (
        f"serve.port={port} is in use, perhaps by another server; choose another with serve.port={port + 1}, or any "
        "free one with serve.port=0"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "no such name", "ex\udcffample"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="is no address of this machine"):
        listen(ServeConfig(host=host, port=0))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ResourceError, match=r"task=serve needs the package uvicorn; pip install 'qlora\[serve\]'"):
        check_packages()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("serve.port=70000", "serve.port must lie between 0 and 65535, got 70000"),
        ("serve.slots=0", "serve.slots must be positive, got 0"),
        ("serve.queue=0", "serve.queue must be positive, got 0"),
        ("serve.context=1", "serve.context must be 2 or more, or null, got 1"),
        ("serve.name=base", "serve.name must be a name without blanks and slashes, and not 'base'"),
        ("serve.adapters={base: a}", "serve.adapters.base must be a name without blanks and slashes"),
        ("serve.adapters={a/b: a}", "serve.adapters.a/b must be a name without blanks and slashes"),
    ],
)
def test_values_that_cannot_be_are_refused(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        compose(["task=serve", "adapter=none", override])
    assert str(error.value).startswith(sentence)


def test_the_context_is_the_models_unless_it_is_long() -> None:
    assert choose_context(ServeConfig(), 512) == 512
    assert choose_context(ServeConfig(), 131072) == choose_context(ServeConfig(), None) == 8192
    assert choose_context(ServeConfig(context=100_000), 131072) == 100_000
    with pytest.raises(ConfigError, match=r"serve\.context=600 is more than the model's context of 512 tokens"):
        choose_context(ServeConfig(context=600), 512)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (GenerationConfig(loop=Loop.transformers), "generation.loop"),
        (GenerationConfig(num_beams=2), "generation.num_beams"),
        (GenerationConfig(use_cache=False), "generation.use_cache"),
    ],
)
def test_options_that_slots_do_not_compute_are_refused(config: GenerationConfig, key: str) -> None:
    check_answers(GenerationConfig())
    with pytest.raises(ConfigError) as error:
        check_answers(config)
    assert str(error.value).startswith(f"task=serve answers by slots, which have no place for {key}; leave it out (")


def adapter(folder: Path, **settings: Any) -> Path:
    import json

    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 24, **settings}))
    (folder / "chat_template.jinja").write_text("")
    return folder


def test_the_commands_for_production_attach_the_adapters(tmp_path: Path) -> None:
    plain, dora = adapter(tmp_path / "a"), adapter(tmp_path / "b", use_dora=True)
    vllm, sglang = production_lines("me/base", {"a": plain, "b": dora})
    template = f"--chat-template {plain}/chat_template.jinja"
    assert vllm == f"vllm serve me/base --enable-lora --max-lora-rank 32 --lora-modules a={plain} {template}"
    assert sglang == (
        "python -m sglang.launch_server --model-path me/base --enable-lora --max-lora-rank 24 "
        f"--lora-paths a={plain} {template}"
    )
    assert production_lines("me/base", {"b": dora}) == []
    assert production_lines("me/base", {})[0] == "vllm serve me/base"
    assert production_lines("me/base", {}, tmp_path / "full")[0] == f"vllm serve {tmp_path}/full"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_handlers_are_as_before(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    with signals() as ended:
        signal.raise_signal(number)
        assert ended.is_set()
    assert signal.getsignal(number) is previous


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_and_ends_with_0(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qlora", "serve", "none", "model=tiny", f"serve.port={port}"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "Ctrl-C ends it" in line:
            process.send_signal(number)
    assert process.wait(60) == 0, printed
    assert f"serving base on http://127.0.0.1:{port}/v1; Ctrl-C ends it\nending\n0 answers of 0 tokens" in printed
    assert not [*tmp_path.iterdir()]
