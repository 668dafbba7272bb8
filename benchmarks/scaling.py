"""Measures how training runs and sweeps scale over the GPUs of one machine.

    python benchmarks/scaling.py [--parts weak ...] [--models llama-7b ...] [--modes bf16 ...] [--gpus 1 2 ...]
                                 [--json FILE] [--small] [-- KEY=VALUE]
    python benchmarks/scaling.py --table FILE [FILE ...]

Every measurement is the whole program, `python -m qlora`, started by torchrun where it has several processes: NF4 with
double quantization, LoRA r=64 on all linear layers without dropout, random weights, rows of 2,048 tokens.

`weak`: one GPU with 8 rows a step, and n GPUs with 8 rows each. `strong`: n GPUs with the same 8 rows, whose losses are
set beside those of one GPU. `rounding`: these rows on one GPU in smaller micro-batches, where only rounding differs.
`sharded`: a base of which each GPU holds a part. `sweep`: small jobs, on one GPU and on all.

What `--json FILE` holds already is not measured again. `--table` prints the tables of such files.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from data_pipeline import describe_machine, describe_versions  # noqa: E402

from qlora.sweep.job_processes import visible_gpus  # noqa: E402

PARTS = ("weak", "strong", "rounding", "sharded", "sweep")
ROWS, LENGTH, MICRO = 8, 2048, 4
WARM_UP, LOG = 5, 5
"""Steps that do not count, and steps between two logs."""
WORDS = ("the", "stone", "owl", "of", "river", "bird", "and", "house")
MODES = {
    "bf16": [],
    "fp8": ["quantization.compute=fp8"],
    "plain": ["trainer.compile=false", "trainer.fused_linear=false"],
    "bf16, not compiled": ["trainer.compile=false"],
}
EVERY = [
    *("model.weights=random", "model.tokenizer=tiny", "lora.r=64", "lora.dropout=0", "data=local", "data.format=text"),
    *("data.eval_dataset_size=1", "data.source_max_len=null", "data.target_max_len=null", "task.evaluate=false"),
    *("task.predict=false", "evaluation=loss", "evaluation.baseline=false", "trainer.group_by_length=false"),
    *("trainer.eval_steps=null", "trainer.save_steps=null", "trainer.num_train_epochs=null"),
]
SMALL = [
    *("model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=256", "device=cpu"),
    *("model.architecture.intermediate_size=512", "model.architecture.num_attention_heads=4"),
    *("model.architecture.num_key_value_heads=2", "model.architecture.vocab_size=2048", "lora.r=4"),
    *("quantization.compute_dtype=fp32", "trainer.optim=adamw_torch", "trainer.fused_linear=true"),
]
JOBS = [
    *("trainer.max_steps=20", "trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={}"),
    *("trainer.warmup_steps=0", "trainer.eval_steps=null", "data.max_eval_samples=32", "evaluation=loss"),
    *("evaluation.baseline=false", "task.predict=false"),
]
LIBRARIES = ("peft", "bitsandbytes")


@dataclass(frozen=True)
class Training:
    """A training to measure; what identifies it, too."""

    part: str
    model: str
    mode: str
    gpus: int
    rows: int
    """Rows an optimizer step, of all GPUs together."""
    micro: int

    def overrides(self) -> list[str]:
        """Returns what makes it different from the others."""
        sharded = self.part == "sharded"
        return [
            *(f"model={self.model}", *EVERY, *MODES[self.mode]),
            f"trainer.gradient_checkpointing={str(sharded).lower()}",
            *(["trainer.parallel=fsdp"] if sharded else []),
            f"trainer.per_device_train_batch_size={self.micro}",
            f"trainer.gradient_accumulation_steps={self.rows // (self.micro * self.gpus)}",
        ]


def planned_runs(arguments: argparse.Namespace) -> Iterator[Training]:
    """Yields the training runs of the chosen parts."""
    shapes = [(model, mode) for model in arguments.models for mode in arguments.modes]
    for model, mode in shapes:
        for gpus in arguments.gpus:
            if "weak" in arguments.parts:
                yield Training("weak", model, mode, gpus, ROWS * gpus, MICRO)
            if "strong" in arguments.parts and gpus > 1 and ROWS % gpus == 0:
                yield Training("strong", model, mode, gpus, ROWS, min(MICRO, ROWS // gpus))
        if "rounding" in arguments.parts:
            yield Training("rounding", model, mode, 1, ROWS, MICRO // 2)
    for mode in arguments.sharded_modes if "sharded" in arguments.parts else []:
        for gpus in (count for count in arguments.gpus if count > 1):
            yield Training("sharded", arguments.sharded_model, mode, gpus, MICRO * gpus, MICRO)


def write_rows(file: Path, count: int, length: int) -> None:
    """Writes rows of random words, longer than any limit, so that every row has exactly its tokens."""
    generator = np.random.default_rng(0)
    rows = (" ".join(WORDS[index] for index in generator.integers(0, len(WORDS), length)) for _ in range(count))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def run(command: list[str], environment: dict[str, str], folder: Path, limit: float) -> str | None:
    """Runs a command in a process group of its own; returns why it failed, if it did."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"longer than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return None
        output.seek(0)
        said = output.read()
    print(said[-6000:], file=sys.stderr, flush=True)
    errors = [line for line in said.splitlines() if "Error" in line or line.startswith("error")]
    return (errors or said.strip().splitlines() or ["no message"])[-1]


