"""Times one training step of QLoRA in each mode, on the same random weights and the same tokens, side by side.

    python benchmarks/step.py [--small] [--model llama-7b] [--workloads long ...] [--contestants fp8 ...]
                              [--steps N] [--end-to-end] [--profile] [--json FILE] [-- KEY=VALUE]

`long` is 8 rows of 2,048 tokens an optimizer step. `guanaco` is rows of lengths as of chats (log-normal, 32 to 512
tokens): packs of 8,192 tokens, where a contestant packs, else 16 rows, grouped by length and padded to the longest.
Tokens are counted without padding. Every contestant is a process of its own: NF4 with double quantization, LoRA r=64 on
all linear layers without dropout, paged AdamW in 32 bits; the median of some steps after warm-up. `--end-to-end` runs
`python -m qlora` itself on a file of such rows, with loading, logging and saving, and takes its steps 6 to 20.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from data_pipeline import describe_machine, describe_versions  # noqa: E402

LONG, PACK, WARM_UP = 2048, 8192, 3
PLAIN = [f"trainer.{part}=false" for part in ("compile", "fused_linear", "fused_attention", "fused_loss")]
FP8 = ["quantization.compute=fp8"]
KEEP, AGAIN = (["trainer.gradient_checkpointing=false"], ["trainer.gradient_checkpointing=true"])
LEAN = ["lora.dtype=bf16", "trainer.memory_budget=7.3GB"]
MIDDLE = ["trainer.memory_budget=16GB"]
CONTESTANTS: dict[str, tuple[list[str], dict[str, int], bool]] = {
    # name: overrides, rows a micro-batch by workload, whether it packs
    "fp8": ([*FP8, *KEEP], {"long": 4, "guanaco": 1}, True),
    "bf16": (KEEP, {"long": 4, "guanaco": 1}, True),
    "fp8, 16 GB": ([*FP8, *MIDDLE], {"long": 4, "guanaco": 1}, True),
    "bf16, 16 GB": (MIDDLE, {"long": 4, "guanaco": 1}, True),
    "fp8, 7.3 GB": ([*FP8, *LEAN], {"long": 4, "guanaco": 1}, True),
    "bf16, 7.3 GB": (LEAN, {"long": 4, "guanaco": 1}, True),
    "plain": ([*PLAIN, *AGAIN], {"long": 4, "guanaco": 16}, False),
    "original": ([*PLAIN, *AGAIN], {"long": 1, "guanaco": 1}, False),
}
ROWS = {"long": 8, "guanaco": 16}
"""Rows an optimizer step, where they are not packed."""
SMALL = ["model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=256",
         "model.architecture.intermediate_size=512", "model.architecture.num_attention_heads=4",
         "model.architecture.num_key_value_heads=4", "model.architecture.vocab_size=2048"]  # fmt: skip
EVERY = ["model.weights=random", "model.tokenizer=tiny", "lora.r=64", "lora.dropout=0", "data=demo"]


def lengths(count: int) -> list[int]:
    """Returns tokens of rows as chats have them."""
    drawn = np.random.default_rng(0).lognormal(5.9, 0.6, count)
    return [int(each) for each in np.clip(drawn, 32, 512)]


def batches(workload: str, name: str, vocabulary: int, device: Any, shrink: int) -> Iterator[list[tuple[Any, int]]]:
    """Yields the micro-batches of optimizer steps without end, each with its count of tokens."""
    import torch

    from qlora.data.collate import Collator
    from qlora.data.packing import pack

    _, size, packs = CONTESTANTS[name]
    generator, collate = np.random.default_rng(1), Collator(0, width=PACK // shrink if packs else 0)
    drawn = [LONG // shrink] * 4096 if workload == "long" else [max(each // shrink, 2) for each in lengths(8192)]

    def row(count: int) -> dict[str, Any]:
        ids = generator.integers(3, vocabulary, count)
        return {"input_ids": ids, "labels": ids, "length": count}

    def to_device(rows: list[dict[str, Any]]) -> tuple[Any, int]:
        batch = {key: tensor.to(device) for key, tensor in collate(rows).items()}
        return batch, sum(each["length"] for each in rows)

    def joined(counts: list[int]) -> dict[str, Any]:
        parts = [row(count) for count in counts]
        joint = {key: np.concatenate([part[key] for part in parts]) for key in ("input_ids", "labels")}
        starts = np.cumsum([0, *counts[:-1]])
        joint["labels"] = joint["labels"].copy()
        joint["labels"][starts] = -100
        positions = np.concatenate([np.arange(count) for count in counts])
        return {**joint, "position_ids": positions, "length": sum(counts)}

    if workload == "long":
        collate = Collator(0)
    while True:
        if workload == "guanaco" and packs:
            for members in pack(np.array(drawn), PACK // shrink):
                yield [to_device([joined([drawn[index] for index in members])])]
        else:
            together, micro = ROWS[workload], size[workload]
            for first in range(0, len(drawn) - together + 1, together):
                chosen = sorted(drawn[first : first + together])
                yield [
                    to_device([row(count) for count in chosen[start : start + micro]])
                    for start in range(0, together, micro)
                ]
        torch.manual_seed(1)


def measure(
    workload: str, name: str, overrides: list[str], steps: int, *, profile: bool, small: bool
) -> dict[str, Any]:
    """Trains some steps in this process and returns their speed and memory."""
    import bitsandbytes
    import torch

    from qlora.compose import compose
    from qlora.models.device import device_name, peak_memory_gb, reset_peak_memory
    from qlora.models.fast import FastStep, Packs
    from qlora.run import Run
    from qlora.training.flat import flatten_groups

    shrink = 16 if small else 1
    config = compose([*EVERY, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, folder)
        started = time.monotonic()
        model = run.add_adapter(run.load_base()).train()
        loading = time.monotonic() - started
        device = run.placement.device
        if config.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        packed = workload == "guanaco" and CONTESTANTS[name][2]
        width = (PACK if packed else LONG) // shrink
        packs = Packs(PACK // shrink, 64, 512 // shrink) if packed else None
        step = FastStep(model, config.trainer, config.quantization, run.placement, packs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = bitsandbytes.optim.PagedAdamW32bit(trained, lr=1e-4)
        if step.is_active:
            flatten_groups(optimizer)
        if (budget := run._build_budget(step, longest=width)) is not None:
            plan = budget.choose()
            step.checkpointed, step.offloaded = plan.checkpointed, plan.offloaded
        reset_peak_memory(device)
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        source = batches(workload, name, config.model.architecture.vocab_size, device, shrink)

        def once() -> tuple[int, float]:
            micro = next(source)
            count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch, _ in micro)
            wait()
            started = time.perf_counter()
            for batch, _ in micro:
                with step, run.placement.autocast():
                    loss = model(**batch, num_items_in_batch=count).loss
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            for parameter in trained:
                parameter.grad = None
            wait()
            assert torch.isfinite(loss)
            return sum(tokens for _, tokens in micro), time.perf_counter() - started

        _, first = once()
        for _ in range(WARM_UP - 1):
            once()
        speeds = [tokens / seconds for tokens, seconds in (once() for _ in range(steps))]
        if profile:
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as record

            with record(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as trace:
                once()
            print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=40), file=sys.stderr)
        return {
            "tokens_per_second": statistics.median(speeds),
            "peak_gb": peak_memory_gb(device),
            "first_step_seconds": first,
            "loading_seconds": loading,
            "parts": step.parts,
            "checkpointed": step.checkpointed,
            "offloaded": step.offloaded,
            "device": device_name(device),
        }


def end_to_end(name: str, overrides: list[str], *, small: bool) -> dict[str, Any]:
    """Runs `python -m qlora` on a file of rows as of chats; returns the speed of its steps 6 to 20."""
    shrink = 16 if small else 1
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "rows.jsonl", Path(folder) / "run"
        words = ["the", "stone", "owl", "sings", "of", "rivers", "and", "towers"]
        rows = [" ".join(words[place % 8] for place in range(max(each // shrink, 2) - 1)) for each in lengths(2048)]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        packing = ["data.packing=true", f"data.pack_length={PACK // shrink}"] if CONTESTANTS[name][2] else []
        command = [
            *(sys.executable, "-m", "qlora", *EVERY, "data=local", f"data.path={file}", "data.format=text", *packing),
            *("data.max_length=1024", "trainer.max_steps=20", "trainer.logging_steps=1", "trainer.eval_steps=null"),
            *("trainer.save_steps=10", "task.evaluate=false", "task.predict=false"),
            *("evaluation=loss", "evaluation.baseline=false", *overrides, f"hydra.run.dir={run}"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return {"failure": (done.stderr or done.stdout).strip().splitlines()[-1]}
        history = json.loads((run / "history.json").read_text())
        speeds = [entry["train_tokens_per_second"] for entry in history if "train_tokens_per_second" in entry]
        metrics = json.loads((run / "result.json").read_text())["metrics"]
        return {"tokens_per_second": statistics.median(speeds[5:20]), "peak_gb": metrics["peak_memory_gb"]}


def run_apart(task: dict[str, Any]) -> dict[str, Any]:
    """Measures in a process of its own; returns its numbers, or the end of what it said when it failed."""
    command = [sys.executable, str(Path(__file__)), "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if task["profile"]:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"failure": said[-1] if said else "no message"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the measurements, in their order."""
    head = ["workload", "contestant", "tokens/s", "peak, GB", "first step, s"]
    lines = [head, ["---", "---", "---:", "---:", "---:"]]
    for result in results:
        numbers = (
            [result["failure"], "", ""]
            if "failure" in result
            else [
                f"{result['tokens_per_second']:,.0f}",
                f"{result['peak_gb']:.1f}",
                f"{result['first_step_seconds']:.0f}" if "first_step_seconds" in result else "",
            ]
        )
        lines.append([result["workload"], result["contestant"], *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a narrow model and short rows, for a try on a CPU")
    parser.add_argument("--model", default="llama-7b", help="a preset")
    parser.add_argument("--workloads", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--end-to-end", action="store_true", help="also the whole program, on guanaco")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions()}"
    shape = [f"model={arguments.model}", *(SMALL if arguments.small else []), *arguments.overrides]
    results: list[dict[str, Any]] = []
    for workload in arguments.workloads:
        for name in arguments.contestants:
            own, micro, packs = CONTESTANTS[name]
            parts = 1 if packs and workload == "guanaco" else ROWS[workload] // micro[workload]
            batch = [f"trainer.per_device_train_batch_size={micro[workload]}"]
            overrides = [*shape, *own, *batch, f"trainer.gradient_accumulation_steps={parts}"]
            task = {"workload": workload, "name": name, "overrides": overrides, "steps": arguments.steps}
            found = [(workload, run_apart({**task, "profile": arguments.profile, "small": arguments.small}))]
            if workload == "guanaco" and arguments.end_to_end:
                found.append(("guanaco, end to end", end_to_end(name, overrides, small=arguments.small)))
            for title, numbers in found:
                results.append({"workload": title, "contestant": name, **numbers})
                print(results[-1], file=sys.stderr, flush=True)
            if arguments.json:  # after each: a machine may go away
                text = json.dumps({"about": about, "model": arguments.model, "results": results}, indent=2)
                arguments.json.write_text(text, encoding="utf-8")
    devices = {result["device"] for result in results if "device" in result}
    print("\n\n".join([", ".join([about, *sorted(devices)]), to_table(results)]))


if __name__ == "__main__":
    main()
