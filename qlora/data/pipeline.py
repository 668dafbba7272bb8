"""From a config to the rows to train and measure on, with a report of what was kept and what was cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from qlora.config.paths import cache_root
from qlora.config.registries.objectives import RowKind
from qlora.config.schema import DataConfig, MixConfig, Overlap, Pairs, Stop
from qlora.config.schema.data import MOST_HELD_OUT
from qlora.data.batching.item_stream import ItemStream
from qlora.data.batching.packing import PackedRows, efficiency, lengths_of, pack
from qlora.data.batching.token_store import column
from qlora.data.cache import Cache
from qlora.data.chat.chat_mask import ChatWriter
from qlora.data.chat.templates import Template
from qlora.data.data_report import DataReport, build_report, log_losses, warn_of_lost_texts
from qlora.data.data_set import Part, Questions, RowSet, class_names
from qlora.data.formats.scores import NAME as SCORED
from qlora.data.formats.whole_texts import sort_labels
from qlora.data.lost_characters import LostCharacters
from qlora.data.overlap import HeldOut
from qlora.errors import ConfigError, DataError
from qlora.text import listed
from qlora.upstream.transformers import decode

log = logging.getLogger(__name__)

INSTRUCTIONS = "qlora.demo.instructions:train_rows"
"""Where `data=demo` reads its rows."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows to train on come from."""

    sets: list[str]
    """The sets, as a config names them."""
    ends: np.ndarray
    """How many rows this set and those before it give together."""
    chosen: np.ndarray | None
    """Which of them all are taken; None: all."""

    def name(self, index: int, row: int) -> str:
        """Returns the name of a row to train on, which is number `row` (from 0) of its set."""
        position = index if self.chosen is None else self.chosen[index]
        return f"{self.sets[int(np.searchsorted(self.ends, position, side='right'))]}, row {row + 1}"


@dataclass(frozen=True, slots=True)
class StreamLength:
    """How much of a stream a training run takes."""

    steps: int
    items: int
    """Rows or packs an optimizer step."""
    seed: int
    """Of what is drawn."""


