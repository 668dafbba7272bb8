"""Grids: what is composed when, which jobs are one, what is refused, and what large ones cost."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from qlora.config.combinations import Combinations
from qlora.config.compose import compose, compose_dict
from qlora.config.saved_config import config_to_dict
from qlora.errors import UserError
from qlora.sweep import live_table
from qlora.sweep.grid import run_grid
from qlora.sweep.jobs import Job, Status, identity, read_job, recorded, write_status
from qlora.sweep.launcher import AHEAD, JobsFailed
from qlora.sweep.leaderboard import build_leaderboard
from qlora.sweep.live_table import Upkeep
from qlora.sweep.sweep_folder import Sweep, read_sweep
from qlora.sweep.sweep_page import write_overview

FOLDER = Path("outputs/sweeps/grid")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["qlora"])


def finish(folder: Path, loss: float = 1.0) -> None:
    """Does what the process of a job does."""
    result = {"objective": loss, "metrics": {"eval_loss": loss}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    write_status(folder, Status.finished, result="result.json")


def run(*args: str, launch: Callable[..., Any] | None = None) -> list[list[str]]:
    """Runs a grid by an engine of another project; returns the overrides of the jobs that it was given."""
    config, given = compose_dict([f"hydra.sweep.dir={FOLDER}"]), []

    def finish_all(batch: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        given.extend(batch)
        for job_words in batch:
            [folder] = FOLDER.glob(f"*-{identity(config_to_dict(compose(job_words)))}")
            finish(folder)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in batch]

    run_grid(config, list(args), launch=launch or finish_all, build=None)
    return given


def overview() -> dict[str, Any]:
    return json.loads((FOLDER / "sweep.json").read_text())


@pytest.mark.full
def test_a_combination_is_what_its_overrides_compose_to() -> None:
    args = ["lora=all-linear,dora", "lora.target_modules=all-linear,[q_proj,v_proj]", "trainer.learning_rate=1e-3,2",
             "quantization.compute_dtype=fp32,bf16", "seed=range(0,2)", "name=x", "data.columns={output: answer}",
             "trainer.eval_steps=null,5"]  # fmt: skip
    grid = Combinations(args)
    combinations = list(grid)
    assert len(combinations) == len(grid) == 64
    for positions in combinations[::13]:
        assert grid.config(positions) == compose(grid.overrides(positions))


def test_a_config_as_plain_values_is_what_omegaconf_makes_of_it() -> None:
    mix = "data.mix={one: {path: a.jsonl, weight: 2}, two: b.jsonl}"
    for args in ([], ["model=llama-7b", "evaluation=mmlu", "tracking=wandb"], ["data=mix", mix]):
        config = compose(args)
        assert config_to_dict(config) == OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lora.r=8,0"], "lora.r must be positive, got 0"),
        (["seed=1,x"], "seed must be a whole number, got 'x'"),
        (["data=demo,dmeo"], "data=dmeo: data has no such option"),
        (["lora.target_modules=[q_proj],{a:1}"], "lora.target_modules"),
        (["model.revision=main,hf_aaaaaaaaaaaaaaaaaaaaaaaa"], "model.revision holds a token of the Hugging Face hub"),
        (["trainer.max_steps=5,9223372036854775808"], "trainer.max_steps must lie between -2^63 and 2^63"),
    ],
)
def test_every_value_is_checked_before_a_job_starts(args: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("^", r"\^")):
        run("trainer.max_steps=1", *args)
    assert not FOLDER.exists()


@pytest.mark.full
def test_a_combination_that_is_refused_is_a_failed_job_and_the_others_run() -> None:
    args = ["quantization=none,nf4", "lora=all-linear,pissa"]
    with pytest.raises(JobsFailed, match="1 of 4 jobs failed"):
        run(*args)
    assert overview()["counts"] == {"finished": 3, "failed": 1}
    [failed] = [job for job in overview()["jobs"] if job["status"] == "failed"]
    assert failed["overrides"] == ["quantization=nf4", "lora=pissa"]
    assert failed["reason"].startswith("lora.init=pissa rewrites the base weights")
    assert failed["reason"] in (FOLDER / "leaderboard.md").read_text()


@pytest.mark.full
def test_every_engine_refuses_a_folder_of_another_config_and_leaves_finished_jobs_alone() -> None:
    assert len(run("lora.alpha=8,16", "seed=0,1")) == 4
    with pytest.raises(UserError, match=r"holds a sweep of another config; changed:\n  trainer.max_steps: 200 -> 3"):
        run("lora.alpha=8,16", "seed=0,1", "trainer.max_steps=3")
    assert run("lora.alpha=16,8.0,32", "seed=0") == [["lora.alpha=32", "seed=0"]]


@pytest.mark.full
def test_seeds_are_averaged_over_equal_configs_only(tmp_path: Path) -> None:
    jobs = {}
    for steps, rank, seed in [(5, 8, 0), (5, 8, 1), (9, 8, 0), (9, 8, 1)]:
        folder = tmp_path / f"r={rank},seed={seed},{steps}"
        config = config_to_dict(compose([f"lora.r={rank}", f"seed={seed}", f"trainer.max_steps={steps}"]))
        with recorded(folder, [f"lora.r={rank}", f"seed={seed}"], "result.json", config):
            finish(folder, loss=steps)
        jobs[folder.name] = read_job(folder)
    board = build_leaderboard(Sweep(tmp_path, "eval_loss", jobs))
    assert [(len(row.jobs), row.metrics["eval_loss"][0]) for row in board.rows] == [(2, 5.0), (2, 9.0)]


def test_a_finished_job_that_is_started_again_keeps_its_seconds(tmp_path: Path) -> None:
    with recorded(tmp_path, [], "result.json"):
        finish(tmp_path)
    write_status(tmp_path, Status.finished, seconds=1234.5)
    with recorded(tmp_path, [], "result.json"):
        pass
    assert read_job(tmp_path).seconds == 1234.5
    with recorded(tmp_path, [], "result.json"):
        finish(tmp_path, loss=2.0)
    assert read_job(tmp_path).seconds != 1234.5


class Enough(Exception):
    """Ends a sweep."""


def test_a_grid_of_ten_thousand_jobs_composes_the_next_ones_only(capsys: pytest.CaptureFixture[str]) -> None:
    def launch(batch: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        assert batch == [["lora.r=1", "seed=0"]]
        raise Enough

    config = compose_dict([f"hydra.sweep.dir={FOLDER}", "hydra.sweeper.max_batch_size=1"])
    with pytest.raises(Enough):
        run_grid(config, ["lora.r=range(1,101)", "seed=range(0,100)"], launch=launch, build=None)
    assert overview()["to_come"] == 10_000 - AHEAD
    assert len(overview()["jobs"]) == AHEAD
    told = capsys.readouterr().out
    assert "10,000 jobs, lora.r (100 values) x seed (100 values); each value is checked" in told
    assert "10,000 jobs to run, 0 finished already" in told


def test_a_job_whose_files_have_not_changed_is_not_read_again(tmp_path: Path) -> None:
    job = tmp_path / "a-12345678"
    finish(job, loss=1.5)
    read_sweep(tmp_path, "eval_loss").write()
    assert not read_sweep(tmp_path).has_changed
    result, times = job / "result.json", (job / "result.json").stat()
    result.write_text(result.read_text().replace("1.5", "2.5"))
    os.utime(result, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_sweep(tmp_path).jobs[job.name].objective == 1.5
    os.utime(result)
    assert read_sweep(tmp_path).jobs[job.name].objective == 2.5


def test_the_last_of_many_jobs_that_end_together_leaves_the_last_state(tmp_path: Path) -> None:
    for turn in range(4):
        folder = tmp_path / str(turn)
        jobs = [folder / f"seed={seed}-0000000{seed}" for seed in range(4)]
        for job in jobs:
            write_status(job, Status.queued, overrides=[f"seed={job.name[5]}"])

        def end(job: Path, folder: Path = folder) -> None:
            finish(job)
            write_overview(folder, "eval_loss")

        threads = [threading.Thread(target=end, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert json.loads((folder / "sweep.json").read_text())["counts"] == {"finished": 4}
        assert (folder / "leaderboard.csv").read_text().count("finished") == 4
        assert (folder / "report.html").stat().st_mtime_ns >= max(job.stat().st_mtime_ns for job in jobs)


def test_files_are_kept_up_to_date_in_their_share_of_the_time_and_never_stay_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, written = [0.0], []

    def write() -> None:
        clock[0] += 1.0
        written.append(clock[0])

    monkeypatch.setattr(live_table, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    upkeep = Upkeep(write, 0.1)
    for _ in range(100):
        clock[0] += 1.0
        upkeep.changed()
    assert len(written) <= 11
    clock[0] += 100.0
    upkeep.poll()
    count = len(written)
    upkeep.poll()
    upkeep.finish()
    assert len(written) == count
    upkeep.changed()
    upkeep.finish()
    assert len(written) == count + 1


def test_only_changed_jobs_are_put_into_text_again(tmp_path: Path) -> None:
    jobs = {f"j{number}": Job(tmp_path / f"j{number}", [f"seed={number}"]) for number in range(3)}
    sweep = Sweep(tmp_path, "eval_loss", jobs)
    sweep.write()
    previous = dict(sweep._texts)
    jobs["j1"].status = Status.running
    sweep.write()
    assert [name for name in jobs if sweep._texts[name] is not previous[name]] == ["j1"]
    assert [job["status"] for job in json.loads((tmp_path / "sweep.json").read_text())["jobs"]] == [
        "queued", "running", "queued"
    ]  # fmt: skip
