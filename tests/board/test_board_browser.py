"""The board in a real browser, with two hundred runs: it searches, compares, follows runs, and fits a phone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import ALARM, DESKTOP, PHONE, launched, needs_browser, open_page
from synthetic_runs import write_run, write_sweep

from qlora.board.server import Board
from qlora.runtime.folder_lock import locked
from qlora.sweep.sweep_page import write_overview

pytestmark = needs_browser

CHARTS = "[...document.querySelectorAll('#charts .chart')]"
DRAWN = f"{CHARTS}.length && {CHARTS}.every(chart => chart.data)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """198 runs of which some attack the page, and a sweep of two."""
    outputs = tmp_path_factory.mktemp("project") / "outputs"
    for number in range(198):
        status = ("finished", "finished", "failed", "interrupted")[number % 4]
        answers = [{"prompt": f"Say {word}. {ALARM}", "reference": word, "prediction": answer}
                   for word, answer in (("yes", "yes"), ("no", ALARM if number % 2 else "no"))]  # fmt: skip
        reason = None if status == "finished" else f"it broke {ALARM}"
        overrides = [f"lora.r={2 ** (number % 5)}"]
        folder = write_run(
            outputs / "runs" / f"run-{number:03}", overrides, status=status, reason=reason, steps=8, answers=answers
        )
        record = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps(record | {"started": 1.8e9 + 60 * number}))
    (outputs / "runs" / "run-000").rename(outputs / "runs" / "<img src=x onerror='window.broken = 1'>")
    write_sweep(outputs / "sweeps" / "ranks", {"lora.r": ["4", "8"]})
    write_overview(outputs / "sweeps" / "ranks", None)
    return outputs


@pytest.fixture(scope="module")
def url(outputs: Path) -> Iterator[str]:
    with Board(outputs, 0) as board:
        threading.Thread(target=board.serve_forever, args=(0.05,), daemon=True).start()
        yield board.url
        board.shutdown()


@pytest.mark.matrix(1)
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_two_hundred_runs_are_shown_without_a_fault_and_fit_the_screen(
    browser: Any, url: str, size: dict[str, int], scheme: str
) -> None:
    page, errors = open_page(browser, url, size, scheme)
    page.locator("#runs tbody tr").nth(199).wait_for()
    page.wait_for_function(DRAWN)
    assert page.locator("#count").inner_text().startswith("200 of 200 runs")
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert page.evaluate("window.broken") is None
    assert page.locator("img").count() == 0
    assert page.locator("#sweeps-body a").get_attribute("href") == "/files/sweeps/ranks/report.html"
    assert not errors


@pytest.mark.full
def test_search_and_filters_narrow_the_table_and_stand_in_the_address(browser: Any, url: str) -> None:
    page, errors = open_page(browser, url, DESKTOP)
    rows = page.locator("#runs tbody tr")
    rows.nth(199).wait_for()
    page.locator("#search").fill("run-01 lora.r=4")
    assert rows.count() == 2  # run-012 and run-017
    page.locator("#status").select_option("finished")
    assert rows.count() == 2
    page.locator("#status").select_option("failed")
    assert rows.count() == 0
    page.locator("#status").select_option("finished")
    page.reload()
    page.locator("#runs tbody tr").first.wait_for()
    assert page.locator("#search").input_value() == "run-01 lora.r=4"
    assert page.locator("#status").input_value() == "finished"
    assert not errors


@pytest.mark.full
def test_a_click_on_a_head_sorts_with_the_unknown_last(browser: Any, url: str) -> None:
    page, _ = open_page(browser, url, DESKTOP)
    page.locator("#runs tbody tr").nth(199).wait_for()
    page.locator("#runs thead button", has_text="loss").click()
    texts = page.locator("#runs tbody tr td:nth-child(4)").all_inner_texts()
    values = [float(text.split("→")[-1]) for text in texts if text != "–"]
    assert values == sorted(values)
    assert texts[len(values) :] == ["–"] * (200 - len(values))


def test_selected_runs_are_overlaid_and_two_are_shown_side_by_side(browser: Any, url: str) -> None:
    page, errors = open_page(browser, url, DESKTOP)
    page.locator("#runs tbody tr").nth(199).wait_for()
    for number in ("005", "008"):
        page.get_by_label(f"select run-{number}").check()
    page.locator("#detail-body h3", has_text="what differs").wait_for()
    assert page.locator("#legend button").all_inner_texts() == ["run-005", "run-008"]
    page.wait_for_function(DRAWN)
    names = page.locator("#charts .chart").first.evaluate("chart => [...new Set(chart.data.map(({ name }) => name))]")
    assert sorted(names) == ["run-005", "run-008"]
    chart = page.locator("figure[data-name=eval_loss] .chart")
    starts = chart.evaluate("chart => chart.data.map(({ x, y }) => [x[0], y[0]])")
    assert starts == [[0, 4.2], [0, 4.2]]
    assert page.locator("#detail-body tr.value").all_inner_texts() == ["lora.r\t1\t8"]
    asked = page.locator("#detail-body td.asked").all_inner_texts()
    assert len(asked) == 2
    assert "<script>" in asked[0]
    page.get_by_label("select run-008").uncheck()
    page.locator("#detail-title", has_text="run-005").wait_for()
    assert page.evaluate("window.broken") is None
    assert not errors


@pytest.mark.full
def test_a_run_that_begins_appears_and_moves_by_itself(browser: Any, tmp_path: Path) -> None:
    with Board(tmp_path / "outputs", 0) as board:
        threading.Thread(target=board.serve_forever, args=(0.05,), daemon=True).start()
        page, errors = open_page(browser, board.url, PHONE)
        page.locator("#count", has_text="There are no runs").wait_for()
        folder = write_run(tmp_path / "outputs" / "runs" / "new", status="running", steps=4)
        with locked(folder, "in use"):
            page.locator("#runs tbody tr", has_text="step 4 of 4").wait_for()
            (folder / "progress.json").write_text('{"step": 7, "max_steps": 9}')
            page.locator("#runs tbody tr", has_text="step 7 of 9").wait_for()
            history = json.loads((folder / "history.json").read_text())
            page.wait_for_function("document.querySelector('#charts .chart')?.data?.[0].x.at(-1) === 4")
            (folder / "history.json").write_text(json.dumps([*history, {"step": 5, "loss": 1.0}]))
            (folder / "progress.json").write_text('{"step": 8, "max_steps": 9}')
            page.wait_for_function("document.querySelector('#charts .chart').data[0].x.at(-1) === 5")
        page.locator("#runs .pill.interrupted").wait_for()
        assert not errors
        page.context.set_offline(True)
        page.locator("#live.lost", has_text="no answer").wait_for()
        board.shutdown()


def test_a_chart_is_as_wide_as_its_card(browser: Any, url: str) -> None:
    page, _ = open_page(browser, url, DESKTOP)
    page.locator("#runs tbody tr").nth(199).wait_for()
    page.wait_for_function(DRAWN)
    charts = "[...document.querySelectorAll('#charts .main-svg')]"
    widths = page.evaluate(
        f"{charts}.map((svg) => [svg.getBoundingClientRect().width, svg.closest('.chart').clientWidth])"
    )
    assert widths
    assert all(svg <= chart + 1 for svg, chart in widths), widths


def test_an_answer_of_any_length_leaves_room_for_the_next_row(browser: Any, tmp_path: Path) -> None:
    long = "word " * 2000
    outputs = tmp_path / "outputs"
    write_run(outputs / "runs" / "mine", answers=[{"prompt": "Say no.", "reference": "no", "prediction": long}])
    with Board(outputs, 0) as board:
        threading.Thread(target=board.serve_forever, args=(0.05,), daemon=True).start()
        page, errors = open_page(browser, f"{board.url}?run=runs/mine", DESKTOP)
        cell = page.locator("#detail-body td.wrong", has_text="word")
        cell.wait_for()
        assert cell.bounding_box()["height"] < 400
        board.shutdown()
    assert not errors
