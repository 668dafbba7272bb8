"""SIGKILL at random moments of predict, evaluate, merge and report: started again, each ends as an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.sweep.jobs import recorded
from qlora.tasks import build_job, run_job
from tests.faults.runs import QUICK, Writes, check_whole, run
from tests.warm import IMPORTED

SHORT = ["generation.max_new_tokens=4", "generation.batch_size=1", "merge.prompts=2"]
MEASURED = (
    "eval_loss",
    "eval_exact_match",
    "base_eval_loss",
    "merge_kl_mean",
    "merge_top1_agreement",
    "report_finished",
)
"""Metrics that do not depend on what befell a task."""


def task_overrides(training: Path) -> dict[str, list[str]]:
    """Returns the overrides of each task, for a finished training run."""
    about = [*QUICK, *SHORT, f"adapter={training}"]
    return {
        "predict": ["task=predict", *about],
        "evaluate": ["task=evaluate", *about, "evaluation=exact-match", "evaluation.baseline=true"],
        "merge": ["task=merge", *about],
        "report": ["task=report", f"runs={training}"],
    }


def work(folder: Path, overrides: list[str], number: int) -> None:
    """Runs a task as the command line does; kills this process when its write of this number begins."""
    writes = Writes()
    writes.watch(folder, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    config = compose(overrides)
    with recorded(folder, [], f"{config.task.name.value}.json"):
        run_job(build_job(config, folder, overrides))
    (folder.parent / f"{folder.name}.writes").write_text(str(writes.count))


def start(folder: Path, overrides: list[str], number: int = -1) -> BaseProcess:
    """Starts a task in a process that a server forks, which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    process = context.Process(target=work, args=(folder, overrides, number))
    process.start()
    return process


def finish(folder: Path, overrides: list[str]) -> float:
    """Lets a task end, and returns the seconds that it took."""
    began = time.monotonic()
    process = start(folder, overrides)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def digests(folder: Path) -> dict[str, str]:
    """Returns the hashes of the files of a task, without times, folders and process ids."""
    kept = ("predictions.jsonl", "evaluate.jsonl", "leaderboard.csv", "merged/*.safetensors", "merged/config.json")
    paths = [path for pattern in kept for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def outcome(folder: Path, task: str) -> dict[str, Any]:
    metrics: Mapping[str, Any] = json.loads((folder / f"{task}.json").read_text())["metrics"]
    return {**{name: metrics[name] for name in MEASURED if name in metrics}, **digests(folder)}


def torment(tmp_path: Path, tasks: list[str], total: int) -> dict[str, int]:
    """Kills tasks in turn, at one of their writes or by the clock, and compares how they end."""
    draw, kills = random.Random(0), dict.fromkeys(tasks, 0)
    training = tmp_path / "training"
    run(training)
    initial = {path: path.read_bytes() for path in training.rglob("*") if path.is_file()}
    overrides = {task: all_overrides for task, all_overrides in task_overrides(training).items() if task in tasks}
    seconds = {task: finish(tmp_path / f"calm-{task}", overrides[task]) for task in tasks}
    calm = {task: outcome(tmp_path / f"calm-{task}", task) for task in tasks}
    writes = {task: int((tmp_path / f"calm-{task}.writes").read_text()) for task in tasks}
    while sum(kills.values()) < total:
        task = tasks[sum(kills.values()) % len(tasks)]
        folder = tmp_path / f"{task}-{kills[task]}"
        by_clock = draw.random() < 0.5
        process = start(folder, overrides[task], -1 if by_clock else draw.randint(1, writes[task]))
        process.join(draw.uniform(0, seconds[task]) if by_clock else None)
        process.kill()
        process.join()
        kills[task] += process.exitcode == -signal.SIGKILL
        check_whole(folder)
        finish(folder, overrides[task])
        assert outcome(folder, task) == calm[task]
        assert not [*folder.rglob(".*.tmp"), *folder.rglob("*.partial")]
    assert {path: path.read_bytes() for path in initial} == initial
    print(f"\n{total} kills ({', '.join(f'{count} of {task}' for task, count in kills.items())}): 0 losses")
    return kills


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_task_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    assert torment(tmp_path, ["predict", "report"], total=2) == {"predict": 1, "report": 1}


@pytest.mark.full
def test_twenty_kills_of_tasks_lose_nothing(tmp_path: Path) -> None:
    assert sum(torment(tmp_path, ["predict", "evaluate", "merge", "report"], total=20).values()) == 20
