"""1,000 mutated data files of all formats: each is refused with one message, or prepared and every row of it counted.

None raises anything else.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from qlora.config.compose import compose
from qlora.data.pipeline import build_data
from qlora.errors import UserError
from qlora.models.tokenizer import load_tokenizer

FULL, SHORT = 1000, 50
CHUNK = 100
ROWS = 6

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
LAYOUTS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "input-output": {"input": "a", "output": "b"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "question-answer": {"question": "a", "answer": "b"},
    "messages": {"messages": CHAT},
    "tools": {
        "messages": CHAT,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    "conversations": {"conversations": SHAREGPT, "system": "Be brief."},
    "chosen": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "dialogue": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "human-bot": {"text": "<human>: a\n<bot>: b"},
    "inst": {"text": "<s>[INST] a [/INST] b</s>"},
    "guanaco": {"text": "### Human: a### Assistant: b"},
    "self-instruct-tasks": {"instruction": "a", "instances": [{"input": "b", "output": "c"}]},
    "unnatural": {"instances": [{"instruction_with_input": "a", "output": "b"}]},
    "segments": {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]},
    "text": {"text": "Once upon a time."},
}
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1e308,
        10**30,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\0",
        "nan",
        "False",
        "no",
        "\ud800",
        "é" * 100,
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        "[INST]",
    ),
    *("<|im_end|>", "</s>", "{{ x }}", "{% for %}", "NaN", "../../evil", {"a": {"b": [1]}}, {"role": "user"}),
    *([{"role": "system"}], [{"role": 3, "content": None}], [{"from": "gpt", "value": "b"}]),
    [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    *([{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "image"}]}]),
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz", ".ndjson", ".JSONL")
NOISE = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":"),
    *(b"\\", b"\\u0000", b"\\ud800", b"NaN", b"Infinity", b"1e999", b"\t", b"#", b"//", b"\x1f\x8b", b"PAR1"),
    b"\xe2\x80\xa8",
)
COLUMNS = (
    *(
        "id",
        "x" * 300,
        "",
        "instruction ",
        "Messages",
        "text",
        "input_ids",
        "length",
        "\ud800",
        "\0",
        "label",
        "kto_tag",
    ),
    *("system", "history", "weight", "train", "tools", "context", "unread"),
)
NESTED = ("self-instruct-tasks", "unnatural")
"""Formats whose rows give several examples."""
ENCODINGS = ("utf-16", "utf-8-sig", "utf-32", "latin-1")
FORMATS = ("alpaca", "messages", "conversations", "text", "chosen", "segments")


class Writer:
    """Draws a data file from a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def write(self, folder: Path) -> Path:
        """Writes a file that was sound and then got some faults; returns its path."""
        layout, suffix = self.draw.choice(list(LAYOUTS)), self.draw.choice(SUFFIXES)
        rows = [self.row(layout) for _ in range(ROWS)]
        if self.draw.random() < 0.5:
            for _ in range(self.draw.randint(1, 4)):
                self.spoil(rows)
        try:
            raw = _encode(rows, suffix)
        except (pa.ArrowException, UnicodeError, TypeError, OverflowError, csv.Error):  # what the format cannot hold
            raw = _encode([self.row(layout) for _ in range(ROWS)], suffix)
        if self.draw.random() < 0.5:
            for _ in range(self.draw.randint(1, 3)):
                raw = self.damage(raw)
        if suffix.endswith(".gz"):
            raw = gzip.compress(raw) if self.draw.random() < 0.8 else raw
            raw = self.damage(raw) if self.draw.random() < 0.3 else raw
        path = folder / f"rows{suffix}"
        path.write_bytes(raw)
        return path

    def row(self, layout: str) -> dict[str, Any]:
        """Returns a sound row, told from others by a number."""
        text = json.dumps(LAYOUTS[layout]).replace('"a"', f'"a{self.draw.randrange(1000)}"')
        row: dict[str, Any] = json.loads(text)
        return row

    def spoil(self, rows: list[dict[str, Any]]) -> None:
        """Changes a row in place: another value, a missing, renamed or further column, or no object at all."""
        index = self.draw.randrange(len(rows))
        row = rows[index]
        if not isinstance(row, dict) or not row:
            return
        name = self.draw.choice(list(row))
        kind = self.draw.randrange(6)
        if kind == 0:
            del row[name]
        elif kind == 1:
            row[self.draw.choice(COLUMNS)] = self.draw.choice((row[name], *VALUES))
        elif kind == 2:
            rows[index] = self.draw.choice(VALUES)
        elif kind == 3:
            for other in rows:
                if isinstance(other, dict) and name in other:
                    other[name] = self.draw.choice(VALUES)
        else:
            row[name] = self.draw.choice(VALUES)

    def damage(self, raw: bytes) -> bytes:
        """Returns the bytes with one fault."""
        spot, other = sorted(self.draw.randrange(len(raw) + 1) for _ in range(2))
        kind = self.draw.randrange(9)
        if kind == 0:
            return raw[:spot]
        if kind == 1:
            return raw[:spot] + self.draw.choice(NOISE) + raw[spot:]
        if kind == 2:
            return raw[:spot] + raw[other:]
        if kind == 3:
            return raw[:other] + raw[spot:]
        if kind == 4 and raw:
            changed = bytearray(raw)
            for _ in range(self.draw.randint(1, 8)):
                changed[self.draw.randrange(len(raw))] ^= 1 << self.draw.randrange(8)
            return bytes(changed)
        if kind == 5:
            return raw.decode("utf-8", "replace").encode(self.draw.choice(ENCODINGS), "replace")
        if kind == 6:
            return raw.replace(b"\n", self.draw.choice((b"", b"\r", b"\r\n", b"\n\n", b"\n,\n")))
        if kind == 7:
            return raw.replace(b'": ', b'": 1, "a": ', self.draw.choice((1, 1, 3)))  # a key that may stand twice
        return raw[spot:]


