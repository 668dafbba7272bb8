"""How many tokens a training run reads in a pass, counted before anything is loaded: for the plan. Imports no torch.

The rows go the way that they go in training: split, rendered and tokenized, by the same code. Of many, some do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedTokenizerBase

from qlora.config.paths import cache_root
from qlora.config.registries.objectives import RowKind
from qlora.config.schema import DataConfig
from qlora.config.training_length import TokenCount
from qlora.data.batching.packing import efficiency, lengths_of, pack
from qlora.data.batching.token_store import column
from qlora.data.cache import Cache
from qlora.data.ingest.sources import is_file_path
from qlora.data.pipeline import row_sets
from qlora.models.embedded import ROWS
from qlora.upstream.transformers import decode

SAMPLE = 5000
"""Rows that are counted, of all sets together; their mean is within some percent."""
TOKEN_BYTES = 4
"""Bytes of text that a token of a large model holds, on average and in most languages."""
MEGABATCH = 50
"""Of 50 batches transformers' trainer sorts the rows by length, with `trainer.group_by_length`."""


def are_at_hand(config: DataConfig) -> bool:
    """Returns whether the rows can be read without a network: files, embedded ones, or what was downloaded before."""
    paths = [part.path for part in config.mix.values()] or [config.path]
    return all(path is not None and _is_here(path) for path in paths)


def _is_here(path: str) -> bool:
    if path.startswith(ROWS) or is_file_path(path):
        return True
    if ":" in path:  # a function of the user's, which a plan does not call
        return False
    return (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="dataset")).is_dir()


