"""The presets of models: their page, their table, and what a mistyped one was meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.config.help import preset_family, print_help
from qlora.config.options import option_names
from qlora.config.schema import ArchitectureConfig, described_settings
from qlora.config.suggestions import nearest_presets, unknown_option
from qlora.errors import ConfigError
from qlora.planning.training_plan import build_plan
from tests.config.preset_table import DOCS, build_table

MINE = """# A hybrid of my own (MIT).
name: me/hybrid
license: mit
architecture:
  model_type: qwen3_5_text
  hidden_size: 64
  intermediate_size: 96
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  vocab_size: 512
  max_position_embeddings: 256
  options:
    linear_num_key_heads: 2
    linear_num_value_heads: 4
    linear_key_head_dim: 16
    linear_value_head_dim: 16
"""


def test_the_table_of_the_docs_is_read_from_the_files() -> None:
    assert build_table() in DOCS.read_text(encoding="utf-8"), "write it anew: python tests/config/preset_table.py"


def test_the_page_of_models_fits_80_columns_and_groups_families(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_help(["model"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    listed = page[page.index("\nOptions") : page.index("\n  * is the default")]
    assert all(f"\n  {name} " in listed or f"\n  {name}* " in listed for name in option_names("model"))
    assert listed.count("\n\n  ") == len({preset_family(name) for name in option_names("model")})


def test_a_preset_is_added_by_its_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hybrid-7m.yaml").write_text(MINE, encoding="utf-8")
    config = compose(["model=hybrid-7m", "task=plan", "plan.device=t4", f"data.cache_dir={tmp_path}"], tmp_path)
    plan = build_plan(config)
    assert plan.training.shape.parameters > 100_000
    assert plan.fits
    print_help(["model", "--config-dir", str(tmp_path)])
    assert "hybrid-7m" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"model=hybrid-7: model has no such option \(did you mean hybrid-7m\?\)"):
        compose(["model=hybrid-7"], tmp_path)


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "qwen3.5-9b-instruct": "qwen3.5-9b",
        "qwen3-5-9b": "qwen3.5-9b",
        "gemma-4-e4b-instruct": "gemma-4-e4b-it",
        "gemma4-e4b": "gemma-4-e4b",
        "ministral-3-8b-it": "ministral-3-8b-instruct",
        "glm-4.5-air-instruct": "glm-4.5-air",
        "deepseek-v2-lite-instruct": "deepseek-v2-lite-chat",
        "llama-3-8b-instruct": "llama-3.1-8b-instruct",
        "qwen3-4b-instruct": "qwen3-4b-instruct-2507",
        "smollm3": "smollm3-3b",
        "phi4": "phi-4",
    }.items(),
)
def test_a_mistyped_model_is_one_of_its_size_and_kind(typed: str, meant: str) -> None:
    assert nearest_presets(typed, option_names("model"))[0] == meant
    assert f"did you mean {meant}" in str(unknown_option("model", typed, option_names("model")))


@pytest.mark.parametrize("word", ["nonsense", "gpt2"])
def test_what_is_near_no_model_is_not_taken_for_one(word: str) -> None:
    assert nearest_presets(word, option_names("model")) == []


def test_other_settings_of_a_model_type_have_one_place() -> None:
    described = described_settings(ArchitectureConfig(
        model_type="x", hidden_size=1, num_hidden_layers=1, num_attention_heads=1, vocab_size=1,
        max_position_embeddings=1, sliding_window=0, options={"conv_L_cache": 3},
    ))  # fmt: skip
    assert described["conv_L_cache"] == 3
    assert described["sliding_window"] is None
    assert "options" not in described
    for wrong, message in (
        ("model.architecture.options.head_dim=8", "model.architecture.options.head_dim is a setting of "
         "model.architecture itself; write model.architecture.head_dim"),
        ("model.architecture.options=3", "model.architecture.options must be a mapping such as"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            compose([wrong])
