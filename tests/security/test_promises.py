"""SECURITY.md names a test beside every promise."""

from __future__ import annotations

import re
from pathlib import Path

from promises import ROOT


def test_every_promise_has_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = Path(__file__).parent.parent
    files = [file for name in ("security", "faults", "board", "serving") for file in (tests / name).glob("test_*.py")]
    defined = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)}
    assert len(named) >= 10
    assert named <= defined
