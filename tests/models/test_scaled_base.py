"""A base with `model.rope_scaling` is the one of plain transformers with the same rotary positions, and stays it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

from qlora.config.compose import compose
from qlora.errors import ConfigError, UserError
from qlora.models.embedded import EMBEDDED
from qlora.models.model_config import has_rope, scale_rope
from qlora.run import Run
from tests.config.test_rope_scaling import GIVEN, YARN

TINY = str(EMBEDDED["tiny"])
HALF_HEAD = AutoConfig.from_pretrained(TINY).head_dim // 2


def text_of(scaling: dict[str, Any]) -> str:
    return "model.rope_scaling=" + json.dumps(scaling).replace('"', "")


def plain(scaling: dict[str, Any]) -> Any:
    """Returns the embedded model as plain transformers loads it with a scaling."""
    config = AutoConfig.from_pretrained(TINY)
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **scaling}
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", GIVEN)
def test_the_base_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, **GIVEN[kind]}
    if kind == "longrope":
        scaling |= {"short_factor": [1.5] * HALF_HEAD, "long_factor": [3.0] * HALF_HEAD}
    if kind != "linear":
        scaling |= {"original_max_position_embeddings": 128} if "original_max_position_embeddings" in scaling else {}
    run = Run(compose(["quantization=fp32", text_of(scaling)]), tmp_path).session
    ids = torch.arange(3, 603)[None] % 500  # more than the model's 512 positions
    with torch.no_grad():
        ours, theirs = run.load_base()(ids).logits, plain(scaling)(ids).logits
        unscaled = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, unscaled, atol=1e-3)


def test_a_run_keeps_its_scaling_to_the_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    Run(compose([YARN, "quantization=fp32", "data.max_length=700", "trainer.max_steps=2", "evaluation=loss",
                 "trainer.eval_steps=null", "task.predict=false"]),
        folder).execute()  # fmt: skip
    scaling = {"rope_type": "yarn", "factor": 4}
    assert json.loads((folder / "adapter" / "base.json").read_text())["rope_scaling"] == scaling
    card = (folder / "adapter" / "README.md").read_text()
    assert "rope_type yarn, factor 4" in card
    code = card.split("```python\n")[1].split("```")[0].split("prompt =")[0]
    namespace: dict[str, Any] = {}
    monkeypatch.chdir(folder / "adapter")
    exec(code, namespace)
    assert isinstance(model := namespace["model"], PeftModel)
    assert model.config.rope_parameters["rope_type"] == "yarn"

    used = ["task=predict", f"adapter={folder}"]
    session = Run(compose(used), tmp_path / "used").session
    assert session.config.model.rope_scaling == scaling
    ids = torch.arange(3, 603)[None] % 500
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(scaling), folder / "adapter").eval()(ids).logits
        torch.testing.assert_close(session.load_trained().eval()(ids).logits, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"model.rope_scaling=null: it was trained with .*yarn.*; set model.rope_scal"):
        Run(compose([*used, "model.rope_scaling=null"]), tmp_path / "other").session.load_trained()

    Run(compose(["task=merge", f"adapter={folder}"]), tmp_path / "merge").execute()
    merged = next(path.parent for path in tmp_path.rglob("config.json") if "merged" in str(path))
    assert AutoConfig.from_pretrained(merged).rope_parameters["rope_type"] == "yarn"


def test_of_two_kinds_of_layers_those_are_stretched_that_look_at_all_tokens() -> None:
    config = Gemma3TextConfig()
    sliding = dict(config.rope_parameters["sliding_attention"])
    scale_rope(config, {"rope_type": "linear", "factor": 8.0})
    full = config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"], full["rope_theta"]) == ("linear", 8.0, 1000000.0)
    assert config.rope_parameters["sliding_attention"] == sliding


def test_rows_beyond_the_positions_of_a_model_in_a_folder_are_refused_before_rows_are_read(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "base")
    run = Run(compose([f"model.name={tmp_path / 'base'}", "data.max_length=2000"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"knows 512 positions; set model.rope_scaling='{rope_type: yarn, factor: 4}'"):
        run.execute()


def test_a_model_without_rotary_positions_is_refused_when_it_is_read() -> None:
    assert not has_rope(GPT2Config())
    with pytest.raises(UserError, match="stretches rotary positions, and gpt2 has none; leave it"):
        scale_rope(GPT2Config(), {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "longrope", "short_factor": [1], "long_factor": [1], "original_max_position_embeddings": 8},
         f"short_factor has 1 number, and this llama rotates {HALF_HEAD} pairs of each head's numbers; give one for"),
        ({"rope_type": "yarn", "factor": 2, "partial_rotary_factor": 0.5},
         "partial_rotary_factor=0.5: llama rotates whole heads; leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_heads_of_a_model_is_said_of_the_scaling(scaling: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"model.rope_scaling.{said}")):
        scale_rope(AutoConfig.from_pretrained(TINY), scaling)