def measure_training(training: Training, arguments: argparse.Namespace, rows: Path, folder: Path) -> dict[str, Any]:
    """Runs a training run; returns its speed, memory and losses, or why it failed."""
    steps, length = arguments.warm_up + arguments.steps, LENGTH // (16 if arguments.small else 1)
    args = [
        *training.overrides(),
        *(SMALL if arguments.small else []),
        *(f"data.path={rows}", f"data.max_length={length}", f"trainer.max_steps={steps}"),
        *(f"trainer.logging_steps={LOG}", f"hydra.run.dir={folder / 'run'}"),
        *recording(folder / "records", arguments.warm_up),
        *arguments.overrides,
    ]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(training.gpus)]
    launcher = [sys.executable, *(many if training.gpus > 1 else [])]
    environment = {} if arguments.small else {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[: training.gpus])}
    started = time.time()
    if failure := run([*launcher, "-m", "qlora", *args], environment, folder, arguments.limit):
        return {"failure": failure}
    records = read_records(folder / "records")
    history = json.loads((folder / "run" / "history.json").read_text())
    seconds = max(record["seconds"] for record in records)
    return {
        "tokens_per_second": training.rows * length * arguments.steps / seconds,
        "peak_gb": [record["peak_gb"] for record in records],
        "first_step_seconds": max(record["first_step_seconds"] for record in records),
        "start_seconds": max(record["first_step_began"] for record in records) - started,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "devices": [record["device"] for record in records],
    }


def recording(folder: Path, warm_up: int) -> list[str]:
    """Returns the overrides that let a training run note its speed."""
    callback = "+callbacks.recorder"
    return ["trusted=[recorder]", f"{callback}._target_=recorder.Recorder", f"{callback}.folder={folder}",
            f"{callback}.warm_up={warm_up}"]  # fmt: skip


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Returns what the processes noted, by rank and start."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: (record["rank"], record["began"]))


def used_mib() -> list[int]:
    """Returns how much memory of each GPU is in use."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]


def measure_sweep(gpus: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs a sweep of small jobs, one a GPU at a time; returns its wall time and what became of the GPUs."""
    names = visible_gpus()[:gpus]
    args = [*JOBS, *recording(folder / "records", 1), f"hydra.launcher.n_jobs={gpus}", "name=scaling"]
    args += ["device=cpu", "trainer.max_steps=3", "data.max_train_samples=32"] if arguments.small else []
    previous = [] if arguments.small else used_mib()
    command = [sys.executable, "-m", "qlora", "-m", f"seed={','.join(map(str, range(arguments.jobs)))}", *args]
    environment = {} if arguments.small else {"CUDA_VISIBLE_DEVICES": ",".join(names)}
    started = time.monotonic()
    failure = run(command, environment, folder, arguments.limit)
    seconds = time.monotonic() - started
    if failure:
        return {"failure": failure}
    records = read_records(folder / "records")
    jobs = json.loads((folder / "outputs/sweeps/scaling/sweep.json").read_text())["jobs"]
    after = [] if arguments.small else used_mib()
    return {
        "seconds": seconds,
        "finished": sum(job["status"] == "finished" for job in jobs),
        "jobs_by_gpu": {str(name): sum(record["visible"] == name for record in records) for name in names},
        "shared_gpu": sum(overlap(records, name) for name in names),
        "memory_left_mib": [now - then for now, then in zip(after, previous, strict=True)],
        "devices": [record["device"] for record in records],
    }


