"""Processes that tokenize: in order, the same as alone, and never a silent end or none."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from doubling import PARTS, Double

from qlora.errors import UserError
from qlora.runtime.workers import OPEN, run_parts

pytestmark = pytest.mark.cold

MANY = [(start, start + 10) for start in range(0, 20_000, 10)]
"""More than one process does before it hears of the others."""


@pytest.fixture
def task(tmp_path):
    (tmp_path / "notes").mkdir()
    return Double(tmp_path / "notes", os.getpid())


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run(task, work, parts=PARTS, processes=2):
    return [n for batch, counts in run_parts(task, parts, processes=processes, folder=work, label="data.path=x")
            for n in batch.column("number").to_pylist() if counts["rows"] == 10]  # fmt: skip


def alone(parts=PARTS):
    return [2 * n for n in range(parts[-1][1])]


def test_results_come_in_order_and_others_take_part_with_default_signals(task, work):
    task.slow_until = 2000  # 2 s: the others have their share, however busy the machine is
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert run(task, work, MANY, processes=3) == alone(MANY)
    finally:
        signal.signal(signal.SIGTERM, previous)
    others = [stop for start, stop, _ in task.done_by("other")]
    assert len(others) > 2
    assert {is_default for *_, is_default in task.done_by("other")} == {"True"}
    assert not list(work.iterdir())


def test_only_a_limited_number_of_results_wait_for_the_previous_one(task, work):
    results = run_parts(task, PARTS, processes=2, folder=work, label="data.path=x")
    next(results)
    time.sleep(0.5)
    assert len(task.done_by("first")) + len(task.done_by("other")) <= OPEN * 2 + 2
    results.close()
    assert not list(work.iterdir())


def test_a_killed_process_ends_the_work_in_one_sentence(task, work):
    results = run_parts(task, MANY, processes=2, folder=work, label="data.path=x")
    while len(task.done_by("other")) < 4:
        next(results)
    [pid] = children(os.getpid(), "spawn_main")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError) as caught:
        list(results)
    assert str(caught.value) == (
        "data.path=x: a process that tokenizes was killed (SIGKILL), probably because memory ran out; run again with "
        "data.num_proc=1, which needs the least memory"
    )
    assert not list(work.iterdir())


def test_what_no_process_can_do_is_the_error_of_one_process_alone(task, work, caplog):
    task.refuse_at = 350
    with pytest.raises(UserError, match=r"^row 351: is broken$"):
        run(task, work)
    assert not caplog.records
    assert not list(work.iterdir())


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fail_others": True}, "ValueError: not here"),
        ({"differ": True}, "it made different tokens from the same rows"),
    ],
    ids=["others fail", "others do something else"],
)
def test_what_only_others_get_wrong_is_done_by_one_process_and_said(task, work, caplog, changes, reason):
    vars(task).update(changes, slow_until=2000)  # 2 s: the other one has answered by then
    assert run(task, work, MANY) == alone(MANY)
    assert [record.getMessage() for record in caplog.records] == [
        "data.path=x: this process tokenizes the rest, because another one failed where this one succeeds "
        f"({reason}); data.num_proc=1 starts no others"
    ]


def test_a_task_that_cannot_be_sent_is_done_by_one_process_and_said(work, caplog):
    def double(part):
        return pa.record_batch({"number": [2 * n for n in range(*part)]}), Counter(rows=part[1] - part[0])

    assert run(double, work) == alone()
    assert "this process tokenizes the rest" in caplog.text


SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from doubling import PARTS, Double
from qlora.runtime.workers import run_parts
print("begun", flush=True)
folder = Path(sys.argv[1])
task = Double(folder / "notes", os.getpid())
parts = PARTS if len(sys.argv) < 3 else [(n, n + 1) for n in range(10**6)]
from qlora.data.cache import Cache
def write(work):
    for batch, _ in run_parts(task, parts, processes=3, folder=work, label="data.path=x"):
        (work / "half").touch()
Cache(folder / "cache").entry("key", write)
print("finished", flush=True)
"""


@pytest.fixture
def script(tmp_path):
    """A script of a user, which does not ask whether it is the main program."""
    (tmp_path / "notes").mkdir()
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    return path


@pytest.mark.full
def test_a_script_that_does_not_ask_for_its_name_runs_once(script, tmp_path):
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.returncode) == ("begun\nfinished\n", 0), done.stderr
    assert list(tmp_path.glob("notes/other-*"))


def children(pid, word):
    """Returns the children of a process whose command holds a word."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if word in Path(f"/proc/{child}/cmdline").read_text()]  # fmt: skip


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.matrix(1)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "while they start"),
        (signal.SIGINT, "while they start"),
        (signal.SIGTERM, "while they work"),
        (signal.SIGKILL, "while they work"),
    ],
)
def test_a_signal_ends_all_processes_soon(script, tmp_path, number, moment):
    process = subprocess.Popen(
        [sys.executable, script, tmp_path, "long"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    while len(workers := children(process.pid, "spawn_main")) < 2 and process.poll() is None:
        time.sleep(0.01)
    while moment == "while they work" and len(list(tmp_path.glob("notes/other-*"))) < 9 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it, to all of them
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert output == ""
    assert process.returncode == (128 + number if number is signal.SIGTERM else -number)
    assert errors.count("Traceback") == (number is signal.SIGINT), errors
    deadline = time.monotonic() + 20
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(lives, workers))
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(left) == (number is signal.SIGKILL)  # the next run removes it
    assert not (tmp_path / "cache" / "key").exists()


def test_a_process_that_tokenizes_needs_no_torch():
    code = "import sys, qlora.data.batching.token_store; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
