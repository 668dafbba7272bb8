"""`quantization=stored` takes the quantization from the base's files, while the config is composed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.config.registries.quantization_methods import DECODED, KEPT
from qlora.errors import ConfigError
from qlora.quantization import mxfp4
from qlora.quantization.saved_formats import FORMATS

BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True}  # fmt: skip


def base(folder: Path, settings: Any) -> str:
    config = {"model_type": "llama"} | ({"quantization_config": settings} if settings is not None else {})
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.name={folder}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (BNB4, (4, "fp4", True)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, (4, "nf4", False)),
        ({"load_in_8bit": True, "llm_int8_threshold": 5.0}, (8, "nf4", False)),
        *(({"quant_method": name}, (16, "nf4", False)) for name in DECODED),
    ],
)
def test_the_files_decide(settings: dict[str, Any], expected: tuple[int, str, bool], tmp_path: Path):
    quantization = compose(["quantization=stored", base(tmp_path, settings)]).quantization
    assert (quantization.bits, quantization.quant_type.value, quantization.double_quant) == expected
    assert quantization.method == "auto"
    assert quantization.int8_threshold == settings.get("llm_int8_threshold", 6.0)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_that_are_decoded_stay_packed(name: str, bits: int, tmp_path: Path):
    settings = {"quant_method": name, "bits": bits}
    quantization = compose(["quantization=stored", base(tmp_path, settings)]).quantization
    assert (quantization.method, quantization.bits) == ("packed", bits)
    mixture = {"model_type": "qwen3_moe", "num_experts": 8, "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(mixture))
    quantization = compose(["quantization=stored", f"model.name={tmp_path}"]).quantization
    assert (quantization.method, quantization.bits) == ("auto", 16)


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["lora=dora"], r"lora\.use_dora=true computes with the base weights"),
        (
            {"quant_method": "awq", "bits": 4},
            ["lora=none"],
            r"lora=none trains all weights, which quantization\.method",
        ),
        (None, [], r"are not quantized \(its config\.json has no quantization_config\); choose quantization=nf4"),
        ({"quant_method": "aqlm"}, [], r"is quantized by aqlm, which is not decoded here .*original 16-bit weights"),
        (BNB4, ["quantization.bits=8"], r"quantization\.bits=8 and quantization=stored exclude each other"),
        (BNB4, ["model.weights=random"], r"model\.weights=random has none; choose quantization=nf4"),
        (BNB4, ["lora.init=pissa"], r"lora\.init=pissa rewrites the base weights"),
        ({"quant_method": "gptq", "bits": 4}, ["quantization.double_quant=true"], r"exclude each other"),
    ],
)
def test_what_the_files_do_not_say_is_refused(settings: Any, overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        compose(["quantization=stored", base(tmp_path, settings), *overrides])


def test_a_base_that_is_neither_here_nor_on_the_hub_is_refused():
    with pytest.raises(ConfigError, match=r"config\.json of model\.name=me/gone .* is not available .*download it"):
        compose(["quantization=stored", "model.name=me/gone"])
    with pytest.raises(ConfigError, match=r"files of model\.name=tiny are not quantized"):
        compose(["quantization=stored"])


def test_the_names_that_are_decoded_are_those_of_the_decoders():
    assert set(DECODED) == {*FORMATS, mxfp4.NAME}
