"""Turns segments of text into token ids and labels, within the lengths of the config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from qlora.data.collate import IGNORED
from qlora.data.formats import Format, Segment
from qlora.data.sources import no_progress_bars
from qlora.errors import ConfigError
from qlora.schema import DataConfig

PARALLEL_ROWS = 50_000
"""Above so many rows several processes pay: a process costs about as much as tokenizing 10,000 rows."""
MAX_PROCESSES = 16

TOKENS = List(Value("int32"))
TRAIN_COLUMNS = {
    "input_ids": TOKENS,
    "labels": TOKENS,
    "length": Value("int32"),
    "trained": Value("int32"),
    "cut_source": Value("bool"),
    "cut_target": Value("bool"),
}
EVAL_COLUMNS = {"prompt_ids": TOKENS, "prompt": Value("string"), "reference": Value("string")}
TASK_COLUMN = "task"
"""The column of source rows that evaluation rows keep, for reports by task."""


class Encoded(NamedTuple):
    """One row in tokens."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    """Tokens before the first of a trained segment, `<bos>` included."""
    cut_source: bool
    cut_target: bool


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer with the lengths and the labels that a config asks for."""

    base: PreTrainedTokenizerBase
    bos: list[int]
    """The token that begins every row; empty where the tokenizer has none."""
    eos: int
    source_max_len: int
    target_max_len: int
    train_on_source: bool

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Encodes rows of segments, each segment on its own."""
        # Each text once: short answers and the words of templates come again and again.
        texts = list(dict.fromkeys(segment.text for row in rows for segment in row))
        pieces = dict(zip(texts, self._ids(texts), strict=True))
        return [self._join(row, [pieces[segment.text] for segment in row]) for row in rows]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A text that spells a special token ("</s>") is data: split_special_tokens reads it as plain characters.
        # verbose=False: what is longer than model_max_length is cut below, no need to warn.
        if not texts:
            return []
        return self.base(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _join(self, row: Sequence[Segment], pieces: list[list[int]]) -> Encoded:
        flags = [segment.trained for segment in row]
        if flags == [False, True]:
            return self._join_pair(*pieces)
        bos = self.bos
        # A row without any trained text teaches nothing, not even to stop.
        ids, labels = list(bos), [IGNORED] * len(bos)
        for piece, trained in zip(pieces, flags, strict=True):
            ids += piece
            labels += piece if trained or self.train_on_source else [IGNORED] * len(piece)
        if any(flags):
            ids.append(self.eos)
            labels.append(self.eos)
        limit = self.source_max_len + self.target_max_len
        leading = flags.index(True) if any(flags) else len(flags)
        prompt = len(bos) + sum(map(len, pieces[:leading]))
        return Encoded(ids[:limit], labels[:limit], min(prompt, limit), False, len(ids) > limit)

    def _join_pair(self, source: list[int], target: list[int]) -> Encoded:
        """Joins a prompt, which loses its beginning, and an answer, which loses its end and then `<eos>`."""
        bos = self.bos
        room = self.source_max_len - len(bos)
        kept = source[max(len(source) - room, 0) :]
        answer = [*target, self.eos]
        cut_target = len(answer) > self.target_max_len
        answer = answer[: self.target_max_len]
        source_labels = kept if self.train_on_source else [IGNORED] * len(kept)
        return Encoded(
            input_ids=[*bos, *kept, *answer],
            labels=[IGNORED] * len(bos) + source_labels + answer,
            prompt_length=len(bos) + len(kept),
            cut_source=len(kept) < len(source),
            cut_target=cut_target,
        )


def build_tokenizer(config: DataConfig, base: PreTrainedTokenizerBase) -> Tokenizer:
    """Sets a tokenizer's lengths and labels; raises `ConfigError` where it has no end token to teach."""
    if base.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {base.name_or_path!r} has no end token, so no answer could learn to stop; set eos_token "
            "in its tokenizer_config.json"
        )
    bos = [] if base.bos_token_id is None else [base.bos_token_id]
    return Tokenizer(base, bos, base.eos_token_id, config.source_max_len, config.target_max_len, config.train_on_source)


def tokenize(rows: Dataset, layout: Format, tokenizer: Tokenizer, *, for_eval: bool = False) -> Dataset:
    """Renders and encodes all rows, in order, in memory; a row in which nothing is trained is left out.

    Columns: those of `TRAIN_COLUMNS`, for evaluation also those of `EVAL_COLUMNS` and `task` where `rows` has it.
    """
    columns = dict(TRAIN_COLUMNS)
    if for_eval:
        columns |= EVAL_COLUMNS
        if TASK_COLUMN in rows.column_names:
            columns[TASK_COLUMN] = Value("string")
    processes = min(os.cpu_count() or 1, MAX_PROCESSES) if len(rows) > PARALLEL_ROWS else None
    with no_progress_bars():
        return rows.map(
            _encode_batch,
            fn_kwargs={"layout": layout, "tokenizer": tokenizer, "columns": list(columns), "forked": bool(processes)},
            batched=True,
            remove_columns=rows.column_names,
            features=Features(columns),
            num_proc=processes,
            keep_in_memory=True,
            load_from_cache_file=False,
            # Unset, `datasets` would hash the rows and pickle the tokenizer to name a cache that is not used.
            new_fingerprint=generate_random_fingerprint(),
        )


def _encode_batch(
    batch: dict[str, list[Any]], *, layout: Format, tokenizer: Tokenizer, columns: list[str], forked: bool
) -> dict[str, list[Any]]:
    """Encodes one batch of `Dataset.map`: columns in, columns out."""
    if forked:
        # One thread a process; it also spares the warning that tokenizers gives in a forked process.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = list(batch)
    sources = [dict(zip(names, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
    rendered = [layout.render(row) for row in sources]
    out: dict[str, list[Any]] = {name: [] for name in columns}
    for source, row, encoded in zip(sources, rendered, tokenizer.encode(rendered), strict=True):
        cells = _cells(source, row, encoded)
        if cells["trained"]:
            for name in columns:
                out[name].append(cells[name])
    return out


def _cells(source: Mapping[str, Any], row: Sequence[Segment], encoded: Encoded) -> dict[str, Any]:
    """Returns every column of one row; the prompt and the reference split it at the first trained segment."""
    leading = next((index for index, segment in enumerate(row) if segment.trained), len(row))
    return {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "length": len(encoded.input_ids),
        "trained": len(encoded.labels) - encoded.labels.count(IGNORED),
        "cut_source": encoded.cut_source,
        "cut_target": encoded.cut_target,
        "prompt_ids": encoded.input_ids[: encoded.prompt_length],
        "prompt": "".join(segment.text for segment in row[:leading]),
        "reference": "".join(segment.text for segment in row[leading:]).strip(),
        TASK_COLUMN: str(source.get(TASK_COLUMN, "")),
    }
