"""Each task that needs no network makes no connection, as the system sees it: what strace writes of one process that
runs them one after another, and of all that it starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from promises import QUICK, ROOT

TASKS = """
import sys
from qlora import cli

def run(*words):
    print("TASK", *words, flush=True)
    sys.argv = ["qlora", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)

quick = sys.argv[1:]
trained = ["adapter=trained", *quick]
run("task=doctor", "hydra.run.dir=doctor", *quick)
run("task=plan", "plan.device=a6000", "hydra.run.dir=plan", *quick)
run("task=preview", "hydra.run.dir=preview", *quick)
run("hydra.run.dir=trained", *quick)
run("task=evaluate", "hydra.run.dir=evaluated", *trained)
run("task=predict", "hydra.run.dir=predicted", *trained)
run("task=merge", "hydra.run.dir=merged", *trained)
run("task=chat", "hydra.run.dir=chat", *trained)
run("task=replay", "run=trained", "hydra.run.dir=again")
run("task=report", "runs=trained", "hydra.run.dir=report")
run("task=migrate", "from=original.sh", "hydra.run.dir=moved")
run("task=wandb-sweep", "lora.r=4,8", "hydra.sweep.dir=described")
run("-m", "seed=0,1", "hydra/launcher=basic", "hydra.sweep.dir=sweep", "task=plan", "plan.device=a6000")
"""
REMOTE = re.compile(r"AF_INET6?\b")


@pytest.fixture(scope="module")
def strace() -> str:
    """The tracer, which a container may lack or forbid."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    if subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-e", "trace=network", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("processes may not be traced here")
    return "strace"


@pytest.mark.full
@pytest.mark.slow
def test_no_task_makes_a_connection(strace: str, tmp_path: Path) -> None:
    (tmp_path / "original.sh").write_text("python qlora.py --model_name_or_path huggyllama/llama-7b --lora_r 8\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT}/qlora/plugins", "HF_HOME": str(tmp_path / "hf")}
    overrides = [word for word in QUICK if not word.startswith("trainer.save_steps")]
    done = subprocess.run(
        [
            strace,
            "-f",
            "--seccomp-bpf",
            "-e",
            "trace=network",
            "-o",
            "calls.txt",
            sys.executable,
            "-c",
            TASKS,
            *overrides,
        ],
        cwd=tmp_path,
        env=environment,
        input="/exit\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("TASK ") == TASKS.count("\nrun(")
    calls = (tmp_path / "calls.txt").read_text(errors="replace").splitlines()
    assert any("exited with 0" in line for line in calls), "strace wrote what it saw"
    sent = [line for line in calls if REMOTE.search(line) and re.search(r"\b(connect|sendto|sendmsg|sendmmsg)\(", line)]
    assert not sent, sent[:5]
