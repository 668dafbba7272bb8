"""Renders and tokenizes whole sets in chunks, in parallel, into a memory-mapped Arrow file with the counts of it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qlora.config.registries.objectives import WHOLE_TEXTS, RowKind
from qlora.config.schema import OnEmpty, OnTooLong
from qlora.data.batching.row_encoder import Encoded, RowEncoder
from qlora.data.batching.shared_prompts import count_shared
from qlora.data.chat.answer_weights import settle
from qlora.data.chat.conversations import Conversation
from qlora.data.formats.cells import Row, TrackedRow, take_rows
from qlora.data.formats.prompts import AnyExample, Example, Labelled, Pair, WholeText, sides
from qlora.data.formats.questions import asks
from qlora.data.formats.renderers import Format
from qlora.errors import DataError, UserError
from qlora.runtime import console
from qlora.runtime.workers import Part, Result, run_parts

CHUNK: Final = 1000
CHUNK_BYTES: Final = 2**18
"""About so much text is in a chunk of long rows: its memory stays small, and every process gets some."""
BATCH_BYTES: Final = 2**22
"""About so much is written as one batch: opening the file, or reading one column, touches memory for each batch."""
PARALLEL_BYTES: Final = 2**22
"""Above so much text several processes pay: the others import for about two seconds before they begin."""
MAX_PROCESSES: Final = 16
REOPEN: Final = 50
"""After this many chunks a process maps the rows anew, so that what it has read does not stay in its memory."""

TOKENS: Final = pa.list_(pa.int32())
COLUMNS: Final = {
    "input_ids": TOKENS,
    "labels": TOKENS,
    "length": pa.int32(),
    "source": pa.int32(),
    "target": pa.int32(),
    "trained": pa.int32(),
    "cut_source": pa.bool_(),
    "cut_target": pa.bool_(),
    "stops": pa.bool_(),
    "row": pa.int64(),
    "digest": pa.int64(),
}
EVAL_COLUMNS: Final = {"prompt_ids": TOKENS, "prompt": pa.string(), "reference": pa.string()}
KIND_COLUMNS: Final[dict[RowKind, dict[str, pa.DataType]]] = {
    RowKind.tokens: {},
    RowKind.pairs: {
        "answer_start": pa.int32(),
        "rejected_ids": TOKENS,
        "rejected_labels": TOKENS,
        "shared": pa.int32(),
    },
    RowKind.labelled: {"answer_start": pa.int32(), "desirable": pa.bool_()},
    RowKind.classes: {"label": pa.string()},
    RowKind.values: {"values": pa.list_(pa.float64())},
    RowKind.texts: {"partners": pa.list_(TOKENS), "values": pa.list_(pa.float64())},
}
"""What rows of other kinds hold besides; `qlora.data.formats.preferences` and `whole_texts` say what it means.
`shared` is the number of tokens that both sides of a pair begin with, their labels included."""
TASK_COLUMN: Final = "task"
"""The column of source rows that evaluation rows keep, for reports by task."""

UNREAD: Final = "unread:"
"""Stands before the keys that nothing reads among the counts of a chunk."""

TOKENS_FILE: Final = "tokens.arrow"
COUNTS_FILE: Final = "counts.json"


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows of a set."""

    rows: int = 0
    """Rows that were read."""
    left_out: int = 0
    """Rows that their format leaves out, e.g. answers marked as bad."""
    untrained: int = 0
    """Examples dropped because no token of them would be trained."""
    switched_off: int = 0
    """Those of them whose answers are all switched off."""
    only_thoughts: int = 0
    """Those of them whose answers hold thoughts alone, which the chat template leaves out."""
    too_long: int = 0
    """Examples dropped by `on_too_long=drop`."""
    empty: int = 0
    """Examples dropped because their answers are empty."""
    empty_answers: int = 0
    """Empty answers in examples that are kept."""
    unread: dict[str, int] = field(default_factory=dict)
    """Columns, and keys of objects in them (`COLUMN.KEY`), that nothing reads: how often they hold something."""
    equal: int = 0
    """Pairs dropped because both sides hold the same tokens."""
    unordered: int = 0
    """Pairs dropped because their scores do not put the chosen side first."""
    lost_thoughts: int = 0
    """Trained turns whose thoughts the chat template leaves out."""
    lost_messages: int = 0
    """Messages of others than the assistant that it leaves out."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to encode any chunk of a set."""

    rows: Dataset
    order: np.ndarray | None
    """Indices of the rows to take; None: all."""
    layout: Format
    tokenizer: RowEncoder
    on_empty: OnEmpty
    for_eval: bool
    label: str
    """The key and the path, for messages."""
    questions: bool = False
    """Whether rows may ask and hold no answer."""
    kind: RowKind = RowKind.tokens
    """What its format renders a row as."""

    def __len__(self) -> int:
        return len(self.rows) if self.order is None else len(self.order)

    @property
    def row_bytes(self) -> float:
        """The mean size of a source row."""
        return float(self.rows.data.nbytes / max(self.rows.data.num_rows, 1))

    @property
    def schema(self) -> pa.Schema:
        """The columns of the encoded rows."""
        columns = COLUMNS | KIND_COLUMNS[self.kind]
        if self.for_eval:
            columns |= EVAL_COLUMNS
            if TASK_COLUMN in self.rows.column_names:
                columns[TASK_COLUMN] = pa.string()
        return pa.schema(columns)


