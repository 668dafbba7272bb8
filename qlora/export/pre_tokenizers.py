"""The pre-tokenizers that llama.cpp knows by name, by how tokenizer.json describes them."""

from __future__ import annotations

from typing import Any, NamedTuple

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class PreTokenizer(NamedTuple):
    """How texts are split before merging."""

    pattern: str | None
    """The regular expression of a `Split`; None: GPT-2's own, within `ByteLevel`."""
    ignores_merges: bool = False
    """Whether a whole word that is a token is taken as it is."""
    splits_digits: bool = False
    """Whether each digit stands alone."""


KNOWN: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(None),
    "smollm": PreTokenizer(None, splits_digits=True),
    "llama-bpe": PreTokenizer(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}",
        ignores_merges=True,
    ),
    "qwen2": PreTokenizer(
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
    ),
    "tekken": PreTokenizer(
        rf"[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}*{CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{CASED[0]}+{CASED[1]}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}",
        ignores_merges=True,
    ),
}
"""By the names of llama.cpp."""


def find_pre_tokenizer(described: dict[str, Any] | None, ignores_merges: bool) -> str | None:
    """Returns the name of the pre-tokenizer that tokenizer.json describes; None: llama.cpp knows none like it."""
    if described is None:
        return None
    steps = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    *splits, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    uses_regex = last.get("use_regex", True)
    if not splits and uses_regex:
        splitter = PreTokenizer(None, ignores_merges)
    elif len(splits) == 1 and splits[0]["type"] == "Digits" and splits[0]["individual_digits"] and uses_regex:
        splitter = PreTokenizer(None, ignores_merges, splits_digits=True)
    elif len(splits) == 1 and _is_split(splits[0]) and not uses_regex:
        splitter = PreTokenizer(splits[0]["pattern"].get("Regex"), ignores_merges)
    else:
        return None
    return next((name for name, known in KNOWN.items() if known == splitter), None)


def _is_split(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]
    )
