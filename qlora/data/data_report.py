"""What the rows of a run became, in numbers, and what a person must hear of it."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from qlora.config.schema import DataConfig, OnEmpty
from qlora.data.batching.packing import PackedRows
from qlora.data.batching.token_store import Counts, column
from qlora.data.chat.templates import suggest_template, suggest_thoughts
from qlora.data.data_set import RowSet
from qlora.text import listed, plural

log = logging.getLogger(__name__)

MOST_NAMED = 5
"""Held-out rows that a warning names."""


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
    empty_rows: int
    """Rows dropped because their answers are empty."""
    empty_answers: int
    """Empty answers in rows that are kept, held-out rows too: without loss, or with `data.on_empty=train` trained."""
    equal_rows: int
    """Pairs dropped because both sides hold the same tokens."""
    unordered_rows: int
    """Pairs dropped because their scores do not put the chosen side first."""
    eval_left_out_rows: int
    eval_dropped_rows: int
    eval_too_long_rows: int
    eval_empty_rows: int
    eval_equal_rows: int
    eval_unordered_rows: int
    """Held-out rows that are not measured on, for the same reasons."""
    unread: dict[str, int]
    """Columns, and keys of objects in them (`COLUMN.KEY`), that nothing reads: how often they hold something, in rows
    to train on and in held-out rows."""
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
    near_rows: list[str] = field(default_factory=list)
    """Held-out rows that are nearly equal to a row that is trained on, each with that one and how near it is, where
    `data.overlap=near` looks for them."""
    streamed: bool = False
    """Whether rows are streamed; the numbers of rows to train on are then those of the first of them."""

    @property
    def lost_rows(self) -> int:
        """Rows to train on that are not trained on."""
        of_pairs = self.equal_rows + self.unordered_rows
        return self.left_out_rows + self.dropped_rows + self.too_long_rows + self.empty_rows + of_pairs

    @property
    def eval_lost_rows(self) -> int:
        """Held-out rows that are not measured on."""
        unmeasured = self.eval_left_out_rows + self.eval_dropped_rows + self.eval_too_long_rows
        return unmeasured + self.eval_empty_rows + self.eval_equal_rows + self.eval_unordered_rows

    def describe_held_out(self) -> str:
        """Says how many rows are held out: "4 held out", "2 held out (4, but 2 are dropped)"."""
        lost = self.eval_lost_rows
        detail = f" ({self.eval_rows + lost:,}, but {lost:,} are dropped)" if lost else ""
        return f"{self.eval_rows:,} held out{detail}"


def build_report(
    config: DataConfig,
    sets: Sequence[RowSet],
    train: Dataset | None,
    held_out: Dataset | None,
    counts: Sequence[Counts],
    eval_counts: Sequence[Counts],
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
        empty_rows=sum(part.empty for part in counts),
        empty_answers=sum(part.empty_answers for part in (*counts, *eval_counts)),
        equal_rows=sum(part.equal for part in counts),
        unordered_rows=sum(part.unordered for part in counts),
        eval_left_out_rows=sum(part.left_out for part in eval_counts),
        eval_dropped_rows=sum(part.untrained for part in eval_counts),
        eval_too_long_rows=sum(part.too_long for part in eval_counts),
        eval_empty_rows=sum(part.empty for part in eval_counts),
        eval_equal_rows=sum(part.equal for part in eval_counts),
        eval_unordered_rows=sum(part.unordered for part in eval_counts),
        unread=dict(sum((Counter(part.unread) for part in (*counts, *eval_counts)), Counter())),
        lost_thoughts=sum(part.lost_thoughts for part in counts),
        lost_messages=sum(part.lost_messages for part in counts),
        held_out_in_training=_count_shared(*digests),
        packs=None if packed is None else len(packed),
        packed_share=packed_share,
        commits=[part.commit for part in sets],
        fingerprint=fingerprint.hexdigest()[:16],
        streamed=config.streaming,
    )


def _count_shared(train: np.ndarray, held_out: np.ndarray) -> int:
    """Returns how many of the few `held_out` are also in the many `train`, which are not sorted or copied."""
    few = pa.array(held_out)
    return int(np.isin(held_out, train[pc.is_in(pa.array(train), few).to_numpy(zero_copy_only=False)]).sum())


def log_losses(report: DataReport, config: DataConfig) -> None:
    """Says in a line each what the rows lost and what nothing reads, and warns of what should not be."""
    # The other limits together may leave no row of that length.
    limit = (
        f" (data.max_length={config.max_length})"
        if config.max_length and config.longest_row == config.max_length
        else ""
    )
    cut_source, cut_target = (
        "" if getattr(config, key) is None else f" to data.{key}={getattr(config, key)}"
        for key in ("source_max_len", "target_max_len")
    )
    losses = (
        (report.cut_sources, f"sources cut at the beginning{cut_source}{limit}"),
        (report.cut_targets, f"targets cut at the end{cut_target}{limit}"),
        (report.dropped_rows, "rows dropped, nothing in them is trained"),
        (report.too_long_rows, "rows dropped as too long (data.on_too_long=drop)"),
        (report.empty_rows, "rows dropped, their answers are empty (data.on_empty=drop)"),
        (report.left_out_rows, "rows left out by their format"),
        (report.equal_rows, "pairs dropped, both sides are equal"),
        (report.unordered_rows, "pairs dropped, their scores do not put the chosen side first"),
    )
    first = "the first " if report.streamed else ""
    _log_counts(losses, f"{report.name}: of {first}{report.train_rows + report.lost_rows:,} rows")
    held_out = (
        (report.eval_dropped_rows, "dropped, nothing in them is trained"),
        (report.eval_too_long_rows, "dropped as too long (data.on_too_long=drop)"),
        (report.eval_empty_rows, "dropped, their answers are empty (data.on_empty=drop)"),
        (report.eval_left_out_rows, "left out by their format"),
        (report.eval_equal_rows, "dropped, both sides are equal"),
        (report.eval_unordered_rows, "dropped, their scores do not put the chosen side first"),
    )
    _log_counts(held_out, f"{report.name}: of {report.eval_rows + report.eval_lost_rows:,} held-out rows")
    if report.unread:
        log.info("%s: not read: %s", report.name, describe_unread(report))
    for warning in data_warnings(report, config):
        log.warning("%s: %s", report.name, warning)


def _log_counts(counts: Sequence[tuple[int, str]], lead: str) -> None:
    if said := [f"{count:,} {what}" for count, what in counts if count]:
        log.info("%s: %s", lead, "; ".join(said))


def describe_unread(report: DataReport) -> str:
    """Lists what nothing reads, most of it first: "id, context (in 5 of 20 rows), messages.refusal (in 3)"."""
    rows = report.train_rows + report.eval_rows + report.lost_rows + report.eval_lost_rows
    rows -= report.left_out_rows + report.eval_left_out_rows
    keys = sorted(report.unread.items(), key=lambda item: -item[1])
    return listed(
        f"{key} (in {count:,})" if "." in key else f"{key} (in {count:,} of {rows:,} rows)" if count < rows else key
        for key, count in keys
    )


def data_warnings(report: DataReport, config: DataConfig) -> list[str]:
    """Returns what a person should see about the rows before a training run."""
    trained = config.on_empty is OnEmpty.train
    empty = report.empty_answers if trained else report.empty_rows + report.eval_empty_rows + report.empty_answers
    are = "is" if empty == 1 else "are"
    fate = f"{are} trained, an end token alone" if trained else f"{are} not trained"
    shared = report.held_out_in_training
    near, more = len(report.near_rows), f"; and {len(report.near_rows) - MOST_NAMED:,} more in manifest.json"
    named = "; ".join(report.near_rows[:MOST_NAMED]) + (more if near > MOST_NAMED else "")
    warnings = (
        (empty, f"{plural(empty, 'answer')} {are} empty and {fate} (data.on_empty={config.on_empty.value})"),
        (
            report.held_out_in_training,
            f"{shared:,} of {plural(report.eval_rows, 'held-out row')} {'is' if shared == 1 else 'are'} also trained "
            "on, word for word, so the model is measured on what it has seen",
        ),
        (
            near,
            f"{near:,} of {plural(report.eval_rows, 'held-out row')} {'is' if near == 1 else 'are'} nearly equal to a "
            f"row that is trained on: {named}",
        ),
    )
    return [text for count, text in warnings if count]


def warn_of_lost_texts(part: RowSet, counts: Sequence[Counts]) -> None:
    """Warns once of what the chat template of a set leaves out, in the rows to train on and those held out."""
    thoughts, messages = sum(item.lost_thoughts for item in counts), sum(item.lost_messages for item in counts)
    losses = (
        (thoughts, f"the thoughts of {plural(thoughts, 'turn')}", "them", suggest_thoughts),
        (messages, f"the text of {plural(messages, 'message')} of system, user or tool", "it", suggest_template),
    )
    for count, what, them, suggest in losses:
        if count and part.template is not None:
            log.warning(
                "%s: the chat template (%s) leaves out %s, so the model learns to answer without %s; %s=%s writes all "
                "of %s",
                *(part.part.label, part.template.name, what, them, part.template_key, suggest(part.tokenizer), them),
            )
