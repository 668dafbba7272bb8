"""A base is known by its weights: wherever and however they are stored, and told from any other."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.fingerprint import (
    STORED,
    Base,
    find_difference,
    fingerprint_random,
    fingerprint_weights,
    read_base,
    write_base,
)
from qlora.models.weight_files import fetch_weights, weight_files

Weights = dict[str, torch.Tensor]


def fingerprint(folder: Path) -> str:
    return fingerprint_weights(weight_files(folder))


def changed(folder: Path, copy: Path, change: Callable[[Weights], Weights]) -> str:
    """The fingerprint of a copy whose weights are what `change` makes of them."""
    copy.mkdir(exist_ok=True)
    save_file(change(load_file(folder / "model.safetensors")), copy / "model.safetensors")
    return fingerprint(copy)


def test_copies_shards_and_other_files_beside_are_the_same_base(base_folder: Path, tmp_path: Path) -> None:
    expected = fingerprint(base_folder)
    assert expected.startswith(f"{STORED}:")
    shutil.copytree(base_folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text("{}")
    (tmp_path / "copy" / "README.md").write_text("another text")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"no weights of this model")
    assert fingerprint(tmp_path / "copy") == expected
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint(tmp_path / "shards") == expected


def test_a_dtype_that_holds_all_values_is_the_same_base_and_one_that_rounds_is_not(
    base_folder: Path, tmp_path: Path
) -> None:
    bf16 = changed(base_folder, tmp_path / "bf16", lambda weights: {n: w.bfloat16() for n, w in weights.items()})
    fp32 = changed(tmp_path / "bf16", tmp_path / "wide", lambda weights: {n: w.float() for n, w in weights.items()})
    half = changed(tmp_path / "bf16", tmp_path / "fp16", lambda weights: {n: w.half() for n, w in weights.items()})
    assert bf16 == fp32
    assert bf16 != fingerprint(base_folder)
    assert bf16 != half, "16-bit floats round small bf16 numbers"


def test_the_names_that_wrappers_and_tied_matrices_have_do_not_matter(base_folder: Path, tmp_path: Path) -> None:
    def unwrap(weights: Weights) -> Weights:
        return {name.removeprefix("model."): weight for name, weight in weights.items()}

    def tie(weights: Weights, *names: str) -> Weights:
        kept = {name: weight for name, weight in weights.items() if "embed" not in name and "lm_head" not in name}
        return kept | {name: weights["lm_head.weight"].clone() for name in names}

    assert changed(base_folder, tmp_path / "bare", unwrap) == fingerprint(base_folder)
    matrices = [("lm_head.weight",), ("model.embed_tokens.weight",), ("lm_head.weight", "model.embed_tokens.weight")]
    assert len({changed(base_folder, tmp_path / "tied", lambda w, n=names: tie(w, *n)) for names in matrices}) == 1


def test_buffers_that_older_versions_stored_do_not_matter(tmp_path: Path) -> None:
    config = GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                           vocab_size=200)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    mask = {f"gpt_neox.layers.{layer}.attention.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    frequencies = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    old = changed(tmp_path / "base", tmp_path / "old", lambda weights: weights | mask | frequencies)
    assert old == fingerprint(tmp_path / "base")
    AutoModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "bare")
    assert not [name for name in load_file(tmp_path / "bare" / "model.safetensors") if name.startswith("gpt_neox.")]
    bias = "gpt_neox.layers.1.attention.dense.bias"
    other = changed(tmp_path / "base", tmp_path / "other", lambda weights: weights | {bias: weights[bias] + 1})
    assert other != old, "a bias of a layer is a weight"


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_other_values_in_any_one_tensor_are_another_base(base_folder: Path, tmp_path: Path, name: str) -> None:
    def noise(weights: Weights) -> Weights:
        return weights | {name: weights[name] + 0.01}

    assert changed(base_folder, tmp_path / "other", noise) != fingerprint(base_folder)


def test_shapes_and_the_order_of_layers_count(base_folder: Path, tmp_path: Path) -> None:
    def swap(weights: Weights) -> Weights:
        turn = {"layers.0": "layers.1", "layers.1": "layers.0"}
        return {next((n.replace(a, b) for a, b in turn.items() if a in n), n): w for n, w in weights.items()}

    def reshape(weights: Weights) -> Weights:
        name = "model.layers.0.mlp.up_proj.weight"
        return weights | {name: weights[name].reshape(64, 128)}

    def grow(weights: Weights) -> Weights:
        return weights | {"model.layers.2.extra.weight": torch.ones(3)}

    others = [changed(base_folder, tmp_path / "other", change) for change in (swap, reshape, grow)]
    assert len({fingerprint(base_folder), *others}) == 4


def test_what_is_stored_quantized_has_the_fingerprint_of_what_is_stored(base_folder: Path, tmp_path: Path) -> None:
    config = compose([f"model.name={base_folder}", "model.tokenizer=tiny"])
    from transformers import BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=bits)
    model.save_pretrained(tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "copy")
    files = fetch_weights(config.model)
    assert files is not None
    assert fingerprint(tmp_path / "packed") == fingerprint(tmp_path / "copy") != fingerprint_weights(files)


def test_a_large_base_is_fingerprinted_by_few_reads(tmp_path: Path) -> None:
    """80 GB in a file with holes; what is read is counted by the kernel."""
    rows, columns, layers = 8192, 28672, 85
    size = rows * columns * 4
    header = {f"model.layers.{layer}.mlp.up_proj.weight": {
        "dtype": "F32", "shape": [rows, columns], "data_offsets": [layer * size, (layer + 1) * size],
    } for layer in range(layers)}  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * size)
    started, bytes_before = time.perf_counter(), _bytes_read()
    assert fingerprint_weights([path]).startswith(STORED)
    assert _bytes_read() - bytes_before < 2**20
    assert time.perf_counter() - started < 5


def _bytes_read() -> int:
    path = Path("/proc/self/io")
    if not path.is_file():
        pytest.skip("the kernel counts no reads here")
    return int(path.read_text().split()[1])


def test_a_shard_that_is_missing_is_named(base_folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path, max_shard_size="200KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError) as error:
        weight_files(tmp_path)
    assert str(error.value) == (
        f"model.name={tmp_path}: 1 of the 4 files of the weights that model.safetensors.index.json names are missing, "
        f"first {gone.name}; finish the download, or copy the model again"
    )


def test_a_snapshot_of_the_hub_is_its_local_copy(base_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)
    for folder in (snapshot, snapshot.parent.parent / "refs"):
        folder.mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(snapshot, max_shard_size="200KB")
    config = compose(["model.name=org/base", f"model.cache_dir={tmp_path}", "model.tokenizer=tiny"])
    files = fetch_weights(config.model)
    assert files is not None
    assert fingerprint_weights(files) == fingerprint(base_folder)


def base(name: str = "base", fingerprint: str | None = f"{STORED}:0", **more: object) -> Base:
    return Base(name, fingerprint=fingerprint, **more)  # type: ignore[arg-type]


def test_the_fingerprint_decides_and_the_name_only_where_there_is_none() -> None:
    other = f"{STORED}:1"
    assert find_difference(base("a"), base("b")) is None
    assert find_difference(base("a", None), base("a")) is None
    certain = {
        find_difference(base("a", other), base("b")): "give that base as model.name",
        find_difference(base("a", other), base("a")): "restore the previous files",
        find_difference(base("a", other, revision="v1"), base("a")): "set model.revision=v1",
        find_difference(base("a", other, revision="v1"), base("b")): "give that base as model.name, with "
        "model.revision=v1",
    }
    for difference, remedy in certain.items():
        assert difference is not None
        assert (difference.remedy, difference.is_certain) == (remedy, True)
    for trained in (base("a", None), base("", None), base("b", "0" * 64)):  # no fingerprint, or one by an older rule
        unknown = find_difference(trained, base("b"))
        assert unknown is not None
        assert not unknown.is_certain


def test_random_weights_are_told_apart_by_what_decides_them() -> None:
    one, other = ({"model.weights": "random", "seed": seed, "model.architecture.head_dim": size}
                  for seed, size in ((0, None), (1, 8)))  # fmt: skip
    trained, now = (base("tiny", fingerprint_random(settings), random=settings) for settings in (one, other))
    assert find_difference(trained, trained) is None
    for difference, remedy in (
        (find_difference(trained, now), "set seed=0 model.architecture.head_dim=null"),
        (find_difference(trained, base("tiny")), "set model.weights=random"),
        (find_difference(base("tiny"), now), "set model.weights=pretrained model.name=tiny"),
    ):
        assert difference is not None
        assert difference.remedy == remedy


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"random": 3}, "config": {"model": {"name": "a"}}}'])
def test_a_damaged_manifest_is_one_sentence_where_nothing_else_says_the_base(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(.*\), and nothing else says .*; copy the run"):
        read_base(tmp_path / "adapter")


def test_a_damaged_record_of_the_base_is_one_sentence(tmp_path: Path) -> None:
    write_base(base("a"), tmp_path)
    assert read_base(tmp_path) == base("a")
    for text in ("{", "[]", '{"nme": "a"}', '{"name": 3}', '{"name": "a", "random": "b"}', '{"name": null}'):
        (tmp_path / "base.json").write_text(text)
        with pytest.raises(UserError, match=r"^adapter=.*: base\.json is damaged \(.*\); copy the adapter again$"):
            read_base(tmp_path)


def test_what_a_newer_version_adds_to_the_base_of_an_adapter_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"name": "mine", "added": 1}')
    assert read_base(tmp_path) == Base("mine")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "it must be an object, got []"),
        ('"mine"', "it must be an object, got 'mine'"),
        ("3", "it must be an object, got 3"),
        ("{}", "name is missing"),
    ],
)
def test_a_base_file_that_is_no_object_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_base(tmp_path)
    assert str(error.value) == f"adapter={tmp_path}: base.json is damaged ({reason}); copy the adapter again"
