"""Trained biases belong to the adapter: the untuned base has its own, and whatever is saved holds them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qlora import adapters
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.tasks.chat_model import ChatModel
from tests.faults.runs import at_step

QUICK = [
    *("lora.r=4", "trainer.max_steps=2", "trainer.eval_steps=null", "trainer.warmup_steps=0", "trainer=paper"),
    *("trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=4", "data.max_train_samples=16"),
    *("data.max_eval_samples=8", "evaluation=loss", "task.predict=false", "trainer.gradient_accumulation_steps=1"),
    *("device=cpu", "quantization.compute_dtype=fp32", "generation.max_new_tokens=8"),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 1600, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small models with random biases: on some layers, and on all."""
    parent, folders = tmp_path_factory.mktemp("bases"), {}
    torch.manual_seed(0)
    for name, model in {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    }.items():
        for parameter in model.parameters():  # as they are drawn, biases are 0, and layers hardly matter
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
        model.save_pretrained(parent / name)
        load_tokenizer(compose([]).model).save_pretrained(parent / name)
        folders[name] = parent / name
    return folders


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, *overrides]), folder, overrides=[*QUICK, *overrides]).execute()


def base_overrides(base: Path, bias: str, quantization: str = "nf4") -> list[str]:
    return [f"model.name={base}", f"lora.bias={bias}", f"quantization={quantization}"]


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path]) -> tuple[Path, list[str]]:
    """A run that trained all biases, and what it was started with."""
    chosen = base_overrides(bases["qwen2"], "all", "fp32")
    run(bases["qwen2"].with_name("run"), *chosen)
    return bases["qwen2"].with_name("run"), chosen


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "bias", "quantization"),
    [("qwen2", "lora_only", "nf4"), ("gpt_neox", "all", "int8")],
)
def test_the_untuned_base_is_the_same_in_the_training_and_beside_its_adapter(
    bases: dict[str, Path], tmp_path: Path, kind: str, bias: str, quantization: str
) -> None:
    chosen = base_overrides(bases[kind], bias, quantization)
    trained = run(tmp_path / "run", *chosen)["metrics"]
    after = run(tmp_path / "out", *chosen, "task=evaluate", f"adapter={tmp_path / 'run'}")["metrics"]
    assert after["base_eval_loss"] == trained["base_eval_loss"]
    assert after["eval_loss"] == trained["eval_loss"] != trained["base_eval_loss"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert [name for name in saved if name.endswith(".bias")]


@pytest.mark.full
def test_without_adapter_is_what_the_base_itself_measures(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, chosen = trained
    beside = run(tmp_path / "a", *chosen, "task=evaluate", f"adapter={folder}")["metrics"]
    alone = run(tmp_path / "b", *chosen, "task=evaluate", "adapter=none")["metrics"]
    assert beside["base_eval_loss"] == alone["eval_loss"]


@pytest.mark.parametrize("failing", [False, True])
def test_trained_biases_come_back_to_the_bit_behind_the_untuned_base(
    trained: tuple[Path, list[str]], recwarn: pytest.WarningsRecorder, failing: bool
) -> None:
    folder, chosen = trained
    model = Run(compose([*QUICK, *chosen, "task=evaluate", f"adapter={folder}"]), folder / "out").session.load_trained()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    plain = AutoModelForCausalLM.from_pretrained(chosen[0].partition("=")[2])
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        with contextlib.suppress(KeyboardInterrupt), adapters.adapter_off(model):
            untuned = model(input_ids=IDS).logits
            if failing:
                raise KeyboardInterrupt
        assert torch.equal(untuned, plain(input_ids=IDS).logits)
        assert torch.equal(tuned, model(input_ids=IDS).logits)
    assert not torch.equal(tuned, untuned)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not [warning for warning in recwarn if "bias" in str(warning.message)]


def test_plain_peft_loads_the_trained_model(trained: tuple[Path, list[str]]) -> None:
    folder, chosen = trained
    ours = Run(compose([*QUICK, *chosen, "task=evaluate", f"adapter={folder}"]), folder / "out").session.load_trained()
    theirs = AutoModelForCausalLM.from_pretrained(chosen[0].partition("=")[2])
    with torch.no_grad():
        assert torch.equal(
            ours.eval()(input_ids=IDS).logits,
            PeftModel.from_pretrained(theirs, folder / "adapter").eval()(input_ids=IDS).logits,
        )


@pytest.mark.full
def test_in_a_chat_the_base_answers_as_it_does_without_an_adapter(trained: tuple[Path, list[str]]) -> None:
    folder, chosen = trained
    answers = []
    for adapter, base in ((folder, True), ("none", False), (folder, False)):
        task = Run(compose([*QUICK, *chosen, "task=chat", f"adapter={adapter}"]), folder / "chat").session
        speaker = ChatModel(
            model=task.load_trained(),
            encoder=task.chat_encoder,
            generation=task.config.generation,
            pad_token_id=task.pad_token_id,
            device=task.placement.device,
            autocast=task.placement.autocast,
        )
        answers.append(speaker.answer([3, 4, 5, 6], lambda text: None, base=base).text)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.full
@pytest.mark.parametrize("merge", ["dequantized", "original"])
def test_a_merged_model_has_the_trained_biases(
    bases: dict[str, Path], trained: tuple[Path, list[str]], tmp_path: Path, merge: str
) -> None:
    folder, chosen = trained
    run(tmp_path, *chosen, "task=merge", f"adapter={folder}", f"merge={merge}", "merge.prompts=2", "merge.dtype=fp32")
    assert json.loads((tmp_path / "merge_report.json").read_text())["kl_mean"] < 1e-6
    merged, untuned = load_file(tmp_path / "merged/model.safetensors"), load_file(bases["qwen2"] / "model.safetensors")
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    bias = saved[f"base_model.model.{name}.base_layer.bias"]
    assert torch.equal(merged[f"{name}.bias"], bias)
    assert not torch.equal(untuned[f"{name}.bias"], bias)


@pytest.mark.full
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_rewrites_the_base_is_saved_with_all_that_was_trained(
    bases: dict[str, Path], tmp_path: Path, init: str
) -> None:
    start = [f"model.name={bases['qwen2']}", "quantization=fp32", f"lora={init}", "lora.bias=all"]
    start += ["model.new_tokens=['<new>']", "lora.use_dora=true", "trainer.save_steps=2"]
    trained = run(tmp_path / "run", *start)["metrics"]
    after = run(tmp_path / "out", *start, "task=evaluate", f"adapter={tmp_path / 'run'}")["metrics"]
    assert after["base_eval_loss"] == pytest.approx(trained["base_eval_loss"], rel=1e-5)
    assert after["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert abs(after["eval_loss"] - after["base_eval_loss"]) > 0.05
    unconverted = [*start, "task=evaluate", f"adapter={tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}"]
    says = rf"^adapter: it begins as a part of its base \(init_lora_weights={init}, .* with adapter=none"
    with pytest.raises(UserError, match=says):
        run(tmp_path / "out", *unconverted)
    alone = run(tmp_path / "out", *unconverted, "evaluation.baseline=false")["metrics"]
    assert alone["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


@pytest.mark.full
def test_a_resumed_run_ends_with_the_biases_of_an_undisturbed_one(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*base_overrides(bases["qwen2"], "all"), "trainer.max_steps=3", "trainer.save_steps=1"]
    results = [run(tmp_path / "calm", *chosen)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    at_step(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *chosen)
    monkeypatch.setattr("qlora.training.callbacks.build_callbacks", lambda *_: [])
    results.append(run(tmp_path / "cut", *chosen))
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("calm", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len({result["metrics"]["base_eval_loss"] for result in results}) == 1


@pytest.mark.full
def test_a_base_without_biases_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "lora.bias=all")
    assert [record.getMessage() for record in caplog.records] == [
        "lora.bias=all: the layers it selects have no biases, so none is trained"
    ]
