"""Damaged files in run folders: each is named, costs its own run alone, and nothing ends in a traceback."""

from __future__ import annotations

import functools
import json
import logging
import math
import random
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose as compose_anew
from qlora.config.saved_config import config_to_dict
from qlora.config.schema import Config
from qlora.errors import UserError
from qlora.runtime.saved_run import READERS, find_damage, to_number
from qlora.sweep.jobs import Job, Status, identity, read_job
from qlora.sweep.launcher import Queue, open_sweep
from qlora.sweep.leaderboard import build_leaderboard
from qlora.sweep.live_table import Screen
from qlora.sweep.report_runs import report
from qlora.sweep.sweep_folder import Sweep, common_keys, read_sweep
from qlora.sweep.sweep_page import write_overview
from tests.faults.damaging import damage, restore
from tests.synthetic_runs import write_run


def compose(overrides: Sequence[str]) -> Config:
    """Returns the config of overrides; each is composed once only."""
    return _composed(tuple(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose_anew(overrides)


RANKS = ("8", "16", "32")
EMPTY, CUT, ODD = b"", b'{"status": "fin', b"[[]]"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_jobs(folder: Path) -> Path:
    """Writes a sweep of three finished jobs, in folders of their identities."""
    for rank in RANKS:
        config = config_to_dict(compose([f"lora.r={rank}"]))
        job = write_run(
            folder / f"lora.r={rank}-{identity(config)}", [f"lora.r={rank}"], level=1 + 1 / int(rank), steps=8
        )
        for name in ("metrics.json", "baseline.json"):
            (job / name).write_text(json.dumps({"eval_loss": 1.5}))
    read_sweep(folder, "eval_loss").write()
    return folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three finished jobs."""
    return write_jobs(tmp_path_factory.mktemp("jobs") / "sweep")


def job_of(sweep: Path, rank: str) -> Path:
    return next(sweep.glob(f"lora.r={rank}-*"))


def restart(folder: Path) -> dict[str, Job]:
    """Opens a sweep as a command that resumes it does, and returns its jobs by rank."""
    combinations = [[f"lora.r={rank}"] for rank in RANKS]
    configs = [compose(overrides) for overrides in combinations]
    with open_sweep(folder, shared(configs), "eval_loss") as sweep:
        Queue(
            sweep,
            [
                (overrides, overrides, lambda c=config: c)
                for overrides, config in zip(combinations, configs, strict=True)
            ],
            len(combinations),
        )
        jobs = [
            sweep.find(overrides, config_to_dict(config))
            for overrides, config in zip(combinations, configs, strict=True)
        ]
        return dict(zip(RANKS, jobs, strict=True))


def shared(configs: Sequence[Config]) -> dict[str, Any]:
    return common_keys([config_to_dict(config) for config in configs])


# Numbers that are none


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("objective", "value"),
    [("eval_loss", math.nan), ("eval_loss", -math.inf), ("eval_exact_match", None), ("eval_exact_match", 10**400)],
    ids=["NaN", "minus infinity", "null", "too large"],
)
def test_a_number_that_is_none_is_the_worst_in_a_running_sweep_a_restart_and_the_report(
    jobs: Path, tmp_path: Path, value: Any, objective: str
) -> None:
    restore(jobs, tmp_path / "sweep")
    best = job_of(tmp_path / "sweep", "32" if objective == "eval_loss" else "8") / "result.json"
    record = json.loads(best.read_text())
    record["metrics"][objective] = record["objective"] = value
    best.write_text(json.dumps(record))
    restart(tmp_path / "sweep")
    sweep = read_sweep(tmp_path / "sweep", objective)
    with Screen(sweep, 0) as screen:
        assert "nan" not in screen._standing([])
        assert "inf" not in screen._standing([])
    assert build_leaderboard(sweep).rows[-1].best.folder == best.parent
    write_overview(sweep.folder, objective)
    assert json.loads((sweep.folder / "sweep.json").read_text(), parse_constant=lambda _: 1 / 0)["counts"] == {
        "finished": 3
    }
    (tmp_path / "out").mkdir()
    asked = replace(compose(["task=report", "runs=x"]), runs=str(sweep.folder), objective=objective)
    report(asked, tmp_path / "out")
    lines = (tmp_path / "out" / "leaderboard.csv").read_text().splitlines()
    assert lines[-1].startswith(best.parent.name.partition(",")[0])


def test_seeds_of_which_one_diverged_have_no_mean_and_are_the_worst(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "eval_loss")
    for name, losses in {"a": (math.inf, 1.0), "b": (-math.inf, math.inf), "c": (7.0, 8.0)}.items():
        for seed, loss in enumerate(losses):
            job = Job(tmp_path / f"{name}{seed}", [f"data={name}", f"seed={seed}"], Status.finished)
            job.metrics = {"eval_loss": loss}
            sweep.jobs[job.name] = job
    assert [row.values["data"] for row in build_leaderboard(sweep).rows] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("saved", "number"), [("nan", math.nan), ("-inf", -math.inf), (None, math.nan), (10**400, math.inf), (3, 3.0)]
)
def test_numbers_are_read_back_as_floats(saved: Any, number: float) -> None:
    assert to_number(saved) == pytest.approx(number, nan_ok=True)


# Damaged files


@pytest.mark.matrix(10)
@pytest.mark.parametrize("name", sorted(READERS))
@pytest.mark.parametrize("content", [EMPTY, CUT, ODD])
def test_a_damaged_file_of_a_job_is_named_and_costs_that_job_alone(
    jobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    restore(jobs, tmp_path / "sweep")
    hurt = job_of(tmp_path / "sweep", "16")
    (hurt / name).write_bytes(content)
    is_whole = name != "result.json"
    result = report_on(tmp_path / "sweep", tmp_path / "out")
    assert result["metrics"] == {"report_runs": 3, "report_finished": 3 if is_whole else 2}
    assert str(hurt / name) in caplog.text
    planned = restart(tmp_path / "sweep")
    assert [planned[rank].status for rank in ("8", "32")] == [Status.finished] * 2
    assert planned["16"].status is (Status.finished if is_whole else Status.queued)
    assert planned["16"].overrides == ["lora.r=16"]
    if not is_whole:
        write_overview(tmp_path / "sweep", "eval_loss")
        table = (tmp_path / "sweep" / "leaderboard.md").read_text()
        assert "- lora.r=16: failed, result.json is damaged (" in table


def report_on(runs: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    return report(replace(compose(["task=report", "runs=x"]), runs=str(runs)), out).to_dict()


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_damaged_file_of_a_run_of_no_sweep_is_named_and_the_run_counts_as_failed(
    jobs: Path, tmp_path: Path, name: str
) -> None:
    for rank in RANKS:
        shutil.copytree(job_of(jobs, rank), tmp_path / "runs" / rank)
    (tmp_path / "runs" / "8" / name).write_bytes(CUT)
    result = report_on(tmp_path / "runs", tmp_path / "out")
    assert result["metrics"] == {"report_runs": 3, "report_finished": 2}
    assert f"failed, {name} is damaged (" in (tmp_path / "out" / "leaderboard.md").read_text()


def test_a_job_without_a_whole_result_is_run_again_whatever_is_damaged(jobs: Path, tmp_path: Path) -> None:
    for name in READERS:
        restore(jobs, tmp_path / "sweep")
        hurt = job_of(tmp_path / "sweep", "16")
        (hurt / "result.json").unlink()
        (hurt / name).write_bytes(CUT)
        assert restart(tmp_path / "sweep")["16"].status is Status.queued


@pytest.mark.parametrize("content", [EMPTY, CUT, ODD, b'{"jobs": [{"job": ".."}]}', b'{"goals": {"eval_loss": 3}}'])
def test_a_damaged_overview_is_made_of_its_jobs_and_still_refuses_another_config(
    jobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    restore(jobs, tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_bytes(content)
    other = [compose([f"lora.r={rank}", "trainer.max_steps=7"]) for rank in RANKS]
    with (
        pytest.raises(UserError, match=r"holds a sweep of another config; changed:\n  trainer.max_steps"),
        open_sweep(tmp_path / "sweep", shared(other), "eval_loss"),
    ):
        pass
    assert f"{tmp_path}/sweep/sweep.json is damaged (" in caplog.text
    assert {job.status for job in restart(tmp_path / "sweep").values()} == {Status.finished}
    assert read_sweep(tmp_path / "sweep").varied == ["lora.r"]


def test_a_job_whose_record_has_no_status_is_finished_by_its_result(jobs: Path, tmp_path: Path) -> None:
    restore(job_of(jobs, "8"), tmp_path / "job")
    (tmp_path / "job" / "status.json").write_text(json.dumps({"status": "done", "result": "../x"}))
    job = read_job(tmp_path / "job")
    assert (job.status, [error.path.name for error in job.damaged]) == (Status.finished, ["status.json"])


# At random


def torment(original: Path, folder: Path, seeds: range) -> dict[str, int]:
    """Damages files of a sweep, has it read by all that reads sweeps, and counts how that ended."""
    counts = {"read": 0, "refused": 0}
    for seed in seeds:
        draw = random.Random(seed)
        restore(original, folder / "sweep")
        files = [
            folder / "sweep" / "sweep.json",
            *(path for path in job_of(folder / "sweep", "8").rglob("*") if path.is_file()),
        ]
        how = [damage(path, draw) for path in draw.sample(sorted(files), k=draw.choice([1, 1, 2, 3]))]
        for step in (restart_and_show, report_anew):
            try:
                step(folder / "sweep", folder / "out")
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1
            except Exception:
                pytest.fail(f"seed {seed}, {how}:\n{traceback.format_exc()}")
    return counts


def restart_and_show(folder: Path, out: Path) -> None:
    planned = restart(folder)
    assert [planned[rank].status for rank in ("16", "32")] == [Status.finished] * 2
    assert {error.path for error in find_damage(folder)} <= {folder / "sweep.json"}
    write_overview(folder, "eval_loss")
    with Screen(read_sweep(folder), 0) as screen:
        screen.waiting([])
        screen.summary()


def report_anew(folder: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    assert report_on(folder, out)["metrics"]["report_finished"] >= 2


@pytest.mark.full
def test_damaged_folders_are_read_without_a_traceback(
    jobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "qlora")
    counts = torment(jobs, tmp_path, range(12))
    assert counts["read"] >= 20


@pytest.mark.full
def test_a_thousand_damaged_folders_are_read_without_a_traceback(jobs: Path, tmp_path: Path) -> None:
    print(f"\n1,000 damaged sweeps, restarted and reported: {torment(jobs, tmp_path, range(1000))}")
