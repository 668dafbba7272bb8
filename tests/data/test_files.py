"""Local files: all forms give the same rows, memory stays flat, and each broken file gets its sentence."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Json, Value

from qlora.data.ingest.json_text import read_array, read_lines
from qlora.data.ingest.readers import kind_of
from qlora.data.ingest.row_size import MAX_ROW_BYTES
from qlora.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the checkout")

ROWS = [
    {"instruction": 'Quote "this",\tplease', "input": "a\nb", "output": "ä\u2028ö"},
    {"instruction": "Second", "input": "", "output": "x" * 200_000},
]
FORMS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")


def write(path, rows):
    """Writes rows in the form that the file's name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        path.write_bytes(gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue())
        return str(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".json"):
            json.dump(rows, file)
        elif name.endswith((".jsonl", ".ndjson")):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", [*FORMS, *(f"{form}.gz" for form in FORMS)])
def test_all_file_forms_read_equal(tmp_path, load, suffix):
    rows = load(write(tmp_path / f"rows.{suffix}", ROWS))
    assert rows.to_list() == ROWS
    assert rows.features == dict.fromkeys(ROWS[0], Value("string"))


def test_text_files_have_a_row_for_each_paragraph(tmp_path, load):
    text = "\ufeffFirst line\r\n  second line\r\n\r\n \t\r\nNext\nparagraph \n\n\nlast"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = [{"text": "First line\n  second line"}, {"text": "Next\nparagraph "}, {"text": "last"}]
    assert load(tmp_path / "a.txt").to_list() == expected
    assert load(tmp_path / "b.txt.gz").to_list() == expected


def test_long_csv_cells_leave_the_limit_of_the_csv_module_alone(tmp_path, load):
    limit = csv.field_size_limit()
    load(write(tmp_path / "rows.csv", ROWS))
    assert csv.field_size_limit() == limit


def test_a_json_file_may_hold_one_object_a_line_and_a_jsonl_file_an_array(tmp_path, load):
    (tmp_path / "rows.json").write_text('\ufeff{"text": "a"}\r\n\n{"text": "b"}')
    (tmp_path / "rows.jsonl").write_text(
        ' \n\ufeff[{"text": "a"},\n{"text": "b"}] \n'.replace(" \n\ufeff", "\ufeff\n ")
    )
    expected = [{"text": "a"}, {"text": "b"}]
    assert load(tmp_path / "rows.json").to_list() == expected
    assert load(tmp_path / "rows.jsonl").to_list() == expected


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, load):
    (tmp_path / "a.csv").write_text("\ufefftext,n\na,1\n")
    assert load(tmp_path / "a.csv").to_list() == [{"text": "a", "n": "1"}]


def test_rows_may_lack_columns_and_null_stays_null(tmp_path, load):
    rows = [{"a": "x", "n": None}, {"a": None, "b": "y"}, {"b": "z", "c": [1, "z"]}, {}]
    expected = [{name: row.get(name) for name in ("a", "n", "b", "c")} for row in rows]
    assert load(write(tmp_path / "rows.jsonl", rows)).to_list() == expected


def test_values_of_mixed_types_come_back_as_they_were(tmp_path, load):
    rows = [{"output": 7, "pairs": [["a", True]]}, {"output": "7", "pairs": [["b", False], ["c", None]]},
            {"output": None, "pairs": {"x": 0.1, "y": {}}}, {"output": "null", "pairs": 2**63}]  # fmt: skip
    loaded = load(write(tmp_path / "rows.jsonl", rows))
    assert loaded.to_list() == rows
    assert loaded.features["output"] == Json()


def test_what_a_column_is_may_show_late(tmp_path, load):
    rows = [{"text": "7", "never": None, "late": None} for _ in range(60_000)]
    rows += [{"text": 7, "late": {"a": [1]}, "new": "n"}, {"text": "x", "new": None}]
    expected = [{name: row.get(name) for name in ("text", "never", "late", "new")} for row in rows]
    path = write(tmp_path / "rows.jsonl", rows)
    assert Path(path).stat().st_size > 2**21, "one chunk would show everything at once"
    loaded = load(path)
    assert loaded.to_list() == expected
    assert loaded.features == {"text": Json(), "never": Value("string"), "late": Json(), "new": Value("string")}


