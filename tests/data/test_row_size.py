"""A row that is far too long ends in one sentence that names it, before it fills the memory."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qlora.data.ingest.readers import read_chunks
from qlora.errors import UserError

LONG, SHORT = "long " * 600, "short"
LIMIT = 2000


def rows_of(text):
    return [{"input": SHORT, "output": SHORT}, {"input": SHORT, "output": text}, {"input": SHORT, "output": SHORT}]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json_array(path, rows):
    path.write_text(json.dumps(rows))


def write_csv(path, rows):
    path.write_text("\n".join(["input,output", *(f'{row["input"]},"{row["output"]}"' for row in rows)]))


def write_tsv(path, rows):
    path.write_text("\n".join(["input\toutput", *(f"{row['input']}\t{row['output']}" for row in rows)]))


def write_text(path, rows):
    path.write_text("\n\n".join(f"{row['input']}\n{row['output']}" for row in rows))


def write_wrapped_text(path, rows):
    path.write_text("\n\n".join(row["output"].replace(" ", "\n") for row in rows))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_parquet_group_a_row(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1)


FORMS = {
    "json lines": (write_json_lines, "rows.jsonl", "line 2"),
    "json array": (write_json_array, "rows.json", "element 1 of the array"),
    "csv": (write_csv, "rows.csv", "line 3"),
    "tsv": (write_tsv, "rows.tsv", "line 3"),
    "text": (write_text, "rows.txt", "line 4"),
    "wrapped text": (write_wrapped_text, "rows.txt", "line 3"),
    "parquet": (write_parquet, "rows.parquet", "row 1"),
    "parquet, a group a row": (write_parquet_group_a_row, "rows.parquet", "row 1"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_long_row_of_a_file_is_named(form, tmp_path, message, load):
    write, name, position = FORMS[form]
    write(tmp_path / name, rows_of(LONG))
    said = message(tmp_path / name, max_row_bytes=LIMIT)
    label = f"data.path={tmp_path / name}"
    assert said.startswith((f"{label}, {position}: the row has", f"{label}: {position}: the row has"))
    assert "more than 2,000 bytes" in said
    assert said.endswith("; if it is meant to be so long, raise data.max_row_bytes")
    assert len(load(tmp_path / name, max_row_bytes=4000)) == 3
    message(tmp_path / name, max_row_bytes=LIMIT)  # also when its rows are in the cache


def test_bytes_count_and_not_characters(tmp_path, message, load):
    write_json_lines(tmp_path / "rows.jsonl", rows_of(""))
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + json.dumps({"input": "", "output": "ü" * 1500}, ensure_ascii=False))
    assert "line 4: the row has more than 2,000 bytes" in message(path, max_row_bytes=LIMIT)
    assert len(load(path, max_row_bytes=3100)) == 4


def test_a_long_row_of_a_function_is_named(message, tmp_path, monkeypatch):
    (tmp_path / "long_rows.py").write_text(f"def rows():\n    return {rows_of(LONG)!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert message("long_rows:rows", max_row_bytes=LIMIT).startswith(
        "data.path=long_rows:rows, row 1: the row has more"
    )


def test_a_long_row_of_a_saved_data_set_is_named(message, tmp_path):
    Dataset.from_list(rows_of(LONG)).save_to_disk(tmp_path / "saved")
    assert f"{tmp_path / 'saved'}, row 2: the row has more" in message(tmp_path / "saved", max_row_bytes=LIMIT)


# The beginning of a row of 3 GB, whose rest are zeros that take no room on the disk.
BEGINNINGS = {
    "rows.jsonl": ('{"text": "a"}\n{"text": "', ", line 2"),
    "rows.csv": ("text,more\na,b\nc,", ", line 3"),
    "rows.tsv": ("text\tmore\na\tb\nc\t", ", line 3"),
    "quote.csv": ('text,more\na,b\nc,"d\n', ", line 3"),
    "rows.txt": ("a\n\nb ", ", line 3"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_row_of_3_gb_is_refused_before_it_is_in_memory(name, tmp_path):
    beginning, position = BEGINNINGS[name]
    path = tmp_path / name
    with path.open("w") as file:
        file.write(beginning)
        file.truncate(3_000_000_000)
    assert_refused(path, position)


@pytest.mark.parametrize(
    ("name", "position"), [("rows.jsonl.gz", ", line 2"), ("rows.json.gz", ": element 1 of the array")]
)
def test_a_small_file_that_unpacks_to_a_long_row_is_refused_too(name, position, tmp_path):
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        file.write(b'[{"text": "a"},\n{"text": "' if name == "rows.json.gz" else b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            file.write(b"a" * 10**6)
    assert_refused(tmp_path / name, position)


def assert_refused(path, position, most=8_000_000):
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            list(read_chunks(path, label="data.path=x", most=most))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"data.path=x{position}: the row has more than {most:,} bytes")
    assert peak < 6 * most


@pytest.mark.parametrize("size", ["many", "0B", "64"])
def test_the_limit_is_a_size(size, make_config):
    assert make_config([], max_row_bytes="1.5GiB").max_row_bytes == "1.5GiB"
    with pytest.raises(UserError, match=r"data\.max_row_bytes must be a size such as 64MB"):
        make_config([], max_row_bytes=size)
