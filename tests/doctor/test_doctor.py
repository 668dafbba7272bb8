"""`task=doctor`: what is fine is said, what is broken is found, named with its fix, and ends with exit code 1."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import doctor as room
from qlora.config.compose import compose
from qlora.config.options import model_presets
from qlora.doctor import gpu_libraries, machine, versions
from qlora.doctor.findings import Finding, Status, look
from qlora.doctor.trial_step import check_step, check_support, find_architecture
from qlora.errors import UserError
from qlora.models import loading
from qlora.run import Run
from qlora.tasks import build_job, run_job
from qlora.upstream import bitsandbytes


def lines(check: Any, *overrides: str) -> list[Finding]:
    return list(look("check", partial(check, compose(overrides)), "fix"))


def named(findings: list[Finding], name: str) -> Finding:
    [match] = [finding for finding in findings if finding.name == name]
    return match


def test_a_healthy_machine_has_a_table_without_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_job(build_job(compose(["task=doctor"]), tmp_path / "run")).to_dict()
    said = capsys.readouterr().out
    assert result["metrics"]["doctor_error"] == 0
    names = [finding["name"] for finding in result["findings"]]
    promised = ["python", "versions", "torch", "gpu", "bitsandbytes", "attention", "training step", "fused_linear"]
    promised += ["fused_attention", "fused_loss", "compile", "memory", "disk", "write rights", "hub", "tracking"]
    for name in promised:
        assert name in names
        assert name in said
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_ends_in_one_sentence_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_job(build_job(compose(["task=doctor", "trainer.fused_attention=true", "device=cpu"]), tmp_path))
    assert str(error.value).startswith("task=doctor: training step: trainer.fused_attention=true: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_layer_of_every_architecture_trains() -> None:
    kinds = {preset["architecture"]["model_type"]: option for option, preset in model_presets().items()}
    for option in kinds.values():
        findings = lines(check_step, f"model={option}", "device=cpu")
        assert [finding for finding in findings if finding.status is not Status.ok] == [], option


MIXTURES: dict[str, list[str]] = {
    "qwen3_moe": ["num_experts=128", "decoder_sparse_step=2", "mlp_only_layers=[0]"],
    "qwen2_moe": ["num_experts=60", "shared_expert_intermediate_size=5632"],
    "mixtral": ["num_local_experts=8"],
    "gpt_oss": [],
    "granitemoe": [],
    "olmoe": [],
    "deepseek_v2": ["q_lora_rank=0", "first_k_dense_replace=1", "n_routed_experts=64", "num_experts_per_tok=6"],
    "deepseek_v3": ["n_routed_experts=256", "first_k_dense_replace=3", "n_group=8", "topk_group=4"],
}


@pytest.mark.matrix(2)
@pytest.mark.parametrize("kind", MIXTURES)
def test_of_a_mixture_a_small_layer_with_experts_trains(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = loading.build_random_base

    def note(*args: Any) -> Any:
        base = build(*args)
        built.append(sum(parameter.numel() for parameter in base.parameters()))
        return base

    monkeypatch.setattr(loading, "build_random_base", note)
    sizes = ["hidden_size=2048", "intermediate_size=6144", "num_hidden_layers=48", "num_attention_heads=32"]
    sizes += ["num_key_value_heads=32"]
    overrides = [f"model.architecture.{word}" for word in (f"model_type={kind}", *sizes, *MIXTURES[kind])]
    finding = named(lines(check_step, "device=cpu", "model.weights=random", *overrides), "training step")
    assert finding.status is Status.ok
    assert finding.says.startswith(f"a 4-bit layer with experts of {kind} trains")
    assert built[0] < 3_000_000


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    "overrides",
    [["quantization=int8"], ["lora=none", "quantization=none"], ["lora=dora"], ["quantization=fp4"],
     ["trainer.fused_linear=true", "trainer.fused_loss=true", "quantization.compute=fp8"]],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_a_layer_trains_in_all_bits_and_parts(overrides: list[str]) -> None:
    findings = lines(check_step, "device=cpu", *overrides)
    assert [finding for finding in findings if finding.status is not Status.ok] == []
    assert (named(findings, "fused_linear").says == "on") is ("trainer.fused_linear=true" in overrides)


def test_gradients_that_an_evaluation_takes_away_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes repacked weights did it on CPUs with AVX512-BF16: the layer's own gradient is gone."""
    from peft.tuners.lora.bnb import Linear4bit

    plain, evaluated = Linear4bit.forward, []

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        evaluated.extend([] if self.training else [self])
        return plain(self, x.detach() if evaluated else x, *args, **kwargs)

    monkeypatch.setattr(Linear4bit, "forward", forward)
    finding = named(lines(check_step, "device=cpu", "lora.dropout=0"), "training step")
    assert finding.status is Status.error
    assert "after an evaluation" in finding.says


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512-BF16")
def test_the_trap_itself_is_found_where_a_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "disable_repacking", lambda model: None)
    finding = named(lines(check_step, "device=cpu"), "training step")
    assert finding.status is Status.error
    assert "after an evaluation" in finding.says


