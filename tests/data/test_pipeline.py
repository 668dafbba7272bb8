import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.data import build_data
from qlora.errors import ConfigError

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


def test_sample_limits_take_the_first_of_the_seeded_order(tokenizer, make_config):
    whole = build_data(make_config(ROWS, eval_dataset_size=6), tokenizer)
    some = build_data(make_config(ROWS, eval_dataset_size=6, max_train_samples=3, max_eval_samples=2), tokenizer)
    assert texts(some.train) == texts(whole.train)[:3]
    assert len(some.eval) == 2
    assert set(texts(some.eval)) < set(texts(whole.eval))


def test_columns_are_those_that_training_and_evaluation_read(tokenizer, make_config):
    data = build_data(make_config(ROWS), tokenizer)
    assert data.train.column_names == ["input_ids", "labels", "length"]
    assert data.eval.column_names == ["input_ids", "labels", "length", "prompt_ids", "prompt", "reference", "task"]
    (row,) = data.eval.to_list()
    number = row["prompt"][1:]
    assert row["reference"] == f"a{number}"
    assert row["task"] == ("even" if int(number) % 2 == 0 else "odd")


def test_rows_of_their_own_are_held_out_in_their_order(tokenizer, make_config, tmp_path):
    held_out = tmp_path / "eval.json"
    held_out.write_text(json.dumps([{"input": "e", "output": str(i)} for i in range(5)]))
    data = build_data(make_config(ROWS, eval_path=str(held_out)), tokenizer)
    assert len(data.train) == 20
    assert texts(data.train) != [f"q{i}a{i}" for i in range(20)]
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
        ConfigError, match=r"data\.format=input-output needs the columns input and output; data\.eval_path"
    ):
        build_data(make_config(ROWS, eval_path=str(held_out)), tokenizer)


@pytest.mark.parametrize("size", [20, 1024])
def test_holding_out_everything_is_answered_with_the_numbers(size, tokenizer, make_config):
    config = make_config(ROWS, eval_dataset_size=size)
    with pytest.raises(ConfigError) as caught:
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
        "train_rows": 2,
        "eval_rows": 1,
        "train_tokens": (1 + 2 + 1 + 1) + (1 + 1 + 3),
        "trained_tokens": (1 + 1) + 3,
        "mean_length": 5.0,
        "max_length": 5,
        "cut_sources": 1,
        "cut_targets": 1,
        "dropped_rows": 1,
        "fingerprint": report.fingerprint,
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
    with pytest.raises(ConfigError, match="none of the 2 rows has a token to train on"):
        build_data(make_config(rows), tokenizer)


def test_a_broken_cell_stops_the_run_with_its_column(tokenizer, make_config):
    with pytest.raises(ConfigError, match="needs text in column output, but a row holds"):
        build_data(make_config([{"input": "a", "output": ["b"]}] * 3), tokenizer)


def test_the_fingerprint_is_the_same_in_another_process(tokenizer, make_config):
    config = make_config(ROWS)
    code = (
        "import sys; from conftest import build_byte_tokenizer as build; from qlora.data import build_data; "
        "from qlora.schema import DataConfig; "
        f"config = DataConfig(name='toy', path={config.path!r}, eval_dataset_size=1); "
        "print(build_data(config, build(bos_token='<s>', eos_token='</s>')).report.fingerprint)"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[1]}", "PYTHONHASHSEED": "5"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == build_data(config, tokenizer).report.fingerprint


def test_changed_rows_are_never_served_from_a_cache(tokenizer, make_config):
    before = build_data(make_config(ROWS), tokenizer)
    after = build_data(make_config([row | {"output": "z"} for row in ROWS]), tokenizer)
    assert texts(after.train) != texts(before.train)
    assert after.report.fingerprint != before.report.fingerprint
