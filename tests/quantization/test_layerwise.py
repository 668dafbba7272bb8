"""Methods that quantize layer by layer: gradients, plans, resuming, merging, and what they refuse."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora.adapters.create import add_lora
from qlora.config.compose import compose
from qlora.doctor.findings import Status
from qlora.doctor.gpu_libraries import check_quantizer
from qlora.errors import ConfigError, ResourceError
from qlora.models import loading
from qlora.models.model_config import load_model_config
from qlora.planning.training_plan import build_plan
from qlora.quantization import layerwise
from qlora.quantization.layerwise import LayerwiseMethod
from qlora.quantization.method import find_method, method_of
from qlora.quantization.placement import find_placement
from qlora.run import Run
from qlora.runtime.device import find_device
from tests.models.bases import load, write

CHOICES = ["hqq4", "torchao-int8"]
WIDTHS = [*CHOICES, "hqq3", "hqq2"]
EXACT = "quantization.compute_dtype=fp32"
QUICK = [
    *("lora.r=4", "recipe=none", "trainer.eval_steps=null", "data.max_train_samples=32", "data.max_eval_samples=4"),
    *("evaluation=loss", "task.predict=false", "trainer.per_device_train_batch_size=2", "device=cpu"),
    *("trainer.gradient_accumulation_steps=1", "trainer.optim=adamw_torch", "trainer.save_steps=2"),
]


def choice(name: str) -> str:
    """The override, where the package is installed."""
    method = find_method(compose([f"quantization={name}"]).quantization)
    assert isinstance(method, LayerwiseMethod)
    if importlib.util.find_spec(method.package) is None:
        pytest.skip(f"{method.package} is not installed")
    return f"quantization={name}"


def base(*overrides: str) -> Any:
    config = compose(["device=cpu", *overrides])
    placement = find_placement(config.quantization, find_device(config.device))
    model_config = load_model_config(config.model)
    return loading.load_base(config.model, config.quantization, placement=placement, model_config=model_config)


def gradients(model: Any, config: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    adapted = add_lora(config.lora, model, tensors=lambda: pytest.fail("not read"), new_token_ids=[], batches=[])
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.01, 0.01, parameter.numel()).view_as(parameter))
    adapted.train()
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_gradients_of_an_adapter_are_those_on_the_dequantized_base(name: str):
    quantized, full = base(choice(name), EXACT), base("quantization=fp32")
    method = method_of(quantized)
    replaced = 0
    with torch.no_grad():
        for path, layer in quantized.named_modules():
            if isinstance(layer, method.layer_classes()):
                weight, original = method.dequantize(layer), full.get_submodule(path).weight
                assert 0 < (weight - original).norm() / original.norm() < 0.6
                original.copy_(weight)
                replaced += 1
    assert replaced == 28
    config = compose(["lora.r=4", "lora.dropout=0"])
    one, other = gradients(quantized, config), gradients(full, config)
    assert one.keys() == other.keys()
    for key, gradient in other.items():
        assert torch.allclose(one[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), key


@pytest.mark.parametrize("name", WIDTHS)
def test_it_is_quantized_layer_by_layer_and_the_plan_counts_its_bytes(name: str, monkeypatch: pytest.MonkeyPatch):
    full, config = [0], compose([choice(name), EXACT]).quantization
    method = find_method(config)
    quantize = type(method).quantize_layer

    def watched(self: Any, layer: nn.Linear, *args: Any, **options: Any) -> nn.Module:
        full.append(layer.weight.numel() * 4)
        return quantize(self, layer, *args, **options)

    monkeypatch.setattr(type(method), "quantize_layer", watched)
    model = base(choice(name), EXACT)
    assert len(full) == 29
    layers = [layer for layer in model.modules() if isinstance(layer, method.layer_classes())]
    kept = planned = 0
    for layer in layers:
        weight = next(parameter for key, parameter in layer.named_parameters() if key != "bias")
        parts = [getattr(weight, "qdata", weight), *(method.scales(weight) or [])]
        kept += sum(part.numel() * part.element_size() for part in parts)
        planned += method.stored_base(config).matrix_bytes(layer.out_features, layer.in_features)
        assert method.count(weight)[0] == layer.out_features * layer.in_features
    assert kept == planned


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_resumes_to_the_bit_and_its_adapter_merges(name: str, tmp_path: Path):
    overrides = [*QUICK, choice(name)]
    Run(compose([*overrides, "trainer.max_steps=4"]), tmp_path / "whole").execute()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for made_later in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "parts" / made_later)
    (tmp_path / "parts" / "result.json").unlink()
    Run(compose([*overrides, "trainer.max_steps=4"]), tmp_path / "parts").execute()
    one, other = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    merge = ["task=merge", f"adapter={tmp_path / 'whole' / 'adapter'}", "merge.dtype=fp32"]
    merged = Run(compose([*overrides, *merge]), tmp_path / "merged").execute()
    assert merged["metrics"]["merge_kl_mean"] < 1e-5
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert find_method(compose(overrides).quantization).describe_precision(compose(overrides).quantization) in card


def test_the_code_of_a_card_quantizes_as_the_run_did():
    config, loaded, model = compose([choice("hqq4")]), base(choice("hqq4"), EXACT), base("quantization=fp32")
    method = find_method(config.quantization)
    code = [*method.library_imports, *method.quantizing_code(config.quantization, "torch.float32")]
    exec("\n".join(code), {"torch": torch, "model": model})
    layers = [name for name, layer in loaded.named_modules() if isinstance(layer, method.layer_classes())]
    assert len(layers) == 28
    for name in layers:
        one, other = (method.dequantize(part.get_submodule(name)) for part in (loaded, model))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CHOICES)
def test_a_random_base_is_quantized_while_it_is_initialised(name: str):
    from qlora.models.model_config import build_model_config
    from qlora.models.random_weights import RandomWeights
    from qlora.models.tokenizer import load_tokenizer

    config = compose([choice(name), EXACT, "model.weights=random", "device=cpu"])
    placement = find_placement(config.quantization, find_device(config.device))
    weights = RandomWeights(build_model_config(config.model, load_tokenizer(config.model)), placement=placement, seed=3)
    model = loading.build_random_base(config.model, config.quantization, weights)
    method = method_of(model)
    layer = model.model.layers[0].mlp.up_proj
    saved = weights.read("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(method.dequantize(layer), method.rounding(layer)(saved))


@pytest.mark.parametrize("name", CHOICES)
def test_weights_that_are_not_finite_are_found(name: str, tmp_path: Path):
    from qlora.errors import DataError
    from tests.models.bases import change

    folder = write("llama", tmp_path / "base")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
        return tensors

    change(folder, spoil)
    with pytest.raises(DataError, match=r"hold NaN or infinite numbers|holds NaN or infinite numbers"):
        load(folder, choice(name))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora=dora"], r"lora\.use_dora=true computes with the base weights.*use lora=all-linear"),
        (["lora.init=pissa"], r"lora\.init=pissa computes with the base weights.*use lora=all-linear"),
        (["lora=none"], r"lora=none trains all weights, which .* does not allow; choose quantization=none"),
        (["quantization.double_quant=true"], r"double_quant=true needs quantization\.bits=4 of bitsandbytes, got"),
        (["quantization.compute=fp8"], r"compute=fp8 is for 4-bit weights of bitsandbytes, got .*quantization=nf4"),
        (["quantization.quant_type=fp4"], r"quant_type=fp4 is read by quantization\.method=bnb4"),
        (["quantization.int8_threshold=5"], r"int8_threshold=5 is read by quantization\.method=bnb8"),
        (["quantization.bits=16"], r"method=\w+ needs quantization\.bits="),
    ],
)
def test_what_its_weights_do_not_allow_is_refused(name: str, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose([f"quantization={name}", *overrides])


@pytest.mark.parametrize("name", CHOICES)
def test_a_missing_package_is_named_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layerwise, "find_spec", lambda package: None)
    with pytest.raises(ResourceError, match=r"needs the package \w+, .*pip install 'qlora\[\w+\]'.*quantization=nf4"):
        compose([f"quantization={name}", "task=train"])


def test_bits_of_no_default_method_name_the_one_that_has_them():
    with pytest.raises(ConfigError, match=r"bits=3 needs quantization\.method=hqq; or choose bits=4, 8, 16 or 32"):
        compose(["quantization.bits=3", "quantization.double_quant=false"])


def test_doctor_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layerwise, "find_spec", lambda package: None)
    [finding] = check_quantizer(compose(["quantization=hqq4", "task=doctor"]))
    assert (finding.name, finding.status, finding.fix) == ("hqq", Status.error, "pip install 'qlora[hqq]'")
    assert list(check_quantizer(compose(["task=doctor"]))) == []


def test_the_plan_counts_another_method_s_bits():
    sizes = {}
    for name in ("nf4", "nf4-plain", "hqq4", "hqq3", "hqq2", "torchao-int8", "none"):
        plan = build_plan(compose([f"quantization={name}", "plan.device=a6000", "model=llama-3.1-8b"]))
        sizes[name] = plan.memory.parts["weights"]
    bits = {name: 16 * size / sizes["none"] for name, size in sizes.items()}
    expected = {"nf4": 4.127, "nf4-plain": 4.5, "hqq4": 4.5, "hqq3": 3.7, "hqq2": 2.5, "torchao-int8": 8.01, "none": 16}
    assert bits == pytest.approx(expected, rel=1e-3)
