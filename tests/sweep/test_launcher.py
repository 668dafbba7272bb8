"""Whole sweeps of the embedded model from the command line: faults survived, finished jobs kept, kills survived."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora.sweep.jobs import Status, read_job
from tests.sweep.faults import SUFFER

KILLS = int(os.environ.get("QLORA_TEST_KILLS", "2"))
"""How often the long forms of the kill test kill a sweep."""

QUICK = [
    *("lora.r=4", "lora.dropout=0", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4"),
    *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
    *("trainer.logging_steps=1", "trainer.eval_steps=2", "data.max_eval_samples=8", "data.max_train_samples=64"),
    *("evaluation=loss", "evaluation.baseline=false", "task.predict=false"),
]

FAULTS = (
    SUFFER
    + '''
from transformers import TrainerCallback

class Fault(TrainerCallback):
    """Does to a job what FAULTS says for its seed."""
    def on_step_end(self, args, state, control, **kwargs):
        suffer(args.seed)
'''
)


def start(folder: Path, *args: str, **environment: str) -> subprocess.Popen[str]:
    extra = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qlora", "-m", *QUICK, *args]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | extra | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def sweep(folder: Path, *args: str, **environment: str) -> tuple[int, str, str]:
    process = start(folder, *args, **environment)
    output, errors = process.communicate(timeout=500)
    return process.returncode, output, errors


def overview(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "outputs" / "sweeps" / name / "sweep.json").read_text())


def by_status(folder: Path, name: str) -> dict[str, list[str]]:
    actual: dict[str, list[str]] = {}
    for job in overview(folder, name)["jobs"]:
        actual.setdefault(job["status"], []).append(job["job"].rpartition("-")[0])
    return actual


def starts(folder: Path, name: str) -> dict[str, int]:
    """How often each job began, from what it printed."""
    return {
        path.parent.name.rpartition("-")[0]: path.read_text().count("qlora 0.")
        for path in (folder / "outputs" / "sweeps" / name).glob("*/stdout.log")
    }


@pytest.mark.full
def test_four_faults_leave_the_others_and_are_run_again_alone(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    args = ["name=faults", "seed=range(0,6)", "callbacks.fault._target_=faults.Fault", "hydra.launcher.n_jobs=2"]
    args.append("trusted=[faults]")
    failures = {"0": "raise", "2": "exit", "3": "kill", "5": "memory"}
    code, output, errors = sweep(tmp_path, *args, FAULTS=json.dumps(failures))
    assert code == 1, output + errors
    actual = by_status(tmp_path, "faults")
    assert sorted(actual["failed"]) == ["seed=0", "seed=2", "seed=3", "seed=5"]
    assert len(actual["finished"]) == 2
    reasons = {job["overrides"][0]: job["reason"] for job in overview(tmp_path, "faults")["jobs"]}
    assert reasons["seed=0"] == "ValueError: a bad row"
    assert reasons["seed=2"] == "SystemExit: 0"
    assert reasons["seed=3"] == "killed (SIGKILL): the system does so when memory runs out"
    assert reasons["seed=5"] == "MemoryError()"
    assert "seed=0: failed, ValueError: a bad row" in output
    assert errors == (
        "error: 4 of 6 jobs failed: outputs/sweeps/faults/leaderboard.md says why; the same command runs them again "
        "and leaves the finished ones alone\n"
    )
    board = (tmp_path / "outputs/sweeps/faults/leaderboard.md").read_text()
    assert "ValueError: a bad row" in board
    previous = starts(tmp_path, "faults")
    code, output, errors = sweep(tmp_path, *args)
    assert code == 0, output + errors
    assert by_status(tmp_path, "faults").keys() == {"finished"}
    again = {job: count - previous[job] for job, count in starts(tmp_path, "faults").items()}
    assert {job for job, count in again.items() if count} == {"seed=0", "seed=2", "seed=3", "seed=5"}
    with (tmp_path / "outputs/sweeps/faults/leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["status"] for row in rows} == {"finished"}


@pytest.mark.full
def test_a_grown_grid_keeps_what_is_finished_and_another_config_is_refused(tmp_path: Path) -> None:
    assert sweep(tmp_path, "lora.alpha=8,16")[0] == 0
    first = starts(tmp_path, "lora.alpha")
    code, output, _ = sweep(tmp_path, "lora.alpha=16,8.0,32", "name=lora.alpha")
    assert code == 0
    assert "1 job to run, 2 finished already" in output
    assert starts(tmp_path, "lora.alpha") == {**first, "lora.alpha=32": 1}
    code, _, errors = sweep(tmp_path, "lora.alpha=8,16", "lora.r=8")
    assert code == 1
    assert "holds a sweep of another config; changed:\n  lora.r: 4 -> 8\nchoose another folder with name=NAME" in errors
    assert starts(tmp_path, "lora.alpha")["lora.alpha=8"] == 1


@pytest.mark.full
def test_a_second_sweep_in_the_folder_is_refused_and_ctrl_c_leaves_a_resumable_one(tmp_path: Path) -> None:
    args = ["seed=0,1", "name=two", "trainer.max_steps=400", "trainer.eval_steps=null", "trainer.save_steps=5"]
    first = start(tmp_path, *args)
    folder = tmp_path / "outputs" / "sweeps" / "two"
    end = time.monotonic() + 120
    while not list(folder.glob("*/checkpoints/checkpoint-*")):
        assert time.monotonic() < end
        time.sleep(0.1)
    code, _, errors = sweep(tmp_path, *args)
    assert (code, errors.strip().splitlines()[-1]) == (
        1, "error: another sweep runs in outputs/sweeps/two; wait until it has ended, or choose another folder"
    )  # fmt: skip
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 130, output + errors
    assert by_status(tmp_path, "two") == {"interrupted": ["seed=0"], "queued": ["seed=1"]}
    again = start(tmp_path, *args)
    stdout = next(folder.glob("seed=0-*/")) / "stdout.log"
    while "resuming from checkpoint-" not in stdout.read_text():
        assert again.poll() is None
        time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)


def family(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return [pid, *(item for child in children for item in family(child))]


def kill_family(pid: int) -> None:
    """Ends a process and all that it has started, as a machine that fails does: at one moment, without a warning."""
    for item in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(item, signal.SIGKILL)


def outcome(folder: Path, name: str) -> list[dict[str, str]]:
    """The lines of the leaderboard but for times and memory, in its order."""
    measured = ("seconds", "train_runtime", "train_tokens_per_second", "train_data_wait", "peak_memory_gb")
    with (folder / "outputs/sweeps" / name / "leaderboard.csv").open() as file:
        return [{key: row[key] for key in row if key not in measured} for row in csv.DictReader(file)]


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a sweep in /proc")
@pytest.mark.parametrize(
    ("slots", "count", "kills"),
    [
        pytest.param(2, 2, 1, marks=pytest.mark.slow, id="one kill"),
        pytest.param(2, KILLS, KILLS, marks=pytest.mark.full, id="grid"),
        pytest.param(1, KILLS, KILLS, marks=pytest.mark.full, id="search"),
    ],
)
def test_a_sweep_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    slots: int, count: int, kills: int, tmp_path: Path
) -> None:
    rate = "trainer.learning_rate=tag(log,interval(1e-4,1e-2))"
    search = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={count}", "hydra.sweeper.seed=0", rate]
    args = [
        *([f"seed=range(0,{count})"] if slots == 2 else search),
        *(f"hydra.launcher.n_jobs={slots}", "trainer.max_steps=60", "trainer.eval_steps=20", "trainer.save_steps=2"),
    ]
    # The first command of a test process is slow: it imports everything for those behind it.
    subprocess.run([sys.executable, "-m", "qlora", "--version"], check=True, capture_output=True)
    began = time.monotonic()
    assert sweep(tmp_path, *args, "name=calm")[0] == 0
    calm = time.monotonic() - began
    folder, draw = tmp_path / "outputs/sweeps/killed", random.Random(0)
    hit: list[int] = []
    began = time.monotonic()
    for _ in range(kills):
        process = start(tmp_path, *args, "name=killed")
        try:
            process.communicate(timeout=draw.uniform(0, 0.7) * calm * slots / count)  # soon, or late in a job
        except subprocess.TimeoutExpired:
            hit.append(sum(read_job(path.parent).status is Status.running for path in folder.glob("*/status.json")))
            kill_family(process.pid)
            process.communicate()
        else:
            assert process.returncode == 0, "it had no more to do"
    assert hit
    code, output, errors = sweep(tmp_path, *args, "name=killed")
    assert code == 0, output + errors
    logs = "".join(path.read_text() for path in folder.glob("*/stdout.log"))
    print(
        f"\n{len(hit)} kills: {sum(map(bool, hit))} while jobs ran, {sum(hit)} jobs cut off, "
        f"{logs.count('resuming from checkpoint-')} resumed from a checkpoint; {count} jobs, "
        f"{calm:.0f} s undisturbed, {time.monotonic() - began:.0f} s with the kills"
    )
    assert outcome(tmp_path, "killed") == outcome(tmp_path, "calm")
    assert {row["status"] for row in outcome(tmp_path, "calm")} == {"finished"}


@pytest.mark.full
def test_the_basic_launcher_keeps_the_same_files(tmp_path: Path) -> None:
    code, output, errors = sweep(tmp_path, "seed=0,1", "name=basic", "hydra/launcher=basic")
    assert code == 0, output + errors
    assert [job["status"] for job in overview(tmp_path, "basic")["jobs"]] == ["finished", "finished"]
    assert "eval_loss" in (tmp_path / "outputs/sweeps/basic/leaderboard.md").read_text()


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["lora.rr=4,8"], "unknown key 'lora.rr'"),
        (["lora.r=4,0"], "lora.r must be positive, got 0"),
        (["seed=0,1", "objective=eval_lss"], "objective='eval_lss' is not a metric of this run"),
        (["seed=0,1", "hydra.launcher.gpus_per_job=2"], "hydra.launcher.gpus_per_job=2, but no GPU is visible here"),
    ],
)
def test_a_mistake_ends_before_any_job(tmp_path: Path, args: list[str], sentence: str) -> None:
    code, _, errors = sweep(tmp_path, *args, CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert errors.strip().splitlines()[-1].startswith(f"error: {sentence}")
    assert not list(tmp_path.glob("outputs/sweeps/*/*/"))
