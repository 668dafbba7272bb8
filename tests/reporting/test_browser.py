"""The pages in a real browser: they draw, answer to clicks, follow light and dark, and fit a phone."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import ALARM, DESKTOP, PHONE, launched, needs_browser, open_page
from synthetic_runs import write_run, write_sweep

from qlora.reporting.run_page import RunState, write_run_page
from qlora.reporting.run_page import run_page as render_run
from qlora.runtime.atomic_files import write_text
from qlora.runtime.run_folder import RunFolder
from qlora.sweep.sweep_page import write_overview

pytestmark = needs_browser

FIRST_CURVE = "[data-kind=curves][data-index='0']"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs over two keys and a value that attacks the page; one has failed, one was pruned."""
    folder = tmp_path_factory.mktemp("sweeps") / "ranks"
    broken = {5: ("failed", f"ValueError: {ALARM}", f"Traceback\n{ALARM}"), 7: ("pruned", "behind the median", "")}
    axes = {"lora.r": ["4", "8", "16"], "trainer.learning_rate": ["1e-4", "1e-3"], "name": ["plain", ALARM]}
    write_sweep(folder, axes, broken=broken)
    write_overview(folder, None)
    return folder / "report.html"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answers = [
        {"prompt": f"### Instruction:\nSay it. {ALARM}", "reference": "yes", "prediction": answer, "answer_tokens": 1}
        for answer in ("yes", "no", ALARM)
    ]
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine", ["lora.r=8"], answers=answers)
    result = json.loads((folder / "result.json").read_text())
    return write_run_page(RunFolder(folder), result, command=f"qlora 'name={ALARM}'")


class Opened:
    """A page that is drawn, with what went wrong."""

    def __init__(self, browser: Any, path: Path, size: dict[str, int], scheme: str = "light") -> None:
        self.requests: list[str] = []
        self.page, self.errors = open_page(browser, "about:blank", size, scheme)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('.chart.wait').length === 0", timeout=60_000)
        self.page.wait_for_function("[...document.querySelectorAll('.chart')].every(chart => chart.data)")

    def traces(self, chart: str = FIRST_CURVE) -> list[dict[str, Any]]:
        """The drawn lines of a chart."""
        script = "chart => chart.data.map(({ name, y, hoverinfo }) => ({ name, y: [...y], hoverinfo }))"
        return self.page.locator(chart).evaluate(script)

    def ground(self) -> str:
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.fixture(scope="module")
def sweep_page(browser: Any, sweep: Path) -> Opened:
    """The sweep's page, for tests that leave it as it was."""
    return Opened(browser, sweep, DESKTOP)


@pytest.fixture(scope="module")
def run_page(browser: Any, run: Path) -> Opened:
    """The run's page, for tests that leave it as it was."""
    return Opened(browser, run, DESKTOP)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", ["sweep", "run"])
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light")])
def test_a_page_is_drawn_without_a_fault_or_a_request_and_fits_the_screen(
    browser: Any, request: pytest.FixtureRequest, tmp_path: Path, name: str, size: dict[str, int], scheme: str
) -> None:
    path = request.getfixturevalue(name)
    opened = Opened(browser, path, size, scheme)
    opened.page.screenshot(path=tmp_path / f"{name}-{size['width']}-{scheme}.png", full_page=True)
    assert not opened.errors
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert opened.page.evaluate("window.broken") is None
    assert opened.page.locator("img[src=x]").count() == 0
    dark = sum(map(int, opened.ground()[4:-1].split(","))) < 3 * 128
    assert dark == (scheme == "dark")


def test_hovering_shows_the_values_and_the_run(run_page: Opened) -> None:
    opened = run_page
    chart = opened.page.locator(FIRST_CURVE)
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = opened.page.locator(f"{FIRST_CURVE} .hoverlayer .legendtext")
    label.first.wait_for()
    texts = " ".join(label.all_text_contents())
    assert "training" in texts
    assert any(f"{value:.4g}"[:4] in texts for value in opened.traces()[-1]["y"])


