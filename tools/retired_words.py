"""Finds words that this project no longer uses, and names the one to write: `python tools/retired_words.py [PATH ...]`.

Names are compared whole, sentences (comments, strings, Markdown, YAML) by pattern. Exits with 1 where a word is found.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATHS = (
    "qlora",
    "conf",
    "tests",
    "docs",
    "benchmarks",
    "examples",
    "tools",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)

NAMES = {
    "place": "path, index, position or offset",
    "places": "paths, indices, positions or offsets",
    "found": "result, matches or output",
    "each": "the noun: weight, group, row",
    "facts": "metadata or summary",
    "words": "overrides, args, or tokens of text",
    "own": "local, or the noun",
    "shown": "label",
    "before": "previous",
    "wanted": "requested",
    "stored": "saved",
    "borders": "cu_seqlens",
    "longest": "max_seqlen, or max_length of what",
    "largest": "amax, or the maximum of what",
    "pieces": "chunks",
    "narrow": "bf16",
    "wide": "fp32",
    "drawn": "random",
    "draws": "random",
    "fault": "reason",
    "faults": "reasons",
    "share": "broadcast, or fraction",
    "gather": "all_gather",
    "agree": "all_reduce",
    "is_first": "is_main_process",
    "draft": "temporary_file",
    "drafts": "temporary_files",
    "seal": "finalize",
    "take_apart": "split",
    "let_go": "release",
    "go_on": "resume",
    "hold": "run_chat, or what is held",
}
"""Names of variables, parameters, functions, classes and attributes, and what to write."""

SENTENCES = {
    r"\btrainings\b": "training runs",
    r"\b(?:a|one|each|every|that|another|finished|killed) training(?=[.,;:)]|$| (?:and|or|is|was|that|which|"
    r"has|in|of|by|from|ends|runs|may|can|would|with|before|after|again|begins|needs|takes|stops)\b)": "training run",
    r"\bto be had\b": "available",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:is|are|was|were) no numbers?\b": "is NaN or infinite, or is not a number",
    r"\bso many\b": "N, or that many",
    r"\btells\b": "prints, reports, says",
    r"\bone behind the other\b": "packed, or one after another",
    r"\bgoes on\b|\bgo on\b|\bgoing on\b|\bwent on\b|\bgone on\b": "resumes, continues",
    r"\btak(?:e|es|en|ing) apart\b": "split",
    r"\bshar(?:e|es|ed|ing) out\b": "sharded",
    r"\blet(?:s|ting)? go\b": "releases",
    r"\bput back\b": "restored",
}
"""Patterns in sentences, and what to write."""
_SENTENCES = {re.compile(pattern): remedy for pattern, remedy in SENTENCES.items()}


def main(paths: list[str]) -> int:
    """Prints each retired word below `paths` as FILE:LINE and returns the exit code."""
    count = 0
    for file in _files([Path(path) for path in paths] or [ROOT / name for name in PATHS]):
        for line, word, remedy in sorted(set(_check(file))):
            print(f"{file}:{line}: {word!r} is retired; write {remedy}")
            count += 1
    print(f"{count} retired words" if count else "no retired word")
    return 1 if count else 0


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in files if file.suffix in (".py", ".md", ".yaml") and file != Path(__file__))


def _check(file: Path) -> Iterator[tuple[int, str, str]]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".py":
        for number, line in enumerate(text.splitlines(), 1):
            yield from _sentence(number, line.partition("#")[2] if file.suffix == ".yaml" else line)
        return
    for node in ast.walk(ast.parse(text)):
        if (name := _name(node)) and name.strip("_") in NAMES:
            yield node.lineno, name, NAMES[name.strip("_")]  # type: ignore[attr-defined]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, line in enumerate(token.string.splitlines()):
                yield from _sentence(token.start[0] + offset, line)


def _name(node: ast.AST) -> str:
    """Returns the name that a node gives to something, or an empty string."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    return node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else ""


def _sentence(line: int, text: str) -> Iterator[tuple[int, str, str]]:
    for pattern, remedy in _SENTENCES.items():
        for match in pattern.finditer(text):
            yield line, match[0], remedy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
