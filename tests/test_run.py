"""Whole runs on the embedded model: what they write, that they resume exactly, and that nothing is done twice."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict, read_config
from qlora.errors import UserError
from qlora.run import Run
from qlora.tasks.build_trainer import build_trainer

QUICK = [
    "lora.r=4",
    "lora.dropout=0.0",
    "trainer.max_steps=6",
    "trainer.per_device_train_batch_size=4",
    "trainer.logging_steps=1",
    "trainer.eval_steps=3",
    "trainer.lr_scheduler_kwargs.num_decay_steps=2",
    "trainer.warmup_steps=1",
    "data.max_eval_samples=8",
    "data.max_train_samples=64",
    "generation.max_new_tokens=4",
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, *overrides]), folder, overrides=[*QUICK, *overrides]).execute()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(folder)
    return folder


def test_a_run_writes_what_it_promises(finished: Path) -> None:
    names = "result.json metrics.json manifest.json config.yaml loss.png README.md predictions.jsonl history.json"
    assert not [name for name in names.split() if not (finished / name).is_file()]
    result = json.loads((finished / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["objective"] == result["metrics"]["eval_loss"]
    promised = {
        *("eval_loss", "eval_perplexity", "eval_exact_match", "base_eval_loss", "base_eval_exact_match"),
        *("train_loss", "train_tokens_per_second", "train_data_wait", "train_runtime", "peak_memory_gb"),
    }
    assert promised <= result["metrics"].keys()
    assert all(Path(path).exists() for path in result["paths"].values())
    assert json.loads((finished / "metrics.json").read_text()) == result["metrics"]


def test_the_manifest_holds_versions_hardware_and_data(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"] == config_to_dict(compose(QUICK))
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["data"]["train_rows"] == 64
    assert len(manifest["data"]["fingerprint"]) == 16


def test_the_stored_config_is_the_resolved_one(finished: Path) -> None:
    assert read_config(finished / "config.yaml") == config_to_dict(compose(QUICK))


def test_loss_is_measured_at_each_evaluation_and_falls(finished: Path) -> None:
    history = json.loads((finished / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3, 6]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["base_eval_loss"]


def test_a_finished_run_returns_its_stored_result(finished: Path) -> None:
    initial = (finished / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(finished) == json.loads((finished / "result.json").read_text())
    assert (finished / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == initial


def test_another_config_in_the_same_folder_is_refused_by_key(finished: Path) -> None:
    with pytest.raises(UserError, match=r"another config; changed:\n  lora.dropout: 0.0 -> 0.5\n  seed: 0 -> 3\n"):
        run(finished, "seed=3", "lora.dropout=0.5")


@pytest.mark.full
def test_the_same_seed_draws_and_trains_the_same_adapter(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "again")
    run(tmp_path / "other", "seed=1")
    assert same(adapter(finished), adapter(tmp_path / "again"))
    assert not same(adapter(finished), adapter(tmp_path / "other"))


def test_the_loss_of_the_last_step_is_that_of_the_result(finished: Path) -> None:
    history = json.loads((finished / "history.json").read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    [last] = [entry for entry in history if entry["step"] == 6 and "eval_loss" in entry]
    assert (last["eval_loss"], last["eval_perplexity"]) == (metrics["eval_loss"], metrics["eval_perplexity"])


@pytest.mark.full
def test_a_later_evaluation_measures_what_training_measured(finished: Path, tmp_path: Path) -> None:
    trained = json.loads((finished / "metrics.json").read_text())
    metrics = run(tmp_path / "evaluated", "task=evaluate", f"adapter={finished}")["metrics"]
    for name in ("eval_loss", "base_eval_loss", "eval_exact_match"):
        assert metrics[name] == pytest.approx(trained[name], rel=1e-7)
    bare = run(tmp_path / "bare", "task=evaluate", "adapter=none")["metrics"]
    assert bare["eval_loss"] == pytest.approx(trained["base_eval_loss"], rel=1e-7)


@pytest.mark.full
def test_a_prediction_after_training_uses_the_trained_adapter(finished: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "predicted", "task=predict", f"adapter={finished}")
    rows = [json.loads(line) for line in Path(result["paths"]["predictions"]).read_text().splitlines()]
    trained = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in trained]
    columns = {"input", "prompt", "prediction", "reference", "finish", "prompt_tokens", "answer_tokens"}
    assert columns <= rows[0].keys()


@pytest.mark.full
def test_training_prediction_and_evaluation_switch_off(tmp_path: Path) -> None:
    result = run(tmp_path / "only_train", "task.evaluate=false", "task.predict=false")
    assert not [name for name in result["metrics"] if "eval" in name]
    assert "predictions" not in result["paths"]
    with pytest.raises(UserError, match=r"holds no adapter; the newest finished run is .*only_train: write qlora "):
        run(tmp_path / "only_evaluate", "task.train=false")
    measured = run(tmp_path / "measured", "task.train=false", f"adapter={tmp_path / 'only_train'}")
    assert "eval_loss" in measured["metrics"]
    assert "train_loss" not in measured["metrics"]


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, out = sys.argv[1:]
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
for module in model.modules():  # where a CPU has AVX512-BF16, bitsandbytes rounds to bf16 in evaluation
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 35)[None]).logits, out)
"""


