"""What a run sets otherwise than the options that it chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.config.compose import compose, opened_hydra
from qlora.config.preset import differences_to_preset


@pytest.mark.matrix(3)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {}),
        (["model=llama-7b", "data=oasst1"], {}),
        (["lora.r=4", "name=mine", "resume=force"], {"lora.r": 32}),
        (["lora.r=32"], {}),
        (["model=llama-7b", "data=oasst1", "seed=3", "trainer.max_steps=9"], {"seed": 0, "trainer.max_steps": 1875}),
        (["data=local", "data.path=rows.jsonl", "lora.r=3"], {"data.path": None, "lora.r": 64}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_differences_are_those_of_the_overrides(overrides: list[str], expected: dict[str, object]) -> None:
    config = compose(overrides)
    assert differences_to_preset(config, overrides) == expected


def test_options_of_a_user_are_presets_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "small.yaml").write_text("# @package _global_\nlora:\n  r: 2\n")
    overrides = ["experiment=small", "seed=5"]
    config = compose(overrides, tmp_path)
    with opened_hydra(overrides, tmp_path):
        assert differences_to_preset(config, overrides) == {"seed": 0}
    assert differences_to_preset(config, overrides) is None  # outside of the command the option is not found
