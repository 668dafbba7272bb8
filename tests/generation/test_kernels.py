"""The kernels of a decode step compute as their twins."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def test_the_kernels_of_a_decode_step_compute_as_their_twins(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.generation.interpret"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) > 20
    assert {name: value for name, value in differences.items() if value > (4e-3 if "float16" in name else 1e-5)} == {}