def test_equal_content_is_parsed_once_whatever_its_name(tmp_path, cache, load):
    first = load(write(tmp_path / "a.jsonl", ROWS))
    (entry,) = cache.root.iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    second = load(write(tmp_path / "b.jsonl", ROWS))
    assert list(cache.root.iterdir()) == [entry]
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == written
    assert first._fingerprint == second._fingerprint != load(write(tmp_path / "c.jsonl", ROWS[:1]))._fingerprint
    assert second.cache_files == [{"filename": str(entry / "rows.arrow")}]


def test_a_damaged_entry_is_written_anew(tmp_path, cache, load):
    path = write(tmp_path / "a.jsonl", ROWS)
    load(path)
    (entry,) = cache.root.iterdir()
    os.truncate(entry / "rows.arrow", 100)
    assert load(path).to_list() == ROWS


def test_the_kind_of_a_file_is_part_of_its_content(tmp_path, load):
    for name in ("a.csv", "a.tsv", "a.txt"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    assert load(tmp_path / "a.csv").to_list() == [{"a": "1", "b": "2"}]
    assert load(tmp_path / "a.tsv").to_list() == [{"a,b": "1,2"}]
    assert load(tmp_path / "a.txt").to_list() == [{"text": "a,b\n1,2"}]


def test_parquet_keeps_its_types(tmp_path, load):
    table = pa.table({"messages": [[{"role": "user", "content": "a"}], None], "n": [1, 2], "empty": [None, None],
                      "kind": pa.array(["a", "b"]).dictionary_encode(),
                      "large": pa.array(["x", None], pa.large_string()),
                      "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet")
    assert rows[0] == {"messages": [{"role": "user", "content": "a"}], "n": 1, "empty": None, "kind": "a", "large": "x",
                       "map": [["a", 1]]}  # fmt: skip
    assert [rows.features[name] for name in ("n", "empty", "kind", "large")] == [Value("int64"), *[Value("string")] * 3]


def test_a_folder_gives_the_rows_of_all_its_files_in_order(tmp_path, load):
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / ".hidden").mkdir()
    for number, name in enumerate(["a.jsonl", "b.csv.gz", "c.parquet", "more/d.json"]):
        write(data / name, [{"text": name, "n": str(number)}])
    for name in ("README.md", "README.txt", "LICENSE", "dataset_info.json", "x.lock", ".hidden/e.jsonl", "f.png"):
        (data / name).write_text("no rows")
    names = ["a.jsonl", "b.csv.gz", "c.parquet", "more/d.json"]
    assert load(data)["text"][:] == names
    assert load(f"{data}/**/*.json*")["text"][:] == ["a.jsonl", "more/d.json"]
    assert load(f"{data}/[bc].*")["text"][:] == names[1:3]


def test_files_of_a_folder_may_differ_in_how_they_hold_a_column(tmp_path, load):
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"m": [[{"a": 1}]], "n": pa.array([1], pa.int32())}), data / "a.parquet")
    pq.write_table(pa.table({"m": [[{"b": "x"}]], "n": pa.array([2], pa.int64())}), data / "b.parquet")
    write(data / "c.jsonl", [{"m": [{"c": None}], "n": "3"}])
    rows = [{"m": [{"a": 1}], "n": 1}, {"m": [{"b": "x"}], "n": 2}, {"m": [{"c": None}], "n": "3"}]
    assert load(f"{data}/*").to_list() == rows
    assert load(f"{data}/*.parquet").features == {"m": Json(), "n": Value("int64")}


def test_folders_of_save_to_disk_are_opened_with_their_splits(tmp_path, load):
    train, test = Dataset.from_list([{"text": "a"}]), Dataset.from_list([{"text": "b"}])
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one").to_list() == [{"text": "a"}]
    assert load(tmp_path / "two").to_list() == [{"text": "a"}]
    assert load(tmp_path / "two", split=("eval", "test")).to_list() == [{"text": "b"}]
    assert load(tmp_path / "one")._fingerprint == load(tmp_path / "two")._fingerprint
    with pytest.raises(UserError, match=r"two: has no split tests, only train, test; choose one of these"):
        load(tmp_path / "two", split="tests")


