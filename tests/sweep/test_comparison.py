"""Sweeps that answer a question: rounds of seeds, verdicts, what is refused, and kills that change nothing."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from qlora.board.run_list import RunList
from qlora.board.served_folder import ServedFolder
from qlora.config import command
from qlora.config.compose import compose, compose_dict, opened_hydra
from qlora.config.schema import CompareConfig
from qlora.errors import UserError
from qlora.sweep.comparison import plan_comparison
from qlora.sweep.confidence_sequence import Interval, confidence_interval, fewest_values
from qlora.sweep.grid import run_grid
from qlora.sweep.jobs import Job, Status, write_status
from qlora.sweep.launcher import JobsFailed
from qlora.sweep.leaderboard import build_leaderboard
from qlora.sweep.report_runs import report
from qlora.sweep.summary_run import count_jobs
from qlora.sweep.sweep_folder import read_sweep
from qlora.sweep.sweep_page import write_overview
from qlora.sweep.verdict_table import build_verdict_table, gpu_hours
from qlora.sweep.verdicts import Question, Verdict, decide, judge, missing_jobs, read_question

FOLDER = Path("outputs/sweeps/compared")


def ask(**changed: Any) -> str:
    """Returns a question as the command line writes it; what is None is left out."""
    question = {"by": "lora.r", "baseline": 8, "metric": "eval_loss", "margin": 0.01} | changed
    return f"sweep.compare={{{', '.join(f'{name}: {value}' for name, value in question.items() if value is not None)}}}"


ASKED = ask()
GAINS = {2: 0.1, 8: 0.0, 16: 0.001}
"""What each rank adds to the loss."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["qlora"])


def loss_of(rank: int, seed: int) -> float:
    """Returns what a job measures: mostly its seed's loss, and a little noise of its own."""
    return 1 + random.Random(seed).gauss(0, 0.5) + GAINS[rank] + random.Random(f"{rank} {seed}").gauss(0, 0.003)