def count_rows(path: Path) -> int | None:
    """Counts the rows of a file without this project; None: it is not plain enough to tell."""
    suffix, raw = path.name.lower().removeprefix("rows"), path.read_bytes()
    try:
        if suffix.endswith(".gz"):
            raw, suffix = gzip.decompress(raw), suffix.removesuffix(".gz")
        if suffix == ".parquet":
            return int(pq.read_table(io.BytesIO(raw)).num_rows)
        text = raw.decode("utf-8-sig")
        if suffix in (".csv", ".tsv"):
            lines = csv.reader(io.StringIO(text, newline=""), delimiter="," if suffix == ".csv" else "\t", strict=True)
            return sum(bool(cells) for cells in lines) - 1
        if suffix == ".txt":
            blocks = itertools.groupby(io.StringIO(text, newline=None), key=lambda line: bool(line.strip()))
            return sum(is_text for is_text, _ in blocks)
        if text.lstrip().startswith("["):
            return len(json.loads(text))
        return sum(bool(line.strip(" \t\r")) for line in text.split("\n"))
    except (ValueError, OSError, EOFError, zlib.error, csv.Error, pa.ArrowException):
        return None


def _encode(rows: list[Any], suffix: str) -> bytes:
    kind = suffix.lower().removesuffix(".gz")
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind == ".txt":
        return "\n\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")
    tables = [row for row in rows if isinstance(row, dict)]
    if kind == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(tables), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in tables for name in row))
    writer = csv.DictWriter(text, names, delimiter="," if kind == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(tables)
    return text.getvalue().encode()


def examine(seed: int, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prepares one mutated file as a run would; returns what became of it."""
    draw = random.Random(-seed)
    data_folder = folder / "data"
    data_folder.mkdir(exist_ok=True)
    path = Writer(seed).write(data_folder)
    overrides = ["data=local", f"data.path={path}", "data.eval_dataset_size=2", f"data.cache_dir={folder}/cache"]
    overrides += [
        "recipe=none",
        "data.num_proc=1",
        "data.max_length=64",
        f"data.packing={draw.choice(('true', 'false'))}",
    ]
    overrides.append(f"data.on_too_long={draw.choice(('truncate', 'drop', 'error'))}")
    overrides.append(f"data.on_empty={draw.choice(('drop', 'drop', 'train', 'train', 'error'))}")
    overrides.append(f"data.template={draw.choice(('auto', 'chatml', 'llama-3', 'guanaco'))}")
    if draw.random() < 0.3:
        overrides.append(f"data.format={draw.choice(FORMATS)}")
    original = path.read_bytes()
    try:
        data = build_data(compose(overrides).data, tokenizer)
        assert data.train is not None
        assert data.eval is not None
        report, count = data.report, count_rows(path)
        if count is not None and report.format not in NESTED:
            read = report.train_rows + report.lost_rows + report.eval_rows + report.eval_lost_rows
            assert (read, report.eval_rows + report.eval_lost_rows) == (count, 2), f"{seed}: {report}"
        for rows in (data.train, data.eval):
            for row in rows:
                assert len(row["input_ids"]) == row["length"] <= 64
                assert any(label != -100 for label in row["labels"])
        outcome = "runs"
    except UserError as error:
        text = str(error)
        assert "data" in text, f"{seed}: {text}"
        assert "Traceback" not in text
        assert text.isprintable(), f"{seed}: {text!r}"
        assert len(text) < 3000, f"{seed}: {len(text)} characters: {text[:200]}"
        outcome = "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed}: {overrides}: {type(error).__name__}: {error}") from error
    assert path.read_bytes() == original
    path.unlink()
    return outcome


def walk(seeds: range, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Examines many; checks that no file appears outside of the cache."""
    work = folder / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    tokenizer = load_tokenizer(compose([]).model)
    counts = Counter(examine(seed, folder, tokenizer) for seed in seeds)
    assert not list(work.iterdir())
    assert {path.name for path in folder.iterdir()} == {"work", "data", "cache"}
    print(dict(counts))
    return counts


@pytest.mark.full
def test_mutated_data_files_are_prepared_or_refused_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = walk(range(SHORT), tmp_path, monkeypatch)
    assert min(counts["refused"], counts["runs"]) > SHORT // 10, "the mutations make both"


@pytest.mark.full
@pytest.mark.parametrize("start", range(0, FULL, CHUNK))
def test_a_thousand_mutated_data_files(start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(range(start, start + CHUNK), tmp_path, monkeypatch)
