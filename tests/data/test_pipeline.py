import dataclasses
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from qlora.config.schema import DataConfig, OnTooLong, TrainOn
from qlora.data.batching import token_store
from qlora.data.pipeline import build_data
from qlora.errors import UserError

ROWS = [{"input": f"q{i}", "output": f"a{i}", "task": "even" if i % 2 == 0 else "odd"} for i in range(20)]


def texts(rows):
    """Decodes rows of the byte tokenizer, special tokens left out."""
    return [bytes(i - 3 for i in ids if i > 2).decode() for ids in rows["input_ids"][:]]


def test_the_split_loses_and_doubles_no_row(tokenizer, make_config):
    data = build_data(make_config(ROWS, eval_dataset_size=6), tokenizer)
    assert (len(data.train), len(data.eval)) == (14, 6)
    assert sorted(texts(data.train) + texts(data.eval)) == sorted(f"q{i}a{i}" for i in range(20))


def test_the_split_depends_on_its_seed_alone(tokenizer, make_config):
    first, again, other = (
        build_data(make_config(ROWS, eval_dataset_size=6, split_seed=seed), tokenizer) for seed in (1, 1, 2)
    )
    assert texts(first.train) == texts(again.train)
    assert first.report.fingerprint == again.report.fingerprint
    assert set(texts(first.eval)) != set(texts(other.eval))
    assert first.report.fingerprint != other.report.fingerprint


def test_the_split_is_the_same_whatever_is_needed(tokenizer, make_config):
    config = make_config(ROWS, eval_dataset_size=6)
    both = build_data(config, tokenizer)
    train_only = build_data(config, tokenizer, need_eval=False)
    eval_only = build_data(config, tokenizer, need_train=False)
    assert texts(train_only.train) == texts(both.train)
    assert texts(eval_only.eval) == texts(both.eval)
    assert train_only.eval is None
    assert eval_only.train is None
    assert eval_only.report.train_rows == 0


def test_fewer_samples_are_a_part_of_more_samples_and_keep_the_order_of_the_file(tokenizer, make_config):
    whole = build_data(make_config(ROWS, eval_dataset_size=6), tokenizer)
    few, more = (
        build_data(make_config(ROWS, eval_dataset_size=6, max_train_samples=n, max_eval_samples=n), tokenizer)
        for n in (2, 4)
    )
    for rows, some, all_rows in ((few.train, more.train, whole.train), (few.eval, more.eval, whole.eval)):
        assert (len(rows), len(some)) == (2, 4)
        assert set(texts(rows)) < set(texts(some)) < set(texts(all_rows))
        assert texts(all_rows) == sorted(texts(all_rows), key=lambda text: int(text[1:].partition("a")[0]))


def test_a_share_of_the_rows_can_be_held_out(tokenizer, make_config):
    data = build_data(make_config(ROWS, eval_dataset_size=0.25), tokenizer)
    assert (len(data.train), len(data.eval)) == (15, 5)


def test_columns_are_those_that_training_and_evaluation_read(tokenizer, make_config):
    data = build_data(make_config(ROWS), tokenizer)
    assert {"input_ids", "labels", "length"} < set(data.train.column_names)
    assert {"prompt_ids", "prompt", "reference", "task"} == set(data.eval.column_names) - set(data.train.column_names)
    (row,) = data.eval.to_list()
    number = row["prompt"][1:]
    assert row["reference"] == f"a{number}"
    assert row["task"] == ("even" if int(number) % 2 == 0 else "odd")


def test_rows_of_their_own_are_held_out_in_their_order(tokenizer, make_config, tmp_path):
    held_out = tmp_path / "eval.json"
    held_out.write_text(json.dumps([{"input": "e", "output": str(i)} for i in range(5)]))
    data = build_data(make_config(ROWS, eval_path=str(held_out)), tokenizer)
    assert len(data.train) == 20
    assert texts(data.train) == [f"q{i}a{i}" for i in range(20)]
    assert texts(data.eval) == [f"e{i}" for i in range(5)]
    some = build_data(make_config(ROWS, eval_path=str(held_out), max_eval_samples=3), tokenizer)
    assert texts(some.eval) == sorted(texts(some.eval))
    assert len(some.eval) == 3


def test_held_out_rows_alone_do_not_read_the_others(tokenizer, make_config, tmp_path):
    config = make_config(ROWS, eval_path=make_config(ROWS).path, path="missing.json")
    assert len(build_data(config, tokenizer, need_train=False).eval) == 20


