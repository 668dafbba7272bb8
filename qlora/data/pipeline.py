"""From a config to the rows to train and measure on, with a report of what was kept and what was cut."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qlora.data.formats import FORMATS, choose_format
from qlora.data.sources import HELD_OUT_SPLITS, load_rows
from qlora.data.tokenize import Tokenizer, build_tokenizer, tokenize
from qlora.errors import ConfigError
from qlora.schema import DataConfig

log = logging.getLogger(__name__)

COUNTS = ["trained", "cut_source", "cut_target"]
"""Columns that the report adds up and that are dropped then."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the rows became; all counts but `eval_rows` are over the rows to train on, lengths are in tokens."""

    name: str
    format: str
    train_rows: int
    eval_rows: int
    train_tokens: int
    trained_tokens: int
    """Tokens that the loss counts."""
    mean_length: float
    max_length: int
    cut_sources: int
    cut_targets: int
    dropped_rows: int
    """Rows left out because nothing in them is trained."""
    fingerprint: str
    """16 hex digits of the SHA-256 of all tokens and labels in order; equal on every machine."""


@dataclass(frozen=True, slots=True)
class Data:
    """Rows in tokens: input_ids, labels, length; for `eval` also prompt_ids, prompt, reference and maybe task."""

    train: Dataset | None
    eval: Dataset | None
    report: DataReport


def build_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, need_train: bool = True, need_eval: bool = True
) -> Data:
    """Loads, splits and tokenizes the rows that are needed.

    The split is the same whatever is needed, so that a later evaluation meets no row that was trained on.
    """
    encoder = build_tokenizer(config, tokenizer)
    name, train_rows, eval_rows = _select_rows(config, need_train, need_eval)
    train = tokenize(train_rows, FORMATS[name], encoder) if train_rows is not None else None
    held_out = tokenize(eval_rows, FORMATS[name], encoder, for_eval=True) if eval_rows is not None else None
    _check_trained(train_rows, train, f"data.path={config.path}")
    _check_trained(eval_rows, held_out, f"data.eval_path={config.eval_path}")
    report = _report(config, name, train_rows, train, held_out)
    _log_losses(report, encoder)
    return Data(_without_counts(train), _without_counts(held_out), report)


def _select_rows(config: DataConfig, need_train: bool, need_eval: bool) -> tuple[str, Dataset | None, Dataset | None]:
    """Returns the name of the format and the raw rows to train and measure on."""
    if config.eval_path is not None:
        return _load_both(config, need_train, need_eval)
    limit = config.max_train_samples and config.max_train_samples + config.eval_dataset_size
    rows = _load_main(config, limit)
    name = choose_format(config.format, rows.column_names)
    size = config.eval_dataset_size
    if size >= len(rows):
        raise ConfigError(
            f"data.eval_dataset_size={size} leaves no row to train on: {config.path} has {len(rows)}; set "
            f"data.eval_dataset_size={max(len(rows) // 10, 1)}, or hold rows of your own out with data.eval_path=FILE"
        )
    order = _permutation(len(rows), config.split_seed)
    held_out, training = order[:size], order[size:]
    return (
        name,
        rows.select(training[: config.max_train_samples]) if need_train else None,
        rows.select(np.sort(held_out[: config.max_eval_samples])) if need_eval else None,
    )


def _load_both(config: DataConfig, need_train: bool, need_eval: bool) -> tuple[str, Dataset | None, Dataset | None]:
    """Loads rows to train on and rows to measure on, each from its own path; one format renders both."""
    name, train, held_out = config.format, None, None
    if need_train:
        train = _load_main(config, config.max_train_samples)
        name = choose_format(name, train.column_names)
        train = train.select(_permutation(len(train), config.split_seed)[: config.max_train_samples])
    if need_eval:
        assert config.eval_path is not None
        subset = config.subset if config.eval_path == config.path else None
        held_out = load_rows(
            config.eval_path, subset=subset, split=HELD_OUT_SPLITS, limit=config.max_eval_samples, key="data.eval_path"
        )
        name = choose_format(name, held_out.column_names, key="data.eval_path")
        order = _permutation(len(held_out), config.split_seed)[: config.max_eval_samples]
        held_out = held_out.select(np.sort(order))
    return name, train, held_out


def _load_main(config: DataConfig, limit: int | None) -> Dataset:
    assert config.path is not None, "DataConfig checks it"
    return load_rows(config.path, subset=config.subset, split=config.split, data_files=config.data_files, limit=limit)


def _permutation(count: int, seed: int) -> np.ndarray:
    # RandomState's stream is frozen (NEP 19); that of numpy's default_rng may change between versions.
    return np.random.RandomState(seed).permutation(count)


def _check_trained(rows: Dataset | None, encoded: Dataset | None, shown: str) -> None:
    if rows is not None and encoded is not None and not len(encoded):
        raise ConfigError(
            f"{shown}: none of the {len(rows)} rows has a token to train on; either no segment is marked as trained, "
            "or the first that is lies beyond data.source_max_len + data.target_max_len"
        )


def _report(
    config: DataConfig, name: str, rows: Dataset | None, train: Dataset | None, held_out: Dataset | None
) -> DataReport:
    lengths = _column(train, "length")
    return DataReport(
        name=config.name,
        format=name,
        train_rows=len(lengths),
        eval_rows=0 if held_out is None else len(held_out),
        train_tokens=int(lengths.sum()),
        trained_tokens=int(_column(train, "trained").sum()),
        mean_length=round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        max_length=int(lengths.max(initial=0)),
        cut_sources=int(_column(train, "cut_source").sum()),
        cut_targets=int(_column(train, "cut_target").sum()),
        dropped_rows=len(rows) - len(lengths) if rows is not None else 0,
        fingerprint=_fingerprint(train, held_out),
    )


def _column(rows: Dataset | None, name: str) -> np.ndarray:
    return np.empty(0, int) if rows is None else rows.data.column(name).to_numpy()


def _fingerprint(*parts: Dataset | None) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        if rows is None:
            digest.update(b"none")
            continue
        for name in ("input_ids", "labels"):
            # Lengths first, then values: how rows are cut into chunks must not show.
            digest.update(pc.list_value_length(rows.data.column(name)).to_numpy().astype("<i4").tobytes())
            for chunk in rows.data.column(name).chunks:
                digest.update(chunk.flatten().to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def _log_losses(report: DataReport, limits: Tokenizer) -> None:
    """Says in one line what the lengths cost the rows to train on, if anything."""
    losses = (
        (report.cut_sources, f"sources cut at the beginning to data.source_max_len={limits.source_max_len}"),
        (report.cut_targets, f"targets cut at the end to data.target_max_len={limits.target_max_len}"),
        (report.dropped_rows, "rows dropped, nothing in them is trained"),
    )
    said = [f"{count} {what}" for count, what in losses if count]
    if said:
        log.info("%s: of %d rows: %s", report.name, report.train_rows + report.dropped_rows, "; ".join(said))


def _without_counts(rows: Dataset | None) -> Dataset | None:
    return None if rows is None else rows.remove_columns(COUNTS)
