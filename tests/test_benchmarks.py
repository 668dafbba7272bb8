"""The benchmarks run: small, and without what only they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_pipeline.py"


def test_the_data_benchmark_prints_a_table_and_writes_its_numbers(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    sizes = ["--rows", "60", "--chats", "10", "--only", "qlora,collator", "--json", str(numbers)]
    done = subprocess.run([sys.executable, str(SCRIPT), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| alpaca", "| chats"))]
    systems = ["qlora, cold", "qlora, second start", "tokenizing collator"]
    assert [row[1] for row in rows] == systems * 2
    results = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [result["rows"] for result in results] == [59, 59, 60, 9, 9, 10]  # qlora holds one row out
    assert all(result["first_batch"] <= result["whole_pass"] for result in results)
    assert all(500 < result["tokens"] / result["rows"] < 2000 for result in results if result["set"] == "chats")
