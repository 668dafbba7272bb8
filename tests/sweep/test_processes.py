"""Jobs in processes of their own: slots, every kind of end, interruptions, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.errors import UserError
from qlora.sweep.job_processes import Task, _die_with, build_slots, run_tasks, tail, visible_gpus
from qlora.sweep.jobs import Job, Status, read_job

BODY = """
import json, os, signal, sys, time
from pathlib import Path
from qlora.sweep.jobs import recorded
folder = Path(sys.argv[1])
with recorded(folder, [], "result.json"):
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))
    {what}
    (folder / "result.json").write_text(json.dumps({{"objective": 1.0, "metrics": {{}}}}))
"""
OK = "time.sleep(0.2)"


def task(folder: Path, what: str = OK) -> Task:
    return Task(Job(folder), [sys.executable, "-c", BODY.format(what=what), str(folder)], {"OWN": folder.name})


def run(tasks: list[Task], slots: list[dict[str, str]] | None = None) -> dict[str, Job]:
    ended: dict[str, Job] = {}
    waiting = iter(tasks)
    run_tasks(
        lambda: next(waiting, None),
        slots or [{}],
        on_start=lambda job: None,
        on_end=lambda job: ended.update({job.name: job}),
        on_wait=lambda jobs: None,
    )
    return ended


def test_every_kind_of_end_is_reported_and_the_others_continue(tmp_path: Path) -> None:
    ends = {
        "raises": "raise ValueError('no such thing')",
        "exits": "sys.exit(0)",
        "leaves": "os._exit(0)",
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "terminated": "os.kill(os.getpid(), signal.SIGTERM)",
        "memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytearray(2**30)",
        "stopped": "from qlora.sweep.jobs import *; write_status(folder, Status.interrupted); os._exit(75)",
        "fine": OK,
    }
    ended = run([task(tmp_path / name, what) for name, what in ends.items()], [{}, {}])
    reasons = {name: job.reason for name, job in ended.items() if job.status is Status.failed}
    assert reasons == {
        "raises": "ValueError: no such thing",
        "exits": "SystemExit: 0",
        "leaves": "ended with exit code 0 and without a result",
        "killed": "killed (SIGKILL): the system does so when memory runs out",
        "terminated": "killed (SIGTERM)",
        "memory": "MemoryError()",
    }
    assert ended["stopped"].status is Status.interrupted, "it resumes from its checkpoint"
    assert ended["fine"].status is Status.finished
    assert "ValueError: no such thing" in tail(tmp_path / "raises")[-1]


def test_a_process_that_dies_before_its_job_does_not_show_an_earlier_end(tmp_path: Path) -> None:
    assert run([task(tmp_path / "job", "raise ValueError('first')")])["job"].reason == "ValueError: first"
    broken = Task(Job(tmp_path / "job"), [sys.executable, "-c", "raise SystemExit(7)"], {})
    assert run([broken])["job"].reason == "ended with exit code 7 and without a result"


@pytest.mark.full
def test_there_are_as_many_jobs_at_a_time_as_slots_and_each_sees_its_own(tmp_path: Path) -> None:
    slots = [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    most = 0

    def count(jobs: list[Job]) -> None:
        nonlocal most
        most = max(most, len(jobs))

    waiting = iter([task(tmp_path / str(number), "time.sleep(0.5)") for number in range(5)])
    run_tasks(lambda: next(waiting, None), slots, on_start=lambda job: None, on_end=lambda job: None, on_wait=count)
    assert most == 2
    seen = [json.loads((tmp_path / str(number) / "environment.json").read_text()) for number in range(5)]
    assert {item["CUDA_VISIBLE_DEVICES"] for item in seen} == {"3", "5"}
    assert [item["OWN"] for item in seen] == ["0", "1", "2", "3", "4"]


@pytest.mark.full
def test_a_source_that_has_nothing_now_is_asked_again_after_an_end(tmp_path: Path) -> None:
    ended: list[str] = []

    def source() -> Task | None:
        number = len(ended)
        return task(tmp_path / str(number), "pass") if number < 3 and not (tmp_path / str(number)).exists() else None

    run_tasks(source, [{}, {}], on_start=lambda job: None, on_end=lambda job: ended.append(job.name),
              on_wait=lambda jobs: None)  # fmt: skip
    assert ended == ["0", "1", "2"]


SWEEP = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_processes import run, task
folder = Path(sys.argv[1])
print("ready", flush=True)
run([task(folder / str(number), "print(os.getpid(), flush=True); time.sleep(60)") for number in range(4)], [{{}}, {{}}])
"""


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("*/stdout.log") if path.read_text().strip()]


def wait_until(fact: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not fact():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.matrix(2)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed parent")
@pytest.mark.parametrize(
    ("number", "status", "ignored"),
    [
        (signal.SIGINT, Status.interrupted, False),
        (signal.SIGINT, Status.interrupted, True),
        (signal.SIGTERM, Status.interrupted, False),
        (signal.SIGKILL, Status.interrupted, False),
    ],
    ids=["Ctrl-C", "Ctrl-C, started in the background", "SIGTERM", "SIGKILL"],
)
def test_an_end_from_outside_leaves_no_process_and_a_resumable_sweep(
    tmp_path: Path, number: signal.Signals, status: Status, ignored: bool
) -> None:
    code = SWEEP.format(tests=str(Path(__file__).parent))
    start = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], preexec_fn=start, stderr=subprocess.PIPE)
    wait_until(lambda: len(pids(tmp_path)) == 2)
    running = pids(tmp_path)
    sweep.send_signal(signal.SIGTERM if ignored else number)
    sweep.communicate(timeout=40)
    wait_until(lambda: not any(lives(pid) for pid in running), 5)
    assert sweep.returncode != 0
    assert [read_job(tmp_path / name).status for name in "01"] == [status, status]
    assert not (tmp_path / "2").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed parent")
def test_a_job_whose_sweep_died_while_it_was_started_does_not_begin() -> None:
    command, gone = [sys.executable, "-c", "print('begun')"], 0
    job = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: _die_with(gone))
    assert job.communicate()[0] == b""
    assert job.returncode == -signal.SIGKILL


# Slots


def test_each_slot_has_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3, 5,GPU-a1")
    assert visible_gpus() == ["0", "3", "5", "GPU-a1"]
    visible = [slot["CUDA_VISIBLE_DEVICES"] for slot in build_slots(None, 1, on_cpu=False)]
    assert visible == ["0", "3", "5", "GPU-a1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in build_slots(None, 2, on_cpu=False)] == ["0,3", "5,GPU-a1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in build_slots(1, 3, on_cpu=False)] == ["0,3,5"]
    with pytest.raises(UserError, match=r"gpus_per_job=5, but 4 GPUs are visible here \(0, 3, 5, GPU-a1\); lower it"):
        build_slots(None, 5, on_cpu=False)


def test_without_gpus_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert build_slots(None, 1, on_cpu=False) == [{}]
    cores = len(os.sched_getaffinity(0))
    assert build_slots(2, 1, on_cpu=False) == [{"OMP_NUM_THREADS": str(max(cores // 2, 1))}] * 2
    with pytest.raises(UserError, match="gpus_per_job=2, but no GPU is visible here; leave it out"):
        build_slots(None, 2, on_cpu=False)


def test_on_the_cpu_no_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert build_slots(None, 1, on_cpu=True) == [{}]
