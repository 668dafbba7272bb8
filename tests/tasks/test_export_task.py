"""`task=export`: a GGUF file is whole and proved, or is not there."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError, DataError, ResourceError, UserError
from qlora.export import quantize
from qlora.export.model_file import ModelFile
from qlora.run import Run
from tests.export.engines import REAL, needs_real

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

QUICK = [
    *("lora.r=4", "lora.alpha=8", "trainer.max_steps=2", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    *("trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=4", "data.max_train_samples=16"),
    *("data.max_eval_samples=12", "evaluation=loss", "task.predict=false", "merge.prompts=4", "trainer=paper"),
    *("trainer.gradient_accumulation_steps=1", "device=cpu", "verify.prompts=4", "verify.chats=12"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    overrides = (*QUICK, *overrides)
    return Run(compose(list(overrides)), folder, overrides=list(overrides)).execute()


def export(folder: Path, trained: Path, *overrides: str) -> dict[str, Any]:
    return run(folder, "task=export", f"adapter={trained}", *overrides)


def refusal(folder: Path, trained: Path | str, *overrides: str, kind: type[UserError]) -> str:
    with pytest.raises(kind) as error:
        run(folder, "task=export", f"adapter={trained}", *overrides)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("**/*.gguf")) + list(folder.glob("**/*.partial")) + list(folder.glob("**/*.tmp"))
    return str(error.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(folder)
    return folder


PLAIN = ["quantization=fp32"]


@pytest.fixture(scope="module")
def on_plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base is not quantized, so that llama.cpp adds its adapter to the weights that it was trained on."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(folder, *PLAIN)
    return folder


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-3), ("q8_0", 1e-2)])
def test_an_adapter_beside_an_untouched_base_answers_as_it_was_trained(
    on_plain_base: Path, tmp_path: Path, kind: str, bound: float
) -> None:
    export(tmp_path / "adapter", on_plain_base, *PLAIN, "export=gguf-adapter", f"export.type={kind}")
    file = tmp_path / "adapter" / f"run-adapter-{kind}.gguf"
    base = tmp_path / "adapter" / f"run-adapter-{kind}-base.gguf"
    served = ["verify.engine=llama-cpp", f"verify.path={base}", f"verify.lora={file}", f"verify.max_kl={bound}"]
    result = run(tmp_path / "v", "task=verify", f"adapter={on_plain_base}", *PLAIN, *served)
    assert result["metrics"]["verify_kl_mean"] < bound
    certificate = json.loads((tmp_path / "v" / "certificate.json").read_text())
    assert certificate["adapter_kl"] > 10 * bound, "the adapter changes nothing, so the comparison shows nothing"


def test_eight_bits_are_proved_within_their_own_bound(trained: Path, tmp_path: Path) -> None:
    result = export(tmp_path, trained, "export.type=q8_0")
    assert Path(result["paths"]["gguf"]).name == "run-q8_0.gguf"
    assert result["metrics"]["merge_kl_mean"] < 1e-3
    run(tmp_path / "v", "task=verify", f"adapter={trained}", "verify.engine=llama-cpp",
        f"verify.path={result['paths']['gguf']}")  # fmt: skip
    certificate = json.loads((tmp_path / "v" / "certificate.json").read_text())
    assert (certificate["precision"], certificate["max_kl"]) == ("Q8_0", 1e-2)


def test_a_merged_folder_becomes_a_file_without_another_merge(trained: Path, tmp_path: Path) -> None:
    run(tmp_path / "m", "task=merge", f"adapter={trained}")
    result = export(tmp_path / "e", tmp_path / "m" / "merged", "quantization=none")
    assert Path(result["paths"]["gguf"]).name == "m-f16.gguf"
    assert not (tmp_path / "e" / "merge_report.json").exists()


def test_nothing_is_left_of_the_merge_that_the_file_was_made_of(trained: Path, tmp_path: Path) -> None:
    export(tmp_path, trained)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "export.json", "merge_report.json", "run-f16.gguf"} | (left & {".lock", "train.log"})


@needs_real
def test_a_tiny_llama_gets_a_modelfile_and_answers_in_llama_cpp_as_it_was_trained(tmp_path: Path) -> None:
    data = [
        f"model.name={REAL / 'models' / 'stories260K'}", "data=local", f"data.path={REAL / 'alpaca_gpt4_en.jsonl'}",
        "data.max_length=256", "data.eval_dataset_size=60", "data.max_eval_samples=60", "verify.chats=50",
    ]  # fmt: skip
    run(tmp_path / "run", *data)
    result = export(tmp_path / "e", tmp_path / "run", *data)
    lines = Path(result["paths"]["modelfile"]).read_text().splitlines()
    assert lines[1] == "FROM ./run-f16.gguf"
    named = export(tmp_path / "n", tmp_path / "run", *data, f"export.path={tmp_path / 'mine.gguf'}")
    assert Path(named["paths"]["modelfile"]).name == "mine.Modelfile"
    verified = ["verify.engine=llama-cpp", f"verify.path={result['paths']['gguf']}"]
    run(tmp_path / "v", "task=verify", f"adapter={tmp_path / 'run'}", *data, *verified)
    certificate = json.loads((tmp_path / "v" / "certificate.json").read_text())
    assert certificate["kl_mean"] < 1e-3
    assert certificate["equal_chats"] == certificate["chats"] == 50


def test_what_an_adapter_file_cannot_hold_is_refused(trained: Path, tmp_path: Path) -> None:
    dora = tmp_path / "dora"
    run(dora, "lora=dora")
    chosen = ["export=gguf-adapter"]
    text = refusal(tmp_path / "a", dora, "lora=dora", *chosen, kind=DataError)
    assert "the adapter holds the magnitudes of DoRA, which llama.cpp adds to no base" in text
    assert "adapter=none names no adapter" in refusal(tmp_path / "b", "none", "model=tiny", *chosen, kind=ConfigError)
    q4 = refusal(tmp_path / "c", trained, *chosen, "export.type=q4_k_m", kind=ConfigError)
    assert "an adapter is written in f16 or q8_0" in q4


def test_four_bits_without_the_library_of_llama_cpp_are_refused_before_the_merge(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    text = refusal(tmp_path, trained, "export.type=q4_k_m", kind=ConfigError)
    assert "pip install llama-cpp-python, put its llama-quantize on the PATH, or use export.type=q8_0" in text
    assert not list(tmp_path.iterdir())


def test_four_bits_are_quantized_by_the_library_from_a_file_that_does_not_stay(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bytes, int]] = []

    def copy(source: bytes, target: bytes, settings: Any) -> int:
        calls.append((Path(source.decode()).read_bytes()[:4], settings.ftype))
        shutil.copyfile(source, target)
        return 0

    settings = types.SimpleNamespace(ftype=0)
    library = types.SimpleNamespace(LLAMA_FTYPE_MOSTLY_Q4_K_M=15, llama_model_quantize=copy,
                                    llama_model_quantize_default_params=lambda: settings)  # fmt: skip
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    result = export(tmp_path, trained, "export.type=q4_k_m")
    assert calls == [(b"GGUF", 15)]
    assert [path.name for path in tmp_path.glob("**/*.gguf*")] == ["run-q4_k_m.gguf"]
    assert Path(result["paths"]["gguf"]).is_file()


def test_a_program_that_fails_to_quantize_is_quoted(tmp_path: Path) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho 'failed to quantize: odd shapes' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ResourceError, match=r"could not quantize the file \(failed to quantize: odd shapes\)"):
        quantize._by_program(str(program), tmp_path / "a", tmp_path / "b")


def test_a_package_that_is_missing_is_named_before_the_merge(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf, which is not installed: pip install 'qlora[gguf]'" in refusal(
        tmp_path, trained, kind=ConfigError)  # fmt: skip


def test_a_full_disk_leaves_no_file_and_the_old_one_stays(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ModelFile, "_write_tokenizer", fill)
    text = refusal(tmp_path / "e", trained, kind=ResourceError)
    assert "No space left on device" in text or "became full while run-f16.gguf was written" in text
    old = tmp_path / "old.gguf"
    old.write_bytes(b"GGUF old")
    with pytest.raises(ResourceError):
        export(tmp_path / "f", trained, f"export.path={old}")
    assert old.read_bytes() == b"GGUF old"
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["old.gguf"]


def test_an_interruption_leaves_no_file(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelFile, "_write_tokenizer", interrupt)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - a run turns it into its own
        export(tmp_path, trained)
    assert not [path for path in tmp_path.rglob("*") if ".gguf" in path.name or "partial" in path.name]


def test_a_path_without_the_ending_is_refused(trained: Path, tmp_path: Path) -> None:
    text = refusal(tmp_path, trained, "export.path=model.bin", kind=ConfigError)
    assert text == "export.path must name a file that ends in .gguf, got 'model.bin'"
