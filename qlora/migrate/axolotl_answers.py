"""The forms of Axolotl's rows beside `rl`: pairs of answers, and answers with a label."""

from __future__ import annotations

from typing import Any

from qlora.migrate.translation import Settings

PAIRS, LABELLED = "qlora.data.formats.as_chat:from_pair", "qlora.data.formats.as_chat:from_any"
CHATS = "chosen"
"""The format of rows that hold turns."""
FRAMES = ("chatml", "llama3")
"""The frames that a form names before its point."""
WRITTEN = ("argilla", "icr", "intel", "prompt_pairs")
"""The forms of a question and answers, each a text."""
TURNS = ("argilla_chat", "ultra")
"""The forms whose answers are turns."""
OF_TEMPLATE = ("chat_template", "chat_template.default", "chat_template.argilla", "chat_template.argilla_chat")
"""The forms of turns that are written by the chat template of the config."""


def read_form(settings: Settings, method: str) -> dict[str, Any] | None:
    """Returns the format of an entry of `datasets` beside `rl`, with its columns and template; None: it is unknown."""
    name = str(settings.look("type"))
    frame, _, form = name.partition(".")
    part: dict[str, Any]
    if frame in FRAMES and form in WRITTEN:
        part = {"format": LABELLED if method == "kto" else PAIRS, "template": (frame, None)}
    elif frame in FRAMES and form in TURNS:
        texts = method == "kto" and form == "ultra"
        part = {"format": LABELLED if texts else "auto" if method == "kto" else CHATS, "template": (frame, None)}
    elif name in OF_TEMPLATE and method != "kto":
        named = settings.take("chat_template"), settings.take("chat_template_jinja")
        part = {"format": CHATS, "template": named if any(named) else None}
    elif name in ("passthrough", "passthrough.default"):
        part = {"format": "auto"}
    else:
        return None
    fields = {ours: settings.take(f"field_{ours}") for ours in ("messages", "chosen", "rejected")}
    columns = {ours: str(theirs) for ours, theirs in fields.items() if theirs not in (None, ours)}
    return part | ({"columns": columns} if columns else {})
