"""A tokenizer in the forms that llama.cpp knows: byte-level BPE by a named pre-tokenizer, or BPE of SentencePiece.

What llama.cpp does otherwise is refused, or written into the chat template where that can say it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.errors import DataError
from qlora.export.chat_template import Segments
from qlora.export.pre_tokenizers import find_pre_tokenizer
from qlora.text import brief_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The kinds of tokens in a GGUF file."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it."""

    model: str
    """`gpt2`: byte-level BPE; `llama`: SentencePiece by scores; `gemma4`: SentencePiece by merges."""
    pre: str | None
    """The name of the pre-tokenizer, of `gpt2` alone."""
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    """Whether llama.cpp puts a space before a text, and behind special tokens."""
    adds_bos: bool = False
    """Whether it puts the begin token before a text."""
    segments: Segments | None = None
    """What the chat template must do because llama.cpp does not; None: nothing."""


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, key: str) -> Vocabulary:
    """Returns a tokenizer for a model of `rows` embeddings; raises `DataError` for one that llama.cpp does not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{key}: the tokenizer is Python code without tokenizer.json, of which llama.cpp knows no form")
    data = json.loads(backend.to_str())
    model, added = data["model"], {entry["content"]: entry for entry in data["added_tokens"]}
    if model["type"] != "BPE":
        raise DataError(f"{key}: the tokenizer is {model['type']}, and only BPE is written here")
    _check_added(added, key)
    vocabulary = _sentencepiece(data, key) if model.get("byte_fallback") else _byte_level(data, key)
    tokens, types = _tokens(data, added, rows, vocabulary.segments)
    scores = _align(vocabulary.scores, model["vocab"], rows) if vocabulary.scores else []
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    if vocabulary.model == "gemma4" and not adds_bos:
        raise DataError(
            f"{key}: llama.cpp puts a begin token before every text of a tokenizer whose merges are no scores, and "
            "this one puts none"
        )
    return Vocabulary(vocabulary.model, vocabulary.pre, tokens, types, vocabulary.merges, scores,
                      vocabulary.space_prefix, adds_bos, vocabulary.segments)  # fmt: skip


def _check_added(added: Mapping[str, Any], key: str) -> None:
    """Raises `DataError` for tokens that take blanks beside them, or stand as whole words only."""
    for text, entry in added.items():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if entry[flag]]
        if flags:
            raise DataError(
                f"{key}: the token {brief_text(text)} has {flags[0]}=true, which a GGUF file cannot say; llama.cpp "
                "would split texts with it otherwise"
            )


def _byte_level(data: dict[str, Any], key: str) -> Vocabulary:
    pre = find_pre_tokenizer(data["pre_tokenizer"], bool(data["model"].get("ignore_merges")))
    if pre is None:
        label = brief_text(json.dumps(data["pre_tokenizer"], ensure_ascii=False), 160)
        raise DataError(f"{key}: llama.cpp knows no pre-tokenizer that splits texts as this tokenizer does ({label})")
    segments = Segments.of(data["normalizer"], data["added_tokens"])
    if isinstance(segments, str):
        raise DataError(
            f"{key}: llama.cpp does not change texts before it splits them as this tokenizer does ({segments})"
        )
    return Vocabulary("gpt2", pre, [], [], _merges(data["model"]), segments=segments)


def _sentencepiece(data: dict[str, Any], key: str) -> Vocabulary:
    """Returns BPE over characters, whose spaces are `▁` and whose unknown characters are bytes."""
    scheme = _prepend_scheme(data)
    if scheme is None:
        label = {name: data[name] for name in ("normalizer", "pre_tokenizer")}
        raise DataError(
            f"{key}: llama.cpp does not change texts before it splits them as this tokenizer does "
            f"({brief_text(json.dumps(label, ensure_ascii=False), 160)})"
        )
    scores = _scores(data["model"])
    segments = None if scheme == "never" else Segments(scheme, _special(data["added_tokens"]))
    if scores is not None:
        return Vocabulary(
            "llama", None, [], [], scores=scores, space_prefix=scheme in ("always", "prepend"), segments=segments
        )
    mixed = next((token for token in data["model"]["vocab"] if "\n" in token and token.strip("\n")), None)
    missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in data["model"]["vocab"]), None)
    if mixed is not None or scheme in ("always", "prepend"):
        why = f"its token {mixed!r} holds more than a line break" if mixed else "and it puts a space before every text"
        raise DataError(f"{key}: llama.cpp cannot merge in the order of this tokenizer, which no scores give ({why})")
    if missing is not None:
        raise DataError(f"{key}: the tokenizer lacks the token <0x{missing:02X}> of a byte, which llama.cpp needs")
    return Vocabulary("gemma4", None, [], [], _merges(data["model"]), segments=segments)


def _prepend_scheme(data: dict[str, Any]) -> str | None:
    """Returns where a space is put before a text, as `Segments` names it, or `never`; None: in another way."""
    normalizer, pre = data["normalizer"], data["pre_tokenizer"]
    if normalizer is None and pre is not None and pre["type"] == "Metaspace":
        inner = any(SPACE in token.lstrip(SPACE) for token in data["model"]["vocab"])
        return None if pre["split"] and inner else str(pre["prepend_scheme"])
    steps = _steps(normalizer)
    plain = pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    replaces = [step for step in steps if step.get("pattern") == {"String": " "} and step.get("content") == SPACE]
    if not plain or len(replaces) != 1 or steps[-1] is not replaces[0]:
        return None
    if len(steps) == 1:
        return "never"
    return "prepend" if len(steps) == 2 and steps[0] == {"type": "Prepend", "prepend": SPACE} else None


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]


def _merges(model: dict[str, Any]) -> list[str]:
    return [" ".join(pair) for pair in _pairs(model)]


def _scores(model: dict[str, Any]) -> list[float] | None:
    """Returns a score for each token by which SentencePiece merges as the merges say; None: no scores do.

    SentencePiece joins any two neighbours whose text is a token, the best one first; so every way to split a token in
    two must be a merge, and those of one token follow one another.
    """
    vocabulary, pairs = model["vocab"], _pairs(model)
    known, rank = set(pairs), dict[str, int]()
    previous = ""
    for index, (left, right) in enumerate(pairs):
        token = left + right
        if token in rank and token != previous:
            return None
        rank.setdefault(token, index)
        previous = token
    for token in vocabulary:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if any(left in vocabulary and right in vocabulary and (left, right) not in known for left, right in splits):
            return None
    return [-float(rank.get(token, len(pairs))) for token in sorted(vocabulary, key=vocabulary.__getitem__)]


def _align(scores: list[float], vocabulary: Mapping[str, int], rows: int) -> list[float]:
    by_id = dict(zip(sorted(vocabulary.values()), scores, strict=True))
    return [by_id.get(index, 0.0) for index in range(rows)]


def _special(added: list[dict[str, Any]]) -> list[str]:
    return [entry["content"] for entry in added if entry["special"] or not entry["normalized"]]


def _tokens(
    data: dict[str, Any], added: Mapping[str, Any], rows: int, segments: Segments | None
) -> tuple[list[str], list[int]]:
    """Returns text and kind of each embedding; one that no token has is unused."""
    tokens, types = [f"[UNUSED{index}]" for index in range(rows)], [UNUSED] * rows
    falls_back, unknown = bool(data["model"].get("byte_fallback")), data["model"].get("unk_token")
    for text, index in data["model"]["vocab"].items():
        if index < rows:
            tokens[index] = text
            types[index] = BYTE if falls_back and BYTE_TOKEN.fullmatch(text) else UNKNOWN if text == unknown else NORMAL
    for text, entry in added.items():
        if entry["id"] < rows:
            changes = entry["normalized"] and not entry["special"] and segments is not None
            tokens[entry["id"]] = segments.apply(text) if changes and segments is not None else text
            types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, types
