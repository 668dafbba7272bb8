"""A part of the fast step can come from another package."""

from __future__ import annotations

import pytest

from qlora.config.compose import compose
from qlora.config.registries import installed
from qlora.errors import ConfigError
from tests.step.test_fast import batch, build, build_step, learn
from tests.step_extension import CountTokens

NAMED = "trainer.step_parts=['tests.step_extension:CountTokens']"


@pytest.mark.parametrize("by_entry_point", [False, True])
def test_a_part_of_another_package_acts_in_steps_only(by_entry_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    point = ("count", "tests.step_extension:CountTokens")
    monkeypatch.setattr(installed, "_read", lambda group, _: (point,) if group == "qlora.step_parts" else ())
    monkeypatch.setattr(CountTokens, "seen", 0)
    chosen = ("trainer.step_parts=[count]",) if by_entry_point else (NAMED, "trusted=[tests]")
    model, config = build(overrides=chosen)
    step = build_step(model, config)
    name = config.trainer.step_parts[0]
    assert step.parts[name] == "on"
    assert step.extra_bytes(2, 24) == 8 * 48
    learn(model, batch())
    assert CountTokens.seen == 0
    with step:
        learn(model, batch())
    learn(model, batch())
    assert CountTokens.seen == 48


def test_a_part_that_cannot_run_is_refused_in_one_sentence() -> None:
    model, config = build(overrides=("trainer.step_parts=['tests.step_extension:Never']", "trusted=[tests]"))
    with pytest.raises(ConfigError, match=r"trainer\.step_parts: .*Never cannot run: it is Sunday; leave it out"):
        build_step(model, config)


def test_a_part_that_is_not_trusted_or_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.step_parts\[0\]=.*: code of the package 'tests' would run"):
        compose([NAMED])
    with pytest.raises(ConfigError, match=r"trainer\.step_parts\[0\]=cuont is unknown; no installed package adds one"):
        compose(["trainer.step_parts=[cuont]"])
