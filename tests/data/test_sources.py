import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Json, Value
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from qlora.errors import UserError


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "import itertools, datetime, numpy\n"
        "calls = []\n"
        "def endless():\n    return ({'text': str(i), 'pair': ('a', True)} for i in itertools.count())\n"
        "def wrong():\n    return [1]\n"
        "def single():\n    return {'text': 'a'}\n"
        "def late():\n"
        "    calls.append(1)\n"
        "    for i in range(3000):\n        yield {'text': str(i) if i < 2500 else i, 'n': numpy.int64(i)}\n"
        "def strange():\n    return [{'a': 'x'}, {'a': object()}]\n"
        "def numbered():\n    return [{1: 'x'}]\n"
        "def mixed():\n    return [{'a': 'x'}, {'b': 'y'}]\n"
        "def failing():\n    yield {'a': 'x'}\n    raise KeyError('mine')\n"
        "def nothing():\n    return []\n"
        "def day():\n    return [{'day': datetime.date(2024, 2, 29), 'more': numpy.arange(2)}]\n"
        "def repeated():\n    return [{'id': i % 4000 or None} for i in range(10000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    return "my_rows"


def test_a_limit_ends_an_endless_function(module, load):
    rows = load(f"{module}:endless", limit=3)
    assert rows.to_list() == [{"text": str(i), "pair": ["a", True]} for i in range(3)]


def test_a_function_is_called_once_though_its_columns_show_late(module, load):
    rows = load(f"{module}:late")
    assert rows.to_list() == [{"text": str(i) if i < 2500 else i, "n": i} for i in range(3000)]
    assert sys.modules[module].calls == [1]


def test_equal_rows_of_a_function_have_equal_fingerprints(module, load):
    first, second, shorter = (load(f"{module}:endless", limit=limit) for limit in (2000, 2000, 1999))
    assert first._fingerprint == second._fingerprint != shorter._fingerprint
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qlora.data.cache import Cache\n"
        "from qlora.data.ingest.sources import load_rows\n"
        "print(load_rows('my_rows:endless', cache=Cache(Path('cache')), limit=2000)._fingerprint)\n"
    )
    folder = Path(sys.modules[module].__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), *sys.path]))}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() == first._fingerprint
    assert not list((folder / "cache").iterdir()), "rows of a function go with the process"


def test_dates_and_arrays_of_a_function_become_text_and_lists(module, load):
    assert load(f"{module}:day").to_list() == [{"day": "2024-02-29", "more": [0, 1]}]


def test_functions_that_give_no_rows_are_named(module, message):
    assert message(f"{module}:endles") == (
        "data.path=my_rows:endles: module my_rows has no function endles (did you mean endless?)"
    )
    assert message("no_such.module:rows") == (
        "data.path=no_such.module:rows: there is no module no_such; it must be installed or lie on PYTHONPATH"
    )
    assert message(f"{module}:wrong").endswith("row 0 is of type int; each must be an object with named columns")
    assert message(f"{module}:single").endswith("returned dict; it must return an iterable of rows (dicts)")
    assert message(f"{module}:nothing") == "data.path=my_rows:nothing: no rows in it"
    assert message(f"{module}:strange").startswith(
        "data.path=my_rows:strange, row 1: column a holds a value of type object; rows are of text, numbers,"
    )
    assert message(f"{module}:numbered") == "data.path=my_rows:numbered, row 0: a column is named 1; names must be text"
    assert message(f"{module}:mixed").startswith(
        "data.path=my_rows:mixed, row 1: has the columns b, but the rows before it have a"
    )


def test_an_error_inside_a_function_is_its_own_and_leaves_nothing(module, load, cache):
    with pytest.raises(KeyError, match="mine"):
        load(f"{module}:failing")
    assert not list(cache.root.iterdir())


def test_repeated_ids_are_said_and_kept(module, load, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qlora"):
        assert len(load(f"{module}:repeated")) == 10_000
    assert caplog.messages == ["data.path=my_rows:repeated: 5998 rows repeat an id of an earlier row; all are kept"]
    ids = ["a", "b", "a", None, None, 7, "c", 7]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": "x"}) + "\n" for name in ids))
    Dataset.from_list([{"id": 1}, {"id": 1}, {"id": 2}]).save_to_disk(tmp_path / "saved")
    caplog.clear()
    for source in (path, path, tmp_path / "saved"):
        load(source)
    assert [line.split(": ")[1].split()[0] for line in caplog.messages] == ["2", "2", "1"]


def test_columns_are_renamed_and_replace_those_of_the_wanted_name(tmp_path, load):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "i", "input": "n", "response": "r"}')
    expected = {"instruction": "i", "output": "r", "input": "n"}
    assert load(path, columns={"output": "response"}).to_list() == [expected]
    assert load(path, columns={"input": "response"}).to_list() == [{"instruction": "i", "input": "r"}]
    swapped = load(path, columns={"input": "response", "response": "input", "instruction": "instruction"})
    assert swapped.to_list() == [{"instruction": "i", "input": "r", "response": "n"}]
    names = [load(path, columns=columns)._fingerprint for columns in ({"output": "response"}, {"output": "input"}, {})]
    assert len({*names, load(path, columns={"output": "response"})._fingerprint}) == 3


