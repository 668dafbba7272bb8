"""Takes the picture of the README: a run, as the terminal shows it, as SVG.

`python tools/picture.py` runs the first training run in a folder of its own and writes `docs/images/first_run.svg`;
`python tools/picture.py FILE.svg OVERRIDE ...` runs another command.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from qlora import cli
from qlora.runtime import console

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "first_run.svg"
WIDTH = 100
FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
"""What an SVG would load from elsewhere."""


def main(args: list[str]) -> None:
    """Writes the picture of a command."""
    file = Path(args[0]).absolute() if args else PICTURE
    overrides = args[1:] or ["name=first", "trainer.logging_steps=50"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        svg = picture(overrides)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(svg, encoding="utf-8")
    print(f"{file}: {len(svg):,} bytes")


class Recorder(Console):
    """A console that keeps what it prints, with paths as they are from here."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints texts, without the path of the working folder."""
        for text in objects:
            if isinstance(text, Text):
                text.plain = text.plain.replace(f"{Path.cwd()}/", "")
        super().print(*objects, **options)


def picture(overrides: list[str]) -> str:
    """Returns what a command prints, as SVG."""
    recorder = Recorder(
        record=True, file=io.StringIO(), force_terminal=True, width=WIDTH, highlight=False, markup=False
    )
    size = {"COLUMNS": str(WIDTH)}  # at which lines are wrapped
    with mock.patch.object(console, "screen", return_value=recorder), mock.patch.dict(os.environ, size):
        cli.run(overrides)
    svg = recorder.export_svg(title=" ".join(["$ qlora", *overrides]), theme=MONOKAI)
    return FONTS.sub("", svg)


if __name__ == "__main__":
    main(sys.argv[1:])
