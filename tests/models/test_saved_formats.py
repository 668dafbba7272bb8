"""Bases that others have quantized are decoded tensor by tensor while they load, and trained like 16-bit ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.models.decoded_files import DecodedWeights
from qlora.models.weight_files import Checkpoint
from qlora.quantization.method import find_method, method_of
from qlora.quantization.packed_layer import PackedLinear
from qlora.quantization.saved_formats import AWQ_ORDER, FORMATS, Codes
from qlora.run import Run
from tests.models.bases import change, load, write
from tests.quantization.test_layerwise import gradients

Packed = dict[str, Tensor]
Packer = Callable[[str, Tensor], tuple[Packed, Tensor]]
"""Returns the tensors that a weight is saved as, and the weight that they stand for."""


def fp8(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
    """In blocks of 48 by 32, of which the last rows are cut."""
    codes = (weight * 100).to(torch.float8_e4m3fn)
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 48), columns // 32) / 100
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * torch.kron(scale, torch.ones(48, 32))[:rows]


def fp8_exponents(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
    """One row of 32 to a scale, whose byte is an exponent."""
    codes = (weight * 100).to(torch.float8_e4m3fn)
    scale = torch.randint(118, 122, (len(weight), weight.shape[1] // 32), dtype=torch.uint8)
    per_weight = 2.0 ** (scale.float() - 127)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * per_weight.repeat_interleave(32, 1)


def pack(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Packs the columns of codes as AutoGPTQ and AutoAWQ do: one after another into 32 bits, from the lowest."""
    count = 32 // bits
    packed = torch.zeros(len(codes), codes.shape[1] // count, dtype=torch.int64)
    for word in range(packed.shape[1]):
        for index in range(count):
            column = word * count + (order[index] if order else index)
            packed[:, word] |= codes[:, column].long() << (bits * index)
    return packed.to(torch.uint32).view(torch.int32)


def gptq(bits: int, form: str, *, ordered: bool) -> Packer:
    def save(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
        rows, columns, stem = *weight.shape, name.removesuffix("weight")
        codes, groups = torch.randint(0, 2**bits, (columns, rows)), columns // 32
        zeros, scales = torch.randint(1, 2**bits, (groups, rows)), torch.rand(groups, rows).half() / 100
        index = torch.arange(columns) // 32
        index = index[torch.randperm(columns)] if ordered else index
        full = ((codes - zeros[index]).float() * scales.float()[index]).T
        tensors = {"qweight": pack(codes.T, bits).T.contiguous(), "scales": scales, "g_idx": index.int(),
                   "qzeros": pack(zeros - int(form == "gptq"), bits)}  # fmt: skip
        return {stem + part: tensor for part, tensor in tensors.items()}, full

    return save


def awq(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
    rows, columns, stem = *weight.shape, name.removesuffix("weight")
    codes, groups = torch.randint(0, 16, (columns, rows)), columns // 32
    zeros, scales = torch.randint(0, 16, (groups, rows)), torch.rand(groups, rows).half() / 100
    full = ((codes - zeros.repeat_interleave(32, 0)).float() * scales.float().repeat_interleave(32, 0)).T
    tensors = {"qweight": pack(codes, 4, AWQ_ORDER), "scales": scales, "qzeros": pack(zeros, 4, AWQ_ORDER)}
    return {stem + part: tensor for part, tensor in tensors.items()}, full


def compressed(form: str, **settings: object) -> Packer:
    """As the package compressed-tensors itself writes and reads a weight."""

    def save(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
        compressors = pytest.importorskip("compressed_tensors.compressors.base")
        quantization = pytest.importorskip("compressed_tensors.quantization")
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**settings))
        args, (rows, columns) = scheme.weights, weight.shape
        groups = columns // args.group_size if args.group_size else 1
        shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, groups)}.get(args.strategy, (2, 2))
        amax = 448.0 if args.type == "float" else 2.0 ** (args.num_bits - 1)
        scale = (0.5 + torch.rand(shape)) * weight.abs().max() / amax
        zero = torch.zeros(shape, dtype=torch.int8)
        if not args.symmetric:
            zero = torch.randint(-3, 4, shape).to(torch.int8)
        compressor = compressors.BaseCompressor.get_value_from_registry(form)
        parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        saved = compressor.compress(parts, scheme)
        full = compressor.decompress(saved, scheme)["weight"]
        return {name.removesuffix("weight") + part: tensor for part, tensor in saved.items()}, full

    return save


