"""How numbers and names read to people: nothing is rounded away, and what is cut can be recognised."""

import pytest

from qlora.text import (
    better_direction,
    format_bytes,
    format_count,
    format_metric,
    format_number,
    format_percent,
    format_range,
    format_speed,
    shorten_cells,
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (format_count(8_030_000_000), "8.03 billion"),
        (format_count(8_030_000_000, " M"), "8,030.0 M"),
        (format_count(656_000), "0.7 million"),
        (format_count(34_816), "34,816"),
        (format_count(0), "0"),
        (format_bytes(2_500_000_000), "2.5 GB"),
        (format_bytes(999_999_999), "1.0 GB"),
        (format_bytes(41_000), "41.0 KB"),
        (format_bytes(12), "12 bytes"),
        (format_bytes(0), "0 bytes"),
        (format_number(0.0004, 2), "<0.01"),
        (format_number(1234.5678, 1), "1,234.6"),
        (format_number(0, 2), "0.00"),
        (format_speed(1210.4), "1,210"),
        (format_speed(1.26), "1.3"),
        (format_speed(0.01), "<0.1"),
        (format_percent(0.0841, 2), "8.41%"),
        (format_percent(0.00001), "<0.1%"),
        (format_percent(0.99999), ">99.9%"),
        (format_percent(0.999, 0), ">99%"),
        (format_percent(1), "100.0%"),
        (format_percent(0), "0.0%"),
        (format_percent(12.5), "1,250.0%"),
        (format_metric("exact_match", 0.0002), "<0.1 %"),
        (format_metric("exact_match", 0.9999), ">99.9 %"),
        (format_metric("win_count", 3.0), "3"),
        (format_range("loss", 0.0002, 0.0013), "0.0002 to 0.001"),
        (format_range("exact_match", -0.0001, 0.02, signed=True), "-0.01 to +2.0 points"),
        (format_range("exact_match", 0, 0.02), "0.0 to 2.0 %"),
    ],
)
def test_nothing_is_rounded_to_none_or_to_all(text: str, right: str) -> None:
    assert text == right


def test_cells_are_cut_so_that_they_can_be_recognised() -> None:
    assert shorten_cells(["gradient_checkpointing"], 8) == ["gradien…"]
    assert shorten_cells(["outputs/runs/moe", "short"], 12) == ["…/runs/moe", "short"]
    assert shorten_cells(["/data/models/a-rather-long-name"], 12) == ["a-rather-lo…"]
    assert shorten_cells(["Qwen/Qwen2.5-0.5B"], 12) == ["Qwen2.5-0.5B"]


@pytest.mark.parametrize(
    "texts",
    [
        ["llama-3.1-8b-instruct", "llama-3.1-8b-base"],
        ["runs/the-long-name-one", "runs/the-long-name-two"],
        ["a/x/mine", "b/x/mine"],
    ],
)
def test_cells_that_differ_stay_different(texts: list[str]) -> None:
    cells = shorten_cells(texts, 7)
    assert len(set(cells)) == len(texts)
    assert all(len(cell) <= 7 for cell in cells)


def test_the_direction_of_a_metric_is_known_by_its_name_or_not_at_all() -> None:
    higher = ("eval_exact_match", "eval_mmlu_test_accuracy", "eval_rouge1", "train_tokens_per_second", "eval_win_rate")
    lower = ("eval_loss", "base_eval_perplexity", "train_runtime", "peak_memory_gb", "train_data_wait", "eval_wer")
    assert {better_direction(name) for name in higher} == {"maximize"}
    assert {better_direction(name) for name in lower} == {"minimize"}
    assert {better_direction(name) for name in ("eval_answer_length", "train_watchdog_slow", "eval_lossy")} == {None}