@pytest.mark.full
def test_plain_peft_in_another_process_gives_equal_logits(tmp_path: Path) -> None:
    options = ["quantization.compute_dtype=fp32"]
    run(tmp_path / "run", *options)
    config = compose([*QUICK, *options, "task=evaluate", f"adapter={tmp_path / 'run'}"])
    model = Run(config, tmp_path / "run").session.load_trained().eval()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 35)[None]).logits
    base = Path(sys.modules["qlora"].__file__ or "").parent / "demo" / "model"
    arguments = [str(base), str(tmp_path / "run" / "adapter"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *arguments], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.full
@pytest.mark.parametrize("quantization", ["none", "fp32"])
def test_full_finetuning_moves_all_weights_and_saves_a_model(tmp_path: Path, quantization: str) -> None:
    options = ["lora=none", f"quantization={quantization}", "trainer.max_steps=2", "trainer.eval_steps=null"]
    result = run(tmp_path / "run", *options)
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]
    options += ["task=evaluate", f"adapter={tmp_path / 'run'}"]
    again = run(tmp_path / "evaluated", *options)
    assert again["metrics"]["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-3)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("quantization", ["fp4", "int8", "none"])
def test_every_base_precision_trains(tmp_path: Path, quantization: str) -> None:
    result = run(tmp_path / "run", f"quantization={quantization}", "trainer.max_steps=3", "trainer.eval_steps=null")
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]


@pytest.mark.full
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch", "lion_32bit"])
def test_optimizers_train_by_their_upstream_names(tmp_path: Path, optim: str) -> None:
    result = run(tmp_path / "run", f"trainer.optim={optim}", "trainer.eval_steps=null", "evaluation=loss")
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]


def test_the_fast_step_ends_where_the_plain_one_does(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "run", "trainer.fused_linear=true", "trainer.fused_loss=true")
    expected = json.loads((finished / "result.json").read_text())["metrics"]["eval_loss"]
    assert result["metrics"]["eval_loss"] == pytest.approx(expected, rel=0.02)
    assert "fused_linear, fused_loss; fused_attention: " in capsys.readouterr().out


def test_loraplus_gives_the_b_matrices_their_own_learning_rate(tmp_path: Path) -> None:
    config = compose([*QUICK, "lora=loraplus", "trainer.optim=paged_adamw_8bit"])
    parts = Run(config, tmp_path).session
    model = parts.add_adapter(parts.load_base())
    optimizer = build_trainer(parts, model, [], None).create_optimizer()  # type: ignore[arg-type]
    sizes = {
        part: sum(p.numel() for name, p in model.named_parameters() if part in name) for part in ("lora_A", "lora_B")
    }
    assert sizes["lora_A"] != sizes["lora_B"]
    rate_of = {sum(p.numel() for p in group["params"]): group["lr"] for group in optimizer.param_groups}
    rates = {part: rate_of[size] for part, size in sizes.items()}
    assert rates == {"lora_A": pytest.approx(2e-3), "lora_B": pytest.approx(16 * 2e-3)}


