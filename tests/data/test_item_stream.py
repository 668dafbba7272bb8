"""Rows that are read as they are needed: the same as those read whole, exact after a restart, and in flat memory."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from qlora.config.schema import DataConfig, Stop
from qlora.data.batching.item_stream import ItemStream
from qlora.data.batching.stream_state import STATE
from qlora.data.batching.token_store import column
from qlora.data.pipeline import Data, StreamLength, build_data
from qlora.errors import DataError, RunError, UserError

STEP = 4
"""Items an optimizer step takes in these tests."""


def write_rows(path: Path, count: int, word: str = "row", **more: Any) -> Path:
    rows = [
        {"input": f"{word} {index} " + "x" * (index % 7), "output": f"out {index}", **more} for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def stream_of(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    def build(steps: int = 30, *, seed: int = 0, **values: Any) -> Data:
        values = {"name": "toy", "streaming": True, "path": None, "cache_dir": str(tmp_path / "cache"),
                  "eval_dataset_size": 0, "shuffle_buffer": 10, "max_length": 64} | values  # fmt: skip
        return build_data(
            DataConfig(**values), tokenizer, need_eval=values["eval_dataset_size"] != 0,
            length=StreamLength(steps, STEP, seed),
        )  # fmt: skip

    return build


def stream(data: Data) -> ItemStream:
    assert data.stream is not None
    return data.stream


def names(items: ItemStream, first: int, count: int) -> list[str]:
    return [name for index in range(first, first + count) for name, _ in items.named_rows(index)]


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_a_pass_shows_each_row_once_in_the_tokens_of_rows_read_whole(
    stream_of: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", 40))
    items = stream(stream_of(20, path=path))
    whole = build_data(DataConfig(name="toy", path=path, eval_dataset_size=0, max_length=64,
                                  cache_dir=str(tmp_path / "cache")), tokenizer, need_eval=False)  # fmt: skip
    assert whole.train is not None
    expected = {row["row"]: row["input_ids"] for row in whole.train}
    for start in (0, 40):
        seen = [items.named_rows(index)[0] for index in range(start, start + 40)]
        numbers = [int(name.rpartition(" ")[2]) - 1 for name, _ in seen]
        assert sorted(numbers) == list(range(40))
        assert numbers != list(range(40))
        for number, (_, row) in zip(numbers, seen, strict=True):
            assert row["input_ids"].tolist() == expected[number]


@pytest.mark.parametrize(
    "kind", ["rows", "packs", "mix", "mix of all, in packs", "function", "parquet", "saved", "hub"]
)
def test_a_stream_resumes_bit_for_bit_after_a_restart(
    stream_of: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"path": str(write_rows(tmp_path / "a.jsonl", 70))}
    if kind.startswith("mix"):
        write_rows(tmp_path / "b.jsonl", 25, "other")
        values = {"mix": {"a": {"path": values["path"], "probability": 0.7},
                          "b": {"path": str(tmp_path / "b.jsonl"), "probability": 0.3}}}  # fmt: skip
    if kind == "mix of all, in packs":
        values["stop"] = Stop.all
    if kind.endswith("packs"):
        values |= {"packing": True, "pack_length": 96}
    if kind == "function":
        values = {"path": "tests.data.test_item_stream:endless"}
    if kind == "parquet":
        import pyarrow.json
        import pyarrow.parquet

        table = pyarrow.json.read_json(values["path"])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=16)
        values = {"path": str(tmp_path / "a.parquet")}
    if kind in ("saved", "hub"):
        rows = Dataset.from_list([json.loads(line) for line in Path(values["path"]).read_text().splitlines()])
        rows.save_to_disk(str(tmp_path / "saved"), num_shards=3)
        values = {"path": str(tmp_path / "saved")}
    if kind == "hub":

        def load_dataset(path: str, subset: str | None, *, streaming: bool, **rest: Any) -> IterableDataset:
            assert (path, streaming) == ("org/set", True)
            return rows.to_iterable_dataset(num_shards=5)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        values = {"path": "org/set"}
    steps = 40
    whole = stream(stream_of(steps, **values))
    expected = [whole[index] for index in range(steps * STEP)]
    assert whole.passes > 0 or kind == "function"
    interrupted = stream(stream_of(steps, **values))
    for step in range(1, steps, 3):
        for index in range((step - 1) * STEP, step * STEP + 2):  # a loader reads ahead
            interrupted[index]
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        interrupted.save(folder, step * STEP)
        resumed = stream(stream_of(steps, **values))
        resumed[0]  # a trainer looks at the first row
        resumed.load(folder, step * STEP)
        last = min((step + 4) * STEP, steps * STEP)
        assert all(same(resumed[index], expected[index]) for index in range(step * STEP, last)), step
        interrupted = resumed
    assert interrupted.counts.rows > 0


def endless() -> Iterator[dict[str, str]]:
    number = 0
    while True:
        yield {"input": f"question {number}", "output": f"answer {number}"}
        number += 1


def test_every_item_of_several_processes_is_the_same_stream(stream_of: Any, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", 50))
    alone, first, second = (stream(stream_of(10, path=path)) for _ in range(3))
    for index in range(10 * STEP):
        assert same(alone[index], (first, second)[index // 2 % 2][index])  # two micro-batches of two rows in turn
    for number, items in enumerate((alone, first)):  # the last rows are those of the second process
        folder = tmp_path / str(number)
        folder.mkdir()
        items.save(folder, 10 * STEP)
    assert (tmp_path / "0" / STATE).read_text() == (tmp_path / "1" / STATE).read_text()


def test_packs_are_full_and_hold_each_row_once(stream_of: Any, tmp_path: Path) -> None:
    items = stream(stream_of(100, path=str(write_rows(tmp_path / "rows.jsonl", 2000)), packing=True, pack_length=128))
    lengths = [len(items[index]["input_ids"]) for index in range(200)]
    assert max(lengths) <= 128
    assert np.mean(lengths) > 0.9 * 128
    seen = Counter(names(items, 196, 4))
    assert max(seen.values()) == 1
    assert (items[199]["position_ids"] == 0).sum() > 1


def test_sets_are_drawn_by_their_probabilities(stream_of: Any, tmp_path: Path) -> None:
    mix = {"a": {"path": str(write_rows(tmp_path / "a.jsonl", 600)), "probability": 0.8},
           "b": {"path": str(write_rows(tmp_path / "b.jsonl", 600)), "probability": 0.2}}  # fmt: skip
    seen = [name for index in range(400) for name, _ in stream_of_mix(stream_of, mix).named_rows(index)]
    part = sum(name.startswith("data.mix.a") for name in seen) / len(seen)
    assert 0.74 < part < 0.86


_streams: dict[int, ItemStream] = {}


def stream_of_mix(stream_of: Any, mix: dict[str, Any]) -> ItemStream:
    key = id(mix)
    if key not in _streams:
        _streams[key] = stream(stream_of(100, mix=mix))
    return _streams[key]


@pytest.mark.parametrize(("stop", "least"), [("first", 0), ("all", 60)])
def test_stop_says_when_a_pass_over_several_sets_ends(stream_of: Any, tmp_path: Path, stop: str, least: int) -> None:
    mix = {"long": str(write_rows(tmp_path / "a.jsonl", 60)), "short": str(write_rows(tmp_path / "b.jsonl", 10))}
    items = stream(stream_of(60, mix=mix, stop=Stop[stop], shuffle_buffer=1))
    seen: Counter[str] = Counter()
    for index in range(240):
        seen.update(name for name, _ in items.named_rows(index))
        if items.passes:
            break
    long_rows = [name for name in seen if "long" in name]
    assert len(long_rows) >= least
    assert len(long_rows) < 60 or stop == "all"
    assert len([name for name in seen if "short" in name]) == 10


def test_held_out_rows_are_the_first_ones_and_are_not_trained(stream_of: Any, tmp_path: Path) -> None:
    data = stream_of(20, path=str(write_rows(tmp_path / "rows.jsonl", 30)), eval_dataset_size=5)
    assert data.eval is not None
    assert column(data.eval, "row").tolist() == [0, 1, 2, 3, 4]
    trained = {int(name.rpartition(" ")[2]) for name in names(stream(data), 0, 80)}
    assert trained == set(range(6, 31))


def test_the_first_rows_of_each_set_of_a_mix_are_held_out_by_its_probability(stream_of: Any, tmp_path: Path) -> None:
    mix = {"a": {"path": str(write_rows(tmp_path / "a.jsonl", 60)), "probability": 0.75},
           "b": {"path": str(write_rows(tmp_path / "b.jsonl", 60)), "probability": 0.25}}  # fmt: skip
    data = stream_of(10, mix=mix, eval_dataset_size=8)
    assert data.eval is not None
    assert column(data.eval, "row").tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_another_split_is_measured_by_its_first_rows(
    stream_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlora")
    parts = {name: [{"input": f"{name} {index}", "output": "a"} for index in range(30)] for name in ("train", "test")}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(str(tmp_path / "saved"))
    data = stream_of(10, path=str(tmp_path / "saved"), eval_split="test", eval_dataset_size=None, max_eval_samples=6)
    assert column(data.eval, "row").tolist() == list(range(6))
    assert "of data.eval_split=test the first 6 rows at most are measured" in caplog.text
    assert len(set(names(stream(data), 0, 30))) == 30  # nothing is held out of the rows to train on


def test_max_samples_ends_a_pass(stream_of: Any, tmp_path: Path) -> None:
    items = stream(stream_of(10, path=str(write_rows(tmp_path / "rows.jsonl", 60)), max_samples=7))
    assert {int(name.rpartition(" ")[2]) for name in names(items, 0, 40)} == set(range(1, 8))


def test_columns_have_other_names_in_a_stream_too(stream_of: Any, tmp_path: Path) -> None:
    rows = [{"question_text": f"q {index}", "reply": f"a {index}", "id": index} for index in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = stream_of(10, path=str(path), columns={"input": "question_text", "output": "reply"})
    assert len(set(names(stream(data), 0, 20))) == 20
    with pytest.raises(UserError, match="has no column replies"):
        stream_of(10, path=str(path), columns={"input": "question_text", "output": "replies"})


def test_another_seed_draws_other_rows(stream_of: Any, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", 60))
    assert names(stream(stream_of(path=path)), 0, 20) != names(stream(stream_of(path=path, seed=1)), 0, 20)


def test_a_file_of_another_size_is_refused_where_a_run_goes_on(stream_of: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 60)
    items = stream(stream_of(path=str(path)))
    items[STEP]
    items.save(tmp_path, STEP)
    write_rows(path, 61)
    with pytest.raises(UserError, match=r"rows.jsonl has .* bytes in 1 files, and had .* the place .* is another"):
        stream(stream_of(path=str(path))).load(tmp_path, STEP)


def test_a_broken_line_far_behind_the_first_rows_is_named(stream_of: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 800)
    lines = path.read_text().splitlines()
    lines[699] = '{"input": "broken'
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"rows.jsonl, line 700: broken JSON"):
        names(stream(stream_of(200, path=str(path))), 0, 790)


def test_a_row_of_other_columns_far_behind_is_named(stream_of: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 800)
    with path.open("a") as file:
        file.write('{"url": "x"}\n')
    with pytest.raises(UserError, match=r"has the columns url, but the .* have input"):
        names(stream(stream_of(300, path=str(path))), 0, 1000)


def test_a_stream_without_a_row_to_train_on_ends_with_a_sentence(stream_of: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 30)
    path.write_text("".join(json.dumps({"input": "a", "output": " "}) + "\n" for _ in range(30)))
    with pytest.raises(DataError, match="none of the 30 rows has a token to train on"):
        stream_of(path=str(path))


def test_more_or_fewer_sets_are_refused_where_a_run_goes_on(stream_of: Any, tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", 30, name)) for name in "ab"]
    stream(stream_of(path=paths[0])).save(tmp_path, 0)
    mixed = stream(stream_of(mix={"a": {"path": paths[0]}, "b": {"path": paths[1]}}))
    with pytest.raises(RunError, match=r"was written while data.path=.* was streamed, and the config names data.mix.a"):
        mixed.load(tmp_path, 0)


def test_a_checkpoint_of_rows_read_whole_is_no_place_in_a_stream(stream_of: Any, tmp_path: Path) -> None:
    items = stream(stream_of(path=str(write_rows(tmp_path / "rows.jsonl", 30))))
    with pytest.raises(RunError, match=r"was written by a run that did not stream its rows, .* leave data.streaming"):
        items.load(tmp_path, 0)


def test_a_single_row_can_only_be_trained_on(stream_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has 1, which leaves none to train on; set data.eval_dataset_size=0,"):
        stream_of(path=str(write_rows(tmp_path / "rows.jsonl", 1)), eval_dataset_size=None)


def test_too_few_rows_to_hold_out_are_refused(stream_of: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"its first 200 rows are held out, and it has 150, .* data.eval_dataset_size=15"
    ):
        stream_of(path=str(write_rows(tmp_path / "rows.jsonl", 150)), eval_dataset_size=None)


def test_memory_does_not_grow_with_the_rows_that_were_read(stream_of: Any) -> None:
    items = stream(stream_of(100_000, path="tests.data.test_item_stream:endless", packing=True, pack_length=256))
    held = []
    tracemalloc.start()
    try:
        for index in range(1200):
            items[index]
            if index in (399, 1199):
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert items.counts.rows > 5000
    assert held[1] - held[0] < 2**20
