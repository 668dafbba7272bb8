"""How commands that a person copies begin: as the one that printed them was started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import qlora
from qlora.runtime.program import program_name

MODULE = str(Path(qlora.__file__).parent / "__main__.py")


@pytest.mark.parametrize(
    ("argv", "typed", "name"),
    [
        ([MODULE], [".venv/bin/python", "-m", "qlora"], [".venv/bin/python", "-m", "qlora"]),
        (["qlora"], ["python", "qlora"], ["qlora"]),
        (["/elsewhere/bin/qlora"], ["python", "/elsewhere/bin/qlora"], ["/elsewhere/bin/qlora"]),
        (["/usr/bin/pytest"], ["python", "/usr/bin/pytest"], ["qlora"]),
    ],
)
def test_a_command_begins_as_the_program_was_started(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], typed: list[str], name: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert program_name() == name