def test_a_broken_folder_of_save_to_disk_is_named(tmp_path, message):
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert message(tmp_path / "one").startswith(f"data.path={tmp_path}/one: cannot be read as a folder of datasets'")


def test_missing_files_are_answered_with_the_nearest_name(tmp_path, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    write(tmp_path / "my" / "rows.jsonl", ROWS)
    assert message("my/row.jsonl") == "data.path=my/row.jsonl: no such file (did you mean my/rows.jsonl?)"
    write(tmp_path / "rows.jsonl", ROWS)
    assert message("rows.jsnol") == "data.path=rows.jsnol: no such file (did you mean rows.jsonl?)"
    assert message("./nothing") == "data.path=./nothing: no such file"
    assert message("./mi") == "data.path=./mi: no such file (did you mean my?)"
    assert message("no/rows.csv", key="data.eval_path") == (
        "data.eval_path=no/rows.csv: no such file (there is no folder no)"
    )


def test_folders_and_globs_without_data_are_answered_with_what_there_is(tmp_path, message):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    forms = "; the forms are .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt, and these with .gz"
    for name in ("README.md", "a.xlsx"):
        (data / name).write_text("")
    assert (
        message(data) == f"data.path={data}: no data files in this folder ({data} holds README.md, a.xlsx, sub/){forms}"
    )
    assert (
        message(f"{data}/sub")
        == f"data.path={data}/sub: no data files in this folder ({data}/sub holds nothing){forms}"
    )
    assert message(f"{data}/*.jsonl") == (
        f"data.path={data}/*.jsonl: matches no data file ({data} holds README.md, a.xlsx, sub/){forms}"
    )
    assert message(f"{tmp_path}/no/**/*.csv").startswith(
        f"data.path={tmp_path}/no/**/*.csv: matches no data file (there is no folder {tmp_path}/no)"
    )
    assert message(data / "a.xlsx") == f"data.path={data}/a.xlsx: cannot read .xlsx{forms}"
    (data / "rows").write_text("")
    assert message(data / "rows") == f"data.path={data}/rows: cannot read a file without a suffix{forms}"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', ", line 3: broken JSON (Expecting value); the file must hold one array"),
        ("a.jsonl", '{"a": 1}{"a": 2}\n', ", line 1: broken JSON (Extra data)"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "}\n", ", line 1: broken JSON (nested too deeply)"),
        ("a.json", "[" * 100_000, ", line 1: broken JSON (nested too deeply)"),
        ("a.json", '[{"a": 1},\n{"a" 1}]', ", line 2: broken JSON (Expecting ':' delimiter)"),
        ("a.json", '[{"a": 1},\n{"a": 2}\n{"a": 3}]', ", line 3: broken JSON (Expecting ',' delimiter)"),
        ("a.json", '[{"a": 1},\n{"a": "x\n"}]', ", line 2: broken JSON (Invalid control character at)"),
        ("a.json", '[{"a": 1},\n{"a": "x', ", line 2: broken JSON (the array is not closed; is the file cut off?)"),
        ("a.json", '[{"a": 1},\n\n', ", line 1: broken JSON (the array is not closed; is the file cut off?)"),
        ("a.json", '[{"a": 1}]\n[]', ", line 2: broken JSON (Extra data)"),
        ("a.json", '[{"a": 1}, ["b"]]', ": element 1 of the array is an array; each must be an object"),
        ("a.jsonl", '{"a": 1}\nnull', ", line 2: null; each line must hold an object"),
        ("a.jsonl", '{"a": 1}\n"text"', ", line 2: a string; each line must hold an object"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}', ", line 2: column a holds half of a surrogate pair"),
        ("a.jsonl", '{"a": "x"}\n{"a": ["\\ud83d"]}', ", line 2: column a holds half of a surrogate pair"),
        ("a.jsonl", '{"a": 1}\n{"a": 36893488147419103232}', ", line 2: column a cannot be kept (Value is too big!)"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}', ", line 2: the key 'a' stands twice in one object; keep one"),
        (
            "a.jsonl",
            '{"a": [{"b": {"c": 1, "c": 1}}]}',
            ", line 1: the key 'c' stands twice in one object; keep one of",
        ),
        ("a.json", '[{"a": 1},\n{"a": {"b": 1,\n"b": 2}}]', ", line 2: the key 'b' stands twice in one object; keep"),
        ("a.json", '[\n{"a": 1,\n"a": 1}\n]', ", line 2: the key 'a' stands twice in one object; keep one of them"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "\\ud800": "x"}', ", line 2: the name of the column '\\ud800' holds half of a"),
        ("a.json", '[{"a": 1}, {"\\udfff b": 1}]', ", element 1: the name of the column '\\udfff b' holds half of a"),
        ("a.jsonl", '{"a": {"\\ud800": "x"}}', ", line 1: column a holds half of a surrogate pair"),
        ("a.jsonl", "{}\n{}", ", line 1: has no columns"),
        ("a.jsonl", "", " is empty"),
        ("a.json", " \n", " is empty"),
        ("a.txt", "\n \n", " is empty"),
        ("a.csv", "", " is empty"),
        ("a.csv", " \r\n\n", " is empty"),
        ("a.parquet", "", " is empty"),
        ("a.csv", "a,b\n", ": no rows in it"),
        ("a.json", "[]", ": no rows in it"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, but the first line names 2 columns"),
        ("a.csv", 'a,b\n"1\n",2\n1\n', ", line 4: 1 cells, but the first line names 2 columns"),
        ("a.csv", 'a,b\n1,"2\n\n3,4\n', ", line 2: broken row (a quote is opened and never closed)"),
        ("a.csv", 'a,b\n1,"2"x\n', ", line 2: broken row (',' expected after '\"')"),
        ("a.csv", "a,b,a\n1,2,3\n", ", line 1: two columns are named a; give each its own name"),
        ("a.csv", "\n,b\n1,2\n", ", line 2: column 1 has no name; name it, or leave it out (pandas: index=False)"),
        ("a.parquet", "PAR1 no PAR1", ": broken Parquet file ("),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, message, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert message(path).startswith(f"data.path={path}{expected}")


@pytest.mark.full
def test_errors_far_into_a_file_have_the_right_line(tmp_path, message):
    line = json.dumps({"text": "ä" * 3000}, ensure_ascii=False)
    lines = [line] * 2000
    lines[1500] = lines[1500][:-1]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert ", line 1501: broken JSON" in message(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(lines) + "\n]")
    assert ", line 1503: broken JSON (Expecting property name" in message(tmp_path / "a.json")
    lines[1500] = '{"other": "x"}'
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert ", line 3001: has the columns other" in message(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("a,b\n" + '"x\ny",2\n' * 400_000 + "1\n")
    assert ", line 800002: 1 cells" in message(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "content", "position"),
    [
        ("a.jsonl", '{"a": "1", "b": "2"}\n{"a": "1"}\n{"c": "3"}\n', "line 3"),
        ("a.json", '[{"a": "1", "b": "2"}, {"c": "3"}]', "element 1"),
    ],
)
def test_rows_that_share_no_column_with_those_before_are_refused(tmp_path, message, name, content, position):
    (tmp_path / name).write_text(content)
    assert message(tmp_path / name) == (
        f"data.path={tmp_path}/{name}, {position}: has the columns c, but the rows before it have a, b; all rows must "
        "be of one kind"
    )


def test_files_of_a_folder_that_share_no_column_are_refused(tmp_path, message):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.csv", [{"a": "1"}])
    write(data / "b.parquet", [{"b": "1"}])
    assert message(data).startswith(f"data.path={data}, file {data}/b.parquet, row 0: has the columns b, but the rows")
    (data / "b.parquet").write_bytes(b"")
    assert message(data) == f"data.path={data}, file {data}/b.parquet is empty"


def test_parquet_columns_of_one_name_are_refused(tmp_path, message):
    pq.write_table(pa.table([["1"], ["2"]], names=["a", "a"]), tmp_path / "a.parquet")
    assert message(tmp_path / "a.parquet").endswith("two columns are named a; give each its own name")


def test_a_key_that_stands_twice_in_parquet_s_objects_is_refused(tmp_path, message):
    twice = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["k", "k"])
    for column in (twice, pa.ListArray.from_arrays([0, 1], twice)):
        pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
        assert message(tmp_path / "a.parquet").endswith(
            "a.parquet: in column a, the key 'k' stands twice in one object; keep one of them"
        )


def test_what_does_not_print_is_in_no_message(tmp_path, message):
    (tmp_path / "a.jsonl").write_text('{"a\\u0007": 1}\n{"b\\u0000\\u202e": 1}\n')
    sentence = message(tmp_path / "a.jsonl")
    assert sentence.isprintable()
    assert "has the columns b\\x00\\u202e, but the rows before it have a\\x07; all" in sentence
    row = {f"column {number}": 1 for number in range(500)}
    write(tmp_path / "b.jsonl", [row, {"other": 1}])
    assert "column 19 and 480 more; all rows must be of one kind" in message(tmp_path / "b.jsonl")


def test_text_that_is_not_utf8_is_named_with_line_and_byte(tmp_path, message):
    for name in ("c.csv", "c.jsonl", "c.txt"):
        (tmp_path / name).write_bytes("a\nä\n".encode("latin-1"))
        assert message(tmp_path / name) == (
            f"data.path={tmp_path}/{name}, line 2: not UTF-8 text (byte 2); convert it to UTF-8"
        )
    content = '{"a": "ä"}\n'.encode() * 400_000
    (tmp_path / "d.jsonl").write_bytes(content + b'{"a": "\xe4"}')
    assert f"line 400001: not UTF-8 text (byte {len(content) + 7})" in message(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(content + b'{"a": "\xe4'))
    assert f"line 400001: not UTF-8 text (byte {len(content) + 7})" in message(tmp_path / "e.jsonl.gz")


def test_files_that_are_not_what_they_say_are_named(tmp_path, message):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}\n' * 100)[:-12])
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress(b'{"a": "b"}\n' * 100)[:-12])
    damaged = bytearray(gzip.compress(os.urandom(2**20).hex().encode()))
    damaged[2**19] ^= 255
    (tmp_path / "d.txt.gz").write_bytes(damaged)
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.parquet.gz", "d.txt.gz"):
        assert message(tmp_path / name).startswith(f"data.path={tmp_path}/{name}: not a whole gzip file (")
    (tmp_path / "e.jsonl").write_bytes(gzip.compress(b'{"a": "b"}\n'))
    assert message(tmp_path / "e.jsonl").endswith("e.jsonl: is compressed with gzip; give it a name that ends in .gz")
    whole = Path(write(tmp_path / "f.parquet", [{"a": os.urandom(1000).hex()} for _ in range(100)])).read_bytes()
    for content in (whole[:-100], whole[:2000] + b"\xff" * 50_000 + whole[52_000:], whole[:100]):
        (tmp_path / "f.parquet").write_bytes(content)
        assert message(tmp_path / "f.parquet").startswith(f"data.path={tmp_path}/f.parquet: broken Parquet file (")