def test_columns_that_are_not_there_are_answered_with_those_that_are(tmp_path, load):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "i", "input": "n", "response": "r"}')
    with pytest.raises(UserError) as caught:
        load(path, columns={"output": "respons"})
    assert str(caught.value) == (
        f"data.columns.output=respons: data.path={path} has no column respons (did you mean response?); it has "
        "instruction, input, response"
    )
    with pytest.raises(UserError) as caught:
        load(path, columns={"outptu": "answer"})
    assert str(caught.value) == (
        "data.columns.outptu=answer: outptu is no column of a format (did you mean output?), and "
        f"data.path={path} has no column answer"
    )
    with pytest.raises(UserError, match=r"^data.mix.a.columns.b=input: the column is a already$"):
        load(path, columns={"a": "input", "b": "input"}, columns_key="data.mix.a.columns")


def test_a_hub_set_out_of_reach_is_answered_with_ways_out(message):
    text = message("nobody/such-a-set-v1.5")
    assert text.startswith(
        "data.path=nobody/such-a-set-v1.5: no such file, and not available from the Hugging Face hub "
        "(HF_HUB_OFFLINE=1 forbids downloads; "
    )
    assert "hf auth login" in text
    assert "data=local data.path=FILE" in text


def raise_from(cause):
    def load(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset is out of reach.\nMore.") from cause

    return load


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (GatedRepoError, "it is gated: accept its terms on its page there, and log in with `hf auth login` or set HF_"),
        (RepositoryNotFoundError, "no such data set: check the name; if it is private, log in with `hf auth login` or"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE=1 forbids downloads; what was downloaded before can be used offline"),
        (ValueError, "Dataset is out of reach; check the name and data.subset, data.split, data.data_files"),
    ],
)  # fmt: skip
def test_a_hub_set_that_cannot_be_had_is_answered_with_the_reason(monkeypatch, message, cause, expected):
    # The hub's errors want a response; which kind of error it is suffices here.
    monkeypatch.setattr(datasets, "load_dataset", raise_from(cause.__new__(cause)))
    text = message("org/set")
    assert text.startswith(f"data.path=org/set: no such file, and not available from the Hugging Face hub ({expected}")


def test_a_hub_set_gives_the_first_of_the_held_out_splits(monkeypatch, load, message):
    features = Features({"text": Value("string"), "n": Value("int32")})
    rows = Dataset.from_list([{"text": None, "n": None}, {"text": "a", "n": 1}], features=features)
    splits = DatasetDict({"train": rows, "test": rows.select([0])})

    def load_dataset(path, subset, *, split=None, data_files, revision):
        assert (path, subset, data_files, revision) == ("org/set", "en", None, "main")
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("org/set", subset="en", revision="main").to_list() == [{"text": None, "n": None}, {"text": "a", "n": 1}]
    assert load("org/set", subset="en", revision="main")._fingerprint == rows._fingerprint
    assert len(load("org/set", subset="en", revision="main", split=("eval", "test"))) == 1
    assert "has no split eval, only train, test; leave data.path out" in message(
        "org/set", subset="en", revision="main", split=("eval",)
    )


def test_progress_bars_come_back_after_loading(message):
    initial = datasets.are_progress_bars_disabled()
    message("nobody/nothing")
    assert datasets.are_progress_bars_disabled() == initial


def test_no_more_rows_than_the_limit_are_drawn(monkeypatch, load):
    taken = itertools.count()

    def ten_rows():
        return ({"n": str(next(taken))} for _ in range(10))

    ten_rows.__module__ = "json"  # as if it were written there
    monkeypatch.setattr("json.rows", ten_rows, raising=False)
    assert len(load("json:rows", limit=4)) == 4
    assert next(taken) == 4


def test_a_local_path_is_told_from_a_hub_id(tmp_path, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    assert "no data files in this folder" in message("org/set")
    assert "no such file (there is no folder a/b)" in message("a/b/c")
    assert "hub" in message("org/other")


def test_json_columns_read_back_what_was_stored(load, tmp_path):
    # datasets' own encoder keeps text that happens to be JSON as it is: "7" would come back as 7.
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "7"}\n{"a": 7}\n{"a": "{}"}')
    rows = load(path)
    assert rows.features["a"] == Json()
    assert rows["a"][:] == ["7", 7, "{}"]
