"""What `trainer.profile` records of the embedded model's training."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora.config.compose import compose
from qlora.run import Run
from qlora.training.profiling import table

QUICK = [
    "task.evaluate=false",
    "task.predict=false",
    "lora.r=4",
    "quantization=fp32",
    "trainer.per_device_train_batch_size=2",
    "trainer.lr_scheduler_kwargs={}",
    "trainer.lr_scheduler_type=constant",
    "trainer.warmup_steps=0",
    "data.max_eval_samples=4",
    "data.max_train_samples=32",
]


@pytest.mark.full
@pytest.mark.parametrize(("steps", "recorded"), [(8, ["4", "5"]), (4, ["2", "3"]), (1, ["0"])])
def test_a_profile_writes_a_trace_and_prints_the_most_expensive_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, recorded: list[str]
) -> None:
    printed: list[str] = []
    monkeypatch.setattr("qlora.training.profiling.say", lambda line="": printed.append(str(line)))
    # The measured rate is that of a device; any will do.
    monkeypatch.setattr("qlora.tasks.build_trainer.matrix_rate", lambda device, dtype: 1e9)
    result: dict[str, Any] = Run(
        compose([*QUICK, f"trainer.max_steps={steps}", "trainer.profile=true"]), tmp_path
    ).execute()
    trace = tmp_path / "profile" / "trace.json.gz"
    assert result["paths"]["profile"] == str(trace)
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert sorted(re.findall(r"ProfilerStep#(\d+)", " ".join(names))) == recorded
    head, *rows = [line for line in printed if line]
    assert head.split() == ["share", "ms", "in", "all", "calls", "operator"]
    assert len(rows) == 10
    assert any("aten::" in row for row in rows[:3])
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert result["metrics"]["train_mfu"] > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [name for name in ("MFU", "data wait", "model FLOP utilisation") if name not in page] == []


def test_a_table_names_the_ten_most_expensive_in_80_columns() -> None:
    rows = [(float(number), 10_000, f"kernel_{number}_" + "x" * 200) for number in range(1, 13)]
    head, *lines = table(rows, "kernel")
    assert head == "  share    ms in all    calls  kernel"
    assert len(lines) == 10
    assert lines[0].startswith("  15.4%        12.00   10,000  kernel_12_x")
    assert max(map(len, lines)) <= 80