def hqq(bits: int, axis: int) -> Packer:
    """As the package hqq itself writes and reads a layer."""

    def save(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
        quantize = pytest.importorskip("hqq.core.quantize")
        settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
        layer = quantize.HQQLinear.from_weights(weight, None, settings, compute_dtype=torch.float32, device="cpu")
        return {name.removesuffix("weight") + part: tensor for part, tensor in layer.state_dict().items()}, (
            layer.dequantize()
        )

    return save


def torchao(name: str, weight: Tensor) -> tuple[Packed, Tensor]:
    """As the package torchao itself quantizes a weight, and transformers names its parts."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = weight
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    parts = {part: getattr(layer.weight, part) for part in ("qdata", "scale", "zero_point")}
    return {f"{name.removesuffix('weight')}_weight_{part}": tensor for part, tensor in parts.items()}, (
        layer.weight.dequantize()
    )


INT8 = {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 2}}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}
CASES: dict[str, tuple[dict[str, object], Packer]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 32]}, fp8),
    "fp8-exponents": ({"quant_method": "fp8", "weight_block_size": [1, 32]}, fp8_exponents),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq(4, "gptq", ordered=False)),
    "gptq-ordered": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
                     gptq(4, "gptq", ordered=True)),
    "gptq-v2-8": ({"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
                  gptq(8, "gptq_v2", ordered=False)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "packed": ({"format": "pack-quantized"}, compressed("pack-quantized", **GROUPS, symmetric=True)),
    "packed-zeros": ({"format": "pack-quantized"}, compressed("pack-quantized", **GROUPS, symmetric=False)),
    "packed-8": ({"format": "pack-quantized"},
                 compressed("pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)),
    "float": ({"format": "float-quantized"}, compressed("float-quantized", **FLOATS, strategy="channel")),
    "float-tensor": ({"format": "float-quantized"}, compressed("float-quantized", **FLOATS, strategy="tensor")),
    "int": ({"format": "int-quantized"},
            compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True)),
    "hqq": ({"quant_method": "hqq"}, hqq(4, 1)),
    "hqq-3": ({"quant_method": "hqq"}, hqq(3, 1)),
    "hqq-2-columns": ({"quant_method": "hqq"}, hqq(2, 0)),
    "torchao": ({"quant_method": "torchao", "quant_type": INT8}, torchao),
}  # fmt: skip


def save(case: str, folder: Path) -> tuple[Path, Path]:
    """Writes a base as the format has it, and its twin with the weights that this stands for, in float32."""
    settings, packer = CASES[case]
    saved = write("llama", folder / "saved")
    torch.manual_seed(5)
    packed: Packed = {}
    full: Packed = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, full[name] = packer(name, tensor)
            packed |= {key: part.contiguous() for key, part in parts.items()}
        else:
            packed[name] = full[name] = tensor
    twin = folder / "twin"
    shutil.copytree(saved, twin)
    full = {name: tensor.contiguous() for name, tensor in full.items()}
    save_file(packed, saved / "model.safetensors", metadata={"format": "pt"})
    save_file(full, twin / "model.safetensors", metadata={"format": "pt"})
    return change(saved, quantization_config={"quant_method": "compressed-tensors", **settings}), twin


@pytest.mark.parametrize("case", CASES)
def test_a_base_loads_to_the_numbers_that_its_files_stand_for(case: str, tmp_path: Path):
    saved, twin = save(case, tmp_path)
    tensors, expected = (load(folder, "quantization=fp32").state_dict() for folder in (saved, twin))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(tensors[name], tensor, rtol=1e-6, atol=0), name
    settings = json.loads((saved / "config.json").read_text())["quantization_config"]
    view = DecodedWeights(Checkpoint(saved), FORMATS[settings["quant_method"]], settings, "model.name=saved")
    assert set(view) == set(Checkpoint(twin))
    assert all(view.shape(name) == view.read(name).shape == Checkpoint(twin).shape(name) for name in view)


@pytest.mark.parametrize("case", ["fp8", "gptq", "awq", "packed"])
def test_it_is_quantized_anew_to_the_same_4_bits_as_its_twin(case: str, tmp_path: Path):
    saved, twin = (load(folder, "quantization=nf4").state_dict() for folder in save(case, tmp_path))
    assert saved.keys() == twin.keys()
    assert [name for name, tensor in twin.items() if not torch.equal(saved[name], tensor)] == []


@pytest.mark.parametrize("case", ["gptq", "gptq-ordered", "gptq-v2-8", "awq"])
def test_packed_integers_stay_packed_and_compute_as_their_twin(case: str, tmp_path: Path):
    saved, twin = save(case, tmp_path)
    exact = "quantization.compute_dtype=fp32"
    packed, full = load(saved, "quantization=stored", exact), load(twin, "quantization=fp32")
    method = method_of(packed)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 14
    bits = CASES[case][0]["bits"]
    for name, layer in layers.items():
        assert torch.equal(method.dequantize(layer), full.get_submodule(name).weight)
        assert layer.weight.numel() * 8 == layer.in_features * layer.out_features * bits
        assert method.count(layer.weight) == (layer.in_features * layer.out_features, f"int{bits}")
    config = compose(["lora.r=4", "lora.dropout=0"])
    one, other = gradients(packed, config), gradients(full, config)
    assert one.keys() == other.keys()
    for key, gradient in other.items():
        assert torch.allclose(one[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), key


def test_the_plan_counts_the_bytes_of_packed_integers():
    config = compose(["quantization=int8", "quantization.method=packed", "quantization.bits=4"]).quantization
    codes = Codes(4, torch.zeros(256, 64), torch.zeros(2, 64), torch.zeros(2, 64).half(), torch.arange(256) // 128)
    layer = PackedLinear(codes, None, torch.device("cpu"))
    kept = sum(part.numel() * part.element_size() for part in (layer.weight, layer.scales, layer.zeros))
    assert find_method(config).stored_base(config).matrix_bytes(64, 256) == kept


@pytest.mark.parametrize("choice", ["stored", "none"])
def test_an_adapter_on_it_is_trained_and_merged_into_16_bit_files(choice: str, tmp_path: Path):
    saved, twin = save("gptq", tmp_path)
    quick = [
        *("lora.r=4", "recipe=none", "trainer.eval_steps=null", "data.max_train_samples=8", "data.max_eval_samples=4"),
        *("evaluation=loss", "task.predict=false", "trainer.per_device_train_batch_size=2", "model.tokenizer=tiny"),
        *("trainer.gradient_accumulation_steps=1", "trainer.optim=adamw_torch", "trainer.max_steps=4", "device=cpu"),
        *("trainer.save_steps=2", f"model.name={saved}", f"quantization={choice}"),
    ]
    assert compose(quick).quantization.bits == (4 if choice == "stored" else 16)
    Run(compose(quick), tmp_path / "run").execute()
    if choice == "stored":
        shutil.copytree(tmp_path / "run", tmp_path / "parts")
        for made_later in ("adapter", "checkpoints/checkpoint-4"):
            shutil.rmtree(tmp_path / "parts" / made_later)
        (tmp_path / "parts" / "result.json").unlink()
        Run(compose(quick), tmp_path / "parts").execute()
        one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("run", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    adapter = f"adapter={tmp_path / 'run' / 'adapter'}"
    merged = Run(compose([*quick, "task=merge", adapter, "merge.dtype=fp32"]), tmp_path / "merged").execute()
    assert merged["metrics"]["merge_kl_mean"] < 1e-5
    folder = Path(merged["paths"]["merged"])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_file(folder / "model.safetensors").keys() == load_file(twin / "model.safetensors").keys()


def test_a_base_without_integers_is_refused(tmp_path: Path):
    chosen = ("quantization=int8", "quantization.method=packed", "quantization.bits=4")
    with pytest.raises(UserError, match=r"^quantization.method=packed keeps the integers of GPTQ and AWQ, and the "
                       r"files of this base hold 16-bit weights; choose quantization=nf4 or another"):  # fmt: skip
        load(write("llama", tmp_path / "plain"), *chosen)
    with pytest.raises(UserError, match=r"the files of this base hold fp8; choose quantization=nf4"):
        load(save("fp8", tmp_path / "other")[0], *chosen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, r"saved as GPTQ in 3 bits, which is not decoded .*2, 4 and 8 bits are"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"GPTQ in the layout marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"AWQ in 4 bits, version gemv, which is not decoded"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, r"in the format nvfp4-pack-quant"),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": 1}}, r"transform_config \(rotated"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, r"saved as torchao's int4_weight_only"),
        ({"quant_method": "quip"}, r"is quantized by quip"),
    ],
)
def test_what_is_not_decoded_is_refused_before_it_is_read(settings: dict[str, object], message: str, tmp_path: Path):
    folder = change(write("llama", tmp_path / "base"), quantization_config=settings)
    for choice in ("nf4", "none"):
        with pytest.raises(UserError, match=message + r".*16-bit weights"):
            load(folder, f"quantization={choice}")


@pytest.mark.parametrize(("case", "ending"), [("gptq", ".scales"), ("packed", ".weight_scale"), ("fp8", "_scale_inv")])
def test_a_scale_that_is_missing_is_named(case: str, ending: str, tmp_path: Path):
    saved, _ = save(case, tmp_path)
    lost = (
        f"model.layers.1.mlp.down_proj{ending}"
        if ending != "_scale_inv"
        else "model.layers.1.mlp.down_proj.weight_scale_inv"
    )
    change(saved, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj.*scale"):
        load(saved, "quantization=nf4")
