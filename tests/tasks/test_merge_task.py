"""`task=merge`: the merged model answers as the adapter on its base, for every base and adapter, or is not there."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora.adapters.adapted import LowRank
from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer
from qlora.run import Run
from qlora.session import Session
from qlora.tasks import merged_model

REAL = Path(__file__).parents[3] / "shared" / "data"
QUICK = [
    *("lora.r=4", "lora.alpha=8", "trainer.max_steps=2", "trainer.eval_steps=null", "trainer.warmup_steps=0"),
    *("trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=4", "data.max_train_samples=16"),
    *("data.max_eval_samples=8", "evaluation=loss", "task.predict=false", "merge.prompts=4", "trainer=paper"),
    *("trainer.gradient_accumulation_steps=1", "device=cpu", "quantization.compute_dtype=fp32", "merge.dtype=fp32"),
]
NONE16 = ["quantization=none", "quantization.compute_dtype=bf16"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attention_bias": True,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "opt": {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
    },
    "qwen3": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a small model of a kind, with random weights and the embedded tokenizer."""
    parent = tmp_path_factory.mktemp("bases")

    def draw(kind: str) -> Path:
        folder = parent / kind
        if not folder.exists():
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, vocab_size=1600, max_position_embeddings=256, bos_token_id=1,
                                          eos_token_id=2, pad_token_id=0, **SHAPES[kind])  # fmt: skip
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # plain draws are so small that no layer would matter
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
            load_tokenizer(compose([]).model).save_pretrained(folder)
        return folder

    return draw


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return Run(compose([*QUICK, *overrides]), folder, overrides=[*QUICK, *overrides]).execute()


def train_and_merge(folder: Path, *overrides: str) -> dict[str, Any]:
    """Returns the report of a merge in the folder of the training."""
    run(folder, *overrides)
    return merge(folder, *overrides)


def merge(folder: Path, *overrides: str) -> dict[str, Any]:
    run(folder, *overrides, "task=merge")
    return json.loads((folder / "merge_report.json").read_text())


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        run(folder, *overrides, "task=merge")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("chosen", [["quantization=nf4"], ["quantization=fp32", "lora=dora", "lora.bias=all"]], ids=len)
def test_every_architecture_merges_to_the_same_answers(
    base: Callable[[str], Path], tmp_path: Path, kind: str, chosen: list[str]
) -> None:
    report = train_and_merge(tmp_path, f"model.name={base(kind)}", *chosen)
    assert report["kl_mean"] < 1e-6
    assert report["top1_agreement"] > 0.99
    assert report["tokens"] > 50
    untuned = AutoModelForCausalLM.from_pretrained(base(kind)).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert untuned.keys() == merged.keys()
    moved = [name for name in merged if not torch.equal(untuned[name], merged[name])]
    assert len(moved) >= 8, "the training moved nothing, so the comparison shows nothing"