@pytest.mark.matrix(1)
@pytest.mark.parametrize("size", [10, 70])
def test_rows_of_many_megabytes_are_read(tmp_path, load, size):
    rows = [{"text": "short"}, {"text": "ä" * (size * 2**19), "n": [1]}, {"text": "last"}]
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_text(json.dumps(rows, ensure_ascii=False) if name == "a.json" else
                        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))  # fmt: skip
        loaded = load(path, max_row_bytes=2**27)
        assert [len(text) for text in loaded["text"]] == [5, size * 2**19, 4]
        assert loaded[1]["text"] == rows[1]["text"]


ARRAY = '[ {"a": "ä\\n\\u00e4 \\"]", "b": [1.5e3, -7, true, null]},\n {} , {"c": {"d": "}"}},\r\n\t{"n": -1e-7}\n ] \n'


@pytest.mark.parametrize("size", range(1, 12))
def test_an_array_may_be_cut_anywhere_while_it_is_read(size):
    chunks = list(read_array(io.StringIO(ARRAY), "F", size=size, most=MAX_ROW_BYTES))
    assert [row for _, rows in chunks for row in rows] == json.loads(ARRAY)
    starts = [start for start, _ in chunks]
    assert starts == [sum(len(rows) for _, rows in chunks[:i]) for i in range(len(chunks))]


