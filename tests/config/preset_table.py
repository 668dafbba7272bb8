"""The table of docs/models.md of the presets that learned to chat, read from their files.

Written anew by `python tests/config/preset_table.py`.
"""

import re
from pathlib import Path

from qlora.config.help import options, preset_family
from qlora.config.options import CONF_DIR

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = "| presets | licence | chat template | a turn ends with |\n|---|---|---|---|\n"
TEMPLATE = re.compile(r"^# Its chat template is that of (.+); a turn ends with (\S+)$", re.MULTILINE)


def chats(comment: str, template: re.Match[str] | None) -> bool:
    return template is not None or "instruction-tuned" in comment


def build_table() -> str:
    """Returns the table: a row for the presets of a family with one licence and one template."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, comment in options("model").items():
        template = TEMPLATE.search((CONF_DIR / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        if chats(comment, template):
            licence = comment[comment.rindex("(") + 1 : comment.rindex(")")]
            known = template.groups() if template else ("its own", "")
            rows.setdefault((preset_family(name), licence, *known), []).append(f"`{name}`")
    text = HEAD
    for (_, licence, published, end), names in rows.items():
        ends = "`{}`".format(end.replace("|", "\\|")) if end else "what its template writes"
        text += f"| {', '.join(names)} | {licence.replace(';', ',')} | {published} | {ends} |\n"
    return text


def write_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    start = re.search(r"^\| presets? \| licence \|", text, re.MULTILINE)
    assert start is not None
    end = text.index("\n\n", start.start()) + 1
    DOCS.write_text(text[: start.start()] + build_table() + text[end:], encoding="utf-8")


if __name__ == "__main__":
    write_table()
