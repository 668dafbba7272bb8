"""Times a sweep beside a bare loop that runs the same jobs, one after another: what the launcher adds to each job.

    python benchmarks/sweep_overhead.py [--jobs 4] [--repeats 3] [--json FILE]

The jobs train the embedded model for a few steps. Loop and sweep take turns, each in a folder of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline import describe_machine, describe_versions

QLORA = [sys.executable, "-m", "qlora"]
SHORT = [
    *("lora.r=4", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4", "trainer.eval_steps=null"),
    *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
    *("data.max_eval_samples=8", "data.max_train_samples=64", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false", "device=cpu"),
]


def run(folder: Path, *words: str) -> None:
    """Runs one command to its end; one that fails ends the benchmark."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*QLORA, *words, *SHORT], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)


def time_loop(jobs: int) -> float:
    """Returns the seconds of a loop over single runs."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        for seed in range(jobs):
            run(Path(folder), f"seed={seed}", f"name=job{seed}")
        return time.monotonic() - began


def time_sweep(jobs: int) -> float:
    """Returns the seconds of a sweep with one job at a time."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run(Path(folder), "-m", f"seed={','.join(map(str, range(jobs)))}", "hydra.launcher.n_jobs=1", "name=sweep")
        return time.monotonic() - began


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="jobs of the loop and of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run; the medians count")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    args = parser.parse_args()
    if args.jobs < 2:
        parser.error("--jobs must be at least 2: a sweep varies something")
    pairs = [(time_loop(args.jobs), time_sweep(args.jobs)) for _ in range(args.repeats)]
    loop, sweep = (statistics.median(times) for times in zip(*pairs, strict=True))
    overhead = (sweep - loop) / args.jobs
    print(f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}\n")
    print("| jobs | loop, s | sweep, s | the launcher adds to a job, s |\n| --- | --- | --- | --- |")
    print(f"| {args.jobs} | {loop:.1f} | {sweep:.1f} | {overhead:.2f} |")
    if args.json:
        result = {"jobs": args.jobs, "loop": loop, "sweep": sweep, "overhead": overhead, "pairs": pairs}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
