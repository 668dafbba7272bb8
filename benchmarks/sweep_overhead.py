"""Times a sweep beside a bare loop that runs the same jobs, one after another: what the launcher adds to each job.

    python benchmarks/sweep_overhead.py [--jobs 4] [--repeats 3] [--json FILE]

The jobs train the embedded model for a few steps. Loop and sweep take turns, each in a folder of its own.
Where other work takes the cores, compare by "CPU", the busy seconds of all processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline import describe_machine, describe_versions

QLORA = [sys.executable, "-m", "qlora"]
SHORT = [
    *("lora.r=4", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4", "trainer.eval_steps=null"),
    *("trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0"),
    *("data.max_eval_samples=8", "data.max_train_samples=64", "evaluation=loss", "evaluation.baseline=false"),
    *("task.predict=false", "device=cpu"),
]


def run(folder: Path, *overrides: str) -> None:
    """Runs one command to its end; one that fails ends the benchmark."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*QLORA, *overrides, *SHORT], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)


def loop(folder: Path, jobs: int) -> None:
    """Runs the jobs one by one."""
    for seed in range(jobs):
        run(folder, f"seed={seed}", f"name=job{seed}")


def sweep(folder: Path, jobs: int) -> None:
    """Runs the jobs as a sweep, one at a time."""
    run(folder, "-m", f"seed={','.join(map(str, range(jobs)))}", "hydra.launcher.n_jobs=1", "name=sweep")


def measure(work: Callable[[Path, int], None], jobs: int) -> tuple[float, float]:
    """Returns the seconds that pass, and those in which the processes of `work` keep a core busy."""
    with tempfile.TemporaryDirectory() as folder:
        began, busy = time.monotonic(), busy_seconds()
        work(Path(folder), jobs)
        return time.monotonic() - began, busy_seconds() - busy


def busy_seconds() -> float:
    """Returns the seconds of all processes that have been started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="jobs of the loop and of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is run; the medians count")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    args = parser.parse_args()
    if args.jobs < 2:
        parser.error("--jobs must be at least 2: a sweep varies something")
    turns = [(*measure(loop, args.jobs), *measure(sweep, args.jobs)) for _ in range(args.repeats)]
    names = ("loop", "loop_cpu", "sweep", "sweep_cpu")
    results = {name: statistics.median(times) for name, times in zip(names, zip(*turns, strict=True), strict=True)}
    results["overhead"] = (results["sweep"] - results["loop"]) / args.jobs
    results["overhead_cpu"] = (results["sweep_cpu"] - results["loop_cpu"]) / args.jobs
    print(f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}\n")
    print(f"| {args.jobs} jobs | loop | sweep | the launcher adds to a job |\n| --- | --- | --- | --- |")
    for title, more in (("seconds", ""), ("CPU, s", "_cpu")):
        print(
            f"| {title} | {results['loop' + more]:.1f} | {results['sweep' + more]:.1f} | "
            f"{results['overhead' + more]:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(results | {"jobs": args.jobs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
