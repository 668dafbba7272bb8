"""What the rows of a run became, in numbers, and what a person must hear of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from qlora.data.encode import Counts, column
from qlora.data.packing import PackedRows
from qlora.data.sets import RowSet
from qlora.data.templates import suggest_template, suggest_thoughts
from qlora.schema import DataConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the rows became; all counts but those of held-out rows are over the rows to train on, lengths in tokens."""

    name: str
    format: str
    """The formats of its sets, in the order of `data.mix`."""
    recognised: str
    """Why, in words."""
    template: str | None
    """The chat template that wrote the conversations; None: there are none."""
    train_rows: int
    """Rows that a pass over the data shows."""
    eval_rows: int
    train_tokens: int
    trained_tokens: int
    """Tokens that the loss counts."""
    mean_length: float
    max_length: int
    cut_sources: int
    cut_targets: int
    stopping_rows: int
    """Rows whose last trained token is an end token: only they teach to stop."""
    left_out_rows: int
    """Rows left out by their format, such as answers marked as bad."""
    dropped_rows: int
    """Rows dropped because nothing in them is trained."""
    too_long_rows: int
    """Rows dropped by `data.on_too_long=drop`."""
    lost_thoughts: int
    """Trained turns whose thoughts the chat template leaves out."""
    lost_messages: int
    """Messages of system, user or tool that it leaves out."""
    held_out_in_training: int
    """Held-out rows that are equal, token for token, to a row that is trained on."""
    packs: int | None
    """Packs that the rows fill; None: not packed."""
    packed_share: float | None
    """Share of the packs' places that hold a token."""
    commits: list[str | None]
    """For each set the commit of the hub's repository that it comes from; None: it is from elsewhere."""
    fingerprint: str
    """16 hex digits of the SHA-256 of all tokens and labels in order; equal on every machine."""


def build_report(
    config: DataConfig,
    sets: Sequence[RowSet],
    train: Dataset | None,
    held_out: Dataset | None,
    counts: Sequence[Counts],
    packed: PackedRows | None,
    packed_share: float | None,
) -> DataReport:
    lengths = column(train, "length")
    digests = column(train, "digest"), column(held_out, "digest")
    fingerprint = hashlib.sha256()
    for part in digests:
        fingerprint.update(np.ascontiguousarray(part, dtype="<i8").data)
        fingerprint.update(b"|")
    return DataReport(
        name=config.name,
        format=", ".join(dict.fromkeys(part.choice.name for part in sets)),
        recognised="; ".join(dict.fromkeys(part.choice.why for part in sets)),
        template=next((part.template.name for part in sets if part.template), None),
        train_rows=len(lengths),
        eval_rows=0 if held_out is None else len(held_out),
        train_tokens=int(lengths.sum()),
        trained_tokens=int(column(train, "trained").sum()),
        mean_length=round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        max_length=int(lengths.max(initial=0)),
        cut_sources=int(column(train, "cut_source").sum()),
        cut_targets=int(column(train, "cut_target").sum()),
        stopping_rows=int(column(train, "stops").sum()),
        left_out_rows=sum(part.left_out for part in counts),
        dropped_rows=sum(part.untrained for part in counts),
        too_long_rows=sum(part.too_long for part in counts),
        lost_thoughts=sum(part.lost_thoughts for part in counts),
        lost_messages=sum(part.lost_messages for part in counts),
        held_out_in_training=_count_shared(*digests),
        packs=None if packed is None else len(packed),
        packed_share=packed_share,
        commits=[part.commit for part in sets],
        fingerprint=fingerprint.hexdigest()[:16],
    )


def _count_shared(train: np.ndarray, held_out: np.ndarray) -> int:
    """Returns how many of the few `held_out` are also in the many `train`, which are not sorted or copied."""
    few = pa.array(held_out)
    return int(np.isin(held_out, train[pc.is_in(pa.array(train), few).to_numpy(zero_copy_only=False)]).sum())


def log_losses(report: DataReport, config: DataConfig) -> None:
    """Says in one line what the rows to train on lost, if anything, and warns of held-out rows among them."""
    limit = f" (data.max_length={config.max_length})" if config.max_length else ""
    losses = (
        (report.cut_sources, f"sources cut at the beginning to data.source_max_len={config.source_max_len}{limit}"),
        (report.cut_targets, f"targets cut at the end to data.target_max_len={config.target_max_len}{limit}"),
        (report.dropped_rows, "rows dropped, nothing in them is trained"),
        (report.too_long_rows, "rows dropped as too long (data.on_too_long=drop)"),
        (report.left_out_rows, "rows left out by their format"),
    )
    said = [f"{count:,} {what}" for count, what in losses if count]
    rows = report.train_rows + report.dropped_rows + report.too_long_rows + report.left_out_rows
    if said:
        log.info("%s: of %s rows: %s", report.name, f"{rows:,}", "; ".join(said))
    if report.held_out_in_training:
        log.warning(
            "%s: %s of %s held-out rows are also trained on, word for word; what is measured on them is not held out",
            report.name,
            f"{report.held_out_in_training:,}",
            f"{report.eval_rows:,}",
        )


def warn_of_lost_texts(part: RowSet, counts: Sequence[Counts]) -> None:
    """Warns once of what the chat template of a set leaves out, in the rows to train on and those held out."""
    losses = (
        (sum(item.lost_thoughts for item in counts), "the thoughts of", "turn", "", suggest_thoughts),
        (
            sum(item.lost_messages for item in counts),
            "the text of",
            "message",
            " of system, user or tool",
            suggest_template,
        ),
    )
    for count, what, noun, whose, suggest in losses:
        if count and part.template is not None:
            log.warning(
                "%s: the chat template (%s) leaves out %s %s%s, so the model learns to answer without it; "
                "%s=%s writes all of it",
                part.part.shown,
                part.template.name,
                what,
                f"1 {noun}" if count == 1 else f"{count:,} {noun}s",
                whose,
                part.template_key,
                suggest(part.tokenizer),
            )
