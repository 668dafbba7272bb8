"""Presets for clusters: what is asked of SLURM, by a stand-in for its commands; a missing engine is one sentence."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora.errors import ConfigError
from qlora.sweep.engines import check_engine


def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("hydra/launcher=ray needs the package hydra-ray-launcher; install "
                                                    "it with pip install 'qlora[ray]'")):  # fmt: skip
        check_engine(["seed=0,1", "hydra/launcher=ray"])
    check_engine(["hydra/launcher=basic"])


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs the extra slurm")
def test_slurm_gets_one_array_job_with_a_gpu_for_each(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    script = tmp_path / "script.sh"
    bodies = {"sbatch": f'cp "$1" {script}\necho "Submitted batch job 77"', "srun": "", "sacct": "", "scancel": ""}
    for name, body in bodies.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    # Nothing runs here, so that the command waits for its jobs until it is ended.
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora", "-m", "seed=0,1,2", "name=cluster", "hydra/launcher=slurm"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not script.exists() or not script.read_text().endswith("%j\n"):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.kill()
    process.communicate()
    wanted = script.read_text()
    for line in ("--array=0-2%3", "--gpus-per-node=1", "--cpus-per-task=8", "--time=1440", "--signal=USR2@120"):
        assert f"#SBATCH {line}" in wanted
    assert "outputs/sweeps/cluster/.submitit" in wanted
