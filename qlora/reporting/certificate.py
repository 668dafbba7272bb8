"""The lines of a model card that say which engines were proved to serve what was trained."""

from __future__ import annotations

import re
from pathlib import Path

from qlora.reporting.escape import markdown_text
from qlora.runtime.atomic_files import write_text

HEADING, BEFORE = "## Verified", "## Limits"


def add_to_card(card: Path, engine: str, line: str) -> bool:
    """Writes what was proved of an engine into a card, in place of an older line of it; False: there is no card."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    start = f"- {markdown_text(engine)}"
    entry = f"- {markdown_text(line)}"
    match = re.search(rf"^{HEADING}\n\n((?:- .*\n)+)", text, re.MULTILINE)
    if match is not None:
        kept = [old for old in match[1].splitlines() if not old.startswith((f"{start}:", f"{start} "))]
        block = "\n".join([*kept, entry]) + "\n"
        text = text[: match.start(1)] + block + text[match.end(1) :]
    else:
        section = f"{HEADING}\n\n{entry}\n\n"
        head, heading, rest = text.partition(f"{BEFORE}\n")
        text = head + section + heading + rest if heading else f"{text.rstrip()}\n\n{section.rstrip()}\n"
    write_text(card, text)
    return True
