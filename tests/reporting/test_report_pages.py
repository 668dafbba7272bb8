"""The pages of runs as HTML: what they show, in every state, and that what users write stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from qlora.reporting.history import Curve
from qlora.reporting.rendering import format_value, metric_title, plain_value, short_value
from qlora.reporting.run_page import run_page
from qlora.reporting.runs_page import RunsReport, RunView, TableLine, runs_page
from qlora.runtime.run_folder import RunFolder

ALARM = "</script><script>alert(1)</script>"
EMPTY = RunsReport(
    title="none", over="Sweep report", objective="eval_loss", maximizes=False, keys=[], metrics=[], lines=[]
)


def view(number: int, status: str = "finished", **more: Any) -> RunView:
    metrics = {"eval_loss": 1.0 + number, "train_runtime": 60.0, "peak_memory_gb": 1.0} if status == "finished" else {}
    return RunView(
        label=f"r={number}",
        folder=f"r={number}-0a",
        status=status,
        values={"lora.r": str(number)},
        objective=metrics.get("eval_loss"),
        metrics=metrics,
        seconds=70.0,
        curves={"loss": Curve([1, 2], [3.0, 2.0], [10, 20])},
        **more,
    )


def report(count: int, **more: Any) -> RunsReport:
    views = [view(number) for number in range(1, count + 1)]
    lines = [TableLine(item.values, [(f"{item.objective:.3f}", item.objective)], [item]) for item in views]
    return replace(EMPTY, title="ranks", keys=["lora.r"], metrics=["eval_loss"], lines=lines, **more)


def data(html: str) -> dict[str, Any]:
    actual = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert actual
    return json.loads(actual[1])


def test_the_page_of_a_sweep_shows_table_curves_parameters_costs_and_command() -> None:
    html = runs_page(report(3, command="qlora lora.r=1", common={"seed": 0, "data": {"path": None}}))
    for text in ("best loss", "3 of 3", "By loss, lower is better.", "qlora lora.r=1", "data.path", 'href="r%3D1-0a"'):
        assert text in html
    page_data = data(html)
    assert [chart["title"] for chart in page_data["curves"]] == ["training loss"]
    assert [axis["title"] for axis in page_data["scatters"]] == ["lora.r"]  # all costs are equal
    assert page_data["points"]["objective"] == [2.0, 3.0, 4.0]
    assert page_data["groups"][0]["best"]
    assert "Importance compares parameters" in html


def test_a_page_loads_nothing_from_elsewhere() -> None:
    for html in (runs_page(report(2)), runs_page(EMPTY)):
        rest = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", html, flags=re.DOTALL)
        assert "http" not in rest.replace("http-equiv", "")
        assert "default-src 'none'" in rest
        assert not re.search(r"<(?:link|script|img)[^>]+(?:src|href)=\"(?!data:)", rest)


def test_the_plotting_library_comes_along_once_and_only_where_there_are_charts() -> None:
    assert runs_page(report(2)).count('id="plotly"') == 1
    assert 1_000_000 < len(runs_page(report(2))) < 3_000_000
    assert len(runs_page(EMPTY)) < 50_000


@pytest.mark.parametrize("status", ["failed", "pruned", "interrupted", "running", "queued"])
def test_a_run_that_did_not_finish_is_shown_with_reason_folder_and_last_lines(status: str) -> None:
    broken = view(5, status, reason="out of memory", progress="step 3 of 9", log=["Traceback", "line 2"])
    html = runs_page(report(1, unfinished=[broken]))
    for text in (status, "out of memory", "step 3 of 9", "Traceback\nline 2", "1 of 2"):
        assert text in html
    assert data(html)["groups"][1]["hue"] == 7


def test_before_anything_has_finished_the_page_says_so() -> None:
    html = runs_page(replace(EMPTY, unfinished=[view(1, "queued")]))
    assert "Nothing has finished yet." in html
    assert "0 of 1" in html
    assert "no runs yet" in runs_page(EMPTY)


def test_runs_without_an_objective_are_not_ranked() -> None:
    html = runs_page(replace(report(2), objective=None))
    assert "In no order: these runs have no objective." in html
    assert data(html)["scatters"] == []


def test_more_runs_than_hues_are_coloured_by_rank_and_the_worst_are_hidden_at_first() -> None:
    page_data = data(runs_page(report(40)))
    assert [group["hue"] for group in page_data["groups"]] == [None] * 40
    assert [page_data["groups"][index]["rank"] for index in (0, 39)] == [0, 1]
    assert sum(group["shown"] for group in page_data["groups"]) == 30


def test_a_run_that_lacks_a_searched_key_has_no_position_on_its_axis() -> None:
    some = report(3)
    lines = [*some.lines[:2], replace(some.lines[2], runs=[replace(some.lines[2].runs[0], values={})])]
    assert data(runs_page(replace(some, lines=lines)))["scatters"][0]["values"] == [1.0, 2.0, None]


def test_what_users_write_stays_text() -> None:
    broken = view(2, "failed", reason=ALARM, log=[ALARM], progress=ALARM)
    attacked = replace(view(1), label=ALARM, values={ALARM: ALARM}, folder=f"a/{ALARM}", page=ALARM, short=ALARM)
    line = TableLine(attacked.values, [(ALARM, 1.0)], [attacked])
    html = runs_page(
        replace(report(0), title=ALARM, keys=[ALARM], lines=[line], unfinished=[broken], command=ALARM,
                common={ALARM: ALARM}, over=ALARM)
    )  # fmt: skip
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)") > 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answers = [
        {"prompt": "### Instruction:\nSay yes.", "reference": "yes", "prediction": "yes", "answer_tokens": 1},
        {"prompt": ALARM, "reference": ALARM, "prediction": ALARM + "!", "answer_tokens": 16, "finish": "length"},
        {"prompt": "odd", "reference": "a", "prediction": "half a sign \ud83d"},
    ]
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine", ["lora.r=8"], answers=answers)
    (folder / "train.log").write_text(
        f"2030-01-01 00:00:00,000 WARNING qlora.data.data_report: rows overlap {ALARM}\n"
        "2030-01-01 00:00:00,000 WARNING transformers.utils: of a library\n"
        "2030-01-01 00:00:01,000 INFO qlora.runtime.console: step 1\n"
    )
    return folder


def page(folder: Path, **result: Any) -> str:
    saved = json.loads((folder / "result.json").read_text())
    return run_page(RunFolder(folder), saved | result, command="qlora lora.r=8")


def test_the_page_of_a_run_shows_metrics_answers_config_data_machine_and_warnings(folder: Path) -> None:
    html = page(folder)
    for text in ("untuned base 4.200", "41.0 to 55.0 %", "+40.0 to +55.0 points", "Say yes.", "✓ yes", "lora.r",
                 "4f029139d67f1d1a", "a GPU (80.0 GB)", "0123456789ab, with changes", "rows overlap", "sources cut",
                 "16 tokens, cut at generation.max_new_tokens", "qlora lora.r=8", 'href="history.json"'):  # fmt: skip
        assert text in html, text
    assert "of a library" not in html
    assert "<script>alert" not in html
    html.encode()
    page_data = data(html)
    assert [chart["title"] for chart in page_data["curves"]][:2] == ["loss", "exact match"]
    assert [group["label"] for group in page_data["groups"]] == ["training", "held out"]
    assert page_data["smoothing"] > 0


def test_a_run_of_which_little_is_left_has_a_page_too(tmp_path: Path) -> None:
    html = run_page(RunFolder(tmp_path), {}, command="qlora")
    assert "Nothing was measured on held-out rows." in html
    assert data(html)["curves"] == []
    assert 'id="plotly"' not in html


def test_an_evaluation_alone_draws_one_colour(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(json.dumps([{"step": 5, "eval_loss": 2.0}]))
    page_data = data(run_page(RunFolder(tmp_path), {"metrics": {"eval_loss": 2.0}}, command="qlora"))
    assert [group["label"] for group in page_data["groups"]] == ["held out"]
    assert [line["group"] for chart in page_data["curves"] for line in chart["lines"]] == [0]


def test_values_are_written_as_one_would_type_them() -> None:
    assert [plain_value(value) for value in (None, True, 1e-5, ["a", 1], {}, "x")] == [
        "null", "true", "1e-05", "[a,1]", "{}", "x"
    ]  # fmt: skip
    assert [short_value(text) for text in ("0.00015676677195506063", "2e-4", "1000", "[q_proj,k_proj]", "")] == [
        "0.0001568", "2e-4", "1000", "[q_proj,k_proj]", ""
    ]  # fmt: skip
    assert (metric_title("base_eval_exact_match"), metric_title("peak_memory_gb")) == (
        "exact match of the untuned base", "peak memory (GB)"
    )  # fmt: skip
    assert (format_value(3700.0, "train_runtime"), format_value(None, "seconds")) == ("1:01:40", "–")