class _PendingRow(NamedTuple):
    """An example that is to be tokenized."""

    example: AnyExample
    row: int
    task: str
    empty: int
    """Its empty answers."""
    asks: bool = False
    """Whether it ends where the answer would begin."""


def encode(job: Job, folder: Path, *, processes: int | None = None) -> None:
    """Writes the encoded rows of a job, in order, with their counts into an existing folder.

    A row in which nothing is trained is left out. Only some chunks are in memory at a time.
    """
    total: Counter[str] = Counter()
    with (
        pa.OSFile(str(folder / TOKENS_FILE), "wb") as sink,
        pa.ipc.new_stream(sink, job.schema) as writer,
        console.progress("tokenizing", len(job)) as advance,
        closing(_chunks(job, processes or _processes(job), folder)) as chunks,
    ):
        waiting: list[pa.RecordBatch] = []
        for batch, counts in chunks:
            waiting.append(batch)
            if sum(part.nbytes for part in waiting) > BATCH_BYTES:
                writer.write_batch(pa.concat_batches(waiting))
                waiting.clear()
            total.update(counts)
            advance(total["rows"])
        if waiting:
            writer.write_batch(pa.concat_batches(waiting))
    (folder / COUNTS_FILE).write_text(json.dumps(asdict(sum_up(total))), encoding="utf-8")


def sum_up(total: Counter[str]) -> Counts:
    """Returns the counts of all chunks together."""
    names = {item.name for item in fields(Counts)}
    unread = {key.removeprefix(UNREAD): count for key, count in sorted(total.items()) if key.startswith(UNREAD)}
    return Counts(**{key: count for key, count in total.items() if key in names}, unread=unread)


def load_encoded(folder: Path) -> tuple[Dataset, Counts]:
    """Memory-maps what `encode` wrote."""
    counts = json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8"))
    return Dataset.from_file(str(folder / TOKENS_FILE)), Counts(**counts)


def column(rows: Dataset | None, name: str) -> np.ndarray:
    """Returns a column of numbers, in the order of the rows."""
    if rows is None:
        return np.empty(0, int)
    return rows.select_columns(name).with_format("arrow")[:][name].to_numpy()


def _processes(job: Job) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES) if len(job) * job.row_bytes > PARALLEL_BYTES else 1


def _chunks(job: Job, processes: int, folder: Path) -> Generator[Result, None, None]:
    size = min(max(int(CHUNK_BYTES / max(job.row_bytes, 1)), 1), CHUNK)
    parts = [(start, min(start + size, len(job))) for start in range(0, len(job), size)]
    encoder = _Encoder(job)
    # Rows that lie in memory would lie in that of every process.
    if processes > 1 and len(parts) > 1 and job.rows.cache_files:
        yield from run_parts(encoder, parts, processes=processes, folder=folder, label=job.label)
    else:
        yield from map(encoder, parts)


