"""A base in MXFP4, as gpt-oss is on the hub, is decoded while it loads, and trained and merged like its 16-bit twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora.config.compose import compose
from qlora.errors import UserError
from qlora.experts.layout import ExpertsLayout, Placeholder, expert_weight, find_experts
from qlora.quantization import mxfp4
from qlora.run import Run
from tests.models.bases import change, load, write

EXACT = "quantization.compute_dtype=fp32"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in MXFP4, and the same in 16 bits as transformers decodes it."""
    folder = tmp_path_factory.mktemp("bases")
    saved, twin = write("gpt_oss", folder / "mxfp4"), write("gpt_oss", folder / "twin")
    generator = torch.Generator().manual_seed(3)
    packed: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = decoded[name] = tensor.to(torch.bfloat16)
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 125, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(packed, saved / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, twin / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return change(saved, quantization_config=settings, dtype="bfloat16"), change(twin, dtype="bfloat16")


def logits(folder: Path, *overrides: str) -> Tensor:
    with torch.no_grad():
        return load(folder, *overrides)(input_ids=torch.arange(5, 25)[None], use_cache=False).logits.float()


def test_decoded_numbers_are_those_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 2, 8, 16)
    scales = torch.tensor([0, 1, 100, 127, 130, 140, 150, 200], dtype=torch.uint8).expand(2, 2, 8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(mxfp4.decode(blocks, scales, torch.float32), expected)
    assert torch.equal(mxfp4.decode(blocks.bfloat16(), scales.bfloat16(), torch.bfloat16).float(), expected)


def test_it_loads_to_the_same_4_bits_as_its_16_bit_twin(folders: tuple[Path, Path]):
    saved, twin = (load(folder, "quantization=nf4") for folder in folders)
    tensors, expected = saved.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert tensors.keys() == expected.keys()
    weights = [name for name in tensors if not isinstance(tensors[name], Placeholder)]
    assert [name for name in weights if not torch.equal(tensors[name], expected[name])] == []
    assert any("experts.quantized" in name for name in tensors)
    assert not hasattr(saved.config, "quantization_config") or saved.config.quantization_config.load_in_4bit


@pytest.mark.parametrize(
    "overrides", [["quantization=none"], ["quantization=fp32"], ["quantization.experts=none", EXACT]]
)
def test_without_4_bit_experts_it_answers_as_its_16_bit_twin(folders: tuple[Path, Path], overrides: list[str]):
    assert torch.equal(logits(folders[0], *overrides), logits(folders[1], *overrides))


def test_no_projection_of_a_layer_is_ever_decoded_whole(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    decoded, decode = [], mxfp4.decode
    monkeypatch.setattr(mxfp4, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    model = load(folders[0], "quantization=nf4")
    layouts = [ExpertsLayout.of(experts) for experts in find_experts(model).values()]
    assert len(decoded) == sum(layout.count * len(layout.units) for layout in layouts)
    assert all(weight.dim() == 2 for weight in decoded)
    experts = next(iter(find_experts(model).values()))
    assert expert_weight(experts, "down_proj", torch.float32).shape[0] == 4


def test_int8_and_other_saved_quantizations_are_refused_in_one_sentence(folders: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"is quantized by mxfp4, which .*quantization=nf4 or quantization=none"):
        load(folders[0], "quantization=int8")
    for method in ("quip", "aqlm", "eetq"):
        other = tmp_path / method
        write("llama", other)
        change(other, quantization_config={"quant_method": method, "bits": 4})
        for overrides in (["quantization=nf4"], ["quantization=none"]):
            with pytest.raises(UserError, match=rf"model\.name=.* is quantized by {method}.*16-bit weights"):
                load(other, *overrides)


def test_scales_that_are_missing_or_do_not_fit_are_named(folders: tuple[Path, Path], tmp_path: Path):
    def without(ending: str, name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in folders[0].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return change(
            target, lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(ending)}
        )

    for ending in ("0.mlp.experts.down_proj_scales", "0.mlp.experts.down_proj_blocks"):
        for quantization in ("nf4", "none"):
            with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.down_proj"):
                load(without(ending, f"{ending[-6:]}{quantization}"), f"quantization={quantization}")


def test_an_adapter_on_it_is_trained_and_merged_into_16_bit_files(folders: tuple[Path, Path], tmp_path: Path):
    quick = [
        *("lora.r=4", "recipe=none", "trainer.eval_steps=null", "data.max_train_samples=8", "data.max_eval_samples=4"),
        *("evaluation=loss", "task.predict=false", "trainer.per_device_train_batch_size=2", "model.tokenizer=tiny"),
        *("trainer.gradient_accumulation_steps=1", "trainer.optim=adamw_torch", "trainer.max_steps=2", "device=cpu"),
        *("trainer.save_steps=null", f"model.name={folders[0]}"),
    ]
    Run(compose(quick), tmp_path / "run").execute()
    adapter = f"adapter={tmp_path / 'run' / 'adapter'}"
    merged = Run(compose([*quick, "task=merge", adapter, "merge.dtype=fp32"]), tmp_path / "merged").execute()
    assert merged["metrics"]["merge_kl_mean"] < 1e-5
    folder = Path(merged["paths"]["merged"])
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(folders[1] / "model.safetensors").items()}