@pytest.mark.full
def test_the_legend_hides_a_run_and_shows_it_again(sweep_page: Opened) -> None:
    opened = sweep_page
    first = opened.page.locator(".legend button").first
    label = first.get_attribute("title").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert label in {trace["name"] for trace in opened.traces()}
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    assert label not in {trace["name"] for trace in opened.traces()}
    opened.page.get_by_role("button", name="none", exact=True).click()
    assert opened.traces() == []
    opened.page.get_by_role("button", name="all", exact=True).click()
    assert label in {trace["name"] for trace in opened.traces()}
    assert not opened.errors


def test_smoothing_changes_the_curve_and_keeps_the_raw_one(run_page: Opened) -> None:
    opened = run_page

    def roughness(values: list[float]) -> float:
        return sum(abs(a - b) for a, b in itertools.pairwise(values))

    def training(weight: str) -> list[list[float]]:
        opened.page.locator("#smoothing").fill(weight)
        return [trace["y"] for trace in opened.traces() if trace["name"] == "training"]

    [raw] = training("0")
    faint, smooth = sorted(training("0.9"), key=roughness, reverse=True)
    assert faint == raw
    assert len(smooth) == len(raw)
    assert roughness(smooth) < roughness(raw) / 3
    assert opened.page.locator("#smoothing + output").inner_text() == "0.90"


@pytest.mark.full
def test_the_axis_counts_tokens_on_demand_and_is_logarithmic_on_demand(browser: Any, run: Path) -> None:
    opened = Opened(browser, run, DESKTOP)
    opened.page.locator("#x").select_option("tokens")
    opened.page.locator("#log").check()
    layout = opened.page.locator(FIRST_CURVE).evaluate(
        "chart => [chart.layout.xaxis.title.text, chart.layout.yaxis.type]"
    )
    assert layout == ["tokens", "log"]
    assert opened.page.locator(FIRST_CURVE).evaluate("chart => chart.data[0].x.at(-1)") == 480 * 200


def test_a_click_on_a_head_sorts_the_table_and_another_turns_it_round(sweep_page: Opened) -> None:
    opened = sweep_page
    table = opened.page.locator("#leaderboard table")
    column = table.locator("tbody td:nth-child(3)")
    head = table.locator("thead th:nth-child(3)")
    head.get_by_role("button").click()
    rising = [int(text) for text in column.all_inner_texts()]
    assert rising == sorted(rising)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert [int(text) for text in column.all_inner_texts()] == rising[::-1]
    loss = opened.page.locator("#time thead th", has_text="loss").get_by_role("button")
    loss.click()
    losses = opened.page.locator("#time tbody td:nth-child(3)").all_inner_texts()
    assert losses[-2:] == ["–", "–"]  # of those that did not finish
    loss.click()
    assert opened.page.locator("#time tbody td:nth-child(3)").all_inner_texts()[-2:] == ["–", "–"]


def test_the_toggle_turns_the_page_and_its_charts_dark(sweep_page: Opened) -> None:
    opened = sweep_page
    previous = opened.ground(), opened.page.locator(FIRST_CURVE).evaluate("chart => chart.layout.plot_bgcolor")
    opened.page.locator("#theme").click()
    after = opened.ground(), opened.page.locator(FIRST_CURVE).evaluate("chart => chart.layout.plot_bgcolor")
    assert previous[0] != after[0]
    assert previous[1] != after[1]
    opened.page.locator("#theme").click()
    assert opened.ground() == previous[0]


def test_the_charts_of_parameters_hold_every_finished_run(sweep_page: Opened) -> None:
    opened = sweep_page
    counts = opened.page.evaluate(
        "[...document.querySelectorAll('[data-kind=scatters]')].map(chart => chart.data[1].y.length)"
    )
    assert set(counts) == {10}
    dimensions = opened.page.locator("[data-kind=parallel]").evaluate(
        "chart => chart.data[0].dimensions.map(({ label, values }) => [label, values.length])"
    )
    assert dimensions == [["lora.r", 10], ["learning_rate", 10], ["name", 10], ["loss", 10]]
    assert opened.page.locator("[data-kind=parallel] canvas").count()
    for texts in ("[data-kind=parallel] text", "[data-kind=scatters] .xtick text"):
        assert "<script>window.…" in opened.page.locator(texts).all_text_contents()


