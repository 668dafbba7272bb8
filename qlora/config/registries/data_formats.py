"""The formats that `data.format` may name; to check a name imports nothing that renders rows."""

from __future__ import annotations

from qlora.config.registries.installed import installed_names

FORMAT_NAMES = (
    *("auto", "alpaca", "input-output", "prompt-completion", "question-answer", "messages", "conversations"),
    *("chosen", "scored", "human-bot", "inst", "guanaco", "self-instruct-tasks", "unnatural", "segments", "text"),
    "alpaca-newline",
)
"""The formats of this package, which `qlora.data.formats.renderers` renders."""
GROUP = "qlora.formats"
"""The entry points by which an installed package adds formats: a name, and a `module:function` as in `data.format`."""


def format_names() -> list[str]:
    """Returns the names of this package and of installed ones."""
    return [*FORMAT_NAMES, *(name for name in installed_names(GROUP) if name not in FORMAT_NAMES)]


def installed_format(name: str) -> str | None:
    """Returns the function of a format that an installed package adds, as `module:function`; None: there is none."""
    return None if name in FORMAT_NAMES else installed_names(GROUP).get(name)