@pytest.mark.full
@pytest.mark.parametrize(
    "chosen",
    [
        ["lora=rslora", "quantization=nf4"],
        ["lora=dora", "quantization=nf4"],
        ["lora=loftq", "quantization=fp4"],
        ["lora=pissa", "quantization=fp32"],
        ["lora=olora", "quantization=fp32"],
        ["lora.target_modules=[q_proj,down_proj]", "quantization=nf4", "quantization.double_quant=false"],
        ["lora.bias=lora_only", "quantization=nf4"],
        ["lora.bias=all", "quantization=int8"],
        ["model.new_tokens=['<new>','other']", "quantization=nf4"],
    ],
    ids=" ".join,
)
def test_every_kind_of_adapter_merges_to_the_same_answers(
    base: Callable[[str], Path], tmp_path: Path, chosen: list[str]
) -> None:
    report = train_and_merge(tmp_path, f"model.name={base('llama')}", *chosen)
    assert report["kl_mean"] < (5e-3 if "quantization=int8" in chosen else 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
def test_grown_embeddings_are_merged_with_their_trained_rows(
    base: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    tokens = ",".join(f"'<t{number}>'" for number in range(200))
    chosen = [f"model.name={base(kind)}", f"model.new_tokens=[{tokens}]", "quantization=nf4"]
    assert train_and_merge(tmp_path, *chosen)["kl_mean"] < 1e-6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = model.get_input_embeddings().weight
    assert len(rows) == len(tokenizer) == model.config.vocab_size
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = next(value for name, value in saved.items() if "embed_tokens" in name)
    assert torch.equal(rows[tokenizer.convert_tokens_to_ids(["<t0>", "<t199>"])], trained[[0, 199]])


@pytest.mark.full
@pytest.mark.parametrize("chosen", [["quantization=nf4"], ["quantization=int8"], NONE16], ids=" ".join)
def test_the_merged_model_is_in_16_bits_where_that_is_asked_for(
    base: Callable[[str], Path], tmp_path: Path, chosen: list[str]
) -> None:
    report = train_and_merge(tmp_path, f"model.name={base('llama')}", *chosen, "merge.dtype=bf16", "merge.max_kl=0.05")
    assert report["dtype"] == "bf16"
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert report["weights_gb"] == pytest.approx(
        (tmp_path / "merged" / "model.safetensors").stat().st_size / 1e9, rel=0.02
    )


@pytest.fixture(scope="module")
def trained(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished training on the Llama in nf4, and the override that names the base."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, f"model.name={base('llama')}")
    return folder, f"model.name={base('llama')}"


@pytest.fixture
def merged(trained: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    """A copy of that run."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run", trained[1]


@pytest.mark.full
def test_shards_and_their_index_hold_what_one_file_holds(merged: tuple[Path, str]) -> None:
    folder, name = merged
    merge(folder, name)
    whole = load_file(folder / "merged" / "model.safetensors")
    report = merge(folder, name, "merge.max_shard_size=97.5KiB")
    files = sorted((folder / "merged").glob("*.safetensors"))
    assert len(files) == report["files"] > 3
    max_bytes = max(value.nbytes for value in whole.values())
    assert all(path.stat().st_size < max(100_000, max_bytes) + 10_000 for path in files)
    parts = {key: value for path in files for key, value in load_file(path).items()}
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert torch.equal(model.lm_head.weight, whole["lm_head.weight"])


def test_a_merged_folder_is_a_whole_model_that_plain_transformers_loads(merged: tuple[Path, str]) -> None:
    folder, name = merged
    report = merge(folder, name)
    files = {path.name for path in (folder / "merged").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "Modelfile", "merge_report.json"),
    }
    assert json.loads((folder / "merged" / "merge_report.json").read_text()) == report
    assert report["accepted"] is True
    assert not (folder / "merged.partial").exists()
    assert not (folder / "merged.old").exists()
    tokenizer, saved = (AutoTokenizer.from_pretrained(folder / part) for part in ("merged", "adapter"))
    assert tokenizer.chat_template == saved.chat_template
    assert tokenizer("<s> Hi there")["input_ids"] == saved("<s> Hi there")["input_ids"]
    assert GenerationConfig.from_pretrained(folder / "merged").eos_token_id == [2], "the template ends answers with it"


def test_the_commands_that_serve_the_model_are_printed(
    merged: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = merged
    merge(folder, name, "name=My-Model")
    printed = capsys.readouterr().out
    merged_folder = folder / "merged"
    assert f"vllm serve {merged_folder} --dtype float32" in printed
    assert f"ollama create my-model -f {merged_folder}/Modelfile" in printed
    [line] = [line.strip() for line in printed.splitlines() if "pipeline" in line]
    assert str(merged_folder) in line
    compile(line.removeprefix("python -c ").strip("'"), "command", "exec")


# The base's files


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_stored_in_few_bits_is_merged_in_full(
    base: Callable[[str], Path], tmp_path: Path, kind: str, quantization: str
) -> None:
    chosen = [f"model.name={base(kind)}", f"quantization={quantization}"]
    parts = Run(compose([*QUICK, *chosen]), tmp_path / "x").session
    parts.load_base().save_pretrained(tmp_path / "stored")
    load_tokenizer(compose([]).model).save_pretrained(tmp_path / "stored")
    run(tmp_path / "run", *chosen)
    merge(tmp_path / "run", *chosen)
    expected = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    chosen = [f"model.name={tmp_path / 'stored'}", chosen[1], "base=force"]  # what is stored is another base
    report = merge(tmp_path / "run", *chosen)
    tensors = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert report["kl_mean"] < (5e-3 if quantization == "int8" else 1e-6)
    assert {name.removeprefix("transformer.") for name in tensors} == {
        name.removeprefix("transformer.") for name in expected
    }
    if kind == "llama":
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    text = refusal(tmp_path / "run", *chosen, "merge=original")
    assert text.startswith("merge.base=original: the base is saved in 4 or 8 bits only; use merge.base=dequantized")


@pytest.mark.full
def test_of_two_tied_matrices_the_first_is_written_whichever_the_base_has(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(base("qwen3"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert train_and_merge(tmp_path / "run", f"model.name={tmp_path / 'base'}")["kl_mean"] < 1e-6
    written = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert "lm_head.weight" not in written
    assert "model.embed_tokens.weight" in written


@pytest.mark.full
def test_names_without_the_model_s_prefix_are_found(base: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(base("gpt2"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)  # GPT-2 on the hub has its mask in the file
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert train_and_merge(tmp_path / "run", f"model.name={tmp_path / 'base'}")["kl_mean"] < 1e-6
    written = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    assert written.keys() == weights.keys() - {"h.0.attn.bias"}


# What cannot be merged


def test_without_an_adapter_there_is_nothing_to_merge(trained: tuple[Path, str], tmp_path: Path) -> None:
    text = refusal(tmp_path / "a", trained[1], "adapter=none")
    assert text == (
        "adapter=none, so there is nothing to merge; give adapter=FOLDER of an adapter or of a finished run"
    )
    AutoModelForCausalLM.from_pretrained(trained[1].removeprefix("model.name=")).save_pretrained(
        tmp_path / "b" / "model"
    )
    assert "it is a whole model, so there is nothing to merge" in refusal(tmp_path / "b", trained[1])


def test_other_bits_than_in_training_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    text = refusal(tmp_path, trained[1], f"adapter={trained[0]}", "quantization=fp4")
    assert text == (
        f"adapter={trained[0]}: it was trained on other base weights than the config asks for, and it must be "
        "compared on those it was trained on; set quantization.quant_type=nf4"
    )


@pytest.mark.full
def test_an_adapter_of_a_tied_output_layer_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("qwen3"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = refusal(tmp_path, f"model.name={base('qwen3')}", "quantization=fp32", f"adapter={tmp_path / 'adapter'}")
    assert text.startswith("adapter: it changes lm_head.weight, but in this base lm_head.weight and model.embed_tokens")
    assert "are the same matrix, and a merged model would change both; serve the adapter on its base" in text
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "a plain model has no place for its model.embed_tokens.lora_"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "q_proj.lora_B.bias; serve the adapter on its base"),
    ],
)
def test_an_adapter_that_no_plain_model_can_hold_is_refused(
    base: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], part: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = refusal(tmp_path, f"model.name={base('llama')}", "quantization=fp32", f"adapter={tmp_path / 'adapter'}")
    assert part in text


def test_whole_modules_that_were_trained_replace_the_base_s(base: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        adapted.get_output_embeddings().modules_to_save.default.weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    chosen = [f"model.name={base('llama')}", "quantization=nf4", f"adapter={tmp_path / 'adapter'}"]
    assert merge(tmp_path, *chosen)["kl_mean"] < 1e-6


# Whether it answers the same


def test_a_model_that_answers_otherwise_is_not_there_but_its_report_is(merged: tuple[Path, str]) -> None:
    folder, name = merged
    merge(folder, name)
    inode = (folder / "merged" / "model.safetensors").stat().st_ino
    text = refusal(folder, name, "merge=original", "merge.max_kl=1e-4")
    assert text.startswith("merge.base=original: the merged model answers otherwise than the adapter on its base (KL")
    assert "above merge.max_kl=0.0001): the 16-bit weights are not the nf4 ones that it was trained on" in text
    assert "use merge.base=dequantized, or accept it with merge.max_kl=" in text
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["accepted"] is False
    assert report["kl_mean"] > 1e-4
    assert 0.05 < report["quantization"]["mean"] < 0.15
    assert len(report["quantization"]["largest"]) == 5
    assert (folder / "merged" / "model.safetensors").stat().st_ino == inode
    assert not (folder / "merged.partial").exists()


@pytest.mark.full
def test_what_computing_in_16_bits_does_by_itself_is_no_fault_of_the_merge(merged: tuple[Path, str]) -> None:
    report = merge(*merged, "merge.dtype=bf16")
    assert report["computing_kl"] > 0
    assert report["max_kl"] == max(1e-3, 2 * report["computing_kl"])
    assert merge(*merged)["computing_kl"] is None
    assert merge(*merged)["max_kl"] == 1e-3


def test_the_sentence_for_rounded_weights_offers_float32(merged: tuple[Path, str]) -> None:
    text = refusal(*merged, "merge.dtype=bf16", "merge.max_kl=1e-9")
    assert "rounding its weights to bf16 does that; use merge.dtype=fp32, or accept it with merge.max_kl=" in text


@pytest.mark.full
def test_the_sentence_for_float32_names_the_layer(merged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    add = LowRank.add_to
    wrong = iter([False] * 8 + [True] + [False] * 5)  # the second of two layers begins with the eighth matrix
    monkeypatch.setattr(LowRank, "add_to", lambda self, weight: add(self, weight) * (2 if next(wrong) else 1))
    assert "most of it arises in layer 1; serve the adapter on its base instead" in refusal(*merged)


def test_numbers_that_are_none_are_refused(merged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRank, "add_to", lambda self, weight: weight.float() * torch.nan)
    assert "its probabilities are NaN in fp32; use another merge.dtype" in refusal(*merged)


@pytest.mark.full
def test_numbers_too_large_for_fp16_are_refused(merged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRank, "add_to", lambda self, weight: weight.float() * 1e6)
    assert "holds numbers too large for float16; use merge.dtype=bf16" in refusal(*merged, "merge.dtype=fp16")


# Nothing half-written


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_to_safetensors(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.full
@pytest.mark.parametrize(
    ("step", "failure"),
    [
        ("qlora.adapters.merge_tensors.save_file", full_to_safetensors),
        ("qlora.evaluation.parity.save_file", full_to_safetensors),
        ("qlora.tasks.merged_model.write_modelfile", full),
        ("qlora.tasks.merged_model.replace_folder", full),
    ],
)
def test_a_disk_that_becomes_full_leaves_the_old_model_and_nothing_else(
    merged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, step: str, failure: Callable[..., None]
) -> None:
    folder, name = merged
    merge(folder, name)
    initial = {path.name: path.read_bytes() for path in (folder / "merged").iterdir()}
    monkeypatch.setattr(step, failure)
    text = refusal(folder, name)
    assert text == (
        f"the disk of {folder} became full while the model was written, and nothing of it is left; free some space, or "
        "choose another folder with hydra.run.dir=FOLDER"
    )
    assert not list(folder.glob("merged.*"))
    assert {path.name: path.read_bytes() for path in (folder / "merged").iterdir()} == initial


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(
    merged: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(merged_model.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Session, "load_trained", None)
    text = refusal(*merged)
    assert text.startswith("task=merge needs 0.0")
    assert text.endswith(
        f" GB in {merged[0]}, where 1e-06 GB are free; free some, or choose another folder with hydra.run.dir=FOLDER"
    )
    assert not list(merged[0].glob("merged*"))


@pytest.mark.full
def test_a_merge_that_was_killed_is_begun_anew(merged: tuple[Path, str]) -> None:
    folder, name = merged
    (folder / "merged.partial").mkdir()
    (folder / "merged.partial" / "rest").touch()
    (folder / "merged.old").mkdir()
    (folder / "merged.old" / "model.safetensors").touch()
    refusal(folder, name, "merge.max_kl=1e-30")
    assert [path.name for path in folder.glob("merged*")] == ["merged"], "the old model is back"
    merge(folder, name)
    assert (folder / "merged" / "config.json").is_file()
    assert not list(folder.glob("merged.*"))


# What comes after


@pytest.mark.full
def test_a_merged_model_is_measured_like_its_adapter(merged: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = merged
    merge(folder, name)
    expected = run(tmp_path / "a", name, "task=evaluate", f"adapter={folder}")["metrics"]["eval_loss"]
    for path in (folder / "merged", tmp_path / "moved"):
        if path.name == "moved":
            shutil.move(folder / "merged", tmp_path / "moved" / "merged")
        chosen = [name, "task=evaluate", f"adapter={path}", "quantization=fp32"]
        assert run(tmp_path / path.name, *chosen)["metrics"]["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
def test_a_merged_model_is_not_rounded_again_without_a_word(merged: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = merged
    merge(folder, name)
    with pytest.raises(UserError) as error:
        run(tmp_path / "a", name, "task=evaluate", f"adapter={folder / 'merged'}", "quantization=nf4")
    assert str(error.value) == (
        f"adapter={folder / 'merged'} is a whole model in float32, which quantization=nf4 would round again; use "
        "quantization=none or quantization=fp32, or give it as model.name with adapter=none to quantize it on purpose"
    )
    run(tmp_path / "b", f"model.name={folder / 'merged'}", "task=evaluate", "adapter=none")


@pytest.mark.full
@pytest.mark.matrix(1)
@pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the checkout")
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_a_trained_real_model_merges_below_a_ten_thousandth_of_a_nat(tmp_path: Path, name: str) -> None:
    chosen = [
        *(f"model.name={REAL / 'models' / name}", "data=local", f"data.path={REAL / 'tinystories.jsonl'}"),
        *("data.eval_dataset_size=16", "data.max_train_samples=80", "data.max_length=256", "trainer.max_steps=20"),
        *("lora.r=16", "trainer.learning_rate=1e-3", "data.max_eval_samples=16", "merge.prompts=16"),
    ]
    trained = run(tmp_path, *chosen)["metrics"]
    assert trained["eval_loss"] < trained["base_eval_loss"]
    dequantized = merge(tmp_path, *chosen)
    original = merge(tmp_path, *chosen, "merge=original", "merge.max_kl=1")
    assert dequantized["tokens"] > 1000
    assert dequantized["kl_mean"] < 1e-4
    assert dequantized["kl_mean"] < 0.01 * original["kl_mean"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert isinstance(model, torch.nn.Module)
    assert not isinstance(model, PeftModel)
    assert len(tokenizer) <= model.config.vocab_size