@pytest.mark.full
def test_a_search_by_two_goals_shows_its_front(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "goals"
    write_sweep(folder, {"lora.r": ["4", "8", "16", "32"]})
    overview = json.loads((folder / "sweep.json").read_text())
    goals = {"eval_loss": "minimize", "eval_exact_match": "maximize"}
    (folder / "sweep.json").write_text(json.dumps(overview | {"goals": goals}))
    for path, actual in zip(
        sorted(folder.glob("*/result.json")), [(1, 0.4), (2, 0.5), (3, 0.45), (4, 0.6)], strict=True
    ):
        result = json.loads(path.read_text())
        result["metrics"]["eval_loss"], result["metrics"]["eval_exact_match"] = actual
        path.write_text(json.dumps(result))
    write_overview(folder, None)
    opened = Opened(browser, folder / "report.html", DESKTOP)
    assert not opened.errors
    line, points = opened.traces("[data-kind=fronts]")
    assert (line["y"], points["y"]) == ([0.4, 0.5, 0.6], [0.4, 0.5, 0.45, 0.6])
    positions = opened.page.locator("#leaderboard tbody tr td:first-child").all_text_contents()
    assert [index.strip() for index in positions] == ["* 1", "* 2", "3", "* 4"]
    assert opened.page.get_by_role("heading", name="Best compromises").is_visible()


def test_no_button_sends_a_chart_anywhere(run_page: Opened) -> None:
    opened = run_page
    titles = opened.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(each => each.dataset.title)")
    assert set(titles) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def test_the_command_is_copied(run_page: Opened) -> None:
    opened = run_page
    opened.page.evaluate("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    opened.page.locator("[data-copy]").click()
    opened.page.get_by_role("button", name="copied").wait_for()
    assert opened.page.evaluate("window.copied") == f"qlora 'name={ALARM}'"


def test_config_and_answers_can_be_searched(browser: Any, run: Path) -> None:
    opened = Opened(browser, run, DESKTOP)
    opened.page.locator("#config summary").click()
    opened.page.locator("#config input").fill("learning_rate")
    assert opened.page.locator("#config tr:visible").all_inner_texts() == ["trainer.learning_rate\t0.002"]
    opened.page.locator("#wrong").check()
    assert opened.page.locator(".answers > article:visible").count() == 2


@pytest.mark.full
def test_the_page_of_a_run_that_is_alive_loads_itself_again_and_keeps_what_a_reader_has_set(
    browser: Any, tmp_path: Path
) -> None:
    folder = RunFolder(write_run(tmp_path / "alive", status="running"))
    (folder.path / "result.json").unlink(missing_ok=True)

    def show(note: str, seconds: float | None) -> None:
        state = RunState("running" if seconds else "interrupted", note, seconds)
        write_text(folder.report, render_run(folder, {}, command="qlora", state=state))

    show("step 1", 2)
    opened = Opened(browser, folder.report, DESKTOP)
    opened.page.locator("#log").check()
    opened.page.locator("#config summary").click()
    opened.page.evaluate("scrollTo(0, 400)")
    show("step 2", 2)
    opened.page.locator("#state", has_text="step 2").wait_for()
    opened.page.wait_for_function("document.querySelectorAll('.chart.wait').length === 0", timeout=60_000)
    assert opened.page.locator("#log").is_checked()
    assert opened.page.evaluate("document.querySelector('#config details').open")
    assert opened.page.evaluate("scrollY") == 400
    assert opened.page.locator(FIRST_CURVE).evaluate("chart => chart.layout.yaxis.type") == "log"
    show("stopped", None)
    opened.page.locator("#state", has_text="stopped").wait_for()
    opened.page.evaluate("window.same = 1")
    opened.page.wait_for_timeout(3000)
    assert opened.page.evaluate("window.same") == 1
    assert not opened.errors


@pytest.mark.full
def test_a_page_that_is_silent_for_ten_minutes_says_so_and_stays(browser: Any, tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "silent", status="running"))
    html = render_run(folder, {}, command="qlora", state=RunState("running", "step 1", 0.5))
    written = re.search(r'"written":(\d+)', html)
    assert written
    write_text(folder.report, html.replace(written[1], str(int(written[1]) - 601_000)))
    opened = Opened(browser, folder.report, DESKTOP)
    opened.page.locator("#alive", has_text="no news for 10 minutes").wait_for()
    opened.page.evaluate("window.same = 1")
    opened.page.wait_for_timeout(1800)
    assert opened.page.evaluate("window.same") == 1