def finish(folder: Path, loss: float) -> None:
    """Does what the process of a job does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(
        json.dumps({"objective": loss, "metrics": {"eval_loss": loss, "eval_exact_match": loss}})
    )
    write_status(folder, Status.finished, result="result.json", seconds=2.0)


class Killed(BaseException):
    """Ends the command between two jobs."""


def run(
    *args: str, measure: Callable[[int, int], float | None] = loss_of, most: float = math.inf
) -> list[list[tuple[int, int]]]:
    """Runs a sweep by an engine of another project; returns rank and seed of the jobs of each round.

    A job without a measurement fails; the command is killed after `most` jobs.
    """
    config, rounds, ended = (
        compose_dict([f"hydra.sweep.dir={FOLDER}", *args], leave_swept=True),
        list[list[tuple[int, int]]](),
        0,
    )

    def end_all(batch: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        nonlocal ended
        rounds.append([])
        for overrides in batch:
            if ended >= most:
                raise Killed
            given = dict(text.partition("=")[::2] for text in overrides)
            rank, seed = int(given.get("lora.r", 0)), int(given["seed"])
            [folder] = FOLDER.glob(f"*={given.get('lora.r') or given['quantization']},seed={seed}-*")
            loss = measure(rank, seed)
            if loss is None:
                write_status(folder, Status.failed, reason="it broke", result="result.json", seconds=1.0)
            else:
                finish(folder, loss)
            rounds[-1].append((rank, seed))
            ended += 1
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in batch]

    run_grid(config, list(args), launch=end_all, build=None)
    return rounds


def compose_and_run(*args: str, measure: Callable[[int, int], float | None] = loss_of) -> None:
    """Does what the command line does with a sweep."""
    command.compose_command(args, multirun=True, leave_grid=True)
    run(*args, measure=measure)


def overview() -> dict[str, Any]:
    return json.loads((FOLDER / "sweep.json").read_text())


def verdicts() -> dict[str, str]:
    return {item["value"]: item["verdict"] for item in overview()["verdicts"]}


def test_seeds_are_added_where_the_answer_is_open_and_stopped_where_it_is_decided() -> None:
    rounds = run("lora.r=2,8,16", ASKED)
    assert rounds[0] == [(rank, seed) for seed in range(4) for rank in (8, 2, 16)]
    assert verdicts() == {"2": "worse", "16": "same"}
    counts = {item["value"]: item["seeds"] for item in overview()["verdicts"]}
    assert counts["2"] == 4 < counts["16"] < 20
    assert rounds[1:] == [[(8, seed), (16, seed)] for seed in range(4, counts["16"])]
    table = (FOLDER / "leaderboard.md").read_text()
    assert "lora.r = 2, 16 against 8 by eval_loss (lower is better, margin 0.01)" in table
    assert re.search(r"\| 2 +\| worse +\| 4 +\| \+0\.\d{3} +\| \+0\.\d{3} to \+0\.\d{3} +\| 0:08", table), table
    page = (FOLDER / "report.html").read_text()
    assert "same within the margin" in page
    assert 'id="verdicts"' in page


def test_the_same_command_runs_nothing_again_and_more_seeds_continue() -> None:
    def noisy(rank: int, seed: int) -> float:
        return random.Random(f"{rank} {seed}").gauss(1, 1)

    asked = ask(max_seeds=5)
    first = run("lora.r=2,8,16", asked, measure=noisy)
    assert verdicts() == {"2": "open", "16": "open"}
    assert run("lora.r=2,8,16", asked, measure=noisy) == []
    more = run("lora.r=2,8,16", ask(max_seeds=6), measure=noisy)
    assert [len(part) for part in first] == [12, 3]
    assert more == [[(8, 5), (2, 5), (16, 5)]]


def test_seeds_begin_at_that_of_the_config() -> None:
    rounds = run("lora.r=2,8", "seed=7", ASKED)
    assert sorted({seed for part in rounds for _, seed in part})[0] == 7
    assert overview()["compare"]["seeds"][:2] == [7, 8]


def table_of(folder: Path) -> list[Any]:
    record = json.loads((folder / "sweep.json").read_text())
    jobs = [(job["job"], job["status"], job["metrics"]) for job in record["jobs"]]
    return [sorted(jobs), record["verdicts"], record["compare"], (folder / "leaderboard.md").read_text()]


def test_a_sweep_that_is_killed_anywhere_ends_in_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sum(map(len, run("lora.r=2,8,16", ASKED)))
    calm, draw = table_of(FOLDER), random.Random(0)
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    kills = 0
    while kills < count:
        try:
            run("lora.r=2,8,16", ASKED, most=draw.randint(0, 3))
        except Killed:
            kills += 1
        else:
            break
    assert kills > 3
    run("lora.r=2,8,16", ASKED)
    assert table_of(FOLDER) == calm


def test_a_failed_job_leaves_its_candidate_open_and_is_run_again_by_the_same_command() -> None:
    def broken(rank: int, seed: int) -> float | None:
        return None if (rank, seed) == (2, 1) else loss_of(rank, seed)

    with pytest.raises(JobsFailed, match="1 of"):
        run("lora.r=2,8,16", ASKED, measure=broken)
    assert verdicts() == {"2": "open", "16": "same"}
    assert overview()["verdicts"][0]["seeds"] == 1
    assert run("lora.r=2,8,16", ASKED) == [[(2, 1)]]
    assert verdicts()["2"] == "worse"


def test_a_loss_that_is_not_finite_stays_open_with_its_reason_and_takes_no_more_seeds() -> None:
    run("lora.r=2,8", ASKED, measure=lambda rank, seed: math.nan if (rank, seed) == (2, 0) else loss_of(rank, seed))
    [item] = overview()["verdicts"]
    assert (item["verdict"], item["seeds"]) == ("open", 0)
    assert item["reason"] == "seed 0: its eval_loss is not finite"
    assert len(overview()["jobs"]) == 8
    assert "stays open: seed 0" in (FOLDER / "leaderboard.md").read_text()


def test_what_a_job_s_process_writes_keeps_the_verdicts() -> None:
    run("lora.r=2,8", ASKED)
    verdicts_at_end = overview()["verdicts"]
    write_overview(FOLDER, None)
    assert overview()["verdicts"] == verdicts_at_end
    assert read_sweep(FOLDER).question is not None


def test_report_board_and_trackers_say_the_verdicts(tmp_path: Path) -> None:
    run("lora.r=2,8", ASKED)
    [table] = [line for line in (FOLDER / "leaderboard.md").read_text().splitlines() if "| worse |" in line]
    report(compose(["task=report", f"runs={FOLDER}"]), tmp_path / "report")
    assert table in (tmp_path / "report" / "leaderboard.md").read_text()
    assert 'id="verdicts"' in (tmp_path / "report" / "report.html").read_text()
    [listed] = RunList(ServedFolder(tmp_path / "outputs")).read()["sweeps"]
    [said] = listed["verdicts"]
    assert re.fullmatch(r"lora.r=2: worse, \+0\.\d{3} to \+0\.\d{3} after 4 seeds", said)
    sweep = read_sweep(FOLDER)
    assert count_jobs(sweep, build_leaderboard(sweep))["verdict/lora.r=2"] == "worse"


def test_gpu_hours_are_told_where_all_jobs_ran_on_gpus() -> None:
    run("lora.r=2,8", ASKED)
    assert "GPU hours" not in (FOLDER / "leaderboard.md").read_text()
    for folder in FOLDER.glob("lora*"):
        manifest = {"hardware": {"gpus": [{"name": "A"}, {"name": "B"}]}, "config": {"device": "auto"}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    sweep = read_sweep(FOLDER)
    assert sweep.question is not None
    table = build_verdict_table(sweep.question, sweep.jobs)
    assert table.head[-1] == "GPU hours"
    assert [line[-1] for line in table.lines] == ["<0.01", "<0.01"]
    assert gpu_hours(sweep.jobs.values()) == pytest.approx(8 * 2 * 2.0 / 3600)


def test_a_damaged_question_is_named_and_costs_the_verdicts_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run("lora.r=2,8", ASKED)
    record = overview()
    record["compare"]["jobs"] = 3
    (FOLDER / "sweep.json").write_text(json.dumps(record))
    sweep = read_sweep(FOLDER)
    assert "sweep.json is damaged (compare: it is not a question)" in capsys.readouterr().err
    assert (sweep.question, len(sweep.jobs)) == (None, 8)
    assert run("lora.r=2,8", ASKED) == []
    assert verdicts() == {"2": "worse"}


@pytest.mark.matrix(6)
@pytest.mark.parametrize(
    ("args", "changed", "sentence"),
    [
        (["lora.r=2,8"], {"metric": "eval_lss"}, "sweep.compare.metric: 'eval_lss' is not a metric of this run"),
        (
            ["lora.r=2,8", "task.evaluate=false", "trainer.eval_steps=null"],
            {},
            "eval_loss is not measured by these jobs",
        ),
        (["lora.r=2,8"], {"baseline": 9}, "sweep.compare.baseline=9 is no value of lora.r here; choose one of 2, 8"),
        (
            ["lora.r=2,8"],
            {"baseline": None},
            "sweep.compare.baseline is not set; name the value to compare with, one of",
        ),
        (["lora.r=2,8", "seed=0,1"], {}, "sweep.compare adds the seeds itself, and seed=0, 1 sweeps them too"),
        (
            ["lora.r=2,8", "lora.alpha=8,16"],
            {},
            "sweep.compare compares the values of lora.r, and lora.alpha varies too",
        ),
        (["lora.r=8", "lora.alpha=8,16"], {}, "sweep.compare.by=lora.r has a single value here"),
        (["lora.r=2,8"], {"margin": 0}, "sweep.compare.margin must be positive and finite, got 0"),
        (["lora.r=2,8"], {"margin": -1}, "sweep.compare.margin must be positive and finite, got -1"),
        (["lora.r=2,8"], {"margin": "nan"}, "sweep.compare.margin must be"),
        (["lora.r=2,8"], {"margin": None}, "sweep.compare.margin is not set"),
        (["lora.r=2,8"], {"max_seeds": 1}, "sweep.compare.max_seeds must lie between 2 and 1000, got 1"),
        (
            ["lora.r=2,8"],
            {"max_seeds": 3},
            "sweep.compare.max_seeds=3 can decide nothing: beside 1 candidate the first",
        ),
        (["lora.r=2,8"], {"maxseeds": 3}, "unknown key 'sweep.compare.maxseeds'"),
        (["lora.r=2,8"], {"metric": "train_watchdog_slow"}, "its name does not say which values are better"),
        (["lora.r=2,8,8"], {}, "lora.r=8 and lora.r=8 are the same run"),
        (["lora.r=2,8", "task.train=false", "adapter=none"], {}, "(task=train) train nothing"),
        (["lora.dropout=0,0.0,0.1"], {"by": "lora.dropout", "baseline": 0}, "are the same run"),
        (["data.max_eval_samples=8,9"], {"by": "data.max_eval_samples"}, "other rows (data.max_eval_samples differs)"),
        (["lora.r=2,8", "sweep.detach=true"], {}, "sweep.compare needs the result of each seed to add the next one"),
        (["lora.r=2,8", "objective=null"], {"metric": None}, "sweep.compare.metric is not set, and objective=null"),
        (["lora.r=2,8"], {"by": None}, "compares nothing without a key; name the swept one"),
    ],
)
def test_a_question_without_an_answer_is_refused_before_a_job_starts(
    args: list[str], changed: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        compose_and_run(*args, ask(**changed))
    assert "\n" not in str(caught.value)
    assert not FOLDER.exists()


@pytest.mark.parametrize(
    ("args", "multirun", "sentence"),
    [
        (["lora.r=2", ASKED], False, "sweep.compare.by=lora.r compares runs of a sweep, and this is a run"),
        (
            ["lora.r=2,8", ASKED, "task=wandb-sweep"],
            True,
            "task=wandb-sweep leaves the choice of runs to another program",
        ),
    ],
)
def test_a_question_is_refused_where_nothing_adds_seeds(args: list[str], multirun: bool, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        command.compose_command(args, multirun=multirun)


def test_a_search_does_not_compare() -> None:
    pytest.importorskip("optuna")
    from qlora.sweep.search import search

    args = ["hydra/sweeper=optuna", f"hydra.sweep.dir={FOLDER}", ASKED]
    with (
        opened_hydra(args, None) as hydra,
        pytest.raises(UserError, match="hydra/sweeper=optuna searches for the best"),
    ):
        search(compose_dict(args), hydra.config_loader, ["lora.r=choice(2,8)", ASKED], launch=run, build=None)


def test_a_direction_that_a_name_does_not_say_may_be_given() -> None:
    asked = ask(metric="train_watchdog_slow", direction="minimize")
    with pytest.raises(JobsFailed):
        run("lora.r=2,8", asked, measure=lambda rank, seed: None)


def test_groups_texts_and_lists_can_be_compared() -> None:
    args = ["quantization=nf4,fp4", "sweep.compare={by: quantization, baseline: nf4, margin: 0.01}"]
    run(*args, measure=lambda rank, seed: 1 + seed)
    assert verdicts() == {"fp4": "same"}
    config = [
        "lora.target_modules=[q_proj],all-linear",
        "trainer.learning_rate=1e-3,2e-3",
        "lora.use_rslora=true,false",
    ]
    for swept, baseline in zip(config, ("[q_proj]", "0.002", "true"), strict=True):
        key = swept.partition("=")[0]
        asked = CompareConfig(by=key, baseline=OmegaConf.select(compose_dict([f"{key}={baseline}"]), key), margin=0.1)
        assert plan_comparison(asked, [swept], compose_dict([]), None).baseline.lower() == baseline


JOB = """
import json, os, random, sys, time
folder, *overrides = sys.argv[1:]
given = dict(text.partition("=")[::2] for text in overrides)
rank, seed = given["lora.r"], given["seed"]
time.sleep(random.uniform(0.05, 0.3))
noise = random.Random(seed).gauss(0, 0.5) + random.Random(f"{rank} {seed}").gauss(0, 0.003)
loss = 1 + {"2": 0.1, "8": 0, "16": 0.001}[rank] + noise
status = json.load(open(f"{folder}/status.json")) | {"status": "finished", "result": "result.json", "seconds": 0.1}
for name, record in {"result": {"objective": loss, "metrics": {"eval_loss": loss}}, "status": status}.items():
    with open(f"{folder}/.{name}", "w") as file:
        json.dump(record, file)
    os.replace(f"{folder}/.{name}", f"{folder}/{name}.json")
