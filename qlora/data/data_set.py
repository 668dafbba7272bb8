"""One data set of a run: its rows, its format and template, which rows are held out, and its tokens from the cache."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from qlora.config.registries.objectives import WHOLE_TEXTS, RowKind
from qlora.config.schema import DataConfig, MixConfig, OnEmpty
from qlora.config.schema.data import MOST_HELD_OUT
from qlora.data.batching.item_stream import StreamedSet
from qlora.data.batching.row_encoder import build_encoder
from qlora.data.batching.token_store import Counts, Job, encode, load_encoded
from qlora.data.cache import Cache
from qlora.data.chat.conversations import Conversation
from qlora.data.chat.templates import Template, choose_template, prompt_template, suggest_thoughts
from qlora.data.formats.cells import take_rows
from qlora.data.formats.labels import LABELS, is_unlabelled, label_columns, label_number
from qlora.data.formats.prompts import ALPACA, Example, find_prompt, sides
from qlora.data.formats.questions import NAME as QUESTIONS
from qlora.data.formats.questions import choose_questions, is_whole_text
from qlora.data.formats.recognise import ANSWERS, Choice, choose_format
from qlora.data.ingest.row_stream import RowSource, file_sizes, open_stream
from qlora.data.ingest.sources import HELD_OUT_SPLITS, hub_commit, load_rows
from qlora.data.lost_characters import LostCharacters, find_lost
from qlora.errors import ConfigError, DataError, UserError, did_you_mean
from qlora.text import parse_size
from qlora.upstream.datasets import fingerprint

SAMPLE = 20
"""Rows that are looked at to recognise a format."""
READ_BACK = 200
"""Rows that are compared with what their tokens decode to."""
STREAM_SAMPLE = 500
"""Rows of a stream behind those that are held out, by which it is described before the run."""
LABEL_ROWS = 10_000
"""Rows whose labels are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """One data set: its fields in `data`, or in an entry of `data.mix`."""

    fields: MixConfig
    key: str
    """`data`, or `data.mix.NAME`."""
    path_name: str = "path"
    """The name of the path's field; `eval_path` for held-out rows of their own."""

    @property
    def path_key(self) -> str:
        return f"{self.key}.{self.path_name}"

    @property
    def label(self) -> str:
        return f"{self.path_key}={self.fields.path}"


@dataclass(frozen=True, slots=True)
class Questions:
    """That rows may hold no answer, and how they then ask."""

    template: Template | None
    """The chat template that was saved with what answers; None: the words of the instruction formats ask."""

    @property
    def between(self) -> str | None:
        """What stands between an instruction and its input in a message of the template."""
        if self.template is None:
            return None
        return ALPACA.between if json.dumps(ALPACA.between) in self.template.text else "\n\n"


