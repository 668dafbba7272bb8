"""Times large sweeps: until the first job starts, with all jobs finished, and what one more finished job costs.

    python benchmarks/sweep_scale.py [--grid 10000] [--finished 500] [--checkout FOLDER] [--json FILE]

No job trains: the first is ended as it starts, the finished ones are folders that this program writes. `--checkout`
takes the project's code from another folder, to measure two versions beside each other.
Where other work takes the cores, compare by "CPU", the busy seconds of the command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline import describe_machine, describe_versions

PATIENCE = 3600.0


def start(folder: Path, checkout: Path, *overrides: str) -> subprocess.Popen[str]:
    """Starts a sweep with the code of `checkout`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "qlora", "-m", "device=cpu", "hydra.launcher.n_jobs=1", "name=scale", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def axes(jobs: int) -> list[str]:
    """Returns the overrides of a grid of about that many jobs, half of whose keys are plain numbers of a group."""
    ranks = max(int(jobs**0.5), 1)
    return [f"lora.r=range(1,{ranks + 1})", f"seed=range(0,{jobs // ranks})"]


def until_first(checkout: Path, jobs: int) -> tuple[float, float]:
    """Returns the seconds until the first job of a grid starts, and those in which the command kept a core busy."""
    with tempfile.TemporaryDirectory() as name:
        began, busy = time.monotonic(), busy_seconds()
        process = start(Path(name), checkout, *axes(jobs))
        while not any(Path(name).glob("outputs/sweeps/scale/*/stdout.log")):
            if process.poll() is not None or time.monotonic() - began > PATIENCE:
                process.kill()
                sys.exit(process.communicate()[0])
            time.sleep(0.05)
        seconds = time.monotonic() - began
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return seconds, busy_seconds() - busy


def with_finished(checkout: Path, jobs: int) -> dict[str, tuple[float, float]]:
    """Returns the seconds, and the busy ones, of a command all of whose jobs are finished: first without a page."""
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child(checkout, "--write", name, "--finished", str(jobs))
        for title in ("the page is made", "asked again"):
            began, busy = time.monotonic(), busy_seconds()
            output, _ = (process := start(folder, checkout, *axes(jobs))).communicate(timeout=PATIENCE)
            if process.returncode != 0 or "0 jobs to run" not in output:
                sys.exit(output)
            rows[f"{jobs:,} jobs, all finished, {title}"] = time.monotonic() - began, busy_seconds() - busy
    return rows


def child(checkout: Path, *arguments: str) -> str:
    """Returns what a part of this program prints that uses the code of `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.run(
        [sys.executable, __file__, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def write_jobs(folder: Path, jobs: int) -> None:
    """Writes the folders of a grid's jobs as finished ones leave them, but for their weights."""
    from dataclasses import replace

    from qlora.config.compose import compose
    from qlora.config.saved_config import config_to_dict
    from qlora.sweep.jobs import job_folder

    base = compose()
    ranks, seeds = max(int(jobs**0.5), 1), jobs // max(int(jobs**0.5), 1)
    for rank in range(1, ranks + 1):
        for seed in range(seeds):
            config = replace(base, seed=seed, lora=replace(base.lora, r=rank))
            job = job_folder(
                folder / "outputs/sweeps/scale", [f"lora.r={rank}", f"seed={seed}"], config_to_dict(config)
            )
            job.mkdir(parents=True)
            loss = 1 / rank + seed / 1000
            history = [{"step": step, "loss": loss + 1 / step, "eval_loss": loss} for step in range(1, 51)]
            record = {"overrides": [f"lora.r={rank}", f"seed={seed}"], "status": "finished", "reason": None,
                      "result": "result.json", "seconds": 60.0}  # fmt: skip
            result = {"objective": loss, "metrics": {"eval_loss": loss, "train_runtime": 50.0}}
            for file, content in {"status.json": record, "result.json": result, "history.json": history}.items():
                (job / file).write_text(json.dumps(content), encoding="utf-8")


def refresh(jobs: int, repeats: int = 20) -> float:
    """Returns the seconds in which the overview of that many finished jobs takes one more, without the page."""
    from qlora.sweep.jobs import read_job
    from qlora.sweep.sweep_folder import read_sweep

    with tempfile.TemporaryDirectory() as name:
        write_jobs(Path(name), jobs)
        sweep = read_sweep(Path(name) / "outputs/sweeps/scale", "eval_loss")
        sweep.write()
        job = next(iter(sweep.jobs.values()))
        busy = time.process_time()
        for number in range(repeats):
            changed = read_job(job.folder)
            changed.seconds = float(number)
            sweep.update(changed)
        return (time.process_time() - busy) / repeats


def busy_seconds() -> float:
    """Returns the seconds of all processes that have been started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=10_000, help="jobs of the grid that is to start")
    parser.add_argument("--finished", type=int, default=500, help="jobs of the sweep in which all are finished")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="the project's code")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--refresh", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_jobs(args.write, args.finished)
        return
    if args.refresh:
        print(refresh(args.refresh))
        return
    checkout = args.checkout.resolve()
    rows = {f"{args.grid:,} jobs, until the first starts": until_first(checkout, args.grid)}
    rows |= with_finished(checkout, args.finished)
    for jobs in (100, 1000, 5000):
        seconds = float(child(checkout, "--refresh", str(jobs)))
        rows[f"one more finished job of {jobs:,}, in sweep.json"] = seconds, seconds
    print(f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}\n")
    print("| | seconds | CPU, s |\n| --- | --- | --- |")
    for title, (seconds, busy) in rows.items():
        print(f"| {title} | {seconds:.3g} | {busy:.3g} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