@pytest.mark.full
def test_gradient_checkpointing_changes_memory_and_not_the_adapter(finished: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", "trainer.gradient_checkpointing=true")
    result, expected = adapter(tmp_path / "run"), adapter(finished)
    for key in expected:
        torch.testing.assert_close(result[key], expected[key], atol=1e-5, rtol=1e-4)


SHAPES = {
    "llama": [],
    "qwen3": ["head_dim=16", "num_key_value_heads=2"],
    "gemma2": ["head_dim=16", "num_key_value_heads=2"],
    "gpt_neox": ["num_key_value_heads=null", "tie_word_embeddings=false"],
}


def random_base(kind: str) -> list[str]:
    """Overrides that train and measure a small base of a kind, drawn at random."""
    shape = [f"model_type={kind}", "hidden_size=64", "intermediate_size=96", "num_hidden_layers=2"]
    shape += ["num_attention_heads=4", "num_key_value_heads=4", *SHAPES[kind]]
    options = ["model.weights=random", "trainer.eval_steps=null", "evaluation=loss"]
    options += ["device=cpu", "quantization.compute_dtype=fp32", "trainer.learning_rate=1e-2"]
    return [*options, *(f"model.architecture.{text}" for text in shape)]


@pytest.mark.full
@pytest.mark.parametrize("kind", SHAPES)
def test_a_drawn_base_is_stored_nowhere_and_drawn_again_for_its_adapter(tmp_path: Path, kind: str) -> None:
    options = random_base(kind)
    result = run(tmp_path / "run", *options)
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]
    weights = [path.parent.name for path in (tmp_path / "run").rglob("*.safetensors")]
    assert weights == ["adapter"]
    again = run(tmp_path / "again", *options, "task=evaluate", f"adapter={tmp_path / 'run'}")
    assert again["metrics"]["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-5)
    run(tmp_path / "run", *options, "task=merge", "merge.prompts=2", "merge.dtype=fp32")
    assert json.loads((tmp_path / "run" / "merge_report.json").read_text())["kl_mean"] < 1e-6
    original = run(tmp_path / "run", *options, "task=merge", "merge=original", "merge.prompts=2")
    assert 1e-6 < original["metrics"]["merge_kl_mean"] < 0.1
    rounded = json.loads((tmp_path / "run" / "merge_report.json").read_text())["quantization"]["mean"]
    assert 0.05 < rounded < 0.15, "the 16-bit weights are those that were quantized"


@pytest.mark.full
def test_another_drawn_base_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    options = random_base("llama")
    run(tmp_path / "run", *options)
    for change, remedy in {
        "seed=1": "seed=0",
        "model.architecture.num_attention_heads=8": "model.architecture.num_attention_heads=4",
        "quantization.compute_dtype=bf16": "quantization.compute_dtype=fp32",
        "model.weights=pretrained": "model.weights=random",
    }.items():
        for task in ("evaluate", "merge"):
            with pytest.raises(UserError) as error:
                run(tmp_path / "again", *options, change, f"task={task}", f"adapter={tmp_path / 'run'}")
            assert str(error.value) == (
                f"adapter={tmp_path / 'run' / 'adapter'} does not fit the config: it was trained on a base with "
                f"other random weights; set {remedy}, or use it in spite of that with base=force"
            )
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "copy")
    with pytest.raises(UserError, match="set seed=0, or"):
        run(tmp_path / "again", *options, "seed=1", "task=evaluate", f"adapter={tmp_path / 'copy'}")
    (tmp_path / "run" / "result.json").unlink()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    as_on_cuda = manifest["model"]["random"] | {"device": "cuda"}
    # Runs of older versions have what decides the base in a file of its own.
    manifest["model"] = {"fingerprint": None, "revision": None}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run" / "drawn.json").write_text(json.dumps(as_on_cuda))
    with pytest.raises(UserError, match=r"does not fit the config: .*; set device=cuda, or choose another folder"):
        run(tmp_path / "run", *options)