def test_weights_that_are_quantized_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.quantization.bnb4 import layers

    def decode(module: Any) -> torch.Tensor:
        return torch.zeros(module.weight.quant_state.shape)

    monkeypatch.setattr(layers, "dequantize", decode)
    finding = named(lines(check_step, "device=cpu"), "training step")
    assert finding.status is Status.error
    assert "4-bit weights are wrong by 100%" in finding.says


def test_a_step_that_raises_is_a_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "build_random_base", lambda *_: 1 / 0)
    [device, finding] = lines(check_step, "device=cpu")
    assert device.name == "device"
    assert (finding.status, finding.says, finding.fix) == (Status.error, "ZeroDivisionError: division by zero", "fix")


def test_the_architecture_is_that_of_the_model_s_own_config(tmp_path: Path) -> None:
    assert find_architecture(compose(["model=gemma-2-2b"]))[1] == "gemma2"
    shape = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "vocab_size": 2000}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert find_architecture(compose([f"model.name={tmp_path}"]))[1] == "qwen3"
    architecture, whose = find_architecture(compose(["model.name=me/not-here"]))
    assert architecture.model_type == "llama"
    assert "is not here" in whose


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are there in place of the installed ones."""
    changed: dict[str, str] = {}
    plain = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda name: changed.get(name) or plain(name))
    return changed


@pytest.mark.parametrize("pair", versions.BAD_PAIRS, ids=lambda pair: f"{pair.first} {pair.second}")
def test_known_bad_pairs_are_found_with_their_source(pair: versions.BadPair, installed: dict[str, str]) -> None:
    for text in (pair.first, pair.second):
        requirement = versions.Requirement(text)
        for version in ("0.17.1", "0.44.1", "2.9.1", "3.2.0", "5.2.0"):
            if requirement.specifier.contains(version) and requirement.name not in installed:
                installed[requirement.name] = version + ("+cu130" if requirement.name == "torch" else "")
    findings = [finding for finding in versions.check_versions() if pair.says in finding.says]
    assert [finding.status for finding in findings] == [pair.status]
    assert pair.source in findings[0].says
    assert findings[0].fix == pair.fix


def test_a_version_that_another_package_refuses_is_found(installed: dict[str, str]) -> None:
    assert [finding.status for finding in versions.check_versions()] == [Status.ok]
    installed["huggingface_hub"] = "0.20.0"
    findings = list(versions.check_versions())
    assert {finding.status for finding in findings} == {Status.warning}
    assert any("transformers asks for huggingface_hub" in finding.says for finding in findings)


def test_a_torch_that_cannot_be_imported_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python then raises is an ImportError
    findings = list(room.examine(compose(["task=doctor"]), tmp_path))
    assert named(findings, "torch").status is Status.error
    names = {finding.name for finding in findings}
    assert "training step" not in names
    assert {"disk", "write rights", "hub"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_driver_without_a_torch_for_it_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Fri Jan 10\n")
    monkeypatch.setattr(gpu_libraries, "DRIVER", driver)
    assert named(lines(gpu_libraries.check_torch), "gpu").status is Status.warning
    finding = named(lines(gpu_libraries.check_torch, "device=cuda"), "gpu")
    assert finding.status is Status.error
    assert "570.86.10" in finding.says


def test_a_native_library_that_was_not_loaded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no such file"))
    finding = named(lines(gpu_libraries.check_bitsandbytes, "device=cpu"), "bitsandbytes")
    assert finding.status is Status.warning
    assert "no such file" in finding.says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = named(lines(gpu_libraries.check_bitsandbytes), "bitsandbytes")
    assert finding.status is Status.error
    assert "python -m bitsandbytes" in finding.fix


def test_a_missing_package_of_an_attention_is_found() -> None:
    finding = named(lines(check_support, "model.attn_implementation=flash_attention_2"), "attention")
    assert finding.status is Status.error
    assert "flash_attn" in finding.says


def test_recurrent_layers_name_the_kernels_that_packing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["model.weights=random", "model.tokenizer=tiny", "recipe=none", "model.architecture.model_type=qwen3_next"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finding = named(lines(check_support, *shape, "data.packing=true", "data.max_length=64"), "packing")
    assert finding.status is Status.warning
    assert "not installed: flash-linear-attention, causal-conv1d" in finding.says
    assert "qlora[linear]" in finding.fix
    assert "packing" not in [finding.name for finding in lines(check_support, *shape)]
    plain = lines(check_support, "data.packing=true", "data.max_length=64")
    assert "packing" not in [finding.name for finding in plain]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    finding = named(lines(check_support, *shape, "data.packing=true", "data.max_length=64"), "packing")
    assert finding.status is Status.ok


def test_a_full_disk_is_an_error_and_too_little_memory_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(machine, "_host_memory", lambda: (1e9, "1 GB is free"))
    overrides = ["model=llama-7b", "data=alpaca", "device=cpu"]
    [disk] = lines(partial(machine.check_disk, folder=tmp_path), *overrides)
    [memory] = lines(machine.check_memory, *overrides)
    assert (disk.status, memory.status) == (Status.error, Status.warning)
    assert "trainer.save_total_limit" in disk.fix


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [finding] = lines(partial(machine.check_rights, folder=tmp_path), f"data.cache_dir={tmp_path}/file/cache")
    assert finding.status is Status.error
    assert "data.cache_dir" in finding.says
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_gated_or_missing_base_is_found_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    [finding] = lines(machine.check_hub, "model=llama-3.1-8b")
    assert finding.status is Status.error
    assert "HF_HUB_OFFLINE" in finding.says
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    [finding] = lines(machine.check_hub, "model=llama-3.1-8b")
    assert "gated" in finding.says
    [finding] = lines(machine.check_hub)
    assert finding.status is Status.ok


def test_a_wandb_without_a_login_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    [finding] = lines(machine.check_tracking, "tracking=wandb")
    assert finding.status is Status.error
    assert "wandb login" in finding.says
    [finding] = lines(machine.check_tracking, "tracking=wandb", "tracking.mode=offline")
    assert finding.status is Status.ok


def test_a_training_looks_before_it_starts_and_says_problems_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([])
    room.preflight(config)
    started = time.perf_counter()
    versions._requirements.cache_clear()
    room.preflight(config)
    assert time.perf_counter() - started < 0.2
    assert capsys.readouterr().out == ""
    installed["huggingface_hub"] = "0.20.0"
    room.preflight(config)
    said = capsys.readouterr().out
    assert "asks for huggingface_hub" in said
    assert "python" not in said
    installed["peft"] = "0.17.1"
    with pytest.raises(UserError, match="HybridCache"):
        Run(config, tmp_path / "run").train()
    assert not (tmp_path / "run" / "config.yaml").exists()
