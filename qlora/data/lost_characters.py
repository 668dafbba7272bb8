"""Characters that a tokenizer does not keep: what its tokens decode to is compared with the text they were made of."""

from __future__ import annotations

import json
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from qlora.data.batching.row_encoder import RowEncoder
from qlora.data.formats.prompts import Example
from qlora.text import brief

LONGEST_TEXT = 10_000
"""Characters of a row that are compared."""
SHOWN = 4


@dataclass(frozen=True)
class LostCharacters:
    """What a tokenizer loses of the rows that were looked at."""

    characters: list[str]
    """The most frequent first."""
    rows: int
    """Rows that lose any."""
    looked_at: int
    examples: dict[str, str]
    """Words of the rows, and what the model reads in their place."""

    def __str__(self) -> str:
        pairs = ", ".join(f"{brief(word)} as {brief(read)}" for word, read in self.examples.items())
        kinds = len(self.characters)
        added = shlex.quote(f"model.new_tokens={json.dumps(self.characters, ensure_ascii=False)}")
        way_out = f", or give them embeddings of their own with {added}" if kinds <= 2 * SHOWN else ""
        return (
            f"the tokenizer loses {kinds} kind{'s' if kinds > 1 else ''} of characters in {self.rows} of "
            f"{self.looked_at} rows that were looked at: it reads {pairs}; the model neither sees nor learns what is "
            f"lost; choose another model{way_out}"
        )


def find_lost(encoder: RowEncoder, examples: Iterable[Example]) -> LostCharacters | None:
    """Returns what the tokens of examples do not keep of their texts; None: they keep all but blanks."""
    lost, rows, looked_at = Counter[str](), 0, 0
    read_words: dict[str, str] = {}
    for example in examples:
        text, read = encoder.read_back(example, LONGEST_TEXT)
        looked_at += 1
        if not (missing := _missing(text, read)):
            continue
        rows += 1
        for word in (word for word in text.split() if len(read_words) < SHOWN and missing & Counter(word)):
            if word not in read_words and _missing(word, there := encoder.read_text(word)):
                read_words.setdefault(word, there.strip())
        lost += missing
    if not lost:
        return None
    return LostCharacters([character for character, _ in lost.most_common()], rows, looked_at, read_words)


def _missing(text: str, read: str) -> Counter[str]:
    """Returns the characters of a text that are not in what was read; line feeds and tabs where none was read."""
    written, kept = (Counter(unicodedata.normalize("NFKC", part)) for part in (text.strip(), read))
    missing = written - kept
    return Counter({
        character: count for character, count in missing.items()
        if not character.isspace() or (character in "\n\t" and character not in kept)
    })  # fmt: skip
