"""Experts in 4 bits: the bits of linear layers, the products of decoded weights, and every way to load them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.experts.layout import ExpertsLayout, Placeholder, expert_weight, find_experts, stored_experts, stored_units
from qlora.models.random_weights import RandomWeights
from qlora.quantization.method import find_method
from qlora.quantization.placement import find_placement
from tests.models.bases import build, change, choose, in_4_bits, load, write

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


@pytest.mark.matrix(3)
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
            count += 1
            if matrix.shape[1] % 64:  # bitsandbytes decodes those wrongly on a CPU
                continue
            decoded = bnb.dequantize_4bit(packed, state)
            assert torch.equal(store.decode_unit(unit.name, expert, torch.float32), decoded)
            assert torch.equal(expert_weight(experts, unit.projection, torch.float32)[expert, unit.rows], decoded)
    assert count == 3 * sum(ExpertsLayout.of(experts).count for experts in full.values())


@pytest.mark.matrix(3)
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
    expected = expert_weight(experts, "gate_up_proj", torch.float32)
    copies = [experts, copy.deepcopy(experts), copy.deepcopy(experts).to(torch.float16), copy.deepcopy(experts).float()]
    for module in copies:
        assert torch.equal(expert_weight(module, "gate_up_proj", torch.float32), expected)
    for copied in (module.gate_up_proj for module in copies):
        assert isinstance(copied, Placeholder)
        assert copied.shape == (4, 128, 64)
        assert copied.isnan().all()
        assert copied.untyped_storage().nbytes() <= 4
        assert not copied.requires_grad


@pytest.mark.full
def test_odd_shapes_decode_to_the_error_of_4_bits_though_bitsandbytes_does_not_on_a_cpu(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "odd", moe_intermediate_size=24)
    full, model = find_experts(load(folder, "quantization=fp32")), load(folder, FP32)
    for name, experts, unit in stored_units(model):
        store: Any = stored_experts(experts)
        for expert, matrix in enumerate(full_weights(full[name], unit.projection, unit.rows)):
            decoded = store.decode_unit(unit.name, expert, torch.float32)
            assert (decoded - matrix).norm() / matrix.norm() < 0.12
            assert torch.equal(store.rounding()(matrix), decoded)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_checkpoint_with_experts_in_4_bits_loads_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / kind)
    saved = in_4_bits(folder, tmp_path / "saved")
    first, second = (load(path, FP32) for path in (folder, saved))
    buffers = [dict(model.named_buffers()) for model in (first, second)]
    assert [name for name in buffers[0] if ".quantized." in name] == [
        name for name in buffers[1] if ".quantized." in name
    ]
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name
    assert torch.equal(first(IDS).logits, second(IDS).logits)


@pytest.mark.full
def test_experts_none_keeps_16_bits_and_decodes_saved_ones(qwen: Path, tmp_path: Path) -> None:
    saved = in_4_bits(qwen, tmp_path / "saved")
    quantized = load(saved, FP32)
    for folder in (qwen, saved):
        model = load(folder, "quantization.experts=none", FP32)
        assert not list(stored_units(model))
    for name, experts in find_experts(model).items():
        for projection in ExpertsLayout.of(experts).projections:
            expected = expert_weight(find_experts(quantized)[name], projection, torch.float32)
            assert torch.equal(getattr(experts, projection), expected)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen3_moe"])
def test_a_quantized_checkpoint_with_experts_in_16_bits_has_them_quantized(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / kind)
    expected = load(folder)
    load(folder, "quantization.experts=none").save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    model = load(tmp_path / "saved")
    assert list(stored_units(model))
    theirs = dict(expected.named_buffers())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in model.named_buffers() if ".quantized." in name)


def test_no_more_than_one_matrix_of_an_expert_exists_in_full_while_a_base_is_loaded(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path / "base", num_experts=8, moe_intermediate_size=512)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                    sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
            return output

    config = choose(folder, FP32)
    method, placement = find_method(config.quantization), find_placement(config.quantization, torch.device("cpu"))
    with Watch(), method.loading(config.quantization):
        description = method.library_config(config.quantization, placement)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=description)
    assert len(list(stored_units(model))) == 6
    assert max(sizes) == 1600 * 64  # the embedding; the merged experts of a layer have 8 x 1024 x 64


def test_a_matrix_that_is_not_finite_is_named_though_4_bits_hide_it(qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "spoiled")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] = torch.nan
        return tensors

    change(folder, spoil)
    with pytest.raises(
        UserError, match=r"1 of the base's weights holds NaN .*, first model.layers.1.mlp.experts.gate_up"
    ):
        load(folder)


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
def test_a_base_that_lacks_a_matrix_of_an_expert_is_refused(qwen: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(qwen, tmp_path / "torn")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def tear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensor = tensors.pop(name)
        return tensors if kind == "missing" else tensors | {name: tensor[:32]}

    change(folder, tear)
    with pytest.raises(
        UserError,
        match=r"1 tensor cannot be made of what its files hold, \S+1.mlp.experts.down_proj: parts are miss",
    ):
        load(folder)


def test_a_base_with_random_weights_has_quantized_experts_from_its_seed_alone() -> None:
    config = compose(["device=cpu", FP32]).quantization
    placement = find_placement(config, torch.device("cpu"))
    full, quantized = (
        RandomWeights(build("qwen3_moe").config, placement=placement, seed=1).build(find_method(choice), choice)
        for choice in (compose(["quantization=fp32"]).quantization, config)
    )
    experts = find_experts(full)
    assert len(list(stored_units(quantized))) == 6
    for name, module, unit in stored_units(quantized):
        store: Any = stored_experts(module)
        matrix = full_weights(experts[name], unit.projection, unit.rows)[0].contiguous()
        expected = bnb.dequantize_4bit(*bnb.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"))
        assert torch.equal(store.decode_unit(unit.name, 0, torch.float32), expected)