def count_tokens(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch: int = 1,
    grouped: bool = False,
    kind: RowKind = RowKind.tokens,
    shares_prompts: bool = False,
    units: int = 0,
) -> TokenCount:
    """Counts the tokens of the rows to train on, of `SAMPLE` of them where there are more.

    `batch` is the number of rows that are padded to the same length, of similar ones where they are `grouped`. A prompt
    that the answers of a pair share takes its room once. Of a stream a run takes `units` rows or packs. Raises a
    `UserError` as training would, for rows that it could not read.
    """

    def count(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        return lengths_of(rows, shares_prompts=shares_prompts).astype(int), column(rows, "trained")

    counts = _counts(config, tokenizer, count, kind, shares_prompts)
    if config.streaming:
        return _of_stream(config, counts, batch, units)
    counted = sum(len(count.lengths) for count in counts)
    estimate = f"by {counted:,} rows that were counted" if any(count.is_sample for count in counts) else ""
    return _total(config, counts, batch, grouped, estimate)


def guess_tokens(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    why: str,
    *,
    batch: int = 1,
    grouped: bool = False,
    kind: RowKind = RowKind.tokens,
    shares_prompts: bool = False,
) -> TokenCount:
    """Returns what the rows may have with another tokenizer than the given one, by their bytes; `why` says why."""

    def guess(rows: Dataset) -> tuple[np.ndarray, None]:
        others = (row.get("rejected_ids", [])[row["shared"] if shares_prompts else 0 :] for row in rows)
        texts = (decode(tokenizer, [*row["input_ids"], *other]) for row, other in zip(rows, others, strict=True))
        lengths = np.array([-(-len(text.encode()) // TOKEN_BYTES) for text in texts], int)
        return (lengths if config.longest_row is None else np.minimum(lengths, config.longest_row)), None

    whole = replace(config, max_length=None, source_max_len=None, target_max_len=None, packing=False, pack_length=None)
    counts = _counts(whole, tokenizer, guess, kind, shares_prompts)
    return _total(config, counts, batch, grouped, f"guessed at {TOKEN_BYTES} bytes a token, for {why}")


class Count(NamedTuple):
    """What was counted of a set."""

    lengths: np.ndarray
    """Tokens of the rows that were counted."""
    targets: np.ndarray | None
    """How many of each row's tokens the loss counts; None: they were not counted."""
    rows: int
    """How many rows a pass shows."""
    is_sample: bool
    """Whether there are rows that were not counted."""
    attended: float
    """The tokens of all rows for each in `lengths`: more than 1 where answers share prompts."""


def _counts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    measure: Callable[[Dataset], tuple[np.ndarray, np.ndarray | None]],
    kind: RowKind,
    shares_prompts: bool,
) -> list[Count]:
    sets = row_sets(config, tokenizer, Cache(cache_root(config.cache_dir)), kind)
    counts = []
    for part in sets:
        encoded, kept = part.train(SAMPLE // len(sets))
        count = round(part.rows_to_train * len(encoded) / kept.rows * part.part.fields.weight)
        attended = column(encoded, "length").sum() / lengths_of(encoded, shares_prompts=shares_prompts).sum()
        counts.append(Count(*measure(encoded), max(count, 1), kept.rows < part.rows_to_train, float(attended)))
    return counts


def _total(config: DataConfig, counts: list[Count], batch: int, grouped: bool, estimate: str) -> TokenCount:
    lengths = np.concatenate([count.lengths for count in counts])
    rows = sum(count.rows for count in counts)
    computed = sum(count.rows * float(count.lengths.mean()) for count in counts)
    tokens = sum(count.rows * float(count.lengths.mean()) * count.attended for count in counts)
    attended = tokens / computed
    by_row = [count.targets for count in counts if count.targets is not None]
    targets = np.concatenate(by_row) if len(by_row) == len(counts) else None
    all_targets = sum(count.rows * float(count.targets.mean()) for count in counts if count.targets is not None)
    if config.max_train_samples is not None and rows > config.max_train_samples:
        fraction = config.max_train_samples / rows
        rows, tokens, all_targets = config.max_train_samples, tokens * fraction, all_targets * fraction
    trained = None if targets is None else round(all_targets)
    if (width := config.pack_width) is not None:
        members = pack(lengths, width)
        units = max(round(tokens / attended / (efficiency(members, lengths, width) * width)), 1)
        most = None if targets is None else max(int(targets[indices].sum()) for indices in members)
        return TokenCount(units, "packs", round(tokens), float(width), estimate, trained, most, attended)
    most = None if targets is None else int(targets.max())
    padded = padded_length(lengths, batch, grouped=grouped)
    return TokenCount(rows, "rows", round(tokens), padded, estimate, trained, most, attended)


def _of_stream(config: DataConfig, counts: list[Count], batch: int, units: int) -> TokenCount:
    """Returns what a run on `units` rows or packs of a stream reads, by the first rows of each set."""
    shares = np.array(config.probabilities)
    mean = float(shares @ [count.lengths.mean() for count in counts])
    targets = float(shares @ [count.targets.mean() for count in counts if count.targets is not None])
    counted = sum(len(count.lengths) for count in counts)
    estimate = f"by the first {counted:,} rows of the stream"
    width = config.pack_width
    if width is not None:
        lengths = np.concatenate([count.lengths for count in counts])
        tokens = units * width * efficiency(pack(lengths, width), lengths, width)
        return TokenCount(units, "packs", round(tokens), float(width), estimate, round(tokens * targets / mean))
    lengths = np.concatenate([count.lengths for count in counts])
    padded = padded_length(lengths, batch, grouped=False)
    return TokenCount(units, "rows", round(units * mean), padded, estimate, round(units * targets))


def padded_length(lengths: np.ndarray, batch: int, *, grouped: bool) -> float:
    """Returns the mean length of a row with its padding."""
    order = np.random.RandomState(0).permutation(lengths)
    if grouped:
        size = batch * MEGABATCH
        order = np.concatenate([np.sort(order[start : start + size]) for start in range(0, len(order), size)])
    padded = [order[start : start + batch].max() for start in range(0, len(order), batch)]
    return float(np.mean(padded))