def overlap(records: Sequence[dict[str, Any]], visible: str) -> int:
    """Returns how many jobs trained on a GPU while another one did."""
    local = sorted((record["began"], record["ended"]) for record in records if record["visible"] == visible)
    return sum(began < ended for (_, ended), (began, _) in itertools.pairwise(local))


def to_tables(results: list[dict[str, Any]]) -> str:
    """Returns a table of the training runs with whole bases, one of those with sharded bases, one of the sweeps."""
    tables = [
        data_table([result for result in results if result["part"] in ("weak", "strong", "rounding")]),
        sharded_table([result for result in results if result["part"] == "sharded"]),
        sweep_table([result for result in results if result["part"] == "sweep"]),
    ]
    return "\n\n".join(table for table in tables if table)


def data_table(results: list[dict[str, Any]]) -> str:
    """Returns the table of data-parallel training runs, each beside that of one GPU."""
    single = {(result["model"], result["mode"]): result for result in results
              if result["part"] == "weak" and result["gpus"] == 1 and "failure" not in result}  # fmt: skip
    head = ["model", "mode", "GPUs", "rows a step", "rows a micro-batch", "tokens/s", "of GPUs x one", "peak a GPU, GB"]
    lines = [[*head, "first step, s", "losses differ by"]]
    for result in results:
        known = [result["model"], result["mode"], result["gpus"], result["rows"], result["micro"]]
        one = single.get((result["model"], result["mode"]))
        if "failure" in result:
            lines.append([*known, result["failure"], "", "", "", ""])
            continue
        speed = result["tokens_per_second"]
        fraction = f"{speed / (result['gpus'] * one['tokens_per_second']):.3f}" if one else ""
        same = one is not None and result is not one and result["rows"] == one["rows"]
        difference = f"{loss_difference(one['losses'], result['losses']):.1e}" if one and same else ""
        peak = f"{max(result['peak_gb']):.1f}"
        lines.append([*known, f"{speed:,.0f}", fraction, peak, f"{result['first_step_seconds']:.0f}", difference])
    return to_table(lines, text=2)


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the largest difference of two training runs' logged losses, as a share of the loss."""
    return float(np.max(np.abs(np.array(other) / np.array(one) - 1)))


def sharded_table(results: list[dict[str, Any]]) -> str:
    """Returns the table of training runs with a sharded base."""
    lines = [["model", "mode", "GPUs", "rows a step", "tokens/s", "peak a GPU, GB", "first step, s", "until it, s"]]
    for result in results:
        known = [result["model"], result["mode"], result["gpus"], result["rows"]]
        if "failure" in result:
            lines.append([*known, result["failure"], "", "", ""])
            continue
        speed, peak = f"{result['tokens_per_second']:,.0f}", ", ".join(f"{peak:.1f}" for peak in result["peak_gb"])
        lines.append([*known, speed, peak, f"{result['first_step_seconds']:.0f}", f"{result['start_seconds']:.0f}"])
    return to_table(lines, text=2)


def sweep_table(results: list[dict[str, Any]]) -> str:
    """Returns the table of sweeps, each beside that of one GPU."""
    single = next((result["seconds"] for result in results if result["gpus"] == 1 and "failure" not in result), None)
    lines = [["jobs", "GPUs", "seconds", "times as fast", "jobs by GPU", "jobs that shared one", "memory left, MiB"]]
    for result in results:
        known = [result["jobs"], result["gpus"]]
        if "failure" in result:
            lines.append([*known, result["failure"], "", "", "", ""])
            continue
        faster = f"{single / result['seconds']:.2f}" if single else ""
        by_gpu = ", ".join(f"{name}: {count}" for name, count in result["jobs_by_gpu"].items())
        left = ", ".join(map(str, result["memory_left_mib"]))
        lines.append([*known, f"{result['seconds']:.0f}", faster, by_gpu, result["shared_gpu"], left])
    return to_table(lines, text=0)


