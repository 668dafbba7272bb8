"""`task=verify`: what is served is what was trained, or the cause is said."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.schema import GgufType
from qlora.errors import ConfigError, DataError, ResourceError, RunError, UserError
from qlora.run import Run
from tests.export.engines import model_file

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TRAINED = [
    *("trainer.max_steps=24", "trainer.eval_steps=null", "trainer.warmup_steps=2", "trainer.learning_rate=4e-3"),
    *("trainer.per_device_train_batch_size=8", "task.predict=false", "evaluation=loss", "device=cpu", "lora.r=8"),
    *("data.max_eval_samples=60", "verify.prompts=4", "merge.prompts=4"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    overrides = (*TRAINED, *overrides)
    return Run(compose(list(overrides)), folder, overrides=list(overrides)).execute()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the embedded model, with a merged model and a GGUF file."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder)
    run(folder, "task=merge")
    run(folder, "task=export")
    return folder


def verify(folder: Path, trained: Path, *overrides: str) -> dict[str, Any]:
    run(folder, "task=verify", f"adapter={trained}", *overrides)
    return json.loads((folder / "certificate.json").read_text())


def refusal(folder: Path, trained: Path, *overrides: str, kind: type[UserError] = RunError) -> str:
    with pytest.raises(kind) as error:
        run(folder, "task=verify", f"adapter={trained}", *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def gguf_path(folder: Path) -> Path:
    return folder / f"{folder.name}-f16.gguf"


def with_template(merged: Path, path: Path, template: str) -> Path:
    """Writes a GGUF file of a merged model with another template."""
    file = model_file(merged)
    file.tokenizer.chat_template = template
    file.write(path, GgufType.f16, lambda count: None)
    return path


def test_the_gguf_file_of_the_embedded_model_answers_as_the_adapter_on_its_base(trained: Path, tmp_path: Path) -> None:
    record = verify(tmp_path, trained, "verify.engine=llama-cpp")
    assert record["accepted"]
    assert record["kl_mean"] < 1e-3
    assert (record["chats"], record["equal_chats"]) == (50, 50)
    assert record["chats_compared_by"] == "tokens"
    assert record["finished_answers"] == record["ended"] > 0
    assert record["adapter_kl"] > 1
    assert record["compared_tokens"] == "all"


def test_a_file_that_was_exported_into_a_folder_of_its_own_is_found(trained: Path, tmp_path: Path) -> None:
    apart = trained.parent / "apart"
    apart.mkdir()
    shutil.copy(gguf_path(trained), apart / "apart.gguf")
    result = json.loads((trained / "export.json").read_text())
    result["paths"]["gguf"] = str(apart / "apart.gguf")
    (apart / "export.json").write_text(json.dumps(result))
    asked = ["verify.engine=llama-cpp", "verify.chats=1", "verify.prompts=1"]
    assert verify(tmp_path, trained, *asked)["served"] == str(apart / "apart.gguf")
    result["measured"]["adapter"]["digest"] = "of others"
    (apart / "export.json").write_text(json.dumps(result))
    assert verify(tmp_path, trained, *asked)["served"] == str(gguf_path(trained))
    (apart / "export.json").write_text("no JSON")
    assert verify(tmp_path, trained, *asked)["served"] == str(gguf_path(trained))


def test_a_merged_folder_is_verified_by_transformers_and_the_cards_say_so(trained: Path, tmp_path: Path) -> None:
    record = verify(tmp_path, trained)
    assert record["accepted"]
    assert record["engine"] == "transformers"
    assert record["served"] == str(trained / "merged")
    verify(tmp_path, trained)
    for card in (trained / "README.md", trained / "adapter" / "README.md"):
        text = card.read_text()
        assert text.count("- transformers (bfloat16): mean KL divergence") == 1
        assert text.index("## Verified") < text.index("## Limits")
        assert "equal tokens in 50 of 50 chats" in text


WRONG = "{{ bos_token }}{% for message in messages %}Q: {{ message.content }}\n{% endfor %}A: "


def test_a_wrong_template_is_caught_in_llama_cpp(trained: Path, tmp_path: Path) -> None:
    path = with_template(trained / "merged", tmp_path / "wrong.gguf", WRONG)
    text = refusal(tmp_path / "v", trained, "verify.engine=llama-cpp", f"verify.path={path}")
    assert "its chat template is not that of the training (chat 1 of 50: token 2 is" in text
    assert "ignored" not in text
    assert json.loads((tmp_path / "v" / "certificate.json").read_text())["accepted"] is False


def test_a_wrong_template_is_caught_in_transformers(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "chat_template.jinja").write_text(WRONG)
    text = refusal(tmp_path / "v", trained, f"verify.path={tmp_path / 'merged'}")
    assert "its chat template is not that of the training (chat 1 of 50: token 2 is" in text


def test_a_missing_end_token_is_caught_in_transformers(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "merged", tmp_path / "merged")
    path = tmp_path / "merged" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 0}))
    text = refusal(tmp_path / "v", trained, f"verify.path={tmp_path / 'merged'}")
    assert "it does not stop at the end token '</s>', behind which it writes on in 8 of 8 finished answers" in text
    assert "template" not in text


def test_an_ignored_adapter_is_caught(trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    run(tmp_path / "export", "task=export", "adapter=none", "model=tiny", f"export.path={base}")
    text = refusal(tmp_path / "v", trained, "verify.engine=llama-cpp", f"verify.path={base}")
    assert "it answers as the untuned base: the adapter is ignored" in text


def test_what_rounding_changes_is_said_as_such(trained: Path, tmp_path: Path) -> None:
    text = refusal(tmp_path / "v", trained, "verify.engine=llama-cpp", "verify.max_kl=1e-9")
    assert "further away than verify.max_kl=1e-09" in text
    assert "its weights are held as F16, so quantization or rounding is the likely cause" in text


@pytest.fixture
def server(trained: Path) -> Iterator[str]:
    """A server of llama.cpp at an address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf_path(trained))
    params.n_ctx, params.n_parallel, params.port, params.hostnames = 512, 1, 0, ["127.0.0.1"]
    params.warmup, params.verbosity = False, 0
    running = xllamacpp.Server(params)
    yield running.listening_address
    del running


