"""How this program was started, for commands that a person copies."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from qlora.config.paths import short_path

NAME = "qlora"


def program_name() -> list[str]:
    """Returns the words that started this program: `qlora`, its path, or `python -m qlora`."""
    started, typed = Path(sys.argv[0]), sys.orig_argv
    if started.name == "__main__.py" and started.parent.name == NAME:
        return [typed[0], "-m", NAME]
    if started.name != NAME or len(started.parts) == 1 or started == Path(shutil.which(NAME) or ""):
        return [NAME]  # a notebook or a script names the command
    return [short_path(started)]
