"""The rows to train and measure on: the group `data`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora.config.addresses import check_address
from qlora.config.foreign_names import known_value
from qlora.config.registries.chat_templates import template_names
from qlora.config.registries.data_formats import format_names
from qlora.config.schema.code_names import FUNCTION_PATH
from qlora.config.schema.stream import SHUFFLE_BUFFER, check_stream
from qlora.config.schema.values import HOLDS, type_in_words, written
from qlora.errors import ConfigError, did_you_mean, require
from qlora.text import parse_size

TrainOn = StrEnum("TrainOn", "assistant last all")
"""Which tokens the loss counts."""

OnTooLong = StrEnum("OnTooLong", "truncate drop error")
"""What happens to a row that is longer than the limits."""

Pairs = StrEnum("Pairs", "best-worst all")
"""Which pairs rows with several scored answers give."""

OnEmpty = StrEnum("OnEmpty", "drop train error")
"""What happens to an answer without text."""

Overlap = StrEnum("Overlap", "exact near")
"""Which rows to train on count as held-out ones."""

Stop = StrEnum("Stop", "first all")
"""When a pass over streamed sets ends."""


ROW_LENGTH = 2048
"""Tokens of the longest row where nothing else is asked for and the model's context holds them."""
HELD_OUT_SHARE, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.1, 20, 1000
"""What is held out where `eval_dataset_size` is null; never more than a quarter of the rows."""
HELD_OUT_OF_STREAM = 200
"""The same of rows that are streamed, whose number is not known."""


