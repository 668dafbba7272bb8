"""Trains models of random weights for two steps each and compares the memory with what `task=plan` says.

    python benchmarks/memory.py [--small] [--models llama-7b ...] [--lengths 512 ...] [--json FILE] [-- KEY=VALUE]

Each training is a process of its own, of one row a micro-batch. Those that do not fit on the GPU by the plan are left
out. On a CPU (`--small`) what is measured is the whole process, so only that the benchmark runs is seen there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data_pipeline import describe_machine, describe_versions  # noqa: E402
from step import small_shape  # noqa: E402

MODELS, LENGTHS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b"), (512, 1024, 2048, 4096)
EVERY = [
    *("model.weights=random", "model.tokenizer=tiny", "data=local", "data.format=text", "data.eval_dataset_size=1"),
    *("data.source_max_len=null", "data.target_max_len=null", "task.evaluate=false", "task.predict=false"),
    *("trainer.max_steps=2", "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=2"),
    *("trainer.eval_steps=null", "trainer.save_steps=null", "evaluation=loss", "evaluation.baseline=false"),
]


def trainings(arguments: argparse.Namespace, rows: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yields what is varied, and the overrides of the training."""
    for model in arguments.models:
        small = small_shape(model) if arguments.small else []
        for length in arguments.lengths:
            for checkpointing in (True, False):
                overrides = [
                    *(f"model={model}", f"data.path={rows}", f"data.max_length={length}"),
                    f"model.architecture.max_position_embeddings={max(length, 2048)}",
                    f"trainer.gradient_checkpointing={str(checkpointing).lower()}",
                    *EVERY,
                    *small,
                    *arguments.overrides,
                ]
                yield {"model": model, "length": length, "checkpointing": checkpointing}, overrides


def planned(overrides: list[str], device: str) -> dict[str, Any]:
    """Returns the plan's numbers for a training run: 10^9 bytes, and whether the GPU holds it."""
    from qlora.config.compose import compose
    from qlora.tasks.plan import build_plan

    plan = build_plan(compose([*overrides, f"plan.device={device}"]))
    memory = plan.memory
    sizes = {"planned_gb": memory.peak / 1e9, "planned_paged_gb": memory.paged / 1e9}
    return {**sizes, "moment": memory.moment, "fits": plan.fits}


def measured(overrides: list[str], folder: Path, paged_gb: float) -> dict[str, Any]:
    """Trains in a process of its own; returns what torch held at most, or the end of what it said when it failed.

    The run counts `paged_gb` of optimizer states beside that.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "qlora", *overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"measured_gb": None, "seconds": seconds, "failure": said[-1] if said else "no message"}
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    if metrics["train_memory_retries"]:
        return {"measured_gb": None, "seconds": seconds, "failure": "out of memory, then trained by a leaner plan"}
    return {"measured_gb": metrics["peak_memory_gb"] - paged_gb, "seconds": seconds}


def write_rows(path: Path, max_length: int) -> Path:
    """Writes rows that are longer than any limit, so that every row has exactly its tokens."""
    row = json.dumps({"text": "the stone owl sings of rivers and towers " * max_length})
    path.write_text(f"{row}\n" * 8, encoding="utf-8")
    return path


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of what was planned and what was measured."""
    head = ["model", "tokens", "checkpointing", "planned, GB", "measured, GB", "planned / measured", "seconds"]
    lines = [head, ["---"] * len(head)]
    for result in results:
        measured_gb = result["measured_gb"]
        lines.append(
            [
                *(result["model"], f"{result['length']:,}", "all layers" if result["checkpointing"] else "none"),
                *(f"{result['planned_gb']:.2f}", result["failure"] if measured_gb is None else f"{measured_gb:.2f}"),
                *(
                    "–" if measured_gb is None else f"{result['planned_gb'] / measured_gb:.3f}",
                    f"{result['seconds']:.0f}",
                ),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_device() -> tuple[str, str]:
    """Returns the GPU and the name by which the plan knows it; a CPU plans for the largest card."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), "this"
    return "no GPU: the memory of the whole process", "h200"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one narrow layer, for a try on a CPU")
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a row")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    gpu, device = describe_device()
    about = f"{datetime.date.today()}, {describe_machine()}, {gpu}, {describe_versions()}"
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as name:
        rows = write_rows(Path(name) / "rows.jsonl", max(arguments.lengths))
        for number, (varied, overrides) in enumerate(trainings(arguments, rows)):
            plan = planned(overrides, device)
            if not plan["fits"]:
                print(f"{varied}: {plan['planned_gb']:.1f} GB do not fit", file=sys.stderr)
                continue
            kept = [word for word in overrides if not word.startswith("data.path=")]
            measurement = measured(
                overrides, Path(name) / f"run-{number}", plan["planned_paged_gb"] if device == "this" else 0
            )
            results.append({**varied, **plan, **measurement, "overrides": kept})
            print(f"{varied}: {plan['planned_gb']:.2f} GB, {measurement}", file=sys.stderr)
            if arguments.json:  # after each: a machine may go away
                text = json.dumps({"about": about, "gpu": device == "this", "results": results}, indent=2)
                arguments.json.write_text(text, encoding="utf-8")
    print("\n\n".join([about, to_table(results)]))


if __name__ == "__main__":
    main()
