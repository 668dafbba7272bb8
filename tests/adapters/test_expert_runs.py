"""Training runs with adapters on experts: what they say, and that they are resumed, averaged and trained further."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from tests.faults.runs import at_step, outcome, run
from tests.models.bases import write

IDS = torch.arange(100, 132).view(2, 16)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = write("qwen3_moe", tmp_path_factory.mktemp("mixture") / "base", moe_intermediate_size=16)
    return [f"model.name={base}", "quantization=fp32", "lora.target_modules=all-linear", "trainer.max_steps=4"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """A run that nothing befell."""
    run(folder := tmp_path_factory.mktemp("calm"), *overrides)
    return folder


def nothing() -> None:
    pass


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.full
def test_screen_manifest_and_card_name_rank_and_count_of_what_is_trained_on_experts(calm: Path) -> None:
    tensors = load_file(calm / "adapter" / "adapter_model.safetensors")
    on_experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert on_experts == 2 * 4 * 2 * ((64 + 32) + (16 + 64))  # layers, experts, rank, gate_up and down
    trained, told = sum(tensor.numel() for tensor in tensors.values()), f"r=2 on experts ({on_experts:,} parameters)"
    model = json.loads((calm / "manifest.json").read_text())["model"]
    assert model["training"].startswith(f"LoRA r=4, alpha=16, {told}: {trained:,} of ")
    assert re.fullmatch(r"router \(.* of the decoder's weights\); the router is frozen", model["left out"])
    assert f"| LoRA on routed experts | {told} |" in (calm / "README.md").read_text()


def test_the_load_of_experts_and_the_loss_of_routers_are_logged(calm: Path) -> None:
    logged = [entry for entry in json.loads((calm / "history.json").read_text()) if "loss" in entry]
    assert logged
    for entry in logged:
        assert 0 <= entry["expert_idle_share"] < 1
        assert 0 < entry["expert_tokens_mean"] < entry["expert_tokens_max"]
        assert entry["router_aux_loss"] > 1


@pytest.mark.full
def test_a_run_that_was_cut_off_ends_with_the_bits_of_an_undisturbed_one(
    calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    at_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *overrides)
    with pytest.raises(UserError, match=r"checkpoint-2 does not fit what the config makes of the model .*experts"):
        run(tmp_path / "cut", *overrides, "lora.expert_r=4", "resume=force")
    at_step(monkeypatch, 0, nothing)
    run(tmp_path / "cut", *overrides, "resume=force")
    assert outcome(tmp_path / "cut") == outcome(calm)


@pytest.mark.full
def test_a_checkpoint_without_adapters_on_experts_is_refused_where_the_config_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    at_step(monkeypatch, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *overrides, "lora.experts=none")
    with pytest.raises(UserError, match=r"checkpoint-2 does not fit .*experts.*lora_B.default.weight is missing"):
        run(tmp_path / "cut", *overrides, "resume=force")


@pytest.mark.full
def test_an_adapter_is_trained_further_in_its_form(calm: Path, tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "more", *overrides, f"lora.start={calm}", "trainer.max_steps=1", "trainer.learning_rate=1e-12")
    previous, after = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (calm, tmp_path / "more")
    )
    assert previous.keys() == after.keys()
    assert all((previous[name] - after[name]).abs().max() < 1e-6 for name in previous)
    with pytest.raises(
        UserError, match=r"lora.expert_r=4 is not what lora.start=.* was trained with \(lora.expert_r=2\)"
    ):
        run(tmp_path / "other", *overrides, f"lora.start={calm}", "lora.expert_r=4")


@pytest.mark.full
def test_an_average_of_checkpoints_is_one_adapter_of_a_larger_rank(tmp_path: Path, overrides: list[str]) -> None:
    run(tmp_path / "run", *overrides, "trainer.keep=average", "trainer.save_steps=2")
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 8
    assert settings["rank_pattern"] == {"mlp.experts.down_proj": 4, "mlp.experts.gate_up_proj": 4}
    plain = AutoModelForCausalLM.from_pretrained(overrides[0].partition("=")[2], dtype=torch.float32)
    untuned = plain(input_ids=IDS).logits
    assert not torch.equal(
        PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter")(input_ids=IDS).logits, untuned
    )
