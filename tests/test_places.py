"""Systems, users and folders that are not the usual ones: each works, or is refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WINDOWS = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
"""
"""A `sitecustomize` that takes away what Python has on POSIX systems only."""


@pytest.fixture
def without_posix(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has no POSIX-only modules."""
    (tmp_path / "sitecustomize.py").write_text(WINDOWS, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "qlora"],
        [sys.executable, "-m", "qlora", "--help"],
        [str(Path(sys.executable).with_name("qlora")), "task=doctor"],
    ],
)
def test_on_windows_the_one_line_of_a_command_names_wsl(command: list[str], without_posix: dict[str, str]) -> None:
    done = subprocess.run(command, env=without_posix, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: qlora runs on Linux and macOS; on Windows install WSL")


@pytest.mark.parametrize("module", ["qlora", "qlora.run", "qlora.compose"])
def test_on_windows_an_import_says_so_and_may_be_caught(module: str, without_posix: dict[str, str]) -> None:
    code = f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], env=without_posix, capture_output=True, text=True)
    assert done.stdout.startswith("qlora runs on Linux and macOS"), done.stderr
