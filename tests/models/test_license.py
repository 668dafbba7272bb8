"""The licence of a base comes from its own card."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.models.license import license_of, read_license


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("\ufeff---\nlicense:\n- mit\n- other\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: mine-1\n---\n", "mine-1"),
        ("---\nlicense: other\n---\n", "other"),
        ("# A model\nlicense: mit\n", None),
        ("---\nlicense: {a: [\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\n- license\n---\n", None),
        (f"---\nlicense: {'x' * 500}\n---\n", None),
    ],
)
def test_a_card_names_a_licence_or_none(tmp_path: Path, card: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert license_of(tmp_path / "README.md") == expected


@pytest.mark.full
def test_the_config_s_licence_counts_before_that_of_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_license(compose([f"model.name={tmp_path}"]).model) == "mit"
    assert read_license(compose([f"model.name={tmp_path}", "model.license=mine"]).model) == "mine"
    assert read_license(compose().model) == "mit"
    assert license_of(tmp_path / "missing.md") is None


def test_a_hub_that_cannot_be_reached_says_no_licence() -> None:
    assert read_license(compose(["model.name=nobody/nothing"]).model) is None
