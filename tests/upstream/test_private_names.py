"""Private names of Hydra and OmegaConf are used in `qlora/upstream` alone, where the contract tests see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "qlora"
LIBRARIES = ("hydra", "omegaconf")
ATTRIBUTES = ("_get_node", "_value", "_is_none", "_is_missing", "_is_interpolation", "_resolvers")
"""Methods and attributes of OmegaConf's nodes that are used."""


def private_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {part}" for part in parts if part.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES and ast.unparse(node.value) != "self":
            yield node.attr


def test_private_names_of_hydra_and_omegaconf_are_in_upstream_alone() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "upstream" not in file.parents]
    uses = {str(file.relative_to(PACKAGE)): list(private_names(file)) for file in files}
    assert {file: names for file, names in uses.items() if names} == {}