@dataclass(frozen=True, slots=True)
class Data:
    """Rows in tokens: input_ids, labels, length and more; for `eval` also prompt_ids, prompt, reference, maybe task."""

    train: Dataset | None
    """Of a stream, some of its first rows."""
    eval: Dataset | None
    report: DataReport
    template: Template
    """The chat template that is saved with an adapter: the one that wrote the conversations; without any, one that
    asks as the rows of the first set do."""
    end_id: int | None
    """The token that ends an answer in it; None: none does, but for the end of the whole text."""
    packed: PackedRows | None = None
    """The rows of `train` in packs, where `data.packing` asks for them."""
    origin: Origin | None = None
    """Where the rows of `train` come from."""
    lost: LostCharacters | None = None
    """What the tokenizer does not keep of the rows to train on."""
    shares_prompts: bool = False
    """Whether the answers of a pair share their prompt, whose tokens then count once in lengths and packs."""
    labels: tuple[str, ...] = ()
    """The classes of the rows to train on, in order, where rows are texts with one."""
    stream: ItemStream | None = None
    """What is trained on where rows are streamed."""

    @property
    def items(self) -> Dataset | PackedRows | ItemStream:
        """What is trained on: the rows, or their packs."""
        assert self.train is not None
        if self.stream is not None:
            return self.stream
        return self.packed if self.packed is not None else self.train

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each item of what is trained on, a row or a pack: int [items]."""
        assert self.train is not None
        if self.packed is not None:
            return self.packed.lengths
        return lengths_of(self.train, shares_prompts=self.shares_prompts)

    @property
    def max_length(self) -> int:
        """The most tokens that an item of what is trained on has, a row or a pack; of a stream, may have."""
        return self.stream.max_length if self.stream is not None else int(self.lengths.max(initial=0))

    @property
    def attended(self) -> float:
        """The tokens of all rows for each that `lengths` counts: more than 1 where answers share prompts."""
        return float(column(self.train, "length").sum() / self.lengths.sum())

    def without_sharing(self, config: DataConfig) -> Data:
        """Returns the same rows, packed anew, whose answers share no prompt."""
        return replace(self, shares_prompts=False, packed=_pack(config, self.train, shares_prompts=False)[0])

    @property
    def most_targets(self) -> int | None:
        """The most tokens that the loss counts in an item of what is trained on: in a row, or in a pack."""
        if self.train is None or self.stream is not None:
            return None
        targets = column(self.train, "trained")
        return int((targets if self.packed is None else self.packed.sums(targets)).max(initial=0))

    def named_rows(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        """Returns the rows of what is trained on as number `index`, each with its name: one, or those of a pack."""
        if self.stream is not None:
            return self.stream.named_rows(index)
        assert self.train is not None
        assert self.origin is not None
        if self.packed is None:
            row = self.train[index]
            return [(self.origin.name(index, row["row"]), row)]
        members = self.packed.members(index)
        numbers = self.train.select_columns("row")[members]["row"]
        return [
            (self.origin.name(member, number), dict(self.packed.join([member])))
            for member, number in zip(members, numbers, strict=True)
        ]


def build_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    need_train: bool = True,
    need_eval: bool = True,
    questions: Questions | None = None,
    kind: RowKind = RowKind.tokens,
    shares_prompts: bool = False,
    length: StreamLength | None = None,
) -> Data:
    """Loads, splits and tokenizes the rows that are needed; with `questions`, rows of `eval_path` need no answer.

    Of rows that are streamed those to measure on and some others are read; with `length` the rest is there to train on.

    `kind` is what the training objective takes rows for; `qlora.data.formats.preferences` lists the columns of each.
    Where the answers of pairs share their prompt, its tokens count once in packs and lengths.
    The split is the same whatever is needed, so that a later evaluation meets no row that was trained on.
    """
    _check_demo(config, kind)
    cache = Cache(cache_root(config.cache_dir))
    sets = row_sets(config, tokenizer, cache, kind)
    _check_pairs(config, sets, kind)
    trained = [part.train() for part in sets] if need_train else []
    evaluated_sets = sets
    if config.eval_path is not None and need_eval:
        evaluated_sets = [
            _own_held_out(config, sets, tokenizer, cache, like_training=need_train, questions=questions, kind=kind)
        ]
    if need_eval:
        evaluated_sets = [part for part in evaluated_sets if part.holds_out]
        _log_split(config, sets)
    held_out = [part.held_out() for part in evaluated_sets] if need_eval else []
    train, origin = _join(config, sets, [rows for rows, _ in trained]) if trained else (None, None)
    evaluated = _concatenate([rows for rows, _ in held_out]) if held_out else None
    if evaluated is not None and (few := _few(len(evaluated), config.max_eval_samples, config)) is not None:
        evaluated = evaluated.select(few)
    if train is not None and kind is RowKind.labelled:
        _check_both_labels(sets, train)
    labels = _classes(sets, train) if train is not None and kind is RowKind.classes else ()
    if kind is RowKind.values:
        _check_numbers([rows for rows in (train, evaluated) if rows is not None])
    if kind is RowKind.texts:
        _check_partners([rows for rows in (train, evaluated) if rows is not None])
    seen = _held_out(config, tokenizer, evaluated_sets, [rows for rows, _ in held_out])
    stream = None
    if length is not None and train is not None and config.streaming:
        stream = _stream(config, sets, length, seen)
    packed, fraction = _pack(config, train, shares_prompts=shares_prompts)
    if stream is not None:
        packed = None  # these are packs of the first rows alone
    used = sets if need_train or config.splits_off else evaluated_sets
    counts, eval_counts = ([counts for _, counts in encoded] for encoded in (trained, held_out))
    report = build_report(config, used, train, evaluated, counts, eval_counts, packed, fraction)
    is_near = config.overlap is Overlap.near and stream is None  # a stream compares its rows as they come
    if is_near and seen is not None and origin is not None and train is not None:
        overlaps = seen.search(train, origin.name)
        report = replace(report, near_rows=[str(overlap) for overlap in overlaps if not overlap.is_equal])
    log_losses(report, config)
    for part in dict.fromkeys([*sets, *evaluated_sets]):
        pairs = [*zip(sets, trained, strict=False), *zip(evaluated_sets, held_out, strict=False)]
        warn_of_lost_texts(part, [counts for other, (_, counts) in pairs if other is part])
    template = next((part.template for part in used if part.template), used[0].chat_template)
    end_id = ChatWriter(tokenizer, template).end_id
    lost = next(filter(None, (part.find_lost() for part in sets)), None) if need_train else None
    return Data(train, evaluated, report, template, end_id, packed, origin, lost, shares_prompts, labels, stream)


def _held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, sets: Sequence[RowSet], parts: Sequence[Dataset]
) -> HeldOut | None:
    """Returns the held-out rows with their names, to compare rows to train on with; None: there are none."""
    if not parts:
        return None
    rows = [(part.part.label, number) for part, rows in zip(sets, parts, strict=True)
            for number in column(rows, "row").tolist()]  # fmt: skip
    every, few = _concatenate(parts), _few(len(rows), config.max_eval_samples, config)
    indices = range(len(rows)) if few is None else few.tolist()
    names = [f"{label}, row {number + 1}" for label, number in (rows[index] for index in indices)]
    text = partial(decode, tokenizer, skip_special_tokens=True) if config.overlap is Overlap.near else None
    return HeldOut(every if few is None else every.select(few), names, text)


def _stream(config: DataConfig, sets: Sequence[RowSet], length: StreamLength, seen: HeldOut | None) -> ItemStream:
    return ItemStream(
        [part.streamed(number) for number, part in enumerate(sets)],
        length=length.steps * length.items,
        step=length.items,
        probabilities=config.probabilities,
        stop=config.stop or Stop.first,
        buffer=config.shuffle_buffer,
        width=config.pack_width,
        seed=length.seed,
        max_length=config.pack_width or config.longest_row or 0,
        held_out=seen,
    )


def row_sets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, cache: Cache, kind: RowKind = RowKind.tokens
) -> list[RowSet]:
    """Returns the sets to train on, each with its rows, its format and its split."""
    sets = [RowSet(config, part, tokenizer, cache, kind=kind) for part in _parts(config)]
    for part, fraction in zip(sets, config.probabilities, strict=True):
        part.fraction = fraction
    if config.splits_off and not config.streaming:
        total = sum(len(part.rows) for part in sets)
        for part in sets:
            part.total_rows = total
    return sets


def _check_demo(config: DataConfig, kind: RowKind) -> None:
    """Refuses the embedded instructions, which are the default, where a loss over answers needs others."""
    if kind is not RowKind.tokens and config.path == INSTRUCTIONS:
        raise ConfigError(
            "data=demo holds one answer a row, and this loss learns from good answers against bad ones; choose "
            "data=demo-preferences to try it, or rows of your own (data=FILE)"
        )


def _check_pairs(config: DataConfig, sets: Sequence[RowSet], kind: RowKind) -> None:
    """Refuses `data.pairs=all` where no row gives pairs by scores."""
    if config.pairs is not Pairs.all:
        return
    read = [part.choice.name for part in sets]
    if kind is not RowKind.pairs:
        raise ConfigError(
            "data.pairs=all makes pairs for a loss that compares two answers, such as loss=dpo; leave it out"
        )
    if not any(name == SCORED or ":" in name for name in read):
        raise ConfigError(
            f"data.pairs=all is read in rows of several answers with scores, and {sets[0].part.path_key} is read as "
            f"{listed(list(dict.fromkeys(read)))}; leave it out"
        )


def _check_both_labels(sets: Sequence[RowSet], train: Dataset) -> None:
    """Refuses labels of one kind only: nothing would be compared."""
    good = int(column(train, "desirable").sum())
    if good in (0, len(train)):
        kind = "good" if good else "bad"
        raise DataError(
            f"{sets[0].part.label}: all {len(train):,} answers to train on are labelled {kind}, and this loss learns "
            "from good ones against bad ones; add rows with the other label, or choose loss=sft"
        )


def _classes(sets: Sequence[RowSet], train: Dataset) -> tuple[str, ...]:
    """Returns the classes of the rows to train on, in order; refuses a single one, from which nothing is learned."""
    named = [name for part in sets for names in class_names(part.rows).values() for name in names]
    labels = sort_labels(train.unique("label"), list(dict.fromkeys(named)))
    if len(labels) < 2:
        raise DataError(
            f"{sets[0].part.label}: all {len(train):,} rows to train on are labelled {labels[0]!r}, and a head learns "
            "to tell classes apart; add rows of another class, or name another column with data.label=COLUMN"
        )
    return tuple(labels)


def _check_partners(parts: Sequence[Dataset]) -> None:
    """Refuses rows of which some have a score or another number of texts, and others not."""
    kinds = {
        (len(partners) + 1, bool(values))
        for rows in parts
        for partners, values in zip(rows["partners"], rows["values"], strict=True)
    }
    if len(kinds) > 1:
        said = " and ".join(f"{texts} texts{' and a score' if scored else ''}" for texts, scored in sorted(kinds))
        raise DataError(
            f"some rows hold {said}: all rows to train and to measure on need as many texts, and all a score or none; "
            "give each kind a run of its own, or leave a column out"
        )


def _check_numbers(parts: Sequence[Dataset]) -> None:
    """Refuses rows with more or fewer numbers than the first one."""
    counts = [len(values) for rows in parts for values in rows.select_columns("values")["values"]]
    for index, count in enumerate(counts):
        if count != counts[0]:
            raise DataError(
                f"a row holds {count} numbers and the first one {counts[0]} (number {index + 1} of the rows to train "
                "and to measure on): each text needs the same numbers; name their columns with data.label=[A,B]"
            )


def _log_split(config: DataConfig, sets: Sequence[RowSet]) -> None:
    """Says how many rows are held out where no number of them was asked for."""
    if config.streaming and (config.splits_off or config.eval_split is not None) and config.eval_dataset_size != 0:
        _log_first_rows(config, sets)
        return
    if not config.splits_off or config.eval_dataset_size:
        return
    total, count = sum(len(part.rows) for part in sets), sum(part.split_off for part in sets)
    if config.eval_dataset_size == 0:
        why = "data.eval_dataset_size=0: nothing is measured on rows that were not trained on"
    elif not count:
        why = "they are too few; data.eval_path=FILE brings others"
    else:
        why = f"{count / total:.0%}; data.eval_dataset_size=NUMBER changes it, and 0 holds out none"
    log.info("%s: %s of %s rows are held out (%s)", config.name, f"{count:,}" if count else "none", f"{total:,}", why)


def _log_first_rows(config: DataConfig, sets: Sequence[RowSet]) -> None:
    """Says which rows of a stream are held out."""
    if config.eval_split is not None:
        log.info("%s: of data.eval_split=%s the first %s rows at most are measured (data.max_eval_samples)",
                 config.name, config.eval_split, f"{config.max_eval_samples or MOST_HELD_OUT:,}")  # fmt: skip
        return
    counts = ", ".join(f"{part.source.skip:,} of {part.part.label}" for part in sets)
    log.info("%s: held out are the first rows of the stream: %s (data.eval_dataset_size)", config.name, counts)


def _parts(config: DataConfig) -> list[Part]:
    if config.mix:
        return [Part(part, f"data.mix.{name}") for name, part in config.mix.items()]
    assert config.path is not None, "DataConfig checks it"
    fields = MixConfig(
        path=config.path,
        subset=config.subset,
        split=config.split,
        revision=config.revision,
        data_files=config.data_files,
        max_samples=config.max_samples,
        format=config.format,
        columns=config.columns,
    )
    return [Part(fields, "data")]


def _own_held_out(
    config: DataConfig,
    sets: Sequence[RowSet],
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    *,
    like_training: bool,
    questions: Questions | None,
    kind: RowKind,
) -> RowSet:
    """Returns the set of `data.eval_path`, in the format of the rows to train on where there is one."""
    assert config.eval_path is not None
    fields = MixConfig(
        path=config.eval_path,
        subset=config.subset if config.eval_path == config.path else None,
        revision=config.revision if config.eval_path == config.path else None,
        format=sets[0].choice.name if like_training and len(sets) == 1 else config.format,
        columns=config.columns,
    )
    return RowSet(config, Part(fields, "data", "eval_path"), tokenizer, cache, questions, kind)


def _join(config: DataConfig, sets: Sequence[RowSet], encoded: Sequence[Dataset]) -> tuple[Dataset, Origin]:
    """Joins the sets to train on, each row as often as its set's weight says."""
    stream = np.random.RandomState(config.split_seed)
    weighted = []
    for part, rows in zip(sets, encoded, strict=True):
        weight = part.part.fields.weight
        weighted.append(rows if weight == 1 else rows.select(_repeated(len(rows), weight, stream)))
    rows = _concatenate(weighted)
    chosen = _few(len(rows), config.max_train_samples, config)
    origin = Origin([part.part.label for part in sets], np.cumsum([len(part) for part in weighted]), chosen)
    return (rows if chosen is None else rows.select(chosen)), origin


