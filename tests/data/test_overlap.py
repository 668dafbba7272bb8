"""Rows to train on that are nearly held-out ones are found and named."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora.config.schema import DataConfig, Overlap
from qlora.data.overlap import LEAST, OverlapFinder, fingerprints
from qlora.data.pipeline import StreamLength, build_data

WORDS = [
    "red",
    "blue",
    "green",
    "stone",
    "river",
    "cloud",
    "apple",
    "table",
    "window",
    "garden",
    "music",
    "paper",
    "light",
    "water",
    "dream",
    "north",
    "south",
]


def sentence(seed: int, count: int = 20) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def jaccard(left: str, right: str) -> float:
    sets = [{tuple(text[i : i + 3]) for i in range(len(text) - 2)} for text in (left.lower().split(), right.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_similarity_is_the_jaccard_index_of_words_in_threes() -> None:
    held_out = [sentence(number) for number in range(40)]
    finder = OverlapFinder([fingerprints(text) for text in held_out])
    for number in range(40):
        kept = held_out[number].split()
        for changed in range(8):
            text = " ".join([*kept[: 20 - changed], *(f"new{index}" for index in range(changed))])
            expected = max(jaccard(text, other) for other in held_out)
            match = finder.match(fingerprints(text))
            assert (match is not None) == (expected >= LEAST)
            if match is not None:
                assert match.similarity == pytest.approx(expected)
                assert match.held_out == number


def test_capitals_signs_and_spaces_do_not_count() -> None:
    finder = OverlapFinder([fingerprints("The quick brown fox, it jumps over the lazy dog today.")])
    match = finder.match(fingerprints("the  QUICK brown fox: it jumps -- over the lazy dog (today)"))
    assert match is not None
    assert match.similarity == 1


def test_what_all_rows_share_does_not_count() -> None:
    prompt = "Below is an instruction that describes a task. Write a response that completes the request: "
    finder = OverlapFinder([fingerprints(prompt + sentence(number, 8)) for number in range(30)])
    assert finder.match(fingerprints(prompt + sentence(99, 8))) is None
    assert finder.match(fingerprints(prompt + sentence(7, 8))) is not None


def test_rows_of_few_words_are_not_compared() -> None:
    finder = OverlapFinder([fingerprints("two plus three")])
    assert finder.match(fingerprints("two plus three")) is None


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Any]:
    def make(**values: Any) -> Any:
        rows = [{"input": sentence(number), "output": f"answer {number}"} for number in range(60)]
        held_out = [{"input": sentence(number), "output": f"answer {number}"} for number in range(100, 110)]
        near = sentence(103).split()
        near[-1] = "purple"
        rows[41]["input"] = " ".join(near)
        rows[41]["output"] = "answer 103"
        rows[50] = dict(held_out[5])
        for name, written in {"train": rows, "eval": held_out}.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in written))
        config = DataConfig(name="toy", path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "eval.jsonl"),
                            max_length=512, cache_dir=str(tmp_path / "cache"), **values)  # fmt: skip
        return build_data(config, tokenizer, length=StreamLength(15, 4, 0) if config.streaming else None)

    return make


def test_a_near_row_is_counted_and_named(build: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    report = build(overlap=Overlap.near).report
    assert report.held_out_in_training == 1
    assert len(report.near_rows) == 1
    assert "1 of 10 held-out rows is nearly equal to a row that is trained on" in caplog.text
    assert "eval.jsonl, row 4 and data.path=" in caplog.text
    assert "train.jsonl, row 42 (" in caplog.text


def test_near_rows_are_not_looked_for_unless_asked(build: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    report = build().report
    assert (report.held_out_in_training, report.near_rows) == (1, [])
    assert "nearly" not in caplog.text


@pytest.mark.parametrize("overlap", list(Overlap))
def test_a_stream_finds_them_as_rows_come(
    build: Callable[..., Any], caplog: pytest.LogCaptureFixture, tmp_path: Path, overlap: Overlap
) -> None:
    items = build(overlap=overlap, streaming=True, shuffle_buffer=5).stream
    for index in range(60):
        items[index]
    kinds = ["equal", "nearly equal"] if overlap is Overlap.near else ["equal"]
    assert str(items).count("held-out") == len(kinds)
    assert "eval.jsonl, row 6 and data.path=" in str(items)
    assert ("eval.jsonl, row 4 and data.path=" in str(items)) == (overlap is Overlap.near)
    items.save(tmp_path, 60)
    resumed = build(overlap=overlap, streaming=True, shuffle_buffer=5).stream
    resumed.load(tmp_path, 60)
    assert str(resumed) == str(items)