class RowSet:
    """The rows of one data set, its format, and which of them are held out."""

    def __init__(
        self,
        config: DataConfig,
        part: Part,
        tokenizer: PreTrainedTokenizerBase,
        cache: Cache,
        questions: Questions | None = None,
        kind: RowKind = RowKind.tokens,
    ) -> None:
        self.config, self.part, self.tokenizer, self.cache, self.questions = config, part, tokenizer, cache, questions
        self.kind = kind
        """What a row is to the training objective."""
        self.total_rows: int | None = None
        """The rows of all sets of a mix together; None: this is the only set."""
        self.fraction = 1.0
        """How probable it is that a streamed row is one of this set."""

    @property
    def is_streamed(self) -> bool:
        """Whether the rows are read as they are needed."""
        return self.config.streaming and self.part.path_name != "eval_path"

    @cached_property
    def source(self) -> RowSource:
        """The rows to train on, where they are streamed."""
        held_out = self.config.held_out_of_stream(self.fraction)
        return self._open(self.part.fields.split, skip=held_out, limit=self.part.fields.max_samples)

    def _open(self, split: str, *, skip: int = 0, limit: int | None = None) -> RowSource:
        fields, key = self.part.fields, self.part.path_key
        return RowSource(
            partial(
                open_stream,
                fields.path,
                subset=fields.subset,
                split=split,
                revision=fields.revision,
                data_files=fields.data_files,
                max_row_bytes=parse_size(self.config.max_row_bytes) or 0,
                key=key,
            ),
            self.part.label,
            columns=fields.columns,
            columns_key=f"{self.part.key}.columns",
            skip=skip,
            limit=limit,
            sizes=file_sizes(fields.path, key),
        )

    @cached_property
    def rows(self) -> Dataset:
        """All rows of the split to train on, of a stream the first ones; of held-out rows of their own, all."""
        config = self.config
        if self.is_streamed:
            return self.source.head(self.source.skip + STREAM_SAMPLE, self.cache)
        if self.part.path_name == "eval_path":
            return self._load(HELD_OUT_SPLITS, config.max_eval_samples)
        if (most := self.part.fields.max_samples) is not None:
            rows = self._load(self.part.fields.split, most)
            return rows.select(range(min(most, len(rows))))
        limit = config.max_train_samples
        if limit is not None and config.splits_off:
            size = config.eval_dataset_size
            limit += MOST_HELD_OUT if size is None else int(max(size, 1))
        return self._load(self.part.fields.split, limit)

    def _load(self, split: str | tuple[str, ...], limit: int | None) -> Dataset:
        fields = self.part.fields
        return load_rows(
            fields.path,
            cache=self.cache,
            subset=fields.subset,
            split=split,
            revision=fields.revision,
            data_files=fields.data_files,
            limit=limit,
            max_row_bytes=parse_size(self.config.max_row_bytes) or 0,
            columns=fields.columns,
            may_lack=ANSWERS if self.questions is not None else (),
            key=self.part.path_key,
            columns_key=f"{self.part.key}.columns",
        )

    @property
    def commit(self) -> str | None:
        """The commit of the hub's repository that the rows come from; None: they are from elsewhere."""
        return hub_commit(self.rows)

    @cached_property
    def choice(self) -> Choice:
        """The format of the rows."""
        return self._choose(self.rows)

    def _choose(self, rows: Dataset) -> Choice:
        name, sample = self.part.fields.format, _sample(rows)
        asking = None
        if self.questions is not None:
            asking = choose_questions(rows.column_names, between=self.questions.between)
        try:
            choice = choose_format(
                name,
                rows.column_names,
                sample,
                key=self.part.path_key,
                reformulations=self.config.reformulations,
                kind=self.kind,
                pairs=self.config.pairs,
                label=self.config.label_columns,
                class_names=class_names(rows),
            )
        except UserError:
            if asking is None:
                raise
            return asking
        return asking if asking is not None and name == "auto" and is_whole_text(choice, sample) else choice

    @cached_property
    def template(self) -> Template | None:
        """The chat template, if the rows are conversations."""
        return self._template_for(self.rows, self.choice)

    @cached_property
    def chat_template(self) -> Template:
        """What is saved with an adapter, so that chat and serving ask as these rows do."""
        return self.template or prompt_template(find_prompt(self._examples(self.rows, self.choice)), self.tokenizer)

    def _template_for(self, rows: Dataset, choice: Choice) -> Template | None:
        if not any(isinstance(example, Conversation) for example in self._examples(rows, choice)):
            return None
        if self.questions is not None and self.questions.template is not None and choice.name == QUESTIONS:
            return self.questions.template
        return choose_template(self.part.fields.template or self.config.template, self.tokenizer, key=self.template_key)

    @property
    def template_key(self) -> str:
        """The key that chooses the template."""
        return "data.template" if self.part.fields.template is None else f"{self.part.key}.template"

    def _examples(self, rows: Dataset, choice: Choice) -> Iterator[Example]:
        """Renders the sample; raises `DataError` with the row that cannot be."""
        for number, row in enumerate(_sample(rows), 1):
            try:
                yield from (side for example in choice.format.render(row) for side in sides(example))
            except UserError as error:
                raise DataError(f"{self.part.label}, row {number}: {error}") from None

    @cached_property
    def split(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Returns the indices to train and to measure on, each in order; None: all rows, or none."""
        config, count = self.config, len(self.rows)
        if self.is_streamed:
            return self._split_stream(count)
        order = np.random.RandomState(config.split_seed).permutation(count)
        if not config.splits_off:
            few = config.max_train_samples is not None and not config.mix
            return (np.sort(order[: config.max_train_samples]) if few else None), None
        size = self._held_out_size(count)
        held_out, training = order[:size], order[size:]
        if not config.mix:
            training = training[: config.max_train_samples]
            held_out = held_out[: config.max_eval_samples]
        return np.sort(training), np.sort(held_out)

    def _split_stream(self, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the same of the first `count` rows of a stream, whose first ones are held out."""
        size, order = self.source.skip, np.arange(count)
        if size >= count:
            fewer = max(count // 10, 1) if count > 1 else 0
            raise ConfigError(
                f"{self.part.label}: its first {size:,} rows are held out, and it has {count:,}, which leaves none to "
                f"train on; set data.eval_dataset_size={fewer}, or hold rows of your own out with "
                "data.eval_path=FILE"
            )
        return order[size:], order[:size][: self.config.max_eval_samples] if self.config.splits_off else None

    @property
    def split_off(self) -> int:
        """How many rows are split off to measure on."""
        return 0 if self.split[1] is None else len(self.split[1])

    @property
    def holds_out(self) -> bool:
        """Whether there are rows of this set to measure on."""
        return self.split_off > 0 or not self.config.splits_off

    def _held_out_size(self, count: int) -> int:
        requested, key, total = self.config.eval_dataset_size, "data.eval_dataset_size", self.total_rows or count
        if not requested:  # null, or 0
            return min(round(self.config.held_out_count(total) * count / max(total, 1)), count // 4)
        size = max(round(requested * count if requested < 1 else requested * count / total), 1)
        if size >= count:
            fewer = f"set {key}={max(count // 10, 1)}, or " if count > 1 else ""
            raise ConfigError(
                f"{key}={requested:g} leaves no row to train on: {self.part.fields.path} has {count}; {fewer}hold rows "
                "of your own out with data.eval_path=FILE"
            )
        return size

    @property
    def rows_to_train(self) -> int:
        """How many rows are trained on, with those that nothing of may be left of once they are tokens."""
        return len(self.rows) if self.split[0] is None else len(self.split[0])

    def train(self, most: int | None = None) -> tuple[Dataset, Counts]:
        """Returns the rows to train on in tokens, at most `most` of them from all over the set; `weight` is not in
        it yet."""
        order, count = self.split[0], self.rows_to_train
        if most is not None and count > most:
            order = (np.arange(count) if order is None else order)[np.linspace(0, count - 1, most).astype(int)]
        return self._encode(self.rows, order, self.choice, self.template, for_eval=False)

    def find_lost(self) -> LostCharacters | None:
        """Returns the characters of some rows, from all over the set, that the tokenizer does not keep."""
        order = np.linspace(0, len(self.rows) - 1, min(len(self.rows), READ_BACK)).astype(int)
        examples = (example for row in take_rows(self.rows.select(order), slice(None)) for example in self._render(row))
        return find_lost(build_encoder(self.config, self.tokenizer, self.template), examples)

    def _render(self, row: dict[str, Any]) -> Iterator[Example]:
        """Renders a row that may be one which training drops."""
        with suppress(UserError):
            yield from (side for example in self.choice.format.render(row) for side in sides(example))

    def held_out(self) -> tuple[Dataset, Counts]:
        """Returns the rows of this set to measure on in tokens."""
        if self.config.splits_off:
            return self._encode(self.rows, self.split[1], self.choice, self.template, for_eval=True)
        limit, order = self.config.max_eval_samples, None
        if self.config.eval_split is None:
            rows, choice, template = self.rows, self.choice, self.template
        else:
            split = self.config.eval_split
            rows = (
                self._open(split).head(limit or MOST_HELD_OUT, self.cache)
                if self.is_streamed
                else self._load(split, limit)
            )
            choice = self._choose(rows)
            template = self._template_for(rows, choice)
        if limit is not None and limit < len(rows):
            order = np.sort(np.random.RandomState(self.config.split_seed).permutation(len(rows))[:limit])
        return self._encode(rows, order, choice, template, for_eval=True)

    def _encode(
        self,
        rows: Dataset,
        order: np.ndarray | None,
        choice: Choice,
        template: Template | None,
        *,
        for_eval: bool,
    ) -> tuple[Dataset, Counts]:
        label, job = self.part.label, self._job(rows, order, choice, template, for_eval=for_eval)
        key = self._key(job, choice)

        def tokenize(folder: Path) -> None:
            _check_labels(rows, LABELS if self.kind is RowKind.labelled else choice.format.labels, label)
            encode(job, folder, processes=self.config.num_proc)

        folder = self.cache.entry(key, tokenize)
        encoded, counts = load_encoded(folder)
        if not len(encoded):
            self.cache.discard(key)
            lacking = "held-out rows has a token to measure" if for_eval else "rows has a token to train on"
            others = (
                "; hold out another number of rows with data.eval_dataset_size (0: none), or draw others with "
                "data.split_seed"
            )
            way_out = others if for_eval and self.config.splits_off else ""
            raise DataError(f"{label}: none of the {counts.rows} {lacking}: {self._losses(counts)}{way_out}")
        self._check_columns(counts, choice)
        return encoded, counts

    def _job(
        self,
        rows: Dataset,
        order: np.ndarray | None,
        choice: Choice,
        template: Template | None,
        *,
        for_eval: bool,
    ) -> Job:
        tokenizer = build_encoder(self.config, self.tokenizer, template)
        label, asks = self.part.label, self._asks(choice)
        return Job(rows, order, choice.format, tokenizer, self.config.on_empty, for_eval, label, asks, self.kind)

    def streamed(self, number: int) -> StreamedSet:
        """Returns the rows to train on as they are read, of the set with this number."""
        return StreamedSet(number, self.source, self._job(self.rows, None, self.choice, self.template, for_eval=False))

    def _asks(self, choice: Choice) -> bool:
        """Returns whether rows of a format may hold no answer; an empty one may be meant as one."""
        return self.questions is not None and (choice.name == QUESTIONS or self.config.on_empty is not OnEmpty.train)

    def _losses(self, counts: Counts) -> str:
        """Says what became of rows of which none is left, and what keeps them."""
        limits = "raise data.source_max_len, data.target_max_len or data.max_length"
        template = f"{self.template_key}={suggest_thoughts(self.tokenizer)} writes them"
        rest = counts.untrained - counts.switched_off - counts.only_thoughts
        losses = (
            (
                counts.left_out,
                "left out by their format (bad answers, chats in which nobody speaks, or fewer than two with scores)",
            ),
            (counts.empty, "with empty answers (check which column holds the answers, or set data.on_empty=train)"),
            (
                counts.switched_off,
                "whose answers are all switched off (train, weight, masked or the like in their turns)",
            ),
            (
                counts.only_thoughts,
                f"whose answers are thoughts alone, which the chat template leaves out ({template})",
            ),
            (rest, f"without an answer, or one within the lengths ({limits})"),
            (counts.too_long, f"too long ({limits}, or set data.on_too_long=truncate)"),
            (counts.equal, "pairs whose chosen and rejected sides are equal"),
            (counts.unordered, "pairs whose scores do not put the chosen side first"),
        )
        return "; ".join(f"{count} {what}" for count, what in losses if count)

    def _check_columns(self, counts: Counts, choice: Choice) -> None:
        """Refuses a name in `data.columns` under which no row's format reads anything."""
        for name, source in self.part.fields.columns.items():
            if counts.unread.get(name) == counts.rows - counts.left_out:
                needed = [column for columns in choice.format.needs for column in columns]
                raise ConfigError(
                    f"{self.part.key}.columns.{name}={source}: the format {choice.name} reads no column {name}"
                    f"{did_you_mean(name, needed)}; it needs {choice.format.describe_needs()}"
                )

    def _key(self, job: Job, choice: Choice) -> str:
        """Names all that the tokens depend on; a change of any of it is another key."""
        encoder = job.tokenizer
        parts = {
            "rows": fingerprint(job.rows),
            "order": "all" if job.order is None else hashlib.sha256(job.order.astype("<i8").tobytes()).hexdigest(),
            "format": choice.name,
            "own": _own_source(choice.name),
            "reformulations": self.config.reformulations,
            "tokenizer": self._tokenizer_digest,
            "template": encoder.template.text if encoder.template else None,
            "on_empty": job.on_empty.value,
            "limits": [str(limit) for limit in _values(encoder.limits)],
            "train_on": encoder.train_on.value,
            "for_eval": job.for_eval,
            "questions": job.questions,
            "kind": job.kind.value,
            "pairs": self.config.pairs.value,
            "label": [self.config.label_columns, class_names(job.rows)] if self.kind in WHOLE_TEXTS else None,
            "code": _code_digest(),
        }
        return f"tokens-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"

    @cached_property
    def _tokenizer_digest(self) -> str:
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content = tokenizer.backend_tokenizer.to_str()
        else:
            content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
        special = json.dumps({name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())})
        return hashlib.sha256((content + special).encode()).hexdigest()


def _check_labels(rows: Dataset, labels: Sequence[str], label: str) -> None:
    """Refuses labels of preference that say nothing beside others: missing ones, and 0 beside -1."""
    for column in label_columns(rows.column_names, labels):
        cells = (
            row[column]
            for start in range(0, len(rows), LABEL_ROWS)
            for row in take_rows(rows.select_columns(column), slice(start, start + LABEL_ROWS))
        )
        missing, first = list[int](), dict[float, int]()
        for number, cell in enumerate(cells, 1):
            if is_unlabelled(cell):
                missing.append(number)
            elif (value := label_number(cell)) in (0, -1):
                first.setdefault(value, number)
        if len(first) == 2:
            raise DataError(
                f"{label}, row {first[0]}: column {column} holds 0 where row {first[-1]} holds -1, so that 0 may "
                "mean bad or neither; write labels as true and false, and leave out rows that are neither"
            )
        if 0 < len(missing) < len(rows):
            raise DataError(
                f"{label}, row {missing[0]}: column {column} holds no label, which {len(rows) - len(missing)} of "
                f"{len(rows)} rows have; label such rows true or false, or take them or the column out"
            )


def class_names(rows: Dataset) -> dict[str, list[str]]:
    """Returns the names of the classes of the columns that hold their numbers (`ClassLabel`)."""
    return {column: list(kind.names) for column, kind in rows.features.items() if isinstance(kind, ClassLabel)}


def _sample(rows: Dataset) -> list[dict[str, Any]]:
    return take_rows(rows, slice(SAMPLE))


def _values(limits: Any) -> Iterator[Any]:
    for name in type(limits).__slots__:
        yield getattr(limits, name)


def _own_source(format_name: str) -> str | None:
    """Returns a hash of the module that holds the user's own format, for it may change between two runs."""
    if ":" not in format_name:
        return None
    file = importlib.import_module(format_name.split(":")[0]).__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


@cache
def _code_digest() -> str:
    """Returns a hash of this package and the versions of its libraries: tokens of older code are not used."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
