"""The manual as a site: it builds without a warning, and its navigation names every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import site_links
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else [nav]:
        if isinstance(item, str):
            yield item
        else:
            for value in item.values():
                yield from pages(value)


def test_the_navigation_names_every_page_once() -> None:
    named = [*pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])]
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(named) == len({*named})
    assert {name for name in named if not name.startswith(site_links.FOLDER)} == written
    outside = {name.removeprefix(f"{site_links.FOLDER}/") for name in named} - written
    assert outside == {*site_links.ALWAYS}


def test_a_link_out_of_the_manual_leads_to_the_copy_on_the_site() -> None:
    link = site_links._site_link
    assert link(DOCS / "run.md", "../SECURITY.md") == "repository/SECURITY.md"
    assert link(DOCS / "decisions/index.md", "../run.md") == "../run.md"
    assert link(ROOT / "SECURITY.md", "docs/run.md") == "../run.md"
    assert link(DOCS / "run.md", "../missing.md") == "../missing.md"  # which ends the build


def test_a_pipe_in_code_in_a_table_has_no_backslash_on_the_site() -> None:
    assert site_links._unescape_pipes(r"| `<\|end\|>` | a \| b |") == r"| `<|end|>` | a \| b |"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'qlora[docs]'")
    pytest.importorskip("material", reason="pip install 'qlora[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "troubleshoot.html").is_file()
    assert (tmp_path / "repository" / "SECURITY.html").is_file()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img)[^>]*"https?://', page)  # nothing is loaded from elsewhere
