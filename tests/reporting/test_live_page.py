"""The page of a run while it is alive: what it shows, how little it costs, and that it stops nothing."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from qlora.errors import Pruned, RunError, Stopped
from qlora.reporting import live_page
from qlora.reporting.examples import read_examples, write_examples
from qlora.reporting.live_page import LivePage
from qlora.reporting.preview.content import PreviewRow, PreviewToken
from qlora.runtime.disk_space import Patience, waiting_for_space
from qlora.runtime.run_folder import RunFolder

LOGGED = [{"step": 1, "loss": 3.0, "learning_rate": 1e-3, "train_tokens_per_second": 400.0}]
EVALUATED = [*LOGGED, {"step": 2, "eval_loss": 2.5, "eval_perplexity": 12.2, "eval_runtime": 1.0}]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has measured its base and not trained yet."""
    folder = RunFolder(write_run(tmp_path / "mine", ["lora.r=8"], status="running"))
    folder.history.unlink()
    folder.baseline.write_text(json.dumps({"metrics": {"loss": 4.2, "exact_match": 0.25}, "scores": {}}))
    folder.base_predictions.write_text(
        json.dumps({"prompt": "Say yes.", "reference": "yes", "prediction": "no"}) + "\n"
    )
    return folder


def data(folder: RunFolder) -> dict[str, Any]:
    result = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', folder.report.read_text(), re.DOTALL
    )
    assert result
    return json.loads(result[1])


def test_before_the_first_step_the_page_shows_the_base_and_its_answers(folder: RunFolder) -> None:
    LivePage(folder, command="qlora lora.r=8").begin("preparing")
    html = folder.report.read_text()
    for text in ("running", "preparing", "25.0 %", "✗ no", "lora.r=8", "this page follows the run"):
        assert text in html
    [loss] = data(folder)["curves"]
    assert [(line["step"], line["value"]) for line in loss["lines"]] == [([0], [4.2])]
    assert abs(data(folder)["live"]["written"] - 1000 * time.time()) < 60_000


def test_every_log_and_evaluation_is_shown_behind_the_base(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "PAGE_FRACTION", 1e9)
    monkeypatch.setattr(live_page, "DISK_FRACTION", 1e9)
    page = LivePage(folder, command="qlora")
    page.begin("preparing")
    page.update(LOGGED, "training, step 1 of 9")
    assert "training, step 1 of 9" in folder.report.read_text()
    page.update(EVALUATED, "training, step 2 of 9")
    charts = {chart["title"]: chart for chart in data(folder)["curves"]}
    training, held_out = charts["loss"]["lines"]
    assert (training["step"], training["value"]) == ([1], [3.0])
    assert (held_out["step"], held_out["value"]) == ([0, 2], [4.2, 2.5])
    assert "exact match" not in charts  # only the base has been measured by it
    assert "eval_runtime" not in folder.report.read_text()
    assert json.loads(folder.history.read_text()) == EVALUATED


def test_pages_take_a_small_part_of_the_time_and_evaluations_are_shown_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(LivePage, "_write", lambda self, state: (written.append(state.note), time.sleep(0.01)))
    page = LivePage(folder, command="qlora")
    page.begin("begin")
    for step in range(50):
        page.update(LOGGED, f"log {step}")
        time.sleep(0.001)
    assert written[:2] == ["begin", "log 0"]
    assert len(written) < 6
    page.update(EVALUATED, "evaluated", measured=True)
    assert written[-1] == "evaluated"


