"""Adapters go to what text runs through; what is not quantized or not adapted is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora import adapters
from qlora.adapters.targets import find_target_modules
from qlora.errors import UserError
from qlora.models import loading
from qlora.models.decoder import EXPERTS, ROUTER, read_decoder
from qlora.models.model_config import load_model_config
from qlora.models.tokenizer import load_tokenizer
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from tests.models.bases import choose, load, write

BF16 = "quantization.compute_dtype=bf16"
IDS = torch.arange(100, 132)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    kinds = ("gemma3", "qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "llama4_text", "mixtral", "mamba")
    return {kind: write(kind, root / kind) for kind in kinds}


def attach(folder: Path, *overrides: str) -> PeftModel:
    config = choose(folder, *overrides)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}] * 4
    return adapters.add_lora(config.lora, load(folder, *overrides), tensors=list, new_token_ids=[], batches=batches)


def adapted(model: PeftModel) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


def step(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(2):  # B is zero before the first step, and A has no gradient
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.full
@pytest.mark.parametrize("overrides", [[], ["lora.target_modules=[q_proj,v_proj]"]], ids=["all-linear", "names"])
@pytest.mark.parametrize("quantization", ["nf4", "fp32"])
def test_a_tower_for_pictures_gets_no_adapter_and_plain_peft_loads_the_rest(
    folders: dict[str, Path], tmp_path: Path, quantization: str, overrides: list[str]
) -> None:
    model = attach(folders["gemma3"], f"quantization={quantization}", "lora.dropout=0", *overrides)
    names = adapted(model)
    assert len(names) == (4 if overrides else 14)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    step(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    adapters.save_adapter(model, tmp_path / "adapter", tokenizer=load_tokenizer(choose(folders["gemma3"]).model))
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        if quantization == "fp32":
            base = AutoModelForCausalLM.from_pretrained(folders["gemma3"], dtype=torch.float32)
        else:
            base = load(folders["gemma3"], f"quantization={quantization}")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_a_name_that_only_the_tower_has_is_refused(folders: dict[str, Path]) -> None:
    base = load(folders["gemma3"], "quantization=fp32")
    with pytest.raises(
        UserError, match=r"lora.target_modules \['fc1'\] match no linear layer.*; the model has \['down"
    ):
        find_target_modules(["fc1"], base)


def test_the_tower_counts_as_beside_the_decoder(folders: dict[str, Path]) -> None:
    base = load(folders["gemma3"], "quantization=nf4")
    decoder = read_decoder(base)
    vision = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(
        folders["gemma3"]).model.vision_tower.parameters())  # fmt: skip
    assert vision <= decoder.beside < 1.5 * vision
    assert decoder.describe_unquantized() is None
    assert sum(matrix.count for matrix in decoder.matrices) == 2 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "llama4_text", "mixtral"])
def test_experts_and_routers_are_known_by_their_shapes_and_get_no_adapter_with_none(
    folders: dict[str, Path], kind: str
) -> None:
    model = attach(folders[kind], "quantization=none", "lora.dropout=0.1", "lora.experts=none")
    matrices = read_decoder(model.get_base_model()).matrices
    experts = [matrix.name for matrix in matrices if matrix.kind == EXPERTS]
    routers = [matrix.name for matrix in matrices if matrix.kind == ROUTER]
    assert experts
    assert all(".experts." in name for name in experts)
    assert len(routers) == (1 if kind == "deepseek_v3" else 2)  # its first layer is dense
    assert all(re.search(r"(router|gate)\.weight$", name) for name in routers)
    assert not any(matrix.is_adapted for matrix in matrices if matrix.kind in (EXPERTS, ROUTER))
    assert any(matrix.is_adapted for matrix in matrices)
    parameters = model.peft_config["default"].target_parameters or ()
    assert all(re.search(r"(gate|up|down)_proj.weight$", name) for name in parameters)  # dense layers beside experts
    step(model)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("lora", ["dora", "pissa", "olora", "eva", "rslora"])
def test_every_kind_of_adapter_trains_on_a_mixture(folders: dict[str, Path], lora: str) -> None:
    model = attach(folders["qwen3_moe"], "quantization=fp32", f"lora={lora}", "lora.dropout=0.1")
    step(model)
    assert adapted(model)


@pytest.mark.full
def test_eva_says_which_layers_it_cannot_start_from(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"lora.init=eva: PEFT cannot start .* qwen3_next read .*; use lora=attention"):
        attach(folders["qwen3_next"], "quantization=fp32", "lora=eva")
    assert adapted(attach(folders["qwen3_next"], "quantization=fp32", "lora=attention", "lora.init=eva"))


@pytest.mark.full
def test_loftq_starts_on_a_mixture_that_is_mostly_quantized(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path, num_experts=2, moe_intermediate_size=16)
    from qlora.models.weight_files import Checkpoint

    config = choose(folder, "lora=loftq", "quantization=nf4")
    model = adapters.add_lora(
        config.lora, load(folder, "quantization=nf4"), tensors=lambda: Checkpoint(folder), new_token_ids=[], batches=[]
    )
    assert len(adapted(model)) == 8


def test_names_that_peft_gives_to_experts_are_those_of_the_linear_layers_here(folders: dict[str, Path]) -> None:
    base = load(folders["deepseek_v3"], "quantization=none")
    assert find_target_modules(["q_proj", "up_proj"], base) == [
        *("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"),
        *("model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.self_attn.q_proj"),
    ]


def test_layers_whose_weight_a_kernel_reads_are_left_out_of_all_linear(folders: dict[str, Path]) -> None:
    model = attach(folders["mamba"], "quantization=none")
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj"}
    told = read_decoder(model.get_base_model()).describe_unadapted()
    assert told is not None
    assert all(f"{name} (" in told for name in ("out_proj", "x_proj", "dt_proj"))


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("mixtral", ["quantization=int8"], "bitsandbytes has 8-bit products for linear layers alone; use "
         "quantization=nf4, or quantization.experts=none, which keeps experts in 16 bits (393.2 KB)"),
        ("llama4_text", [], "the class of its experts, Llama4TextExperts, computes them in a way of its own; use "
         "quantization.experts=none, which keeps experts in 16 bits (196.6 KB)"),
    ],
    ids=["int8", "llama4"],
)  # fmt: skip
def test_a_base_that_would_be_mostly_unquantized_is_refused_before_it_is_read(
    folders: dict[str, Path], kind: str, overrides: list[str], reason: str
) -> None:
    config = choose(folders[kind], *overrides, BF16)
    placement = find_placement(config.quantization, find_device(config.device))
    shape = load_model_config(config.model)
    with pytest.raises(UserError) as error:
        loading.check_quantization(config.model, config.quantization, shape, placement=placement)
    name = re.escape(str(folders[kind]))
    assert re.fullmatch(
        rf"quantization.bits={config.quantization.bits}: of model.name={name} \d\d.\d % of the "
        rf"decoder's weights are in bfloat16 \(experts, router\), because {re.escape(reason)}",
        str(error.value),
    )


def test_experts_in_16_bits_are_told_with_their_share_and_memory_before_they_are_read(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = choose(folders["llama4_text"], "quantization.experts=none", BF16)
    placement = find_placement(config.quantization, find_device(config.device))
    loading.check_quantization(config.model, config.quantization, load_model_config(config.model), placement=placement)
    assert caplog.messages[-1] == (
        f"quantization.experts=none: of model.name={config.model.name} 57.1 % of the decoder's weights are experts in "
        "bfloat16, 196.6 KB"
    )
    load(folders["llama4_text"], "quantization.experts=none", BF16)


@pytest.mark.full
def test_a_smaller_share_is_told_with_its_kinds(tmp_path: Path) -> None:
    folder = write("qwen3_moe", tmp_path, num_experts=2, moe_intermediate_size=16)
    model = attach(folder, "quantization=nf4", "quantization.experts=none", "lora.experts=none", BF16)
    decoder = read_decoder(model.get_base_model())
    experts, router, attention = 2 * 2 * 3 * 16 * 64, 2 * 2 * 64, 2 * 64 * 16 * (4 + 2 + 2 + 4)
    total = experts + router + attention
    assert decoder.unquantized == decoder.unadapted == {EXPERTS: experts / total, ROUTER: router / total}
    fraction = f"{100 * (experts + router) / total:.1f} %"
    assert decoder.describe_unquantized() == f"{fraction} of the decoder's weights are in bfloat16 (experts, router)"
    assert decoder.describe_unadapted() == (
        f"experts ({100 * experts / total:.1f} % of the decoder's weights), router ({100 * router / total:.1f} %); the "
        "router is frozen"
    )
    quantized = read_decoder(attach(folder, "quantization=nf4", BF16).get_base_model())
    assert quantized.unquantized == {ROUTER: router / total}
