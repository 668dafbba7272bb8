"""What a tokenizer does to a text before merging and llama.cpp does not, written into the chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.text import brief_text

MARK = "\ue0a2"
"""Stands around special tokens while the template splits at them; it is for private use, so no chat holds it."""
SKIPPED = ("NFC",)
"""What most texts are already, and llama.cpp leaves them as they are."""


@dataclass(frozen=True)
class Segments:
    """What becomes of each text between special tokens."""

    scheme: str
    """`steps`; or where SentencePiece puts a space unless one is there: `always`, or `first`, at the start of all; or
    `prepend`, where it puts one in any case."""
    special: list[str]
    """Tokens that split a text before anything is changed."""
    steps: list[tuple[str, ...]] = field(default_factory=list)
    """In their order: `("strip",)`, `("replace", old, new)`, `("prepend", text)`."""

    @classmethod
    def of(cls, normalizer: dict[str, Any] | None, added: Sequence[dict[str, Any]]) -> Segments | str | None:
        """Returns what a normalizer of tokenizer.json does; None: nothing; a text names a step that has no form."""
        listed = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
        steps: list[tuple[str, ...]] = []
        for step in listed:
            match step:
                case {"type": "Strip", "strip_left": True, "strip_right": True}:
                    steps.append(("strip",))
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    steps.append(("replace", old, new))
                case {"type": "Prepend", "prepend": text}:
                    steps.append(("prepend", text))
                case {"type": kind} if kind in SKIPPED:
                    continue
                case _:
                    return brief_text(json.dumps(step, ensure_ascii=False), 100)
        special = [entry["content"] for entry in added if not entry["normalized"]]
        return cls("steps", special, steps) if steps else None

    def apply(self, text: str) -> str:
        """Returns a text as the tokenizer reads it, by `steps`."""
        for name, *values in self.steps:
            if name == "strip":
                text = text.strip()
            elif name == "replace":
                text = text.replace(values[0], values[1])
            elif text:
                text = values[0] + text
        return text

    @property
    def needs_template(self) -> bool:
        """Whether llama.cpp does not do it by itself."""
        return self.scheme != "prepend"

    def wrap(self, template: str) -> str:
        """Returns a template that writes what `template` does, each segment as llama.cpp must read it."""
        if not self.needs_template:
            return template
        template = template.removesuffix("\n")
        tokens = ", ".join(json.dumps(token, ensure_ascii=False) for token in self.special)
        mark = json.dumps(MARK, ensure_ascii=False)
        return (
            f"{{%- set rendered %}}{template}{{% endset %}}\n"
            f"{{%- set tokens = [{tokens}] %}}\n"
            "{%- set split = namespace(text=rendered) %}\n"
            f"{{%- for token in tokens %}}{{%- set split.text = split.text.replace(token, {mark} ~ token ~ {mark}) %}}"
            "{%- endfor %}\n"
            f"{{%- for part in split.text.split({mark}) %}}\n"
            "{%- if part in tokens %}{{- part }}\n"
            f"{{%- elif part %}}{self._written()}{{%- endif %}}\n"
            "{%- endfor %}"
        )

    def _written(self) -> str:
        """Returns the Jinja that writes a `part`."""
        if self.scheme == "always":  # llama.cpp puts one more before it
            return "{{- part[1:] if part.startswith(' ') else part }}"
        if self.scheme == "first":
            return "{{- ' ' ~ part if loop.first and not part.startswith(' ') else part }}"
        lines = ["{%- set said = namespace(text=part) %}"]
        for name, *values in self.steps:
            texts = ", ".join(json.dumps(value, ensure_ascii=False) for value in values)
            changed = {
                "strip": "said.text.strip()",
                "replace": f"said.text.replace({texts})",
                "prepend": f"{texts} ~ said.text if said.text else ''",
            }[name]
            lines.append(f"{{%- set said.text = {changed} %}}")
        return "".join([*lines, "{{- said.text }}"])