class _Encoder:
    """Encodes the chunks of a job in one process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.chunks = 0
        self.mapped = pickle.dumps(job.rows) if job.rows.cache_files else None
        """The rows pickled, which is the paths of their files; None: they lie in memory."""

    def __call__(self, part: Part) -> Result:
        self.chunks += 1
        if self.mapped and self.chunks % REOPEN == 0:
            self.job = replace(self.job, rows=pickle.loads(self.mapped))
        return _encode_chunk(self.job, *part)


def _encode_chunk(job: Job, start: int, stop: int) -> Result:
    indices = np.arange(start, stop) if job.order is None else job.order[start:stop]
    return encode_rows(job, indices.tolist(), take_rows(job.rows, slice(start, stop) if job.order is None else indices))


def encode_rows(job: Job, numbers: Sequence[int], rows: Sequence[Row]) -> tuple[pa.RecordBatch, Counter[str]]:
    """Returns rows as a job encodes them, and what became of them; `numbers` say which ones of the set they are."""
    counts = Counter(rows=len(rows))
    pending: list[_PendingRow] = []
    for index, row in zip(numbers, rows, strict=True):
        try:
            pending += _render(job, index, row, counts)
        except UserError as error:
            raise DataError(f"{job.label}, row {index + 1}: {error}") from None
    kept, rows_kept, tasks_kept = [], [], []
    for encoded, pending_row in zip(_encode(job, pending), pending, strict=True):
        if (encoded.cut_source or encoded.cut_target) and not _stays(job, pending_row.row):
            counts["too_long"] += 1
        elif encoded.lacks_loss and not pending_row.asks:
            counts["untrained"] += 1
            counts["switched_off"] += _is_off(pending_row.example)
            counts["only_thoughts"] += bool(encoded.lost_thoughts) and not (encoded.cut_source or encoded.cut_target)
        elif encoded.is_equal_pair:
            counts["equal"] += 1
        else:
            counts["empty_answers"] += pending_row.empty
            counts["lost_thoughts"] += encoded.lost_thoughts
            counts["lost_messages"] += encoded.lost_messages
            kept.append(encoded)
            rows_kept.append(pending_row.row)
            tasks_kept.append(pending_row.task)
    return _record_batch(job, kept, rows_kept, tasks_kept), counts


def _is_off(example: AnyExample) -> bool:
    """Tells whether a chat has answers, but all of them are switched off."""
    if not isinstance(example, Conversation):
        return False
    weights = [message.get("weight", 1) for message in example.messages if message["role"] == "assistant"]
    return bool(weights) and not any(weights)


def _render(job: Job, index: int, row: Row, counts: Counter[str]) -> Iterator[_PendingRow]:
    """Yields what is to be tokenized of a row, and counts what is not, with the keys that nothing read."""
    tracked = TrackedRow(row)
    examples = job.layout.render(tracked)
    task = str(tracked.get(TASK_COLUMN, ""))
    counts["left_out"] += not examples
    for key in tracked.unread() if examples else ():
        counts[f"{UNREAD}{key}"] += 1
    for example in examples:
        if isinstance(example, WholeText):
            yield _PendingRow(example, index, task, 0)
            continue
        if isinstance(example, Pair) and (example.unordered or example.is_equal):
            counts["equal" if example.is_equal else "unordered"] += 1
            continue
        if job.questions and not isinstance(example, Pair | Labelled) and asks(example):
            yield _PendingRow(example, index, task, 0, asks=True)
            continue
        settled = [settle(side, job.on_empty, job.tokenizer.train_on) for side in sides(example)]
        kept = [side.example for side in settled if side.example is not None]
        if len(kept) < len(settled):
            counts["empty"] += 1
        else:
            yield _PendingRow(_with_sides(example, kept), index, task, sum(side.empty for side in settled))


def _with_sides(example: AnyExample, settled: list[Example]) -> AnyExample:
    if isinstance(example, Pair):
        return Pair(settled[0], settled[1])
    return Labelled(settled[0], example.desirable) if isinstance(example, Labelled) else settled[0]


def _encode(job: Job, pending: list[_PendingRow]) -> list[Encoded]:
    asking = [pending_row for pending_row in pending if pending_row.asks]
    if asking:
        answered = iter(_encode(job, [pending_row for pending_row in pending if not pending_row.asks]))
        return [_encode_question(job, pending_row) if pending_row.asks else next(answered) for pending_row in pending]
    try:
        return job.tokenizer.encode([pending_row.example for pending_row in pending])
    except UserError:
        for pending_row in pending:  # again, one by one, to name the row
            try:
                job.tokenizer.encode([pending_row.example])
            except UserError as error:
                raise DataError(f"{job.label}, row {pending_row.row + 1}: {error}") from None
        raise


def _encode_question(job: Job, pending_row: _PendingRow) -> Encoded:
    assert not isinstance(pending_row.example, Pair | Labelled | WholeText), "only rows of tokens may ask"
    try:
        return job.tokenizer.encode_question(pending_row.example)
    except UserError as error:
        raise DataError(f"{job.label}, row {pending_row.row + 1}: {error}") from None


def _stays(job: Job, index: int) -> bool:
    limits = job.tokenizer.limits
    if limits.on_too_long is OnTooLong.error:
        raise DataError(
            f"{job.label}, row {index + 1}: longer than data.source_max_len={limits.source_max_len}, "
            f"data.target_max_len={limits.target_max_len}, data.max_length={limits.max_length} allow; raise them, or "
            "set data.on_too_long=truncate or drop"
        )
    return limits.on_too_long is OnTooLong.truncate


def _record_batch(job: Job, kept: list[Encoded], rows: list[int], tasks: list[str]) -> pa.RecordBatch:
    ids = [np.asarray(encoded.input_ids, dtype=np.int32) for encoded in kept]
    labels = [np.asarray(encoded.labels, dtype=np.int32) for encoded in kept]
    cells: dict[str, Any] = {
        "input_ids": _lists(ids),
        "labels": _lists(labels),
        "length": [encoded.length for encoded in kept],
        "source": [encoded.source for encoded in kept],
        "target": [encoded.target for encoded in kept],
        "trained": [encoded.trained for encoded in kept],
        "cut_source": [encoded.cut_source for encoded in kept],
        "cut_target": [encoded.cut_target for encoded in kept],
        "stops": [job.tokenizer.stops(encoded) for encoded in kept],
        "row": rows,
        "digest": list(map(_digest, ids, labels, kept)),
    }
    if job.kind in WHOLE_TEXTS:
        cells |= {
            "label": [encoded.label for encoded in kept],
            "values": [list(encoded.values) for encoded in kept],
            "partners": [list(encoded.partners) for encoded in kept],
        }
    elif job.kind is not RowKind.tokens:
        cells |= _preference_cells(job.kind, kept)
    if job.for_eval:
        # Of a conversation the last answer is asked for: the turns before it are its prompt.
        turns = [encoded.turns[-1] for encoded in kept]
        prompts = [np.asarray(job.tokenizer.encode_asked(encoded), dtype=np.int32) for encoded in kept]
        cells["prompt_ids"] = _lists(prompts)
        cells["prompt"] = [turn.prompt for turn in turns]
        # A bad answer is nothing that an answer is compared with.
        is_bad = [encoded.desirable is False for encoded in kept]
        cells["reference"] = [None if bad else turn.reference for turn, bad in zip(turns, is_bad, strict=True)]
        cells[TASK_COLUMN] = tasks
    return pa.record_batch([pa.array(cells[field.name], type=field.type) for field in job.schema], schema=job.schema)


def _preference_cells(kind: RowKind, kept: list[Encoded]) -> dict[str, Any]:
    cells: dict[str, Any] = {"answer_start": [encoded.answer_start for encoded in kept]}
    if kind is RowKind.labelled:
        return cells | {"desirable": [encoded.desirable for encoded in kept]}
    others = [encoded.rejected for encoded in kept if encoded.rejected is not None]
    for name, rows in {
        "rejected_ids": [side.input_ids for side in others],
        "rejected_labels": [side.labels for side in others],
    }.items():
        cells[name] = _lists([np.asarray(row, dtype=np.int32) for row in rows])
    cells["shared"] = [
        count_shared((encoded.input_ids, encoded.labels), side) for encoded, side in zip(kept, others, strict=True)
    ]
    return cells


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.concatenate(rows) if rows else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))


def _digest(ids: np.ndarray, labels: np.ndarray, encoded: Encoded) -> int:
    """Returns 63 bits of a hash over ids and labels, both sides of a pair, and a label; equal on every machine."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8)
    digest.update(labels.astype("<i4").tobytes())
    for row in encoded.rejected or ():
        digest.update(np.asarray(row, dtype="<i4").tobytes())
    if encoded.desirable is not None:
        digest.update(bytes([encoded.desirable]))
    for text in encoded.partners:
        digest.update(np.asarray([len(text), *text], dtype="<i4").tobytes())
    if encoded.label is not None:
        digest.update(encoded.label.encode())
    if encoded.values:
        digest.update(np.asarray(encoded.values, dtype="<f8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1