@dataclass(kw_only=True, slots=True)
class MixConfig:
    """One of several data sets that are trained on together; the fields are those of `data`."""

    path: str
    """As `data.path`."""
    weight: float = 1.0
    """How often a pass over the data shows each row: 2 twice, 0.5 a random half of the rows."""
    probability: float | None = None
    """How probable it is that the next row is one of this set, where `data.streaming` is on; those of all sets add up
    to 1. Unset: all sets are drawn equally often."""
    subset: str | None = None
    """As `data.subset`."""
    split: str = "train"
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""
    data_files: str | None = None
    """As `data.data_files`."""
    max_samples: int | None = None
    """As `data.max_samples`."""
    format: str = "auto"
    """As `data.format`."""
    columns: dict[str, str] = field(default_factory=dict)
    """As `data.columns`."""
    template: str | None = None
    """As `data.template`; unset: that one."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The rows to train and measure on, and how they become tokens."""

    name: str = MISSING
    """The name of the data set in reports."""
    path: str | None = MISSING
    """A file (JSON, JSONL, CSV, TSV, Parquet, plain text, each also .gz), a folder or glob of them, also elsewhere
    (`s3://`, `gs://`, `https://`, `hf://`, or `env://NAME`, a variable that holds the address), a folder that
    `datasets` saved, a hub id, or `module:function` that returns an iterable of rows."""
    subset: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split to train on."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    data_files: str | None = None
    """The file inside the hub data set, where it holds several."""
    max_samples: int | None = None
    """The maximum number of rows of the set, its first ones, before any are held out. Null: all."""
    eval_path: str | None = None
    """Held-out rows of their own, in the forms of `path`; unset: those of `eval_split`, or rows split off `path`."""
    eval_split: str | None = None
    """The split of `path` that holds rows to measure on, e.g. `test`; unset: `eval_dataset_size` rows are split off."""
    mix: dict[str, Any] = field(default_factory=dict, metadata={HOLDS: dict[str, MixConfig | str]})
    """Several sets instead of one `path`, by names of your own: a path, or a mapping with `path`, `weight` (2: a pass
    shows each row twice; 0.5: a random half of the rows), `probability` (in its place where rows are streamed),
    `subset`, `split`, `revision`, `data_files`, `max_samples`, `format`, `columns` and `template`. E.g. `data=mix
    data.mix.mine=a.jsonl data.mix.other.path=b.jsonl data.mix.other.weight=2`."""
    format: str = "auto"
    """What the columns mean: a name of the table in docs/data.md, `module:function` of your own (a row in, a row of
    another format out), or `auto` to recognise it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under other names: `data.columns.output=response` reads `response` where the format wants `output`."""
    label: Any = field(default=None, metadata={HOLDS: list[str] | str | None})
    """The column that holds what `head=classify` or `head=regress` learns, or of several numbers their columns, e.g.
    `[helpful,polite]`; unset: the first there is of `label`, `labels`, `class`, for `regress` of `score`, `scores`,
    `label`, `labels`, `rating`. Each set of `data.mix` has it."""
    reformulations: bool = False
    """Train on the reformulated instructions of unnatural-instructions too."""
    pairs: Pairs = Pairs["best-worst"]
    """Which pairs a row with several scored answers gives, where the loss compares two: its `best-worst` answers, or
    `all` two of them. Two answers of the same score are no pair."""
    template: str = "auto"
    """How conversations are written: `auto` takes the tokenizer's chat template (or `guanaco` where it has none);
    or a name of the table in docs/data.md, or a file with a Jinja chat template."""
    train_on: TrainOn = TrainOn.assistant
    """The loss counts every `assistant` turn, the `last` one, or `all` tokens."""
    train_on_source: bool = False
    """The original's name for `train_on=all`."""
    source_max_len: int | None = None
    """Longest prompt in tokens, `<bos>` included; a longer one loses its beginning, never its end. Null: no limit."""
    target_max_len: int | None = None
    """Longest answer in tokens, end token included; a cut answer keeps no end token. Null: no limit."""
    max_length: int | None = ROW_LENGTH
    """Longest row in tokens: the answer keeps at least half of it, the prompt loses its beginning. Null: no limit. The
    default, 2,048, shrinks to what the model reads."""
    on_too_long: OnTooLong = OnTooLong.truncate
    """`truncate` a row that is too long, `drop` it, or stop with an `error`."""
    on_empty: OnEmpty = OnEmpty.drop
    """An answer without text (white space alone is none): `drop` leaves an empty turn of a chat without loss, and drops
    a row in which nothing else is trained; `train` trains its end token; or stop with an `error`."""
    max_train_samples: int | None = None
    """The maximum number of rows to train on."""
    max_eval_samples: int | None = None
    """The maximum number of held-out rows."""
    eval_dataset_size: float | None = None
    """Rows to hold out when there is neither `eval_path` nor `eval_split`; below 1: a share of all rows; 0: none.
    Null: a tenth of the rows, at most 1,000, and at least 20 if that is no more than a quarter of them."""
    split_seed: int = 42
    """Seed of that split and of the order of the rows; apart from `seed`, so that seeds compare on equal rows."""
    packing: bool = False
    """Join rows into packs of `pack_length` tokens that do not see each other: no padding, fewer steps."""
    pack_length: int | None = None
    """Tokens in a pack; unset: the longest row that the limits allow. A prompt that both answers of a pair share in the
    step (`trainer.fused_attention`) counts once."""
    cache_dir: str | None = None
    """Where rows and tokens are kept between runs; unset: `$QLORA_CACHE`, or `~/.cache/qlora`."""
    num_proc: int | None = None
    """Processes that tokenize; unset: as many as pay for the number of rows and cores."""
    max_row_bytes: str = "64MB"
    """A row with more bytes, in its file or once it is read, stops the run; a size such as `64MB` or `1.5GiB`."""
    overlap: Overlap = Overlap.exact
    """Which rows to train on are reported as held-out ones: those that are equal to one, token for token (`exact`), or
    those that share 70 % of their words in threes with one, too (`near`), whatever all held-out rows share."""
    streaming: bool = False
    """Read rows as they are needed, instead of all of them before the run: for sets without end, or larger than the
    disk. The run needs `trainer.max_steps`."""
    shuffle_buffer: int = SHUFFLE_BUFFER
    """Rows of a stream from among which the next one is drawn at random; 1: the order of the stream."""
    stop: Stop | None = None
    """When a pass over the streamed sets of `mix` ends: when the `first` of them has no more rows, or when `all` have
    been read to their end, the shorter ones again meanwhile. Unset: `first`."""

    def __post_init__(self) -> None:
        for name in ("source_max_len", "target_max_len", "max_length", "pack_length", "num_proc"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", "be positive or null", value)
        for name in ("max_samples", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name}", "be positive or null", value)
        require((parse_size(self.max_row_bytes) or 0) > 0, "data.max_row_bytes", "be a size such as 64MB",
                self.max_row_bytes)  # fmt: skip
        size = self.eval_dataset_size
        require(size is None or (size >= 0 and (size < 1 or size == int(size))), "data.eval_dataset_size",
                "be a number of rows, a share between 0 and 1, 0 for none, or null", size)  # fmt: skip
        require(0 <= self.split_seed < 2**32, "data.split_seed", "lie between 0 and 4294967295", self.split_seed)
        if self.path is None and not self.mix:
            raise ConfigError("data.path is not set; give a file or a hub id, e.g. data=local data.path=my_rows.jsonl")
        if self.path == "vicuna":
            raise ConfigError(
                "data=vicuna: the ShareGPT conversations behind Vicuna were never released; train on a ShareGPT file "
                "of your own with data=local data.format=conversations data.path=FILE, or choose data=oasst1"
            )
        if self.mix and self.path is not None:
            raise ConfigError("data.mix and data.path are both set; name every set in data.mix (data=mix), or one path")
        if self.mix:
            self._check_mix()
        if self.eval_path is not None and self.eval_split is not None:
            raise ConfigError("data.eval_path and data.eval_split both name held-out rows; leave one of them out")
        self.mix = {name: build_mix(name, part) for name, part in self.mix.items()}
        for key, path in self.paths.items():
            check_address(key, path)
        check_stream(self)
        check_format("data.format", self.format)
        check_template("data.template", self.template)
        names = [self.label] if isinstance(self.label, str) else self.label
        is_list = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        require(names is None or bool(is_list), "data.label", "be a column or a list of columns", self.label)
        if self.train_on_source and self.train_on is TrainOn.last:
            raise ConfigError("data.train_on_source=true means data.train_on=all, but data.train_on=last is set; "
                              "leave one of them out")  # fmt: skip
        if self.train_on_source:
            self.train_on = TrainOn.all
        if self.pack_length is not None and not self.packing:
            raise ConfigError("data.pack_length is only read with data.packing=true")
        if self.packing and self.pack_length is None and self.longest_row is None:
            raise ConfigError("data.packing=true needs a length: set data.pack_length, or data.max_length")

    def _check_mix(self) -> None:
        """Refuses what only a single set reads; held-out rows of their own read the format and the columns."""
        unset_values: dict[str, Any] = {
            "subset": None,
            "split": "train",
            "revision": None,
            "data_files": None,
            "max_samples": None,
        }
        if self.eval_path is None:
            unset_values |= {"format": "auto", "columns": {}}
        for name, unset in unset_values.items():
            if (value := getattr(self, name)) != unset:
                raise ConfigError(f"data.{name}={value} is not read beside data.mix, for each of its sets has its own; "
                                  f"set data.mix.NAME.{name}")  # fmt: skip

    @property
    def label_columns(self) -> list[str] | None:
        """The columns of `label`; None: they are recognised."""
        return [self.label] if isinstance(self.label, str) else self.label

    @property
    def splits_off(self) -> bool:
        """Whether the held-out rows are split off those to train on."""
        return self.eval_path is None and self.eval_split is None

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out to measure on; of a file with too few rows none are, in spite of it."""
        return not (self.splits_off and self.eval_dataset_size == 0)

    @property
    def paths(self) -> dict[str, str]:
        """Where rows are, by the full keys that say it."""
        named = {"data.path": self.path, "data.eval_path": self.eval_path}
        named |= {f"data.mix.{name}.path": part.path for name, part in self.mix.items()}
        return {key: path for key, path in named.items() if path is not None}

    @property
    def probabilities(self) -> list[float]:
        """How probable it is that the next row of a stream is one of each set; 1 in sum, also of rounded thirds."""
        given = [part.probability for part in self.mix.values()] or [1.0]
        total = sum(value or 0 for value in given)
        return [1 / len(given) if value is None else value / total for value in given]

    def held_out_of_stream(self, fraction: float) -> int:
        """Returns how many of the first rows of a streamed set are held out, which gives this fraction of all rows."""
        if not self.splits_off or self.eval_dataset_size == 0:
            return 0
        return max(round((self.eval_dataset_size or HELD_OUT_OF_STREAM) * fraction), 1)

    def held_out_count(self, rows: int) -> int:
        """Returns how many of all rows of `path`, or of the sets of `mix` together, are split off to measure on."""
        size = self.eval_dataset_size
        if size is None:
            return min(max(round(HELD_OUT_SHARE * rows), FEWEST_HELD_OUT), MOST_HELD_OUT, rows // 4)
        return max(round(size * rows), 1) if 0 < size < 1 else int(size)

    @property
    def pack_width(self) -> int | None:
        """Tokens of a pack; None: no packing."""
        return (self.pack_length or self.longest_row) if self.packing else None

    @property
    def longest_row(self) -> int | None:
        """The most tokens that the limits leave of a row; None: no limit."""
        limits = [self.max_length] if self.max_length is not None else []
        if self.source_max_len is not None and self.target_max_len is not None:
            limits.append(self.source_max_len + self.target_max_len)
        return min(limits, default=None)


def build_mix(name: str, part: object) -> MixConfig:
    """Returns one entry of `data.mix`, which may be a path alone; raises `ConfigError` with the full key."""
    key = f"data.mix.{name}"
    if isinstance(part, MixConfig):
        return part
    values = {"path": part} if isinstance(part, str) else part
    names = [item.name for item in fields(MixConfig)]
    for field_name in values if isinstance(values, dict) else ():
        if field_name not in names:
            raise ConfigError(f"unknown key '{key}.{field_name}'{did_you_mean(str(field_name), names)}; "
                              f"an entry of data.mix has {', '.join(names)}")  # fmt: skip
    if not isinstance(values, dict) or "path" not in values:
        raise ConfigError(f"{key} needs a path: {key}=FILE, or {key}.path=FILE beside its other fields")
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MixConfig), values))
    except OmegaConfBaseException as error:
        name = str(error.full_key).split(".")[0]
        holds = type_in_words(get_type_hints(MixConfig)[name])
        raise ConfigError(f"{key}.{name} must be {holds}, got {written(values[name])!r}") from error
    assert isinstance(typed, MixConfig)
    require(typed.max_samples is None or typed.max_samples > 0, f"{key}.max_samples", "be positive or null",
            typed.max_samples)  # fmt: skip
    require(math.isfinite(typed.weight) and typed.weight > 0, f"{key}.weight", "be positive", typed.weight)
    probability = typed.probability
    require(probability is None or 0 < probability <= 1, f"{key}.probability", "be above 0 and at most 1", probability)
    check_format(f"{key}.format", typed.format)
    if typed.template is not None:
        check_template(f"{key}.template", typed.template)
    return typed


def check_format(key: str, name: str) -> None:
    """Raises `ConfigError` unless `name` is a format's, or the user's own `module:function`."""
    names = format_names()
    _refuse_foreign(key, name, names)
    if name not in names and not FUNCTION_PATH.fullmatch(name):
        raise ConfigError(
            f"{key}={name!r} is unknown{did_you_mean(name, names)}; "
            f"choose one of {', '.join(names)}, or module:function of your own"
        )


def check_template(key: str, name: str) -> None:
    """Raises `ConfigError` unless `name` is a template's, or looks like a file."""
    names = template_names()
    _refuse_foreign(key, name, names)
    if name not in names and "/" not in name and not name.endswith((".jinja", ".j2")):
        raise ConfigError(
            f"{key}={name!r} is unknown{did_you_mean(name, names)}; "
            f"choose one of {', '.join(names)}, or a file with a Jinja chat template (my.jinja)"
        )


def _refuse_foreign(key: str, name: str, names: list[str]) -> None:
    """Raises `ConfigError` for a name of another tool, which has another one here."""
    field_name = key.rpartition(".")[2]
    if name not in names and (known := known_value(f"data.{field_name}", name)):
        written = known.replace(f"data.{field_name}", key)
        raise ConfigError(f"{key}={name!r} is unknown; write {written}, or see the tables of docs/data.md")
