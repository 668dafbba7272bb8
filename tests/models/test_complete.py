"""A base whose files lack what its config means is refused; what its files hold beyond that is said."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.errors import UserError
from qlora.models.model_config import load_model_config
from qlora.models.weight_files import Checkpoint
from tests.models import bases
from tests.models.bases import change, choose, load, write

Tensors = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, Any], str]] = {
    "a tensor is missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != UP},
        {},
        f"1 tensor is missing from its files, {UP}, and would be initialised at random; download or copy",
    ),
    "a bias alone is missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "norm" not in name},
        {},
        "5 tensors are missing from its files, first model.layers.0.input_layernorm.weight, ",
    ),
    "the config has more layers": (
        None,
        {"num_hidden_layers": 12},
        "90 tensors are missing from its files, first model.layers.2.input_layernorm.weight, ",
    ),
    "the output layer is missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        {},
        "1 tensor is missing from its files, lm_head.weight: that is the output layer, .* set tie_word_embeddings",
    ),
    "every name has a prefix": (
        lambda tensors: {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        {},
        r"21 tensors are missing .*: there the names begin with 'base_model.model.'; save the model without it",
    ),
    "a weight is narrower": (
        lambda tensors: {name: tensor[:100] if name == UP else tensor for name, tensor in tensors.items()},
        {},
        rf"1 tensor in its files differs in shape .*, first {UP} \(100 x 64, and 128 x 64 is needed\); correct",
    ),
    "the vocabulary is smaller than the config says": (
        None,
        {"vocab_size": 2000},
        r"2 tensors in its files differ in shape .*, first lm_head.weight \(1600 x 64, and 2000 x 64 is needed\)",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.mark.matrix(2)
@pytest.mark.parametrize(("damage", "quantization"), [
    *((damage, "nf4") for damage in DAMAGES), ("a tensor is missing", "int8"), ("a weight is narrower", "int8"),
    ("a tensor is missing", "fp32"), ("a weight is narrower", "fp32"),
])  # fmt: skip
def test_what_the_files_lack_is_named_and_refused(llama: Path, tmp_path: Path, damage: str, quantization: str) -> None:
    edit, settings, sentence = DAMAGES[damage]
    folder = change(shutil.copytree(llama, tmp_path / "base"), edit, **settings)
    with pytest.raises(UserError, match=rf"^model.name={re.escape(str(folder))}: {sentence}") as error:
        load(folder, f"quantization={quantization}")
    assert "\n" not in str(error.value)


@pytest.mark.full
def test_a_stored_4bit_base_must_be_complete_too(llama: Path, tmp_path: Path) -> None:
    load(llama, "quantization=nf4").save_pretrained(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*")}
    for gone in (UP, f"{UP}.absmax", f"{UP}.quant_state.bitsandbytes__nf4", f"{UP}.nested_absmax"):
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
        change(tmp_path, lambda tensors, gone=gone: {name: value for name, value in tensors.items() if name != gone})
        with pytest.raises(UserError, match=r"missing|cannot be made of what its files hold"):
            load(tmp_path, "quantization=nf4")


def test_a_tied_output_layer_is_not_missing(tmp_path: Path) -> None:
    folder = write("qwen2", tmp_path)
    assert "lm_head.weight" not in set(Checkpoint(folder))
    model = load(folder, "quantization=nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.full
def test_both_of_two_tied_matrices_may_not_be_missing(tmp_path: Path) -> None:
    folder = change(write("qwen2", tmp_path), lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name
    })  # fmt: skip
    with pytest.raises(UserError, match=r"2 tensors are missing .*model.embed_tokens.weight"):
        load(folder, "quantization=fp32")


def test_a_missing_expert_is_named_by_the_tensor_that_it_is_a_part_of(tmp_path: Path) -> None:
    folder = write("mixtral", tmp_path)
    change(folder, lambda tensors: {name: value for name, value in tensors.items() if "1.block_sparse_moe.experts.2.w1"
                                    not in name})  # fmt: skip
    with pytest.raises(UserError, match=r"1 tensor cannot be made .*, model.layers.1.mlp.experts.gate_up_proj: parts"):
        load(folder, "quantization=fp32")


def test_a_buffer_that_training_fills_may_not_be_missing(tmp_path: Path) -> None:
    folder = change(write("deepseek_v3", tmp_path), lambda tensors: {
        name: tensor for name, tensor in tensors.items() if "e_score_correction_bias" not in name
    })  # fmt: skip
    with pytest.raises(UserError, match=r"1 tensor is missing .*e_score_correction_bias"):
        load(folder, "quantization=fp32")


@pytest.mark.parametrize(
    ("edit", "settings", "sentence"),
    [
        (None, {"num_hidden_layers": 1}, "no place for 9 tensors of its files.*: first model.layers.1.input_layernorm"),
        (
            lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
            {},
            "no place for 1 tensor of its files, .*: model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
    ],
    ids=["fewer layers", "a forgotten adapter"],
)
def test_what_the_files_hold_beyond_the_config_is_said_once(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Any, settings: dict[str, Any], sentence: str
) -> None:
    folder = change(shutil.copytree(llama, tmp_path / "base"), edit, **settings)
    with caplog.at_level(logging.WARNING, logger="qlora"):
        load(folder, "quantization=nf4")
    assert len([record for record in caplog.records if re.search(sentence, record.getMessage())]) == 1


@pytest.fixture(scope="module")
def shards(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("shards") / "base")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size="400KB")
    return folder


def test_a_missing_file_of_several_is_named_before_any_is_read(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "base")
    files = sorted(folder.glob("model-*.safetensors"))
    files[-1].unlink()
    message = (
        rf"1 of the {len(files)} files of the weights that .*index.json names are missing, first {files[-1].name}; "
    )
    with pytest.raises(UserError, match=message):
        load_model_config(choose(folder).model)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_one_sentence(shards: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(shards, tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged \(.*\); correct it, or download or copy it again$"):
        load_model_config(choose(folder).model)


def test_tensors_that_an_index_omits_are_read_from_its_files(llama: Path, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if "layers.1.mlp" not in name}
    index.write_text(json.dumps(content))
    assert set(Checkpoint(folder)) == set(Checkpoint(llama))
    expected = dict(load(llama, "quantization=fp32").named_parameters())
    assert all(
        torch.equal(value, expected[name]) for name, value in load(folder, "quantization=fp32").named_parameters()
    )


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("bert", "is an encoder"), ("roberta", "is an encoder"), ("bart", "has an encoder and a decoder"),
     ("t5", "has an encoder and a decoder"), ("llava", "reads pictures too")],
)  # fmt: skip
def test_what_is_no_decoder_is_refused_by_its_config_alone(tmp_path: Path, kind: str, reason: str) -> None:
    from tests.models.bases import IDS, SHAPES

    config = {"model_type": kind, **IDS, **SHAPES[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=rf"is not a decoder-only causal language model: {kind} {reason}.*; choose"):
        load_model_config(choose(tmp_path).model)


def test_a_bert_that_is_a_decoder_is_taken(tmp_path: Path) -> None:
    config = {"model_type": "bert", "is_decoder": True, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert load_model_config(choose(tmp_path).model).is_decoder


def test_a_text_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gemma3_text", "use_bidirectional_attention": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="gemma3_text lets tokens see those behind them"):
        load_model_config(choose(tmp_path).model)


@pytest.mark.full
def test_two_matrices_that_config_json_ties_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = bases.write("llama", tmp_path / "base")
    bases.change(base, tie_word_embeddings=True)
    bases.load(base, "quantization=nf4")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("qlora")] == [
        f"model.name={base}: its config.json says tie_word_embeddings=true, but its files hold two matrices, "
        "model.embed_tokens.weight and lm_head.weight, that differ: both are used as they are"
    ]
    caplog.clear()
    bases.load(bases.write("qwen2", tmp_path / "tied"), "quantization=nf4")
    assert "tie_word_embeddings" not in caplog.text