"""
PROGRAM = f"""
import sys
from functools import partial
from qlora.config.compose import compose_dict
from qlora.sweep import launcher
from qlora.sweep.engines import build_engine
from qlora.sweep.grid import run_grid

JOB = {JOB!r}
launcher.command = lambda config, folder, overrides: [sys.executable, "-c", JOB, str(folder.absolute()), *overrides]
config = compose_dict(sys.argv[1:], leave_swept=True)
run_grid(config, sys.argv[1:], launch=None, build=partial(build_engine, config.hydra.launcher))
"""
"""A sweep whose jobs are processes that measure what they are told instead of training."""


def start(folder: Path, question: str) -> subprocess.Popen[str]:
    """Starts a sweep of two jobs at a time."""
    folder.mkdir(exist_ok=True)
    args = [f"hydra.sweep.dir={FOLDER}", "hydra.launcher.n_jobs=2", "device=cpu", "lora.r=2,8,16", question]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(1, id="one", marks=pytest.mark.slow),
        pytest.param(int(os.environ.get("QLORA_TEST_KILLS", "3")), marks=pytest.mark.full),
    ],
)
def test_processes_run_in_rounds_and_a_sweep_killed_at_any_moment_ends_in_the_same_table(
    kills: int, tmp_path: Path
) -> None:
    question = ASKED if kills == 1 else ask(margin=0.003)  # which takes more seeds
    calm = start(tmp_path / "calm", question)
    output, _ = calm.communicate(timeout=300)
    assert calm.returncode == 0, output
    assert "lora.r=2: worse, +" in output
    draw, hit = random.Random(0), 0
    for _ in range(kills):
        process, folder = start(tmp_path / "killed", question), tmp_path / "killed" / FOLDER
        until = len(list(folder.glob("*/result.json"))) + draw.choice((0, 1, 1, 2))
        while process.poll() is None and not (len(list(folder.glob("*/result.json"))) >= until and is_at_work(folder)):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.2))
        hit += process.poll() is None
        process.kill()
        process.communicate()
    assert hit
    process = start(tmp_path / "killed", question)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert table_of(tmp_path / "killed" / FOLDER) == table_of(tmp_path / "calm" / FOLDER)
    print(f"{hit} kills while the sweep ran")


def is_at_work(folder: Path) -> bool:
    """Returns whether a job has started and not ended."""
    return len(list(folder.glob("*/status.json"))) > len(list(folder.glob("*/result.json")))


# The documentation


def test_the_questions_of_the_manual_are_answered() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line.split(" #")[0] for line in text.splitlines() if line.startswith("qlora ") and "compare" in line]
    assert len(commands) > 2
    for line in commands:
        args = [word for word in shlex.split(line)[1:] if word != "-m"]
        shutil.rmtree(FOLDER, ignore_errors=True)
        compose_and_run(*args, measure=lambda rank, seed: 1 + seed + rank / 10)
        assert verdicts()


# The statistics


def test_the_interval_is_where_the_e_process_stays_below_one_over_alpha() -> None:
    values, alpha, prior = [0.3, -0.2, 0.9, 0.4, 0.1, 0.7], 0.025, 0.25

    def evidence(mean: float) -> float:
        total, squares = sum(x - mean for x in values), sum((x - mean) ** 2 for x in values)
        count = len(values)
        return math.sqrt(prior / (count + prior)) * (1 - total**2 / ((count + prior) * squares)) ** (-count / 2)

    interval = confidence_interval(values, alpha)
    assert evidence(interval.low) == pytest.approx(1 / alpha)
    assert evidence(interval.high) == pytest.approx(1 / alpha)
    assert evidence(interval.mean) < 1


def test_too_few_values_say_nothing() -> None:
    assert [fewest_values(0.05 / count) for count in (1, 2, 5, 50)] == [4, 4, 5, 6]
    assert confidence_interval([1.0, 1.0, 1.0], 0.05) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.5, "worse"),
        (-0.5, -0.001, "better"),
        (-0.5, 0.5, "open"),
        (-0.09, 0.09, "same"),
        (0.01, 0.09, "same"),
        (-0.1, 0.05, "open"),
        (0.0, 0.2, "open"),
        (-math.inf, math.inf, "open"),
    ],
)
def test_an_interval_decides_by_zero_and_by_the_margin(low: float, high: float, verdict: str) -> None:
    assert decide(Interval((low + high) / 2, low, high), 0.1, maximizes=False).value == verdict
    swapped = {"worse": "better", "better": "worse"}.get(verdict, verdict)
    assert decide(Interval((low + high) / 2, low, high), 0.1, maximizes=True).value == swapped


def question(count: int = 2, seeds: int = 20, metric: str = "eval_loss") -> Question:
    values = ["base", *(f"c{index}" for index in range(count))]
    names = {value: [f"{value}-{seed}" for seed in range(seeds)] for value in values}
    return Question("by", "base", metric, False, 0.1, list(range(seeds)), names)


def jobs_of(asked: Question, measure: Callable[[str, int], float], folder: Path = Path("none")) -> dict[str, Job]:
    return {
        name: Job(folder / name, status=Status.finished, metrics={asked.metric: measure(value, seed)})
        for value, names in asked.jobs.items()
        for seed, name in enumerate(names)
    }


def test_seeds_behind_a_verdict_or_a_gap_change_nothing() -> None:
    asked = question(1)
    jobs = jobs_of(asked, lambda value, seed: random.Random(f"{value} {seed}").gauss(1.0 * (value != "base"), 0.1))
    [item] = judge(asked, jobs)
    assert item.verdict is Verdict.worse
    later = {name: job for name, job in jobs.items() if int(name.rpartition("-")[2]) < item.count}
    assert judge(asked, later) == [item]
    del jobs["base-2"]
    [item] = judge(asked, jobs)
    assert (item.verdict, item.count) == (Verdict.open, 2)
    assert missing_jobs(asked, [item]) == [f"{value}-{seed}" for seed in range(4) for value in ("base", "c0")]


def test_equal_shares_of_a_few_rows_are_not_yet_equal(tmp_path: Path) -> None:
    asked = question(1, 6, "eval_exact_match")
    for rows, verdict in ((8, "open"), (800, "same")):
        jobs = jobs_of(asked, lambda value, seed: 0.5, tmp_path)
        for job in jobs.values():
            job.folder.mkdir(exist_ok=True)
            result = {"objective": 0.5, "metrics": {}, "measured": {"data": {"rows": rows}}}
            (job.folder / "result.json").write_text(json.dumps(result))
        [item] = judge(asked, jobs)
        assert item.verdict.value == verdict


def test_jobs_that_measured_other_rows_are_not_compared(tmp_path: Path) -> None:
    asked = question(1, 6)
    jobs = jobs_of(asked, lambda value, seed: 0.5, tmp_path)
    for name, job in jobs.items():
        job.folder.mkdir()
        result = {"objective": 0.5, "metrics": {}, "measured": {"data": {"rows": 8 if "base" in name else 7}}}
        (job.folder / "result.json").write_text(json.dumps(result))
    [item] = judge(asked, jobs)
    assert item.reason == "seed 0: it is measured on 7 rows, and the baseline on 8"


def test_a_question_is_read_back_and_a_damaged_one_is_refused() -> None:
    asked = question()
    assert read_question(json.loads(json.dumps(asked.to_dict()))) == asked
    for damaged in ({}, [], "x", {**asked.to_dict(), "seeds": [0]}, {**asked.to_dict(), "jobs": {"base": 3}}):
        with pytest.raises(ValueError, match="it"):
            read_question(damaged)