@pytest.mark.full
def test_loftq_repairs_the_rounding_of_a_drawn_base(tmp_path: Path) -> None:
    chosen = [*random_base("llama"), "lora=loftq", "lora.r=16"]
    started, plain = (Run(compose([*QUICK, *chosen, *more]), tmp_path).session for more in ([], ["lora.init=default"]))
    tensors = started.tensors()
    errors = []
    for parts in (started, plain):
        layer = parts.add_adapter(parts.load_base()).get_base_model().model.layers[1].mlp.up_proj
        weight = dequantize_module_weight(layer.get_base_layer()).float() + layer.get_delta_weight("default")
        errors.append(float((weight.detach() - tensors.read("model.layers.1.mlp.up_proj.weight")).norm()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.full
def test_a_model_from_scratch_is_trained_whole(tmp_path: Path) -> None:
    options = [*random_base("llama"), "lora=none", "quantization=fp32", "quantization.compute_dtype=auto"]
    result = run(tmp_path / "run", *options)
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]
    again = run(tmp_path / "run", *options, "task=evaluate")
    assert again["metrics"]["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=1e-5)


@pytest.mark.full
def test_a_finished_run_lets_go_of_its_model(tmp_path: Path) -> None:
    parts = Run(compose([*QUICK, "trainer.eval_steps=null", "evaluation=loss"]), tmp_path)
    kept: list[weakref.ref[Any]] = []

    def load_and_note(load: Any = parts.session.load_base) -> Any:
        model = load()
        kept.append(weakref.ref(model))
        return model

    parts.session.load_base = load_and_note  # type: ignore[method-assign]
    parts.execute()
    del parts, load_and_note
    gc.collect()
    assert [reference() for reference in kept] == [None]


def test_a_packed_run_counts_packs_and_their_tokens(tmp_path: Path) -> None:
    overrides = ["data.packing=true", "data.pack_length=64", "trainer.max_steps=null", "trainer.num_train_epochs=1"]
    changes = ["trainer.per_device_train_batch_size=2", "trainer.eval_steps=null", "trainer.group_by_length=false"]
    packed = Run(compose([*QUICK, *overrides, *changes]), tmp_path)
    packed.execute()
    history = json.loads((tmp_path / "history.json").read_text())
    seen = [entry["num_input_tokens_seen"] for entry in history if "num_input_tokens_seen" in entry]
    assert seen[-1] == packed.session.data.report.train_tokens
    assert max(entry["step"] for entry in history) == -(-packed.session.data.report.packs // 2)


def test_a_model_whose_packed_rows_would_see_each_other_is_refused(tmp_path: Path) -> None:
    shape = ["model_type=gpt_oss", "hidden_size=32", "intermediate_size=64", "num_hidden_layers=1"]
    shape += ["num_attention_heads=2", "num_key_value_heads=2", "head_dim=16"]
    chosen = [f"model.architecture.{text}" for text in shape]
    with pytest.raises(UserError, match=r"data\.packing=true: .* lets packed rows see each other"):
        run(tmp_path, *chosen, "model.weights=random", "model.tokenizer=tiny", "quantization=fp32", "data.packing=true")


@pytest.mark.full
def test_a_chat_run_saves_its_template_with_the_adapter(tmp_path: Path) -> None:
    rows = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "What is the job of Toki Holt?"}, {"role": "assistant", "content": "baker"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    folder = tmp_path / "run"
    chosen = ["data=local", f"data.path={rows}", "data.eval_dataset_size=8", "trainer.lr_scheduler_kwargs={}"]
    quick = [text for text in QUICK if "num_decay_steps" not in text]
    prompt = Run(compose([*quick, *chosen]), folder).execute()["paths"]["predictions"]
    first = json.loads(Path(prompt).read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    assert first["reference"] == "baker"
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert first["input"] == first["prompt"].replace("<s> ", "<s>") == asked
    assert json.loads((folder / "manifest.json").read_text())["data"]["template"] == "guanaco"