def test_a_run_with_rare_logs_shows_that_it_is_alive(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    page = LivePage(folder, command="qlora")
    page.begin("preparing")
    page.keep_alive([], "step 1")
    assert "step 1" not in folder.report.read_text()
    monkeypatch.setattr(live_page, "OLD_SECONDS", 0)
    page.keep_alive([], "step 1")
    assert "step 1" in folder.report.read_text()


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (KeyboardInterrupt(), "interrupted", "the same command in the same folder resumes it"),
        (Stopped("SIGTERM"), "interrupted", "the same command in the same folder resumes it"),
        (Pruned("behind the median"), "pruned", "behind the median"),
        (RunError("the loss is nan"), "failed", "the loss is nan"),
        (ValueError("<script>"), "failed", "ValueError: &lt;script&gt;"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_run_that_does_not_finish_has_a_page_that_stays(
    folder: RunFolder, error: BaseException, status: str, note: str
) -> None:
    page = LivePage(folder, command="qlora")
    page.begin("preparing")
    page.update(LOGGED, "training, step 1 of 9")
    page.end(error)
    html = folder.report.read_text()
    assert f'<span class="pill {status}">' in html
    assert note in html
    assert "live" not in data(folder)
    assert 'href="result.json"' not in html
    assert data(folder)["curves"][0]["title"] == "loss"


@contextmanager
def _never(path: Path) -> Iterator[None]:
    """Puts a folder where the page is written, which no rename replaces."""
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "file").touch()
    yield


def test_a_page_that_cannot_be_written_is_one_warning_and_waits_for_nothing(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> bool:
        raise AssertionError("the page waits for space")

    page = LivePage(folder, command="qlora")
    with _never(folder.report), waiting_for_space(Patience(9, fail, fail)), caplog.at_level(logging.WARNING):
        page.begin("preparing")
        page.update(LOGGED, "step 1", measured=True)
        page.end(KeyboardInterrupt())
    [warning] = caplog.messages
    assert warning.startswith(f"{folder.report} is not up to date ({folder.report} cannot be written")
    assert warning.endswith("; the run continues")


def test_a_bug_in_the_page_is_one_warning(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> str:
        raise TypeError("a bug")

    monkeypatch.setattr(live_page, "run_page", broken)
    page = LivePage(folder, command="qlora")
    page.begin("preparing")
    page.update(LOGGED, "step 1", measured=True)
    assert caplog.messages == [f"{folder.report} is not up to date (TypeError: a bug); the run continues"]


def test_a_damaged_file_is_named_once(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.manifest.write_text("{")
    page = LivePage(folder, command="qlora")
    page.begin("preparing")
    page.update(LOGGED, "step 1", measured=True)
    assert [text for text in caplog.messages if "manifest.json is damaged" in text] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_folder_that_was_removed_is_not_made_again(folder: RunFolder, tmp_path: Path) -> None:
    page = LivePage(folder, command="qlora")
    folder.path.rename(tmp_path / "elsewhere")
    page.update(LOGGED, "step 1", measured=True)
    assert not folder.path.exists()


def test_training_rows_are_kept_with_their_masks_and_stay_text(folder: RunFolder) -> None:
    tokens = [PreviewToken("<b>ask</b>", 1, False), PreviewToken(" yes", 2, True), PreviewToken("</s>", 3, True)]
    write_examples(folder.examples, [PreviewRow(7, tokens, ["its source is cut at the beginning"])])
    [row] = read_examples(folder.examples)
    assert row["parts"] == [{"text": "<b>ask</b>", "trained": False}, {"text": " yes</s>", "trained": True}]
    LivePage(folder, command="qlora").begin("preparing")
    html = folder.report.read_text()
    assert "&lt;b&gt;ask&lt;/b&gt;<mark> yes&lt;/s&gt;</mark>" in html
    assert "row 7: 3 tokens, 2 trained · <b>its source is cut at the beginning</b>" in html


def test_the_answer_of_the_base_stands_beside_each_answer(folder: RunFolder) -> None:
    lines = [{"prompt": prompt, "reference": "yes", "prediction": "yes"} for prompt in ("Say yes.", "Say it.")]
    folder.predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    LivePage(folder, command="qlora").begin("measuring")
    first, second = re.findall(r"<article class=\"card\" data-right.*?</article>", folder.report.read_text(), re.DOTALL)
    assert '<dt>base</dt><dd class="wrong">✗ no</dd>' in re.sub(r">\s+<", "><", first)
    assert "✓ yes" in first
    assert "<dt>base</dt>" not in second


def test_keys_that_differ_from_the_preset_stand_above_the_config(folder: RunFolder) -> None:
    manifest = json.loads(folder.manifest.read_text())
    folder.manifest.write_text(json.dumps({**manifest, "preset": {"lora.r": 32, "data.subset": "x"}}))
    LivePage(folder, command="qlora").begin("preparing")
    rows = re.findall(r'<td class="value">([\w.]+)</td><td class="value"><b>(.*?)</b></td><td class="value">(.*?)</td>',
                      folder.report.read_text())  # fmt: skip
    assert rows == [("lora.r", "8", "32"), ("data.subset", "null", "x")]