def test_one_format_renders_both_paths(tokenizer, make_config, tmp_path):
    held_out = tmp_path / "eval.json"
    held_out.write_text('[{"text": "x"}]')
    with pytest.raises(
        UserError, match=r"data\.format=input-output needs the columns input and output; data\.eval_path"
    ):
        build_data(make_config(ROWS, eval_path=str(held_out)), tokenizer)


@pytest.mark.parametrize("size", [20, 1024])
def test_holding_out_everything_is_answered_with_the_numbers(size, tokenizer, make_config):
    config = make_config(ROWS, eval_dataset_size=size)
    with pytest.raises(UserError) as caught:
        build_data(config, tokenizer)
    assert str(caught.value) == (
        f"data.eval_dataset_size={size} leaves no row to train on: {config.path} has 20; set "
        "data.eval_dataset_size=2, or hold rows of your own out with data.eval_path=FILE"
    )


def test_an_endless_function_gives_as_many_rows_as_asked(tokenizer, make_config, tmp_path, monkeypatch):
    (tmp_path / "endless_rows.py").write_text(
        "import itertools\ndef rows():\n    return ({'text': str(i)} for i in itertools.count())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = build_data(make_config(ROWS, path="endless_rows:rows", max_train_samples=7, eval_dataset_size=3), tokenizer)
    assert (len(data.train), len(data.eval)) == (7, 3)
    assert sorted(texts(data.train) + texts(data.eval), key=int) == [str(i) for i in range(10)]


def test_the_report_counts_tokens_cuts_and_drops(tokenizer, make_config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [
        {"segments": [["abc", False], ["x", True]]},
        {"segments": [["a", False], ["xyz", True]]},
        {"segments": [["a", False]]},
    ]
    held_out = tmp_path / "eval.json"
    held_out.write_text('[{"source": "a", "target": "b"}]')
    config = make_config(rows, eval_path=str(held_out), format="segments", source_max_len=3, target_max_len=3)
    report = build_data(config, tokenizer).report
    assert json.loads(json.dumps(dataclasses.asdict(report))) == {
        "name": "toy",
        "format": "segments",
        "recognised": "data.format=segments",
        "template": None,
        "train_rows": 2,
        "eval_rows": 1,
        "train_tokens": (1 + 2 + 1 + 1) + (1 + 1 + 3),
        "trained_tokens": (1 + 1) + 3,
        "mean_length": 5.0,
        "max_length": 5,
        "cut_sources": 1,
        "cut_targets": 1,
        "stopping_rows": 1,
        "left_out_rows": 0,
        "dropped_rows": 1,
        "too_long_rows": 0,
        "empty_rows": 0,
        "empty_answers": 0,
        "equal_rows": 0,
        "unordered_rows": 0,
        "eval_left_out_rows": 0,
        "eval_dropped_rows": 0,
        "eval_too_long_rows": 0,
        "eval_empty_rows": 0,
        "eval_equal_rows": 0,
        "eval_unordered_rows": 0,
        "unread": {},
        "lost_thoughts": 0,
        "lost_messages": 0,
        "held_out_in_training": 0,
        "packs": None,
        "packed_share": None,
        "fingerprint": report.fingerprint,
        "near_rows": [],
        "streamed": False,
        "commits": [None],
    }
    assert caplog.messages == [
        "toy: of 3 rows: 1 sources cut at the beginning to data.source_max_len=3; 1 targets cut at the end to "
        "data.target_max_len=3; 1 rows dropped, nothing in them is trained"
    ]


def test_nothing_is_said_when_nothing_is_cut(tokenizer, make_config, caplog):
    caplog.set_level(logging.INFO)
    build_data(make_config(ROWS, format="input-output"), tokenizer)
    assert caplog.messages == []


def test_rows_without_anything_to_train_on_stop_the_run(tokenizer, make_config):
    rows = [{"segments": [["a", False]]}] * 3
    config = make_config(rows)
    with pytest.raises(UserError) as caught:
        build_data(config, tokenizer)
    assert str(caught.value) == (
        f"data.path={config.path}: none of the 2 rows has a token to train on: 2 without an answer, or one "
        "within the lengths (raise data.source_max_len, data.target_max_len or data.max_length)"
    )


def test_rows_whose_answers_are_switched_off_or_thoughts_alone_say_so(tokenizer, make_config):
    asked = {"role": "user", "content": "q"}

    def loss(answer, **changes):
        with pytest.raises(UserError) as caught:
            build_data(make_config([{"messages": [asked, {"role": "assistant"} | answer]}] * 3, **changes), tokenizer)
        return str(caught.value).partition("has a token to train on: ")[2]

    off = "2 whose answers are all switched off (train, weight, masked or the like in their turns)"
    for train_on in (TrainOn.assistant, TrainOn.last):
        assert loss({"content": "a", "train": False}, train_on=train_on) == off
    assert loss({"content": "", "reasoning": "x"}) == (
        "2 whose answers are thoughts alone, which the chat template leaves out (data.template=chatml-thoughts with "
        '\'model.new_tokens=["<|im_start|>","<|im_end|>"]\' writes them)'
    )


def test_thoughts_of_others_than_the_assistant_are_named_as_not_read(tokenizer, make_config, caplog):
    parts = [{"type": "text", "text": "q"}, {"type": "thinking", "thinking": "x"}]
    for turn, key in (({"content": "q", "reasoning": "x"}, "reasoning"), ({"content": parts}, "content.thinking")):
        rows = [{"messages": [{"role": "user"} | turn, {"role": "assistant", "content": "a"}]}] * 3
        report = build_data(make_config(rows), tokenizer).report
        assert report.unread == {f"messages.{key}": 3}
    assert not [text for text in caplog.messages if "leaves out" in text]


def test_a_broken_cell_stops_the_run_with_its_column(tokenizer, make_config):
    rows = [{"input": "a", "output": "b"}] * 30 + [{"input": "a", "output": ["b"]}]
    with pytest.raises(UserError, match=r"rows.jsonl, row 31: data.format=input-output needs text in column output"):
        build_data(make_config(rows, format="input-output"), tokenizer)


@pytest.mark.full
def test_the_fingerprint_is_the_same_in_another_process(tokenizer, make_config):
    config = make_config(ROWS)
    code = (
        "from tests.data.byte_tokenizer import build_byte_tokenizer as build; "
        "from qlora.data.pipeline import build_data; "
        "from qlora.config.schema import DataConfig; "
        f"config = DataConfig(name='toy', path={config.path!r}, eval_dataset_size=1); "
        "print(build_data(config, build(bos_token='<s>', eos_token='</s>')).report.fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == build_data(config, tokenizer).report.fingerprint


def test_changed_rows_are_never_served_from_a_cache(tokenizer, make_config):
    previous = build_data(make_config(ROWS), tokenizer)
    after = build_data(make_config([row | {"output": "z"} for row in ROWS]), tokenizer)
    assert texts(after.train) != texts(previous.train)
    assert after.report.fingerprint != previous.report.fingerprint


# Caches


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_the_same_choices_use_the_tokens_of_the_first_time(tokenizer, make_config, tmp_path):
    config = make_config(ROWS, cache_dir=str(tmp_path / "cache"))
    first = build_data(config, tokenizer)
    previous = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    again = build_data(config, tokenizer)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == previous
    assert texts(again.train) == texts(first.train)
    assert again.report == first.report


@pytest.mark.parametrize(
    "change",
    [
        {"train_on_source": True},
        {"target_max_len": 2},
        {"source_max_len": 2},
        {"max_length": 4},
        {"split_seed": 7},
        {"eval_dataset_size": 2},
        {"max_train_samples": 5},
        {"on_too_long": OnTooLong.drop, "target_max_len": 2},
        {"columns": {"output": "task"}},
        {"format": "text", "columns": {"text": "input"}},
    ],
    ids=str,
)
def test_every_choice_that_changes_tokens_has_tokens_of_its_own(change, tokenizer, make_config, tmp_path):
    fresh, shared = {"cache_dir": str(tmp_path / "own")}, {"cache_dir": str(tmp_path / "cache")}
    build_data(make_config(ROWS, **shared), tokenizer)
    try:
        expected = build_data(make_config(ROWS, **change, **fresh), tokenizer).report
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            build_data(make_config(ROWS, **change, **shared), tokenizer)
    else:
        assert build_data(make_config(ROWS, **change, **shared), tokenizer).report == expected


def test_another_tokenizer_or_template_has_tokens_of_its_own(tokenizer, tokenizer_without_bos, make_config, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
             for i in range(4)]  # fmt: skip
    config = make_config(chats, cache_dir=str(tmp_path / "cache"))
    plain = make_config(chats, cache_dir=str(tmp_path / "cache"), template="plain")
    both = (tokenizer, tokenizer_without_bos)
    lengths = {build_data(one, base).report.train_tokens for one in (config, plain) for base in both}
    assert len(lengths) == 4


def test_a_changed_function_of_the_users_own_is_not_served_old_tokens(tokenizer, make_config, tmp_path, monkeypatch):
    module = tmp_path / "own_format.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    config = make_config(ROWS, format="own_format:shout", cache_dir=str(tmp_path / "cache"))
    for word in ("one", "two"):
        module.write_text(f"def shout(row):\n    return {{'text': '{word}'}}\n")
        sys.modules.pop("own_format", None)
        importlib.invalidate_caches()
        assert set(texts(build_data(config, tokenizer).train)) == {word}


def test_nothing_half_written_is_left_after_an_error(tokenizer, make_config, tmp_path):
    rows = [*ROWS, {"input": "a", "output": ["b"]}]
    config = make_config(rows, format="input-output", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError):
        build_data(config, tokenizer)
    assert not [name for name in cached(tmp_path) if name.startswith(("tokens", "."))]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("chunks", [1, 1000], ids=["reopened for each chunk", "opened once"])
def test_several_processes_give_the_same_tokens(tokenizer, make_config, tmp_path, monkeypatch, chunks):
    monkeypatch.setattr(token_store, "REOPEN", chunks)
    monkeypatch.setattr(token_store, "BATCH_BYTES", 300 * chunks)
    rows = [{"input": f"q{i}", "output": f"a{i}" * (i % 7)} for i in range(5000)]
    one, two = (build_data(make_config(rows, num_proc=n, cache_dir=str(tmp_path / str(n))), tokenizer) for n in (1, 2))
    assert one.report == two.report
    assert one.train[:]["input_ids"] == two.train[:]["input_ids"]


def test_an_error_in_one_of_several_processes_names_the_row(tokenizer, make_config):
    rows = [{"input": "a", "output": "b"}] * 3000 + [{"input": "a", "output": ["b"]}]
    with pytest.raises(UserError, match=r"row 3001: data\.format=input-output needs text in column output"):
        build_data(make_config(rows, num_proc=2, format="input-output"), tokenizer)


FORMAT = """
import os, pathlib, time
notes, calls = pathlib.Path(os.environ["NOTES"]), 0
def render(row):
    global calls
    calls += 1
    (notes / f"pid-{os.getpid()}").touch()
    deadline = time.monotonic() + 60
    while calls == int(os.environ["WAIT_AT"]) and len(list(notes.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return {"input": row["q"], "output": row["a"]}
"""


@pytest.mark.full
def test_a_format_of_the_users_own_gives_the_same_tokens_in_several_processes(
    tokenizer, make_config, tmp_path, monkeypatch
):
    (tmp_path / "my_format.py").write_text(FORMAT)
    (tmp_path / "notes").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    rows = [{"q": f"q{i}", "a": f"a{i}" * (i % 7)} for i in range(5_000)]
    data = []
    for processes, wait_at in ((1, 0), (2, 2_000)):
        monkeypatch.setenv("WAIT_AT", str(5_000 * (processes - 1) + wait_at))
        config = make_config(
            rows, num_proc=processes, format="my_format:render", cache_dir=str(tmp_path / str(processes))
        )
        data.append(build_data(config, tokenizer))
    assert data[0].report == data[1].report
    assert data[0].train[:]["input_ids"] == data[1].train[:]["input_ids"]
    assert len(list(tmp_path.glob("notes/pid-*"))) == 2


# Several sets


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mix_of(tmp_path, **changes):
    mine = write(tmp_path / "mine.jsonl", [{"input": f"m{i}", "output": "x"} for i in range(40)])
    other = write(tmp_path / "other.jsonl", [{"text": f"o{i}"} for i in range(20)])
    sets = {"mine": {"path": mine, "weight": 0.5}, "other": {"path": other, "weight": 2}}
    return DataConfig(**{"name": "mix", "path": None, "mix": sets, "eval_dataset_size": 6, **changes})


def test_weights_say_how_often_a_pass_shows_a_row(tokenizer, tmp_path):
    data = build_data(mix_of(tmp_path), tokenizer)
    seen = Counter(texts(data.train))
    mine = {text: count for text, count in seen.items() if text.startswith("m")}
    other = {text: count for text, count in seen.items() if text.startswith("o")}
    assert (len(mine), set(mine.values())) == (18, {1})  # half of the 40 - 4 that are not held out
    assert (len(other), set(other.values())) == (18, {2})
    assert sorted(text[0] for text in texts(data.eval)) == ["m"] * 4 + ["o"] * 2
    assert data.report.format == "input-output, text"
    assert not set(texts(data.eval)) & set(seen)


def test_a_mix_is_the_same_each_time_and_follows_its_seed(tokenizer, tmp_path):
    first, again = (build_data(mix_of(tmp_path), tokenizer) for _ in range(2))
    assert texts(first.train) == texts(again.train)
    assert texts(build_data(mix_of(tmp_path, split_seed=1), tokenizer).train) != texts(first.train)


def test_limits_hold_for_the_whole_mix(tokenizer, tmp_path):
    data = build_data(mix_of(tmp_path, max_train_samples=10, max_eval_samples=3), tokenizer)
    assert (len(data.train), len(data.eval)) == (10, 3)


def test_the_first_rows_of_each_set_are_taken_before_any_are_held_out(tokenizer, tmp_path, make_config):
    mine = write(tmp_path / "mine.jsonl", [{"input": f"m{i}", "output": "x"} for i in range(40)])
    other = write(tmp_path / "other.jsonl", [{"text": f"o{i}"} for i in range(5)])
    sets = {"mine": {"path": mine, "max_samples": 8}, "other": {"path": other, "max_samples": 8}}
    data = build_data(DataConfig(name="mix", path=None, mix=sets, eval_dataset_size=3), tokenizer)
    taken = sorted(texts(data.train) + texts(data.eval))
    assert taken == sorted([f"m{i}x" for i in range(8)] + [f"o{i}" for i in range(5)])
    alone = build_data(make_config(ROWS, max_samples=8, eval_dataset_size=2), tokenizer)
    assert sorted(texts(alone.train) + texts(alone.eval)) == [f"q{i}a{i}" for i in range(8)]
    with pytest.raises(UserError, match=r"data\.max_samples=8 is not read beside data\.mix"):
        DataConfig(name="mix", path=None, mix=sets, max_samples=8)


def test_an_error_in_a_set_names_its_key(tokenizer, tmp_path):
    config = DataConfig(name="mix", path=None, mix={"a": {"path": str(tmp_path / "nowhere.jsonl")}})
    with pytest.raises(UserError, match=r"^data\.mix\.a\.path=.*nowhere\.jsonl: no such file"):
        build_data(config, tokenizer)


# Held-out rows


def test_a_split_of_the_set_can_be_held_out(tokenizer, make_config, tmp_path):
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list([{"input": "t", "output": "z", "task": ""}])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = build_data(make_config(ROWS, path=str(tmp_path / "saved"), eval_split="test"), tokenizer)
    assert len(data.train) == 20
    assert texts(data.eval) == ["tz"]


def test_held_out_rows_that_are_trained_on_are_counted_and_said(tokenizer, make_config, tmp_path, caplog):
    held_out = write(tmp_path / "eval.jsonl", [*ROWS[:3], {"input": "new", "output": "row", "task": ""}])
    report = build_data(make_config(ROWS, eval_path=held_out), tokenizer).report
    assert report.held_out_in_training == 3
    assert "toy: 3 of 4 held-out rows are also trained on, word for word" in caplog.text


# Packing


def test_packs_hold_every_row_once(tokenizer, make_config):
    data = build_data(make_config(ROWS, packing=True, pack_length=40), tokenizer)
    ids = [token for pack in data.packed for token in pack["input_ids"].tolist()]
    assert sorted(ids) == sorted(token for row in data.train["input_ids"][:] for token in row)
    assert data.report.packs == len(data.packed) < len(data.train)
    assert data.report.packed_share == pytest.approx(len(ids) / (40 * len(data.packed)), abs=1e-4)


def test_a_row_longer_than_a_pack_is_refused(tokenizer, make_config):
    with pytest.raises(UserError, match=r"data\.pack_length"):
        build_data(make_config(ROWS, packing=True, pack_length=3), tokenizer)
