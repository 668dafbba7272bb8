"""Merging tensor by tensor: the base's weights are those of the loaded model, to the bit, and none is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from qlora.adapters.adapted import Adapted, LowRank, split_adapter
from qlora.adapters.merge_tensors import Merger
from qlora.config.compose import compose
from qlora.config.schema import MergeBase
from qlora.errors import UserError
from qlora.models import loading
from qlora.models.model_config import load_model_config
from qlora.models.weight_files import Checkpoint, ModelNames
from qlora.quantization.placement import find_placement
from qlora.runtime.device import Placement, find_device

BITS = [
    ["quantization=nf4"],
    ["quantization=nf4", "quantization.double_quant=false"],
    ["quantization=fp4"],
    ["quantization=int8"],
    ["quantization=none"],
]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=1600, n_positions=64)).save_pretrained(folder)
    return folder


def load(folder: Path, *overrides: str) -> tuple[PreTrainedModel, Placement]:
    config = compose([f"model.name={folder}", "model.tokenizer=tiny", "recipe=none", *overrides])
    placement = find_placement(config.quantization, find_device(config.device))
    model_config = load_model_config(config.model)
    base = loading.load_base(config.model, config.quantization, placement=placement, model_config=model_config)
    return base, placement


def merger(folder: Path, adapted: Adapted, placement: Placement, base: MergeBase = MergeBase.dequantized) -> Merger:
    names = ModelNames(load_model_config(compose([f"model.name={folder}", "model.tokenizer=tiny"]).model))
    return Merger(Checkpoint(folder), names, adapted, base, torch.float32, placement)


def untrained(base: PreTrainedModel) -> PeftModel:
    """An adapter that changes nothing: merging then gives the base alone."""
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def weights(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The base's parameters in full, by their names."""
    parameters = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            is_transposed = module.source_cls is not torch.nn.Linear
            weight = dequantize_module_weight(module).detach()
            parameters[f"{name}.weight"] = weight.T if is_transposed else weight
    return parameters


@pytest.mark.matrix(2)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", BITS, ids=" ".join)
@pytest.mark.parametrize("kind", ["base_folder", "gpt2_folder"])
def test_dequantized_weights_are_those_of_the_loaded_model_to_the_bit(
    request: pytest.FixtureRequest, kind: str, bits: list[str], dtype: str
) -> None:
    if bits == ["quantization=none"] and dtype == "fp32":
        bits = ["quantization=fp32"]
    folder = request.getfixturevalue(kind)
    base, placement = load(folder, *bits, f"quantization.compute_dtype={dtype}")
    expected = weights(base)
    made = merger(folder, split_adapter(untrained(base)), placement)
    assert len(made.parts) == len(expected)
    for name, part in made.parts.items():
        assert torch.equal(made.tensor(part), expected[name].float()), name


@pytest.mark.full
def test_original_weights_are_those_of_the_files_to_the_bit(base_folder: Path) -> None:
    base, placement = load(base_folder, "quantization=nf4", "quantization.compute_dtype=bf16")
    made = merger(base_folder, split_adapter(untrained(base)), placement, MergeBase.original)
    plain, _ = load(base_folder, "quantization=fp32")
    expected = plain.state_dict()
    assert all(torch.equal(made.tensor(part), expected[name]) for name, part in made.parts.items())


def test_what_rounding_changed_is_noted_by_layer(base_folder: Path) -> None:
    base, placement = load(base_folder, "quantization=nf4")
    made = merger(base_folder, split_adapter(untrained(base)), placement, MergeBase.original)
    for part in made.parts.values():
        made.tensor(part)
    assert len(made.errors) == 14
    assert all(0.05 < error < 0.12 for error in made.errors.values())


def test_merging_is_what_peft_s_own_does_in_float32(base_folder: Path) -> None:
    for options in ({}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 4}}):
        base, placement = load(base_folder, "quantization=fp32")
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
        model = get_peft_model(base, config)
        made = merger(base_folder, split_adapter(model), placement)
        expected = model.merge_and_unload().state_dict()
        for name, part in made.parts.items():
            torch.testing.assert_close(made.tensor(part), expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("missing", ["layers", "rounded", "replaced"])
def test_a_tensor_that_cannot_be_found_stops_the_merge(base_folder: Path, missing: str) -> None:
    base, placement = load(base_folder, "quantization=nf4")
    adapted = split_adapter(untrained(base))
    layer = LowRank(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    name = "model.layers.7.mlp.gate_proj" + (".weight" if missing == "replaced" else "")
    getattr(adapted, missing)[name] = layer
    with pytest.raises(
        UserError, match=r"no tensor in the files of the base holds model\.layers\.7\.mlp.* alone; serve"
    ):
        _ = merger(base_folder, adapted, placement).parts


def test_another_kind_of_adapter_is_refused(base_folder: Path) -> None:
    from peft import LoHaConfig

    base, _ = load(base_folder, "quantization=fp32")
    model = get_peft_model(base, LoHaConfig(target_modules=["k_proj"]))
    with pytest.raises(UserError, match=r"adapter: task=merge adds LoRA to a base, but this is PEFT's .*LOHA; serve"):
        split_adapter(model)
