"""What tests on a GPU need: a choice before CUDA starts in their process, and rows longer than any limit."""

import json
from pathlib import Path

import pytest

from qlora.runtime.determinism import fix_workspace

fix_workspace()  # or `trainer.deterministic` is refused


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of equal rows, each of which is cut to the tokens that a run takes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = json.dumps({"text": "the stone owl sings of rivers and towers " * 2048})
    path.write_text(f"{row}\n" * 33, encoding="utf-8")
    return path
