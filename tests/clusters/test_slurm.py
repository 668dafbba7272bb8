"""Jobs on a real SLURM of two nodes: every end is reported, warned jobs resume, nothing is submitted twice."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.sweep.engine_config import SlurmSettings
from qlora.sweep.job_processes import Task
from qlora.sweep.jobs import Job, Status, read_job
from qlora.sweep.slurm import SlurmJobs
from qlora.sweep.slurm_batch import BATCHES, submitted_name
from qlora.sweep.sweep_folder import read_sweep
from tests.clusters.tasks import starts, task

DOCS = Path(__file__).parents[2] / "docs" / "clusters.md"
QUICK = [
    *("lora.dropout=0", "trainer.per_device_train_batch_size=4", "trainer.logging_steps=1"),
    *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
    *("data.max_eval_samples=8", "data.max_train_samples=64", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false",),
]
WAIT = 120.0
"""Seconds that something may take on a slow machine."""


def on_one_node(**keys: object) -> SlurmSettings:
    """Settings by which a job takes all CPUs of a node."""
    return SlurmSettings(**{"gpus_per_node": None, "cpus_per_task": 8, "timeout_min": 60, **keys})  # type: ignore[arg-type]


def scancel(*overrides: str) -> None:
    subprocess.run(["scancel", *overrides], check=True, capture_output=True)


def name_of(job: Job) -> str:
    name = submitted_name(job.folder)
    assert name is not None
    return name


def run(
    tasks: list[Task],
    settings: SlurmSettings,
    *,
    detach: bool = False,
    on_start: Callable[[Job], None] = lambda job: None,
    on_wait: Callable[[list[Job]], None] = lambda jobs: None,
) -> dict[str, Job]:
    ended: dict[str, Job] = {}
    waiting = iter(tasks)
    jobs = SlurmJobs(
        settings,
        detach=detach,
        on_start=on_start,
        on_end=lambda job: ended.update({job.name: job}),
        on_wait=on_wait,
    )
    jobs.run(lambda: next(waiting, None), None)
    return ended


@pytest.mark.full
def test_every_kind_of_end_is_reported_and_the_others_continue(tmp_path: Path, on_slurm: dict[str, str]) -> None:
    ends = {
        "fine": "pass",
        "raises": "raise ValueError('no such thing')",
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "lost": "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)",
        "cancelled": "time.sleep(600)",
        "never": "pass",
    }
    begun = "wait(folder.parent / 'go'); "  # so that there is no room for the last one before it is cancelled
    tasks = [task(tmp_path / name, what if name == "cancelled" else begun + what) for name, what in ends.items()]

    def cancel(job: Job) -> None:
        if job.name == "cancelled":
            end = time.monotonic() + WAIT
            while not starts(job.folder):
                assert time.monotonic() < end
                time.sleep(0.05)
            scancel(name_of(job), name_of(Job(tmp_path / "never")))
            (tmp_path / "go").touch()

    ended = run(tasks, on_one_node(cpus_per_task=2, array_parallelism=5), on_start=cancel)
    told = {name: (job.status, re.sub(" on n[12]", " on NODE", job.reason or "")) for name, job in ended.items()}
    assert told == {
        "fine": (Status.finished, ""),
        "raises": (Status.failed, "ValueError: no such thing"),
        "killed": (Status.failed, "killed (SIGKILL): the system does so when memory runs out"),
        "lost": (
            Status.failed,
            "ended in SLURM as FAILED, exit code 0, killed by signal 9 on NODE and without a result",
        ),
        "cancelled": (Status.interrupted, "cancelled in SLURM on NODE"),
        "never": (Status.interrupted, "cancelled in SLURM before it began"),
    }
    assert (tmp_path / "fine" / "stdout.log").read_text() == "says fine\n"
    assert "ValueError: no such thing" in (tmp_path / "raises" / "stderr.log").read_text()
    assert [starts(tmp_path / name) for name in ends] == [1, 1, 1, 1, 1, 0]


@pytest.mark.full
def test_a_warned_job_is_queued_again_until_its_allocations_are_used_up(
    tmp_path: Path, on_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    second = "len(starts.read_text()) > 1 or time.sleep(600)"
    tasks = [task(tmp_path / "goes-on", second), task(tmp_path / "too-long", "time.sleep(600)")]
    queued: dict[str, tuple[Status, str | None]] = {}

    def warn(job: Job) -> None:
        allocation = 2 if job.name in queued else 1
        if (job.name, allocation) == ("goes-on", 2):
            return
        end = time.monotonic() + WAIT
        while starts(job.folder) < allocation or read_job(job.folder).status is not Status.running:
            assert time.monotonic() < end
            time.sleep(0.05)
        scancel("--signal=USR1", "--batch", name_of(job))

    def watch(jobs: list[Job]) -> None:
        for job in jobs:
            if job.status is Status.queued:
                queued[job.name] = (read_job(job.folder).status, job.reason)

    ended = run(tasks, on_one_node(max_num_timeout=1), on_start=warn, on_wait=watch)
    again = (Status.queued, "queued again after 1 of 2 allocations")
    assert queued == {"goes-on": again, "too-long": again}
    assert (ended["goes-on"].status, starts(tmp_path / "goes-on")) == (Status.finished, 2)
    assert (ended["too-long"].status, starts(tmp_path / "too-long")) == (Status.interrupted, 2)
    assert ended["too-long"].reason == (
        "timed out 2 times after hydra.launcher.timeout_min=60 minutes, which hydra.launcher.max_num_timeout=1 allows"
    )
    assert "is queued again: x=goes-on" in capsys.readouterr().out


@pytest.mark.full
def test_detached_and_interrupted_jobs_are_found_again(
    tmp_path: Path, on_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["one", "two", "three"]
    settings = on_one_node()

    def tasks() -> list[Task]:
        return [task(tmp_path / name, "wait(folder.parent / 'go')") for name in names]

    assert run(tasks(), settings, detach=True) == {}
    output = capsys.readouterr().out
    array = re.search(r"submitted 3 jobs to SLURM: (\d+)_\[0-2\]", output)
    assert array is not None, output
    assert f"cancel       scancel {array[1]}_[0-2]" in output

    def interrupt(jobs: list[Job]) -> None:
        if len(jobs) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tasks(), settings, on_wait=interrupt)
    output = capsys.readouterr().out
    for line in (
        f"3 jobs in SLURM already: {array[1]}_[0-2]",
        f"2 jobs still running in SLURM: {array[1]}_[0-1]",
        f"1 job still queued in SLURM: {array[1]}_2",
        "follow       the same command again: it shows their state, and submits none of them twice",
    ):
        assert line in output
    assert read_job(tmp_path / "three").status is Status.queued
    (tmp_path / "go").touch()
    ended = run(tasks(), settings)
    assert {name: job.status for name, job in ended.items()} == dict.fromkeys(names, Status.finished)
    assert [starts(tmp_path / name) for name in names] == [1, 1, 1]
    assert [path.name for path in (tmp_path / BATCHES).iterdir()] == ["1"]


@pytest.mark.full
def test_what_ended_while_nobody_looked_is_told_once_and_then_run_again(
    tmp_path: Path, on_slurm: dict[str, str]
) -> None:
    job = tmp_path / "job"
    again = "len(starts.read_text()) > 1 or sys.exit(3)"
    assert run([task(job, again)], on_one_node(), detach=True) == {}
    end = time.monotonic() + WAIT
    while read_job(job).status is not Status.failed:
        assert time.monotonic() < end
        time.sleep(0.1)
    [told] = run([task(job, again)], on_one_node()).values()
    assert (told.status, starts(job)) == (Status.failed, 1)
    [told] = run([task(job, again)], on_one_node()).values()
    assert (told.status, starts(job)) == (Status.finished, 2)


def test_what_slurm_refuses_is_one_sentence_and_leaves_nothing_submitted(
    tmp_path: Path, on_slurm: dict[str, str]
) -> None:
    refusals = {
        "partition": ("nowhere", "SLURM refused the jobs: .*invalid partition"),
        "constraint": ("h900", "SLURM refused the jobs: .*Invalid feature"),
        "gpus_per_node": (
            64,
            "SLURM refused the jobs: .*no node has the requested gpus_per_node=64, cpus_per_task=8",
        ),
        "additional_parameters": ({"nonsense": 1}, "SLURM refused the jobs: .*unrecognized option '--nonsense=1'"),
    }
    for key, (value, sentence) in refusals.items():
        with pytest.raises(UserError, match=f"(?i){sentence}.*docs/clusters.md lists the keys"):
            run([task(tmp_path / "job")], on_one_node(**{key: value}))
        assert submitted_name(tmp_path / "job") is None
        assert starts(tmp_path / "job") == 0


def documented(launcher: str) -> list[str]:
    """The words of the first sweep in the docs that chooses a launcher."""
    text = DOCS.read_text().replace("\\\n", " ")
    command = next(line for line in text.splitlines() if line.startswith(f"qlora -m hydra/launcher={launcher}"))
    return shlex.split(command)[1:]


def sweep(folder: Path, overrides: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qlora", *overrides, *QUICK],
        cwd=folder,
        env=os.environ | environment,
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
    )


@pytest.mark.full
def test_the_documented_command_trains_on_the_cluster_submitted_first_and_followed_later(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    overrides = [*documented("slurm"), "trainer.max_steps=2", "trainer.gradient_accumulation_steps=1"]
    first = sweep(tmp_path, [*overrides, "sweep.detach=true"], slurm)
    assert (first.returncode, first.stderr) == (0, ""), first.stdout + first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "sweep outputs/sweeps/ranks: 2 jobs to run, 0 finished already"
    submitted = re.fullmatch(r"submitted 2 jobs to SLURM: (\d+)_\[0-1\]", lines[1])
    assert submitted is not None, first.stdout
    assert f"cancel       scancel {submitted[1]}_[0-1]" in lines
    followed = sweep(tmp_path, overrides, slurm)
    assert (followed.returncode, followed.stderr) == (0, ""), followed.stdout + followed.stderr
    assert "submitted" not in followed.stdout
    folder = tmp_path / "outputs" / "sweeps" / "ranks"
    assert followed.stdout.splitlines()[-2:] == [
        "leaderboard  outputs/sweeps/ranks/leaderboard.md",
        "report       outputs/sweeps/ranks/report.html",
    ]
    jobs = read_sweep(folder).jobs.values()
    told = sorted(((job.overrides, job.status) for job in jobs), key=str)
    assert told == [(["lora.r=16"], Status.finished), (["lora.r=8"], Status.finished)]
    for job in jobs:
        assert (job.folder / "stdout.log").read_text().count("qlora 0.") == 1
        assert (job.folder / "stderr.log").read_text() == ""
    again = sweep(tmp_path, overrides, slurm)
    assert again.returncode == 0
    assert again.stdout.splitlines()[0] == "sweep outputs/sweeps/ranks: 0 jobs to run, 2 finished already"


@pytest.mark.full
def test_three_allocations_of_two_minutes_get_ahead_each_time(tmp_path: Path, slurm: dict[str, str]) -> None:
    overrides = ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=20"]
    overrides += [
        "hydra.launcher.max_num_timeout=2",
        "trainer.max_steps=100000",
        "trainer.save_steps=100000",
        "seed=0",
        "name=t",
    ]
    done = sweep(tmp_path, [*overrides, "trainer.gradient_accumulation_steps=1"], slurm)
    [job] = read_sweep(tmp_path / "outputs" / "sweeps" / "t").jobs.values()
    text = (job.folder / "stdout.log").read_text()
    told = done.stdout + done.stderr + (job.folder / "stderr.log").read_text()
    resumed = [int(step) for step in re.findall(r"resuming from checkpoint-(\d+)", text)]
    assert len(resumed) == 2, told + text[-2000:]
    last = max(int(path.name.rpartition("-")[2]) for path in (job.folder / "checkpoints").glob("checkpoint-*"))
    assert 0 < resumed[0] < resumed[1] < last, told
    assert done.returncode == 1, told
    assert "Traceback" not in told
    assert job.reason == (
        "timed out 3 times after hydra.launcher.timeout_min=2 minutes, which hydra.launcher.max_num_timeout=2 allows"
    ), told
