"""What a run reports about its base, and what it refuses before anything is trained."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.evaluation.measure import Measurer
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from tests.models.bases import change, write

QUICK = [
    *("lora.r=4", "recipe=none", "trainer.max_steps=1", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    *("data.max_train_samples=8", "data.max_eval_samples=4", "evaluation=loss", "task.predict=false"),
    *("trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1", "trainer.optim=adamw_torch"),
]


def run(folder: Path, base: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, f"model.name={base}", *overrides]), folder).execute()


def refusal(folder: Path, base: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        run(folder, base, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("llama") / "base")


def test_what_is_not_quantized_and_not_adapted_stands_on_the_screen_in_the_manifest_and_on_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write("qwen3_moe", tmp_path / "base", num_experts=2, moe_intermediate_size=16)
    keys = ["quantization.compute_dtype=bf16", "quantization.experts=none", "lora.experts=none"]
    run(tmp_path / "run", base, *keys)
    fraction = "33.8 % of the decoder's weights are in bfloat16 (experts, router)"
    screen = capsys.readouterr().out
    assert f"nf4 + double quantization; {fraction}\n" in screen
    assert "0.2 M in bfloat16, 24,576 in nf4" in screen
    assert "experts (33.1 % of the decoder's weights), router (0.7 %); the router is frozen" in " ".join(screen.split())
    model = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    assert model["base"] == f"nf4 + double quantization; {fraction}"
    assert model["left out"].startswith("experts (33.1 %")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"frozen in 4-bit NF4 with double quantization, but {fraction}." in card


def test_a_mixture_that_cannot_be_quantized_is_refused_before_rows_are_read(tmp_path: Path) -> None:
    base = write("mixtral", tmp_path / "base")
    message = refusal(tmp_path / "run", base, "data=local", "data.path=missing.jsonl", "quantization=int8")
    assert message.startswith(f"quantization.bits=8: of model.name={base} 8")
    run(tmp_path / "run", base, "quantization=none", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def spoiled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a NaN in one number of a layer, and an infinity in a norm behind it."""

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
        tensors["model.norm.weight"][0] = math.inf
        return tensors

    return change(shutil.copytree(llama, tmp_path_factory.mktemp("spoiled") / "base"), spoil)


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    "overrides",
    [
        ["quantization=nf4"],
        ["quantization=nf4", "quantization.double_quant=false", "task.evaluate=false"],
        ["quantization=int8", "evaluation.baseline=false"],
        ["quantization=none"],
        ["quantization=fp32", "lora=none"],
        ["quantization=fp32", "task=evaluate", "adapter=none"],
        ["quantization=nf4", "task=predict", "adapter=none", "generation.max_new_tokens=4"],
        ["quantization=nf4", "task=chat", "adapter=none"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_weights_that_are_no_numbers_end_a_run_of_any_task_with_the_first_of_them(
    spoiled: Path, tmp_path: Path, overrides: list[str]
) -> None:
    assert refusal(tmp_path / "run", spoiled, *overrides) == (
        f"model.name={spoiled}: 2 of the base's weights hold NaN or infinite numbers, first "
        "model.layers.1.mlp.up_proj.weight, so every loss is NaN; download or copy the model again, or choose another "
        "base"
    )


def test_the_first_of_bad_weights_is_the_one_that_a_forward_pass_uses_first(llama: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = math.nan
        tensors["model.layers.0.input_layernorm.weight"][0] = math.nan  # defined behind the attention
        return tensors

    base = change(shutil.copytree(llama, tmp_path / "base"), spoil)
    assert "2 of the base's weights hold NaN" in (message := refusal(tmp_path / "run", base))
    assert "first model.layers.0.input_layernorm.weight, so" in message


def test_numbers_that_overflow_name_the_module_that_computes_them_first(llama: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
        return tensors

    base = change(shutil.copytree(llama, tmp_path / "base"), enlarge)
    message = refusal(tmp_path / "run", base, "quantization=fp32", "evaluation.baseline=false")
    assert message.startswith(
        f"model.name={base}: its logits are NaN or infinite before anything is trained, first those of its module "
        "model.layers.1.mlp."
    )


def test_a_loss_of_the_base_that_is_no_number_is_not_laid_to_the_training(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Measurer.measure

    def break_down(self: Measurer, model: torch.nn.Module, *, answers: int | None) -> Any:
        layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.act_fn"))
        with torch.no_grad():
            handle = layer.register_forward_hook(lambda *_: torch.full_like(_[2], math.nan), prepend=True)
            try:
                return measure(self, model, answers=answers)
            finally:
                handle.remove()

    monkeypatch.setattr(Measurer, "measure", break_down)
    message = refusal(tmp_path / "run", llama, "quantization=fp32")
    assert message.startswith(
        f"model.name={llama}: its loss on the held-out rows is NaN or infinite before anything is trained, first those "
        "of its module model.layers.1.mlp.act_fn: its weights are finite"
    )
    assert not (tmp_path / "run" / "baseline.json").exists()


def test_a_base_that_transformers_cannot_run_is_one_sentence(llama: Path, tmp_path: Path) -> None:
    base = write("deepseek_v3", tmp_path / "base")
    change(base, head_dim=64)
    message = refusal(tmp_path / "run", base, "quantization=none")
    assert message.startswith(f"model.name={base}: transformers ")
    assert "cannot run this deepseek_v3 (RuntimeError: " in message


@pytest.mark.full
def test_layers_whose_inputs_8_bits_cannot_take_are_one_sentence_and_its_hint_works(tmp_path: Path) -> None:
    base = write("deepseek_v3", tmp_path / "base")
    message = refusal(tmp_path / "run", base, "quantization=int8")
    assert message.startswith(f"quantization.bits=8: model.name={base}: model.layers.")
    assert message.endswith("8-bit weights; use quantization=nf4 or quantization=none")
    run(tmp_path / "run", base, "quantization=nf4")


@pytest.fixture
def larger_tokenizer(tmp_path: Path) -> Path:
    """The embedded tokenizer with two added tokens more than a base of as many rows as it has."""
    tokenizer = load_tokenizer(compose([]).model)
    tokenizer.add_tokens(["picture", "zyzzyva"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def rows(folder: Path, answer: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Say {word}", "output": answer}) + "\n" for word in "abcdef"))
    return path


@pytest.mark.full
def test_an_added_token_without_an_embedding_is_refused_where_rows_hold_it_and_its_hint_works(
    tmp_path: Path, larger_tokenizer: Path
) -> None:
    size = len(load_tokenizer(compose([]).model))
    base = write("llama", tmp_path / "base", vocab_size=size)
    overrides = [f"model.tokenizer={larger_tokenizer}", "data=local", f"data.path={rows(tmp_path, 'so zyzzyva')}",
             "data.eval_dataset_size=2"]  # fmt: skip
    message = refusal(tmp_path / "run", base, *overrides)
    assert message == (
        f"the rows hold 'zyzzyva', one of {size + 2:,} tokens of the tokenizer, but the base {base} has embeddings for "
        f"""{size:,}; train one with 'model.new_tokens=["picture", "zyzzyva"]', or take the token out of the data """
        "and its template"
    )
    hint = message.split("'")[3]
    run(tmp_path / "run", base, *overrides, hint)


def test_an_added_token_without_an_embedding_that_no_row_holds_is_said_and_grows_nothing(
    tmp_path: Path, larger_tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = len(load_tokenizer(compose([]).model))
    base = write("llama", tmp_path / "base", vocab_size=size)
    overrides = [f"model.tokenizer={larger_tokenizer}", "data=local", f"data.path={rows(tmp_path, 'so')}"]
    started = Run(
        compose([*QUICK, f"model.name={base}", *overrides, "data.eval_dataset_size=2"]), tmp_path / "run"
    ).session
    assert started.load_base().get_input_embeddings().weight.shape[0] == size
    assert f"the tokenizer has {size + 2:,} tokens and the base embeddings for {size:,}" in caplog.text


def test_the_tokenizer_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    base = write("llama", tmp_path / "base", vocab_size=500)
    size = len(load_tokenizer(compose([]).model))
    message = refusal(tmp_path / "run", base)
    assert message.startswith(
        f"model.name={base}: its tokenizer has {size:,} tokens, and the base {base} has embeddings for 500, so it "
        "belongs to another model ("
    )
    assert message.endswith("give that of the base as model.tokenizer")


@pytest.mark.full
def test_a_base_refused_while_it_is_loaded_does_not_bind_the_folder_to_its_config(
    llama: Path, spoiled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert "hold NaN or infinite numbers" in refusal(folder, spoiled, "trainer.save_steps=1")
    run(folder, llama, "resume=never", "trainer.save_steps=1")
    with pytest.raises(UserError, match="holds a run with another config"):
        run(folder, llama, "trainer.save_steps=1", "seed=5")
    for name in ("result.json", "manifest.json", "adapter"):  # each of what is left protects the run
        file = folder / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        with pytest.raises(UserError, match="holds a run with another config"):
            run(folder, llama, "trainer.save_steps=1", "seed=5")


@pytest.mark.full
def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_config(llama: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", llama)
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("manifest.json", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="holds a run with another config"):
        run(tmp_path / "run", llama, "seed=5")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_linear_layers_of_a_class_that_is_not_quantized_are_named(tmp_path: Path, quantization: str) -> None:
    base = write("falcon", tmp_path / "base")
    message = refusal(tmp_path / "run", base, f"quantization={quantization}")
    assert message.endswith(
        f"the linear layers of {base} are of a class of their own (FalconLinear), which transformers does not "
        "quantize; use quantization=none"
    )
