import csv
import gzip
import itertools
import json

import datasets
import pytest
from datasets import Dataset, Features, Value

from qlora.data.sources import load_rows
from qlora.errors import ConfigError

ROWS = [
    {"instruction": 'Quote "this",\tplease', "input": "a\nb", "output": "ä\u2028ö"},
    {"instruction": "Second", "input": "", "output": "x" * 200_000},
]


def write(path, rows):
    """Writes rows in the form that the file's name says."""
    name = path.name.removesuffix(".gz")
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".json"):
            json.dump(rows, file)
        elif name.endswith(".jsonl"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def message(path, **arguments):
    with pytest.raises(ConfigError) as caught:
        load_rows(path, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz", "tsv.gz"])
def test_all_file_forms_read_equal(tmp_path, suffix):
    assert load_rows(write(tmp_path / f"rows.{suffix}", ROWS)).to_list() == ROWS


def test_long_csv_cells_leave_the_limit_of_the_csv_module_alone(tmp_path):
    limit = csv.field_size_limit()
    load_rows(write(tmp_path / "rows.csv", ROWS))
    assert csv.field_size_limit() == limit


def test_a_json_file_may_hold_one_object_a_line_and_a_jsonl_file_an_array(tmp_path):
    (tmp_path / "rows.json").write_text('\ufeff{"text": "a"}\n\n{"text": "b"}')
    (tmp_path / "rows.jsonl").write_text('[{"text": "a"},\n{"text": "b"}]')
    expected = [{"text": "a"}, {"text": "b"}]
    assert load_rows(str(tmp_path / "rows.json")).to_list() == expected
    assert load_rows(str(tmp_path / "rows.jsonl")).to_list() == expected


def test_rows_may_differ_in_their_keys_and_null_text_is_empty(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": "x", "n": None}, {"b": "y"}, {"a": None, "c": [1, "z"]}])
    assert load_rows(path).to_list() == [
        {"a": "x", "n": "", "b": "", "c": None},
        {"a": "", "n": "", "b": "y", "c": None},
        {"a": "", "n": "", "b": "", "c": [1, "z"]},
    ]


def test_values_of_mixed_types_come_back_as_they_were(tmp_path):
    rows = [{"output": 7, "pairs": [["a", True]]}, {"output": "seven", "pairs": [["b", False], ["c", True]]}]
    assert load_rows(write(tmp_path / "rows.jsonl", rows)).to_list() == rows


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    write(tmp_path / "my" / "rows.jsonl", ROWS)
    assert message("my/row.jsonl") == "data.path=my/row.jsonl: no such file (did you mean my/rows.jsonl?)"
    assert message("./nothing") == "data.path=./nothing: no such file"
    assert message("no/rows.csv", key="data.eval_path") == (
        "data.eval_path=no/rows.csv: no such file (there is no folder no)"
    )


def test_a_folder_is_answered_with_the_files_in_it(tmp_path):
    write(tmp_path / "rows.csv", ROWS)
    assert message(str(tmp_path)).endswith("is a folder; name a file in it: rows.csv")


def test_unknown_forms_are_refused_with_the_known_ones(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert message(str(tmp_path / "rows.parquet")).endswith(
        "cannot read .parquet; the forms are .json, .jsonl, .csv, .tsv, and these with .gz"
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', ", line 3: broken JSON (Expecting value)"),
        ("a.json", '[{"a": 1},\n{"a" 1}]', ", line 2: broken JSON (Expecting ':' delimiter)"),
        ("a.json", '[{"a": 1}, ["b"]]', ": element 1 of the array is an array; each must be an object"),
        ("a.jsonl", '{"a": 1}\nnull', ", line 2: null; each line must hold an object"),
        ("a.json", " \n", " is empty"),
        ("a.csv", "", " is empty"),
        ("a.csv", "a,b\n", ": no rows in it"),
        ("a.json", "[]", ": no rows in it"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, but the first line names 2 columns"),
        ("a.csv", 'a,b\n1,"2\n', ", line 2: broken row (unexpected end of data)"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    assert message(str(path)).startswith(f"data.path={path}{expected}")


def test_files_that_are_not_what_they_say_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}' * 100)[:-12])
    (tmp_path / "c.csv").write_bytes("a\nä\n".encode("latin-1"))
    assert "not a whole gzip file" in message(str(tmp_path / "a.jsonl.gz"))
    assert "not a whole gzip file" in message(str(tmp_path / "b.jsonl.gz"))
    assert "not UTF-8 text (byte 2)" in message(str(tmp_path / "c.csv"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "import itertools\n"
        "def endless():\n    return ({'text': str(i), 'pair': ('a', True)} for i in itertools.count())\n"
        "def wrong():\n    return [1]\n"
        "def single():\n    return {'text': 'a'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rows"


def test_a_limit_ends_an_endless_function(module):
    rows = load_rows(f"{module}:endless", limit=3)
    assert rows.to_list() == [{"text": str(i), "pair": ["a", True]} for i in range(3)]


def test_functions_that_give_no_rows_are_named(module):
    assert message(f"{module}:endles") == (
        "data.path=my_rows:endles: module my_rows has no function endles (did you mean endless?)"
    )
    assert message("no_such.module:rows") == (
        "data.path=no_such.module:rows: there is no module no_such; it must be installed or lie on PYTHONPATH"
    )
    assert message(f"{module}:wrong").endswith("row 0 is of type int; each must be an object with named columns")
    assert message(f"{module}:single").endswith("returned dict; it must return an iterable of rows (dicts)")


def test_a_hub_set_out_of_reach_is_answered_with_ways_out():
    text = message("nobody/such-a-set-v1.5")
    assert text.startswith(
        "data.path=nobody/such-a-set-v1.5: no such file, and not to be had from the Hugging Face hub"
    )
    assert "hf auth login" in text
    assert "data=local data.path=FILE" in text


def test_a_hub_set_gives_the_first_of_the_held_out_splits(monkeypatch):
    features = Features({"text": Value("string"), "n": Value("int32")})
    rows = Dataset.from_list([{"text": None, "n": None}, {"text": "a", "n": 1}], features=features)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    def load(path, subset, *, split=None, data_files):
        assert (path, subset, data_files) == ("org/set", "en", None)
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("org/set", subset="en").to_list() == [{"text": "", "n": None}, {"text": "a", "n": 1}]
    assert len(load_rows("org/set", subset="en", split=("eval", "test"))) == 1
    assert "has no split eval, only train, test" in message("org/set", subset="en", split=("eval",))


def test_progress_bars_come_back_after_loading(tmp_path):
    before = datasets.are_progress_bars_disabled()
    message("nobody/nothing")
    assert datasets.are_progress_bars_disabled() == before


def test_no_more_rows_than_the_limit_are_drawn(monkeypatch):
    taken = itertools.count()
    monkeypatch.setattr("json.rows", lambda: ({"n": str(next(taken))} for _ in range(10)), raising=False)
    assert len(load_rows("json:rows", limit=4)) == 4
    assert next(taken) == 4