def _concatenate(parts: Sequence[Dataset]) -> Dataset:
    return parts[0] if len(parts) == 1 else concatenate_datasets(list(parts))


def _few(count: int, limit: int | None, config: DataConfig) -> np.ndarray | None:
    """Chooses a random `limit` of the rows that several sets give together; a single set was limited before."""
    if limit is None or limit >= count:
        return None
    return np.sort(np.random.RandomState(config.split_seed).permutation(count)[:limit])


def _repeated(count: int, weight: float, stream: np.random.RandomState) -> np.ndarray:
    """Returns each index `floor(weight)` times, and of the rest of the weight a random share of them once more."""
    whole = int(weight)
    extra = stream.permutation(count)[: round((weight - whole) * count)]
    return np.sort(np.concatenate([np.repeat(np.arange(count), whole), extra]))


def _pack(config: DataConfig, train: Dataset | None, *, shares_prompts: bool) -> tuple[PackedRows | None, float | None]:
    if not config.packing or train is None:
        return None, None
    budget = config.pack_width
    assert budget is not None, "DataConfig checks it"
    lengths = lengths_of(train, shares_prompts=shares_prompts)
    packs = pack(lengths, budget)
    return PackedRows(train, packs, shares_prompts=shares_prompts), round(efficiency(packs, lengths, budget), 4)