@pytest.mark.parametrize("size", [3, 1000])
def test_an_array_that_ends_early_is_never_taken_for_whole(size):
    for end in range(1, len(ARRAY.rstrip())):
        with pytest.raises(UserError, match=r"^F, line \d: broken JSON"):
            list(read_array(io.StringIO(ARRAY[:end]), "F", size=size, most=MAX_ROW_BYTES))


@pytest.mark.parametrize("size", range(1, 12))
def test_lines_may_be_cut_anywhere_while_they_are_read(size):
    text = '\ufeff{"a": "ä\u2028"}\r\n\n {"b": []} \n{"c": 1}'
    chunks = list(read_lines(io.BytesIO(text.encode()), "F", size=max(size, 3), most=MAX_ROW_BYTES))
    assert [row for _, rows in chunks for row in rows] == [{"a": "ä\u2028"}, {"b": []}, {"c": 1}]
    assert [number for numbers, _ in chunks for number in numbers] == [1, 3, 4]


# ru_maxrss starts at what the parent held when it forked; the high-water mark of /proc starts at nothing.
MEASURE = """
import re, sys
from pathlib import Path
from qlora.data.cache import Cache
from qlora.data.ingest.sources import load_rows
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before, cache = peak(), Cache(Path(sys.argv[1]))
assert all(len(load_rows(path, cache=cache)) == int(sys.argv[2]) for path in sys.argv[3:])
print(before, peak())
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ten_times_the_rows_need_no_more_memory(tmp_path):
    peaks, added = [], []
    row = {"instruction": "Name it. " * 10, "input": "", "output": "An answer, of some words. " * 8}
    for count in (15_000, 150_000):
        files = [write(tmp_path / f"{count}.{suffix}", [row] * count) for suffix in ("jsonl", "json", "csv", "parquet")]
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(count), *files]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        initial, peak = map(int, done.stdout.split())
        peaks.append(peak)
        added.append(peak - initial)
    assert peaks[1] < 1.2 * peaks[0]
    assert added[1] < 1.5 * added[0], "what the imports need is not to hide it"


def test_a_file_that_changes_meanwhile_is_not_kept(tmp_path, message, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "b"}\n')
    gzip_open = Path.open

    def change(self, *arguments, **named):
        if self == path and arguments == ("rb",) and path.stat().st_size < 100:
            with gzip_open(path, "a") as file:
                file.write('{"a": "c"}\n')
        return gzip_open(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", change)
    assert message(path).endswith("a.jsonl: changed while it was read; run again when it is finished")


@pytest.mark.full
@needs_real
def test_every_published_file_reads_as_json_reads_it(load):
    files = [path for path in REAL.rglob("*") if kind_of(path) and not {"models", "tokenizers"} & set(path.parts)]
    assert len(files) > 100
    for path in files:
        rows = load(path)
        if kind_of(path) == "json":
            text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
            lines = (json.loads(line) for line in text.split("\n") if line)
            expected = json.loads(text) if text.startswith("[") else list(lines)
            if path.stem != "tau_bench_airline":  # its costs lose their 17th digit in the parser of datasets
                assert [
                    {k: v for k, v in row.items() if k in e} for row, e in zip(rows, expected, strict=True)
                ] == expected


@needs_real
def test_folders_and_globs_of_published_files_load(load):
    containers = REAL / "containers"
    one = load(containers / "alpaca_300.json").to_list()
    assert load(containers).to_list() == one * 7
    assert load(f"{containers}/*.json*").to_list() == one * 3
    assert len(load(REAL / "mmlu" / "csv" / "test")) == 9266
    assert len(load(f"{REAL}/mmlu/**/*_dev.csv")) == 205
    assert len(load(REAL / "tinyshakespeare.txt")) == 6283
