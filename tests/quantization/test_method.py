"""Quantization methods: the three of the package, and one that another package adds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.errors import ConfigError
from qlora.quantization.bnb4.method import Bnb4
from qlora.quantization.bnb8.method import Bnb8
from qlora.quantization.method import find_method
from qlora.quantization.none import Unquantized

LAYER = """
import torch
from torch import nn


class AbsmaxLinear(nn.Linear):
    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        scale = layer.weight.float().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)
"""
METHOD = """
from qlora.quantization.method import QuantizationMethod
from qlora.quantization.stored_base import StoredBase


class Absmax8(QuantizationMethod):
    name = "absmax8"

    def stored_base(self, config):
        return StoredBase(lambda rows, columns: rows * columns + 4 * rows, weight_bytes=1, unquantized_bytes=2)

    def layer_classes(self):
        from absmax.layer import AbsmaxLinear
        return (AbsmaxLinear,)

    def convert(self, model, config, placement):
        from absmax.layer import AbsmaxLinear
        for name, layer in list(model.named_modules()):
            if name.endswith("_proj"):
                model.set_submodule(name, AbsmaxLinear(layer))
"""
NAMED = ["quantization=int8", "quantization.method=absmax.method:Absmax8", "trusted=[absmax]"]
INSTALLED = ["quantization=int8", "quantization.method=absmax8"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of an installed package that adds a method as an entry point."""
    folder = tmp_path / "site" / "absmax"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "layer.py").write_text(LAYER)
    (folder / "method.py").write_text(METHOD)
    metadata = tmp_path / "site" / "absmax-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: absmax\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[qlora.quantization]\nabsmax8 = absmax.method:Absmax8\n")
    return tmp_path / "site"


def run(package: Path, folder: Path, *overrides: str, check: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; from qlora.cli import main\nmain()\n{check}"
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": f"{package}:{root}"}
    command = [sys.executable, "-c", code, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)


def test_bits_choose_the_method() -> None:
    kinds = {"nf4": Bnb4, "fp4": Bnb4, "int8": Bnb8, "none": Unquantized, "fp32": Unquantized}
    for name, kind in kinds.items():
        assert type(find_method(compose([f"quantization={name}"]).quantization)) is kind


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quantization.method=bnb44"],
            r"method=bnb44 is unknown .did you mean bnb4.*; choose one of auto, bnb4, bnb8",
        ),
        (["quantization.method=none"], r"method=none needs quantization\.bits=16 or 32, got bits=4"),
        (["quantization.method=absmax.method:Absmax8"], r"package 'absmax' would run, which is not trusted"),
        (
            ["quantization.method=no_such_module:X", "trusted=[no_such_module]"],
            r"method=no_such_module:X: there is no module no_such_module; it must",
        ),
        (["quantization.method=json:X", "trusted=[json]"], r"method=json:X: module json has no class X"),
        (["quantization.method=json:dumps", "trusted=[json]"], r"json:dumps is not a class"),
    ],
)
def test_a_method_that_is_not_available_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_a_method_whose_module_imports_a_name_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stale_method.py").write_text("from json import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"stale_method cannot be imported .*no_such_name.*; correct the import"):
        compose(["quantization.method=stale_method:X", "trusted=[stale_method]"])


@pytest.mark.full
def test_a_plan_counts_the_bytes_of_an_installed_method_without_torch(package: Path, tmp_path: Path) -> None:
    check = "assert 'torch' not in sys.modules and 'absmax.layer' not in sys.modules"
    done = run(package, tmp_path / "plan", *INSTALLED, "task=plan", "plan.device=a6000", check=check)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "plan" / "plan.json").read_text())
    model = result["model"]
    rows = 2 * model["hidden"] + 2 * model["key_value_heads"] * model["head_dim"] + 2 * model["intermediate"]
    rows += model["hidden"]
    weights = model["layers"] * (
        model["hidden"] * (2 * model["hidden"] + 2 * model["key_value_heads"] * model["head_dim"])
        + 3 * model["hidden"] * model["intermediate"]
    )
    assert result["parts_gb"]["weights"] == pytest.approx((weights + 4 * model["layers"] * rows) / 1e9)
    assert result["setup"]["step"] == "plain"


@pytest.mark.full
def test_a_run_trains_an_adapter_on_a_base_of_another_package_s_method(package: Path, tmp_path: Path) -> None:
    few = ["trainer.max_steps=2", "evaluation=loss", "device=cpu"]
    done = run(package, tmp_path / "run", *NAMED, *few)
    assert done.returncode == 0, done.stderr
    lines = dict(
        line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ") and line.split()[1:]
    )
    assert lines["base"].strip() == "absmax8"
    assert "M in int8" in lines["weights"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_training_that_needs_the_weights_in_full_is_refused_for_another_package_s_method(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    with pytest.raises(ConfigError, match=r"lora.init=loftq computes with the base weights.*method=absmax8 does not"):
        compose([*NAMED, "lora=loftq"])
