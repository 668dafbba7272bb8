"""Experts in 4 bits: the bits of linear layers, the products of decoded weights, and every way to load them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora.config.compose import compose
from qlora.experts.forward import use_experts
from qlora.experts.layout import ExpertsLayout, Placeholder, expert_weight, find_experts, stored_experts, stored_units
from qlora.quantization.method import find_method
from tests.models.bases import build, change, load, write

KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "olmoe")
FP32 = "quantization.compute_dtype=fp32"
IDS = torch.arange(100, 132)[None]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen3_moe", tmp_path_factory.mktemp("qwen") / "qwen3_moe")


def full_weights(experts: nn.Module, projection: str, rows: slice) -> Tensor:
    """The matrices of all experts as linear layers would hold them, from a base that is not quantized."""
    weight = getattr(experts, projection).detach()
    return (weight.transpose(1, 2) if ExpertsLayout.of(experts).is_transposed else weight)[:, rows]


def decoded_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the decoded weights of its experts as plain parameters."""
    twin = copy.deepcopy(model)
    for experts in find_experts(twin).values():
        layout = ExpertsLayout.of(experts)
        for projection in layout.projections:
            weight = expert_weight(experts, projection, torch.float32)
            weight = weight.transpose(1, 2) if layout.is_transposed else weight
            setattr(experts, projection, nn.Parameter(weight.contiguous()))
        del experts.quantized
    return twin


@pytest.mark.parametrize("quantization", ["nf4", "nf4-plain", "fp4"])
def test_each_matrix_of_an_expert_has_the_bits_of_a_linear_layer(folder: Path, quantization: str) -> None:
    config = compose([f"quantization={quantization}"]).quantization
    full = find_experts(load(folder, "quantization=fp32"))
    model = load(folder, f"quantization={quantization}", FP32)
    count = 0
    for name, experts, unit in stored_units(model):
        store: Any = stored_experts(experts)
        part = store.unit(unit.name)
        for expert, matrix in enumerate(full_weights(full[name], unit.projection, unit.rows)):
            packed, state = bnb.quantize_4bit(
                matrix.contiguous(), compress_statistics=config.double_quant, quant_type=config.quant_type.value
            )
            assert torch.equal(part.packed[expert], packed.view(-1))
            assert torch.equal(part.absmax[expert], state.absmax)
            if config.double_quant:
                assert torch.equal(part.nested_absmax[expert], state.state2.absmax)
                assert part.nested_offset[expert] == state.offset
            decoded = bnb.dequantize_4bit(packed, state)
            assert torch.equal(store.decode_unit(unit.name, expert, torch.float32), decoded)
            assert torch.equal(expert_weight(experts, unit.projection, torch.float32)[expert, unit.rows], decoded)
            count += 1
    assert count == 3 * sum(ExpertsLayout.of(experts).count for experts in full.values())


def test_a_model_computes_what_its_decoded_weights_do_and_so_do_its_gradients(folder: Path) -> None:
    model = load(folder, FP32)
    twin = decoded_twin(model)
    outputs = []
    for base in (model, twin):
        embeddings = base.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = base(inputs_embeds=embeddings).logits
        outputs.append((logits, *torch.autograd.grad(logits.pow(2).sum(), embeddings)))
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_single_token_decodes_the_experts_it_is_sent_to_alone(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(qwen, FP32).eval()
    expected = decoded_twin(model)(IDS[:, :1]).logits
    store: Any = type(stored_experts(next(iter(find_experts(model).values()))))
    asked = []
    decode = store.decode
    monkeypatch.setattr(
        store, "decode", lambda self, name, dtype, ids=None: asked.append(ids) or decode(self, name, dtype, ids)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :1]).logits, expected)
    assert [len(ids) for ids in asked] == [2, 2] * 2


def test_the_parameter_of_quantized_experts_is_a_frozen_nan_without_storage(qwen: Path) -> None:
    model = load(qwen)
    experts: Any = next(iter(find_experts(model).values()))
    for copied in (experts.gate_up_proj, copy.deepcopy(experts).gate_up_proj, experts.to(torch.float16).gate_up_proj):
        assert isinstance(copied, Placeholder)
        assert copied.shape == (4, 128, 64)
        assert copied.isnan().all()
        assert copied.untyped_storage().nbytes() <= 4
        assert not copied.requires_grad


def test_odd_shapes_keep_the_bits_of_linear_layers(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "odd", moe_intermediate_size=24)
    full, model = find_experts(load(folder, "quantization=fp32")), load(folder, FP32)
    for name, experts, unit in stored_units(model):
        store: Any = stored_experts(experts)
        for expert, matrix in enumerate(full_weights(full[name], unit.projection, unit.rows)):
            decoded = bnb.dequantize_4bit(
                *bnb.quantize_4bit(matrix.contiguous(), compress_statistics=True, quant_type="nf4")
            )
            assert torch.equal(store.decode_unit(unit.name, expert, torch.float32), decoded)


def per_expert_checkpoint(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a base whose linear layers, those of experts too, are saved in 4 bits as bitsandbytes' layers are."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() != 2 or "embed" in name or "lm_head" in name or ".gate.weight" in name:
            tensors[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
        tensors |= {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
              "quant_method": "bitsandbytes"}  # fmt: skip
    return change(target, quantization_config=config | settings)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_checkpoint_with_experts_in_4_bits_loads_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / kind)
    saved = per_expert_checkpoint(folder, tmp_path / "saved")
    first, second = (load(path, FP32) for path in (folder, saved))
    buffers = [dict(model.named_buffers()) for model in (first, second)]
    assert [name for name in buffers[0] if ".quantized." in name] == [
        name for name in buffers[1] if ".quantized." in name
    ]
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name
    assert torch.equal(first(IDS).logits, second(IDS).logits)


def test_experts_none_keeps_16_bits_and_decodes_saved_ones(qwen: Path, tmp_path: Path) -> None:
    saved = per_expert_checkpoint(qwen, tmp_path / "saved")
    stored = load(saved, FP32)
    for folder in (qwen, saved):
        model = load(folder, "quantization.experts=none", FP32)
        assert not list(stored_units(model))
    for name, experts in find_experts(model).items():
        for projection in ExpertsLayout.of(experts).projections:
            expected = expert_weight(find_experts(stored)[name], projection, torch.float32)
            assert torch.equal(getattr(experts, projection), expected)


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen3_moe"])
def test_a_quantized_checkpoint_with_experts_in_16_bits_has_them_quantized(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / kind)
    expected = load(folder)
    load(folder, "quantization.experts=none").save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    model = load(tmp_path / "saved")
    assert list(stored_units(model))
    theirs = dict(expected.named_buffers())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in model.named_buffers() if ".quantized." in name)


def test_random_weights_are_quantized_one_module_at_a_time() -> None:
    model = build("qwen3_moe")
    method, config = find_method(compose([]).quantization), compose([]).quantization
    expected = {name: full_weights(experts, "down_proj", slice(None)) for name, experts in find_experts(model).items()}
    for experts in find_experts(model).values():
        method.quantize_experts(experts, config)
    use_experts(model)
    for name, experts in find_experts(model).items():
        error = expert_weight(experts, "down_proj", torch.float32) - expected[name]
        assert 0 < error.norm() / expected[name].norm() < 0.12