def test_a_server_is_asked_for_its_likeliest_tokens(trained: Path, tmp_path: Path, server: str) -> None:
    record = verify(tmp_path, trained, f"verify.engine={server}/v1", "verify.top=30")
    assert record["accepted"]
    assert record["compared_tokens"] == 30
    assert record["precision"] == "F16"
    assert record["equal_chats"] == 50


def test_what_cannot_be_asked_is_said_in_one_sentence(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def said(*overrides: str, kind: type[UserError]) -> str:
        return refusal(tmp_path / "v", trained, *overrides, kind=kind)

    assert "this is no GGUF file; qlora export writes one" in said(
        "verify.engine=llama-cpp", f"verify.path={trained / 'config.yaml'}", kind=DataError)  # fmt: skip
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_path(trained).read_bytes()[:5000])
    assert "llama.cpp cannot load it" in said("verify.engine=llama-cpp", f"verify.path={broken}", kind=DataError)
    assert "no model there; qlora merge writes one" in said(f"verify.path={tmp_path}", kind=DataError)
    shutil.copytree(trained / "merged", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    assert f"verify.path={tmp_path / 'cut'}" in said(f"verify.path={tmp_path / 'cut'}", kind=DataError)
    assert "no answer of a server there" in said("verify.engine=http://127.0.0.1:9", kind=ResourceError)
    assert "a server has its own model" in said("verify.engine=http://127.0.0.1:9", "verify.path=x", kind=ConfigError)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert "needs the package xllamacpp, which is not installed" in said("verify.engine=llama-cpp", kind=ConfigError)


def test_an_engine_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"verify\.engine must be transformers, llama-cpp or an http:// address"):
        compose(["task=verify", "verify.engine=ollama", "adapter=x"])