def to_table(lines: list[list[Any]], *, text: int) -> str:
    """Returns lines, the first of them the head, as a table whose first `text` columns hold words; none: nothing."""
    if len(lines) == 1:
        return ""
    rule = [*(["---"] * text), *(["---:"] * (len(lines[0]) - text))]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [lines[0], rule, *lines[1:]])


class Results:
    """The measurements so far, also in a file."""

    def __init__(self, file: Path | None) -> None:
        """Reads what the file holds."""
        self.file, self.about = file, f"{datetime.date.today()}, {describe_machine()}, {describe_versions(*LIBRARIES)}"
        saved = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
        self.all: list[dict[str, Any]] = saved.get("results", [])
        self.about = saved.get("about", self.about)
        self._began = time.monotonic()

    def has(self, known: dict[str, Any]) -> bool:
        """Returns whether something is measured already."""
        return any(known.items() <= result.items() and "failure" not in result for result in self.all)

    def say(self, text: str) -> None:
        """Tells how it goes, with the seconds since the start."""
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", file=sys.stderr, flush=True)

    def add(self, known: dict[str, Any], measurement: dict[str, Any]) -> None:
        """Keeps a measurement, in place of one that failed."""
        self.all = [result for result in self.all if not known.items() <= result.items()] + [known | measurement]
        self.say(json.dumps(measurement))
        if self.file is not None:  # after each: a machine may go away
            self.file.write_text(json.dumps({"about": self.about, "results": self.all}, indent=2), encoding="utf-8")

    def __str__(self) -> str:
        """Returns date, machine and tables."""
        devices = [device for result in self.all for device in result.get("devices", [])]
        most = max((len(result["devices"]) for result in self.all if result["part"] != "sweep" and "devices" in result),
                   default=1)  # fmt: skip
        return f"{self.about}, up to {most} x {', '.join(sorted(set(devices)))}\n\n{to_tables(self.all)}"


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Measures the chosen parts, as far as they are not measured yet."""
    length = LENGTH // (16 if arguments.small else 1)
    with tempfile.TemporaryDirectory(prefix="qlora-scaling-") as name:
        folder = Path(name)
        count = ROWS * max(arguments.gpus) * (arguments.warm_up + arguments.steps) + 1
        write_rows(folder / "rows.jsonl", count, length)
        for number, training in enumerate(planned_runs(arguments)):
            known = dataclasses.asdict(training)
            if not results.has(known):
                results.say(str(training))
                results.add(known, measure_training(training, arguments, folder / "rows.jsonl", folder / str(number)))
        for gpus in sorted({1, max(arguments.gpus)}) if "sweep" in arguments.parts else []:
            known = {"part": "sweep", "jobs": arguments.jobs, "gpus": gpus}
            if not results.has(known):
                results.say(f"a sweep of {arguments.jobs} jobs on {gpus}")
                results.add(known, measure_sweep(gpus, arguments, folder / f"sweep{gpus}"))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow models in processes on the CPU: only that it runs")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--models", nargs="+", default=["llama-7b", "llama-3.1-8b"], help="presets, for whole bases")
    parser.add_argument("--modes", nargs="+", default=["bf16", "fp8"], choices=list(MODES), help="for whole bases")
    parser.add_argument("--sharded-model", default="llama-3.1-70b", help="a preset, for a sharded base")
    parser.add_argument("--sharded-modes", nargs="+", default=["bf16", "fp8", "plain"], choices=list(MODES))
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of GPUs; 1, 2, 4 ... all by default")
    parser.add_argument("--jobs", type=int, default=8, help="jobs of the sweep")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before them")
    parser.add_argument("--limit", type=float, default=400, help="most seconds of one measurement")
    parser.add_argument("--json", type=Path, help="a file for the numbers; what it holds is not measured again")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the tables of such files")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    results = Results(arguments.json)
    if arguments.table:
        for file in arguments.table:
            local = Results(file)
            results.all, results.about = [*results.all, *local.all], local.about
    else:
        there = 2 if arguments.small else len(visible_gpus())
        arguments.gpus = arguments.gpus or [1 << power for power in range(there.bit_length())]
        if max(arguments.gpus) > there:
            parser.error(f"--gpus {max(arguments.gpus)}: {there} are visible here")
        measure(arguments, results)
    print(results)


if __name__ == "__main__":
    main()
