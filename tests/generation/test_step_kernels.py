"""The kernels of a decode step compute as their twins."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_kernels_of_a_decode_step_compute_as_their_twins(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.generation.interpret"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert len(differences) > 20
    assert {name: value for name, value in differences.items() if value > (4e-3 if "float16" in name else 1e-5)} == {}


def test_models_decode_by_the_kernels_what_they_compute_themselves(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.generation.interpret_models"]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert all(result["apart"] < 1e-5 for result in results.values())
    # Of two layers: two norms and a gate each (gemma2: four norms; qwen3_moe, olmoe: two of heads), and the last norm.
    fused = {"llama": 7, "qwen2": 7, "gemma2": 11, "qwen3_moe": 9, "olmoe": 9, "granitemoe": 5, "gpt_oss": 5}
    assert {kind: result["fused"] for kind, result in results.items()} == fused
    assert [kind for kind, result in results.items() if not result["is_turned"]] == ["gpt_oss"]
