"""A job's identity, its files, and what they tell after every kind of end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.config.compose import compose
from qlora.config.saved_config import config_to_dict
from qlora.errors import Pruned, UserError
from qlora.runtime.folder_lock import is_locked, locked
from qlora.sweep.jobs import Status, identity, job_folder, read_job, recorded, slug, write_status


def config(*overrides: str) -> dict[str, object]:
    return config_to_dict(compose(overrides))


@pytest.mark.full
def test_a_config_has_one_identity_however_it_is_written() -> None:
    assert identity(config()) == identity(config("lora.r=32", "seed=0", "model=tiny"))
    assert identity(config("trainer.learning_rate=1e-4")) == identity(config("trainer.learning_rate=0.0001"))
    assert identity(config()) == identity(config("tracking=wandb", "name=other", "data.num_proc=3"))
    others = ("lora.r=8", "seed=1", "quantization=fp4", "task=evaluate", "data.max_length=9", "evaluation=loss")
    assert len({identity(config()), *(identity(config(other)) for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["lora.r=8", "seed=1"], "lora.r=8,seed=1"),
        (["lora.target_modules=[q_proj,k_proj]"], "lora.target_modules=-q_proj-k_proj"),
        (["data.path='/a b/c.jsonl'"], "data.path=-a-b-c.jsonl"),
        ([], "job"),
        (["name=" + "x" * 200], "name=" + "x" * 75),
    ],
)
def test_folders_are_readable_and_safe(overrides: list[str], name: str) -> None:
    assert slug(overrides) == name


def test_a_job_keeps_its_folder_when_the_grid_grows(tmp_path: Path) -> None:
    first = job_folder(tmp_path, ["lora.r=8"], config("lora.r=8"))
    first.mkdir()
    assert job_folder(tmp_path, ["lora.r=8", "seed=0"], config("lora.r=8", "seed=0")) == first
    assert job_folder(tmp_path, ["lora.r=8", "seed=1"], config("lora.r=8", "seed=1")) != first


def test_a_finished_job_records_its_result(tmp_path: Path) -> None:
    with recorded(tmp_path, ["lora.r=8"], "result.json"):
        (tmp_path / "result.json").write_text(json.dumps({"objective": 0.5, "metrics": {"eval_loss": 0.5}}))
        assert read_job(tmp_path).status is Status.running
    job = read_job(tmp_path)
    assert (job.status, job.objective, job.overrides) == (Status.finished, 0.5, ["lora.r=8"])
    assert job.seconds is not None
    assert not is_locked(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("bad\n  thing"), Status.failed, "ValueError: bad thing"),
        (UserError("lora.r must be positive"), Status.failed, "lora.r must be positive"),
        (SystemExit(0), Status.failed, "SystemExit: 0"),
        (MemoryError(), Status.failed, "MemoryError()"),
        (Pruned("eval_loss 2.1 at step 50 of 200"), Status.pruned, "eval_loss 2.1 at step 50 of 200"),
        (KeyboardInterrupt(), Status.interrupted, "interrupted"),
    ],
)
def test_an_error_is_recorded_and_raised_again(
    tmp_path: Path, error: BaseException, status: Status, reason: str
) -> None:
    with pytest.raises(type(error)), recorded(tmp_path, [], "result.json"):
        raise error
    assert (read_job(tmp_path).status, read_job(tmp_path).reason) == (status, reason)


def test_the_varied_overrides_that_a_sweep_told_stay(tmp_path: Path) -> None:
    write_status(tmp_path, Status.queued, overrides=["lora.r=8"])
    with recorded(tmp_path, ["lora.r=8", "data.max_train_samples=64"], "result.json"):
        pass
    assert read_job(tmp_path).overrides == ["lora.r=8"]


HOLD = """
import sys, time
from pathlib import Path
from qlora.sweep.jobs import recorded
with recorded(Path(sys.argv[1]), ["seed=1"], "result.json"):
    print("running", flush=True)
    time.sleep(60)
"""


def test_a_killed_job_is_not_running_and_its_folder_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        assert read_job(tmp_path).status is Status.running
        with pytest.raises(UserError, match="is in use by another process; wait until it has ended"):
            locked(tmp_path, f"{tmp_path} is in use by another process").__enter__()
        process.send_signal(signal.SIGKILL)
    job = read_job(tmp_path)
    assert (job.status, job.reason) == (Status.interrupted, "its process is gone")
    with locked(tmp_path, "free"):
        pass


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    with locked(tmp_path, "taken"):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        assert is_locked(tmp_path)
    try:
        with locked(tmp_path, "free"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.full
def test_looking_at_a_lock_does_not_disturb_who_takes_it(tmp_path: Path) -> None:
    looking = subprocess.Popen([sys.executable, "-c", (
        "import sys; from pathlib import Path; from qlora.runtime.folder_lock import is_locked\n"
        "print(flush=True)\nwhile True: is_locked(Path(sys.argv[1]))"
    ), str(tmp_path)], stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert looking.stdout is not None
        looking.stdout.readline()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with locked(tmp_path, "taken"):
                pass
    finally:
        looking.kill()
        looking.wait()
