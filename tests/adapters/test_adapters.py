"""Adapters: what they target, count, save, and that quantized layers keep their gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import adapters
from qlora.adapters.targets import find_target_modules
from qlora.config.compose import compose
from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.models import loading
from qlora.models.decoder import linear_modules
from qlora.models.model_config import load_model_config
from qlora.models.weight_files import Checkpoint
from qlora.quantization.placement import find_placement
from qlora.runtime.device import find_device
from tests.models import bases


def load(folder: Path, *overrides: str) -> tuple[Config, torch.nn.Module]:
    config = compose(
        [f"model.name={folder}", "model.tokenizer=tiny", "recipe=none", "lora.r=4", "lora.dropout=0", *overrides]
    )
    placement = find_placement(config.quantization, find_device(config.device))
    model_config = load_model_config(config.model)
    return config, loading.load_base(config.model, config.quantization, placement=placement, model_config=model_config)


def attach(config: Config, base: torch.nn.Module, folder: Path) -> PeftModel:
    torch.manual_seed(1)
    ids = torch.arange(3, 67).reshape(2, 32)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 4
    return adapters.add_lora(config.lora, base, tensors=lambda: Checkpoint(folder), new_token_ids=[], batches=batches)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 35)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


@pytest.mark.matrix(2)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none", "fp32"])
def test_an_evaluation_before_training_leaves_the_gradients_unchanged(base_folder: Path, quantization: str) -> None:
    config, base = load(base_folder, f"quantization={quantization}")
    model = attach(config, base, base_folder)
    for name, parameter in model.named_parameters():  # B is drawn too, so that A has a gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    fresh = gradients(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 35)[None])
    again = gradients(model)
    assert torch.nn.functional.cosine_similarity(fresh, again, dim=0) > 0.9999
    assert fresh.norm() > 0


def test_no_4bit_layer_may_repack_its_weights_for_avx512(base_folder: Path) -> None:
    _, base = load(base_folder, "quantization=nf4")
    layers = [module for module in base.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in layers)


def test_all_linear_leaves_out_the_output_layer(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=nf4")
    model = attach(config, base, base_folder)
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and "lora_" not in name}
    assert len(wrapped) == 14
    assert not any("lm_head" in name for name in wrapped)


def test_target_modules_take_names_and_patterns(base_folder: Path) -> None:
    _, base = load(base_folder, "quantization=fp32")
    assert find_target_modules(["q_proj", "v_proj"], base) == ["q_proj", "v_proj"]
    assert find_target_modules([r"model\.layers\.1\..*_proj"], base) == sorted(
        name for name in linear_modules(base) if ".1." in name
    )


def test_unmatched_target_modules_stop_the_run_and_list_what_exists(base_folder: Path) -> None:
    _, base = load(base_folder, "quantization=fp32")
    with pytest.raises(
        UserError, match=r"\['q_prj'\] match no linear layer .did you mean q_proj\?.; the model has"
    ) as e:
        find_target_modules(["q_prj", "v_proj"], base)
    assert "'gate_proj'" in str(e.value)
    with pytest.raises(UserError, match=r"^lora.target_modules: lm_head is the output layer, which cannot be a target"):
        find_target_modules(["q_proj", "lm_head"], base)


def test_a_4bit_weight_counts_as_the_parameters_it_stands_for(base_folder: Path) -> None:
    _, full = load(base_folder, "quantization=fp32")
    config, base = load(base_folder, "quantization=nf4")
    assert adapters.count_parameters(base).total == adapters.count_parameters(full).total
    count = adapters.count_parameters(attach(config, base, base_folder))
    assert count.by_dtype["nf4"] == 14 * 0 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert count.trainable == 2 * (4 * 4 * (64 + 64) + 3 * 4 * (64 + 128))


@pytest.mark.matrix(2)
@pytest.mark.parametrize("lora", ["all-linear", "dora", "rslora", "loftq", "eva"])
def test_adapter_weights_are_float32_whatever_the_base_computes_in(base_folder: Path, lora: str) -> None:
    config, base = load(base_folder, "quantization.compute_dtype=bf16", f"lora={lora}")
    model = attach(config, base, base_folder)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("lora", ["all-linear", "dora"])
def test_adapter_weights_are_stored_in_16_bits_if_asked_for(base_folder: Path, lora: str) -> None:
    config, base = load(base_folder, f"lora={lora}", "lora.dtype=bf16")
    model = attach(config, base, base_folder)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("lora", "quantization"),
    [
        ("dora", "nf4"), ("dora", "fp32"), ("rslora", "nf4"), ("pissa", "fp32"), ("olora", "fp32"), ("loftq", "nf4"),
        ("loftq", "fp4"), ("eva", "nf4"), ("eva", "fp32"), ("attention", "int8"),
    ],
)  # fmt: skip
def test_a_trained_adapter_answers_the_same_on_the_unchanged_base(
    base_folder: Path, tmp_path: Path, lora: str, quantization: str
) -> None:
    config, base = load(base_folder, f"quantization={quantization}", f"lora={lora}")
    model = attach(config, base, base_folder)
    initial = None
    if config.lora.init in adapters.REWRITES_BASE:
        adapters.save_initial_adapter(model, initial := tmp_path / "initial")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        gradients(model)
        optimizer.step()
    tokenizer = loading_tokenizer()
    adapters.save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer, initial=initial)
    model.eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        _, fresh = load(base_folder, f"quantization={quantization}")
        untuned = fresh(input_ids=ids).logits
        logits = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(input_ids=ids).logits
    assert (untuned - expected).abs().max() > 0.05
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


def test_loftq_starts_nearer_to_the_original_weights(base_folder: Path) -> None:
    ids = torch.arange(3, 35)[None]
    _, full = load(base_folder, "quantization=fp32")
    config, base = load(base_folder, "quantization=nf4", "lora=loftq", "lora.r=32", "lora.alpha=16")
    with torch.no_grad():
        expected = full(input_ids=ids).logits
        quantized = (base(input_ids=ids).logits - expected).norm()
        corrected = (attach(config, base, base_folder).eval()(input_ids=ids).logits - expected).norm()
    assert corrected < 0.7 * quantized


@pytest.mark.full
def test_loftq_of_a_rank_above_the_sides_of_a_matrix_corrects_it_exactly_and_trains(base_folder: Path) -> None:
    ids = torch.arange(3, 35)[None]
    _, full = load(base_folder, "quantization=fp32")
    config, base = load(
        base_folder, "quantization=nf4", "quantization.compute_dtype=fp32", "lora=loftq", "lora.r=300", "lora.alpha=150"
    )
    model = attach(config, base, base_folder)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert any(min(layer.in_features, layer.out_features) < 300 for layer in layers)
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, full(input_ids=ids).logits, atol=1e-3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.abs().sum(0).gt(0).all() for layer in layers)


@pytest.mark.full
def test_eva_on_more_directions_than_features_names_the_largest_rank_which_works(base_folder: Path) -> None:
    def start(rank: int) -> PeftModel:
        config, base = load(base_folder, "quantization=fp32", "lora=eva", f"lora.r={rank}")
        return attach(config, base, base_folder)

    with pytest.raises(UserError) as error:
        start(500)
    message = str(error.value)
    assert message.startswith("lora.r=500: lora.init=eva looks for 1000 directions in what a layer reads, and model.")
    assert message.endswith(" or less, or use lora=all-linear lora.init=default")
    max_rank = int(message.partition("set lora.r=")[2].partition(" ")[0])
    with pytest.raises(UserError, match=f"set lora.r={max_rank} or less"):
        start(max_rank + 1)


@pytest.mark.full
def test_eva_on_layers_that_peft_cannot_read_gives_a_hint_that_works(tmp_path: Path) -> None:
    folder = bases.write("deepseek_v3", tmp_path / "base")
    config, base = load(folder, "quantization=fp32", "lora=eva")
    with pytest.raises(UserError) as error:
        attach(config, base, folder)
    message = str(error.value)
    assert message.startswith("lora.init=eva: PEFT cannot start from what some layers of this deepseek_v3 read (")
    assert message.endswith("); use lora=all-linear lora.init=default")
    config, base = load(folder, "quantization=fp32", "lora=all-linear", "lora.init=default")
    assert attach(config, base, folder) is not None


def loading_tokenizer():  # type: ignore[no-untyped-def]
    from qlora.models.tokenizer import load_tokenizer

    return load_tokenizer(compose([]).model)


def test_an_untrained_adapter_is_not_taken_for_a_trained_one(base_folder: Path, tmp_path: Path) -> None:
    config, base = load(base_folder, "quantization=nf4")
    with pytest.raises(UserError, match=r"are zero: nothing was trained; raise trainer\.learning_rate"):
        adapters.save_adapter(attach(config, base, base_folder), tmp_path / "adapter", tokenizer=loading_tokenizer())
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def saved(base_folder: Path, tmp_path: Path) -> tuple[PeftModel, Path]:
    """A changed adapter of rank 4 in memory and its folder."""
    config, base = load(base_folder, "quantization=fp32")
    model = attach(config, base, base_folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    adapters.save_adapter(model, tmp_path / "adapter", tokenizer=loading_tokenizer())
    return model, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("shape", "difference"),
    [
        (
            {"hidden_size": 32},
            "its base_model.model.model.layers.0.mlp.down_proj.lora_B.weight is 64 x 4, and this base needs 32 x 4",
        ),
        (
            {"num_hidden_layers": 1},
            "its base_model.model.model.layers.1.mlp.down_proj.lora_A.weight belongs to a layer that this base does "
            "not have",
        ),
    ],
    ids=["narrower", "fewer layers"],
)
def test_an_adapter_of_another_base_is_refused_with_its_own_base_and_the_first_difference(
    base_folder: Path, saved: tuple[PeftModel, Path], shape: dict[str, int], difference: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2} | shape
    other = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    with pytest.raises(UserError) as error:
        adapters.load_adapter(other, saved[1], "other")
    assert str(error.value) == (
        f"adapter={saved[1]} does not fit model.name=other: it was trained on {base_folder}; give that base as "
        f"model.name ({difference})"
    )


def test_an_adapter_of_a_smaller_model_lacks_what_this_base_has(base_folder: Path, tmp_path: Path) -> None:
    config, base = load(base_folder, "quantization=fp32", "lora.target_modules=[q_proj]")
    attach(config, base, base_folder).save_pretrained(tmp_path)
    larger = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, vocab_size=100,
    ))  # fmt: skip
    with pytest.raises(UserError) as error:
        adapters.load_adapter(larger, tmp_path, "larger")
    assert str(error.value) == (
        f"adapter={tmp_path} is incomplete: 2 of the 6 tensors that its adapter_config.json means on this base are "
        "missing, first base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight; copy the adapter again, or "
        f"give the base it was trained on ({base_folder}) as model.name"
    )


@pytest.mark.full
def test_an_adapter_that_lost_a_layer_is_refused(base_folder: Path, saved: tuple[PeftModel, Path]) -> None:
    weights = load_file(saved[1] / "adapter_model.safetensors")
    gone = [name for name in weights if "layers.1.mlp.up_proj" in name]
    save_file(
        {name: value for name, value in weights.items() if name not in gone}, saved[1] / "adapter_model.safetensors"
    )
    _, fresh = load(base_folder, "quantization=fp32")
    with pytest.raises(
        UserError, match=r"is incomplete: 2 of the 28 tensors .* first base_model.*up_proj.lora_A.weight; "
    ):
        adapters.load_adapter(fresh, saved[1], "base")


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"peft_type": "LO',
            "adapter_config.json is damaged (not JSON: Unterminated string starting at: line 1 column 15",
        ),
        ("{}", "adapter_config.json is damaged (peft_type is missing); copy the adapter again"),
        ("[]", "adapter_config.json is damaged (it must be an object, got []); copy the adapter again"),
    ],
)
def test_a_broken_adapter_config_is_one_sentence(saved: tuple[PeftModel, Path], text: str, sentence: str) -> None:
    (saved[1] / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        adapters.check_adapter_folder(saved[1])
    assert str(error.value).startswith(f"adapter={saved[1]}: {sentence}")
    assert "\n" not in str(error.value)


def test_adapter_weights_that_were_cut_off_are_one_sentence(saved: tuple[PeftModel, Path]) -> None:
    weights = saved[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"^adapter: .*adapter_model.safetensors is damaged or incomplete .* copy it again$"
    ):
        adapters.check_adapter_folder(saved[1])


def test_a_saved_adapter_is_compared_with_the_one_in_memory(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    adapters.verify_adapter(folder, model)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    path = folder / "adapter_model.safetensors"
    weights, whole = load_file(path), path.read_bytes()
    changed = weights | {name: weights[name].clone()}
    changed[name][0, 0] += 1e-6
    save_file(changed, path)
    with pytest.raises(
        UserError, match=rf"adapter was not saved as it is in memory \({name} has other values\); check"
    ):
        adapters.verify_adapter(folder, model)
    save_file({key: value for key, value in weights.items() if key != name}, path)
    with pytest.raises(UserError, match=rf"\({name} is missing\)"):
        adapters.verify_adapter(folder, model)
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="check the disk, and run the same command again to resume"):
        adapters.verify_adapter(folder, model)
    adapters.verify_adapter(folder, model.get_base_model())


def test_numbers_that_are_none_are_saved_as_they_are(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    parameter = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    parameter.data.fill_(torch.nan)
    model.save_pretrained(folder)
    adapters.verify_adapter(folder, model)


def test_the_weight_error_of_nf4_is_a_quarter_below_that_of_fp4(base_folder: Path) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(512, 512)

    def error(kind: str, double: bool) -> float:
        packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        return float((bnb.dequantize_4bit(packed, state) - weight).norm() / weight.norm())

    assert error("nf4", False) < 0.78 * error("fp4", False)
    assert error("nf4", True) < 1.001 * error("nf4", False)


def test_frozen_base_weights_do_not_move(base_folder: Path) -> None:
    config, base = load(base_folder, "quantization=none")
    state = copy.deepcopy(base.state_dict())
    model = attach(config, base, base_folder)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    gradients(model)
    optimizer.step()
    after = model.get_base_model().state_dict()
    assert all(
        torch.equal(value, after.get(key, after.get(key.replace(".weight", ".base_layer.weight"))))
        for key, value in state.items()
    )
