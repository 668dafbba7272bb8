"""`lora.start`: an adapter is trained further, in its own form, on the base that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora.config.compose import compose
from qlora.errors import ConfigError, DataError, ResourceError
from tests.faults.runs import run

SHORT = ["trainer.max_steps=2", "trainer.save_steps=null"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run whose adapter has another rank and other layers than the default's."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, *SHORT, "lora.r=3", "lora.alpha=5")
    return folder


def test_an_adapter_goes_on_from_its_weights_in_its_rank_and_layers(first: Path, tmp_path: Path) -> None:
    overrides = [text for text in SHORT if not text.startswith("lora.")]
    start = first / "adapter"
    run(tmp_path, *overrides, "lora=all-linear", f"lora.start={first}", "trainer.learning_rate=1e-12", "lora.r=3",
        "lora.target_modules=[q_proj,up_proj]")  # fmt: skip
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], sorted(settings["target_modules"])) == (3, 5, ["q_proj", "up_proj"])
    previous, now = (load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "adapter"))
    assert previous.keys() == now.keys()
    assert all((previous[name] - now[name]).abs().max() < 1e-6 for name in previous)
    assert str(start) in json.loads((tmp_path / "manifest.json").read_text())["model"]["start"]
    assert f"trained further from | `{start}`" in (card := (tmp_path / "README.md").read_text()) or str(start) in card
    assert "r=3, alpha=5" in card


def test_another_form_than_the_adapter_has_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.r=8 is not what lora.start=.* was trained with \(lora.r=3\)"):
        run(tmp_path, *SHORT, f"lora.start={first}", "lora.r=8")
    with pytest.raises(ConfigError, match=r"lora.init must be default beside lora.start"):
        compose([f"lora.start={first}", "lora=loftq"])
    with pytest.raises(ConfigError, match=r"lora.start must be unset with lora=none"):
        compose([f"lora.start={first}", "lora=none", "quantization=fp32"])


def test_an_adapter_of_another_base_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lora.start=.* does not fit"):
        run(tmp_path, *SHORT, f"lora.start={first}", "lora.r=3", "model.weights=random", "seed=5")


@pytest.mark.full
def test_what_is_no_adapter_says_what_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder, nor a run in outputs/runs"):
        run(tmp_path / "run", f"lora.start={tmp_path}/missing")
    with pytest.raises(DataError, match=r"holds no adapter; give the folder of an adapter or of a finished run"):
        run(tmp_path / "run", f"lora.start={tmp_path}")
    with pytest.raises(
        ResourceError, match=r"lora.start=nobody/nothing: there is no such folder, and the hub does not give"
    ):
        run(tmp_path / "run", "lora.start=nobody/nothing")
    assert not (tmp_path / "run").exists()


def test_adapter_in_a_training_run_names_the_tasks_and_lora_start() -> None:
    tasks = "task=chat, task=evaluate, task=predict, task=merge, task=export, task=verify, task=push and task=serve"
    with pytest.raises(ConfigError, match=rf"adapter=x is not read by task=train, but by {tasks}; add one of these, "
                                          r"write lora.start=x to train it further, or leave adapter out"):  # fmt: skip
        compose(["adapter=x"])
