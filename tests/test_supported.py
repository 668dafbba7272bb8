"""The README's table of what is supported is the one that the registries make."""

from __future__ import annotations

import supported


def test_the_readme_s_table_is_up_to_date() -> None:
    text = supported.README.read_text(encoding="utf-8")
    assert text.count(supported.BEGIN) == text.count(supported.END) == 1
    assert supported.section() in text, "write it anew: python tools/supported.py"


def test_the_table_names_a_part_of_each_kind() -> None:
    rows = supported.table()
    for name in ("`muon`", "`nf4`", "`dora`", "`simpo`", "`warmup_stable_decay`", "`gguf`", "`trackio`", "`verify`"):
        assert name in rows
