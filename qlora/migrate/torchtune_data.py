"""The rows of torchtune's YAML: the builders in `dataset` and `dataset_val`, and the chat marks of the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from qlora.config.overrides import write_override
from qlora.migrate import shared_rules
from qlora.migrate.translation import Lost, Part, Settings

COMPONENT = "_component_"
ALPACA, PAIRS, CHATS = "alpaca-newline", "input-output", "conversations"
SETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"path": "tatsu-lab/alpaca", "format": ALPACA},
    "alpaca_cleaned_dataset": {"path": "yahma/alpaca-cleaned", "format": ALPACA},
    "slimorca_dataset": {"path": "Open-Orca/SlimOrca-Dedup", "format": CHATS},
    "grammar_dataset": {"path": "liweili/c4_200m", "format": PAIRS},
    "samsum_dataset": {"path": "Samsung/samsum", "format": PAIRS,
                       "columns": {"input": "dialogue", "output": "summary"}},
    "instruct_dataset": {"format": PAIRS},
    "chat_dataset": {"format": CHATS},
    "text_completion_dataset": {"format": "text"},
    "wikitext_dataset": {"path": "EleutherAI/wikitext_document_level", "subset": "wikitext-103-v1", "format": "text",
                         "columns": {"text": "page"}},
    "cnn_dailymail_articles_dataset": {"path": "ccdv/cnn_dailymail", "format": "text", "columns": {"text": "article"}},
}  # fmt: skip
"""By their builders, with what those load."""
AS_CHAT = {
    ALPACA: "qlora.data.formats.as_chat:from_alpaca_prompt",
    PAIRS: "qlora.data.formats.as_chat:from_input_output",
}
"""Rows of an instruction format are messages between the chat marks of the tokenizer, where it has some."""
TOKENIZERS: dict[str, str | None] = {
    "llama2_tokenizer": "llama-2",
    "llama3_tokenizer": "llama-3",
    "mistral_tokenizer": "mistral",
    "phi3_mini_tokenizer": "phi-3",
    "phi4_tokenizer": "auto",
    **dict.fromkeys(("qwen2_tokenizer", "qwen2_5_tokenizer", "qwen3_tokenizer"), "chatml"),
    "gemma_tokenizer": None,
}
"""The chat template that has the marks of a tokenizer; None: it writes messages bare."""
TRAINED_WHOLE = ("alpaca_dataset", "alpaca_cleaned_dataset")
"""Whose `train_on_input` is true unless it is set."""
FILE_TYPES = ("json", "csv", "parquet", "text")
SPLIT_TEXTS = "a text that is longer than a pack is split there (split_across_pack); here it loses its end"


def choose_data(settings: Settings) -> Iterator[Part]:
    """The sets, the marks around their rows, their length, and the rows to measure on."""
    template = yield from _template(settings)
    parts, wholes, packed = [], [], False
    for prefix in _sets(settings):
        part, notes = _part(prefix, settings, template)
        yield from notes
        parts.append(part)
        wholes.append(_is_whole(prefix, settings))
        if settings.take(f"{prefix}.packed"):
            packed = True
            if part["format"] == "text" and settings.take(f"{prefix}.split_across_pack", True):
                yield Lost(SPLIT_TEXTS, f"{prefix}.packed")
    if not parts:
        yield Lost("no rows are named: give data.path=FILE", "dataset")
        parts = [{"path": "rows.jsonl"}]
    yield from shared_rules.mix(parts)
    if any(part["format"] not in ("text", ALPACA, PAIRS) for part in parts if "format" in part):
        yield f"data.template={template or 'plain'}"
        if template is None:
            yield Lost("messages stand bare there; data.template=plain comes nearest", f"tokenizer.{COMPONENT}")
    if any(wholes):
        yield "data.train_on=all"
        if not all(wholes):
            yield Lost("prompts are trained in all sets or in none: in all here", "dataset")
    length = settings.take("tokenizer.max_seq_len")
    yield write_override("data.max_length", length)
    if packed:
        yield "data.packing=true"
    if packed and length is None:
        yield "data.max_length=2048"
        yield Lost("packs need a length: 2048 is taken", "tokenizer.max_seq_len")
    yield from _held_out(settings, parts, template)


def _template(settings: Settings) -> Any:
    """Returns our template with the marks of the tokenizer; yields what differs."""
    name = str(settings.take(f"tokenizer.{COMPONENT}", "")).rpartition(".")[2]
    if settings.take("tokenizer.prompt_template") is not None:
        yield Lost(
            "words of your own around messages: write a Jinja file for data.template", "tokenizer.prompt_template"
        )
    if name == "llama2_tokenizer":
        yield Lost("ours has a blank more before the end of an answer", f"tokenizer.{COMPONENT}")
    if name not in TOKENIZERS:
        yield Lost(
            "the marks of this tokenizer are not known: the base's own template is taken", f"tokenizer.{COMPONENT}"
        )
    return TOKENIZERS.get(name, "auto")


def _held_out(settings: Settings, parts: list[dict[str, Any]], template: str | None) -> Iterator[Part]:
    every = settings.take("run_val_every_n_steps")
    if f"dataset_val.{COMPONENT}" not in settings:
        yield from shared_rules.hold_out(0)
        return
    held_out, notes = _part("dataset_val", settings, template)
    yield from notes
    settings.read |= {"dataset_val.packed", "dataset_val.train_on_input"}
    yield from shared_rules.measure_on(held_out, parts, "dataset_val")
    yield write_override("trainer.eval_steps", every)


def _sets(settings: Settings) -> list[str]:
    """Returns the beginnings of the keys of all data sets: `dataset`, or `dataset.0`, `dataset.1` ..."""
    if f"dataset.{COMPONENT}" in settings:
        return ["dataset"]
    numbers = {match[1] for key in settings if (match := re.match(r"dataset\.(\d+)\.", key))}
    return [f"dataset.{number}" for number in sorted(numbers, key=int)]


def _is_whole(prefix: str, settings: Settings) -> bool:
    name = str(settings.look(f"{prefix}.{COMPONENT}", "")).rpartition(".")[2]
    return bool(settings.take(f"{prefix}.train_on_input", name in TRAINED_WHOLE))


def _part(prefix: str, settings: Settings, template: str | None) -> tuple[dict[str, Any], list[Part]]:
    name = str(settings.take(f"{prefix}.{COMPONENT}", "")).rpartition(".")[2]
    part: dict[str, Any] = dict(SETS.get(name, {"format": "auto"}))
    notes: list[Part] = []
    source, files = settings.take(f"{prefix}.source"), settings.take(f"{prefix}.data_files")
    if isinstance(files, list) and len(files) > 1:
        notes.append(Lost(f"{files[0]} alone is taken", f"{prefix}.data_files"))
    files = files[0] if isinstance(files, list) else files
    local = source in FILE_TYPES
    part["path"] = (files if local else source) or part.get("path") or "rows.jsonl"
    if name not in SETS:
        said = "no such builder here: its rows are recognised by their columns; give data.path=FILE"
        notes.append(Lost(said, f"{prefix}.{COMPONENT}"))
    elif source is None and part["path"] == "rows.jsonl":
        notes.append(Lost("no rows are named: give data.path=FILE", f"{prefix}.source"))
    if files and not local:
        part["data_files"] = files
    if (subset := settings.take(f"{prefix}.name") or settings.take(f"{prefix}.subset")) is not None:
        part["subset"] = subset
    notes += _split(part, settings.take(f"{prefix}.split"), f"{prefix}.split")
    if settings.take(f"{prefix}.conversation_style") == "openai":
        part["format"] = "messages"
    if settings.take(f"{prefix}.add_eos") is False:
        notes.append(Lost("a text ends with the end token", f"{prefix}.add_eos"))
    _columns(part, prefix, settings)
    if template is not None:
        part["format"] = AS_CHAT.get(part["format"], part["format"])
    return part, notes


def _split(part: dict[str, Any], split: Any, key: str) -> Iterator[Part]:
    """Yields what is lost of a split, of which `train[:100]` takes the first rows."""
    name, bracket, bounds = str(split or "train").partition("[")
    if name != "train":
        part["split"] = name
    if first := re.fullmatch(r":(\d+)\]", bounds):
        part["max_samples"] = int(first[1])
    elif bracket or "+" in name:
        yield Lost("a part of a split: take its first rows with data.max_samples", key)


def _columns(part: dict[str, Any], prefix: str, settings: Settings) -> None:
    columns: dict[str, str] = dict(part.pop("columns", {}))
    for key in [key for key in settings if key.startswith(f"{prefix}.column_map.")]:
        columns[key.rpartition(".")[2]] = str(settings.take(key))
    if (column := settings.take(f"{prefix}.conversation_column")) is not None:
        columns[part["format"]] = str(column)
    if (column := settings.take(f"{prefix}.column")) is not None:
        columns["text"] = str(column)
    if columns := {role: column for role, column in columns.items() if role != column}:
        part["columns"] = columns
