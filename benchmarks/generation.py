"""Times the decoding of answers with an adapter attached to a 4-bit base: by slots, by transformers' own loop, and by
Unsloth where it is installed.

    python benchmarks/generation.py [--model llama-7b] [--batches 1 16 64 256] [--prompts 128 2048] [--tokens 128]
                                    [--contestants slots transformers] [--rows 1000] [--small] [--json FILE]
                                    [-- KEY=VALUE]

Random weights in NF4 with double quantization, adapters of rank 64 on all linear layers (of a mixture of experts 16, on
its experts too), greedy; no token ends an answer. Each contestant is a process of its own and answers random prompts of
the same length twice; the second time counts. The first token, with the reading of prompts, is timed apart from the
steps that decode one token of each row. Unsloth loads the same weights from a checkpoint, which is written first.

`--rows` times `evaluation=exact-match` in place of that: the answers to as many held-out rows, each of `--tokens`
tokens, and their score, by a model that is loaded; compiling and capturing are counted the first time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_pipeline import describe_machine, describe_versions  # noqa: E402
from step import is_mixture, small_shape  # noqa: E402

EVERY = ["model.weights=random", "model.tokenizer=tiny", "lora.r=64", "lora.dropout=0", "data=demo", "recipe=none"]
ADAPTED_EXPERTS = ["lora.r=16", "lora.experts=all", "lora.expert_r=16"]
UNSLOTH = "unsloth"
CONTESTANTS = {
    "slots": ["generation.loop=slots", "generation.weights=16bit"],
    "slots, 4 bits": ["generation.loop=slots", "generation.weights=4bit"],
    "transformers": ["generation.loop=transformers"],
    UNSLOTH: [],
}
Answer = Callable[[list[list[int]], int], dict[str, Any]]
"""Answers prompts with a number of tokens, and returns what `measure` collects."""


def measure(
    overrides: list[str], batches: list[int], prompts: list[int], tokens: int, base: str | None = None
) -> list[dict[str, Any]]:
    """Answers batches of prompts in this process; returns the times and the memory of each batch size and length.

    With `base`, Unsloth answers with the checkpoint in that folder.
    """
    import numpy as np
    import torch

    from qlora.config.compose import compose
    from qlora.evaluation.measure import evaluation_mode
    from qlora.quantization.placement import find_placement
    from qlora.runtime.device import device_name, find_device, peak_memory_gb, reset_peak_memory

    config = compose([*EVERY, *overrides, f"generation.max_new_tokens={tokens}", f"generation.min_new_tokens={tokens}"])
    device = find_device(config.device)
    vocabulary = config.model.architecture.vocab_size if config.model.architecture else 1600
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if base is None:
            model, answer = load(config, folder)
        else:
            model, answer = load_unsloth(
                base, config, find_placement(config.quantization, device), max(prompts) + tokens
            )
        with evaluation_mode(model):
            for length in prompts:
                for size in batches:
                    asked = np.random.default_rng(size).integers(3, vocabulary, (size, length)).tolist()
                    reset_peak_memory(device)
                    try:
                        measured = answer(asked, tokens)
                    except torch.OutOfMemoryError:
                        measured = {"failure": "does not fit"}
                    memory = {"peak_gb": peak_memory_gb(device), "device": device_name(device)}
                    results.append({"batch": size, "prompt": length, **measured, **memory})
                    print(results[-1], file=sys.stderr, flush=True)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return results


def measure_rows(overrides: list[str], rows: int, tokens: int) -> dict[str, Any]:
    """Measures the exact match of held-out rows in this process, twice; returns the seconds of both."""
    from qlora.config.compose import compose
    from qlora.run import Run
    from qlora.runtime.device import device_name, peak_memory_gb

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        texts = (
            {"instruction": f"count the stones of tower {index}", "output": f"{index} stones"}
            for index in range(2 * rows)
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        length = [f"generation.max_new_tokens={tokens}", f"generation.min_new_tokens={tokens}"]
        data = ["data=local", f"data.path={file}", f"data.eval_dataset_size={rows}", f"data.cache_dir={folder}/cache"]
        session = Run(compose([*EVERY, *data, "evaluation=exact-match", *overrides, *length]), folder).session
        model, seconds = session.add_adapter(session.load_base()), []
        device = session.placement.device
        for _ in range(2):
            started = _seconds(device)
            answered = session.measurer.predict(model, None)
            assert session.measurer.score(answered).metrics["exact_match"] <= 1
            assert [record["answer_tokens"] for record in answered] == [tokens] * rows
            seconds.append(_seconds(device) - started)
    return {"first_seconds": seconds[0], "again_seconds": seconds[1], "peak_gb": peak_memory_gb(device),
            "device": device_name(device)}  # fmt: skip


def load(config: Any, folder: str) -> tuple[Any, Answer]:
    """Returns the model of a config, and what answers with it."""
    from qlora.evaluation.measure import evaluation_mode
    from qlora.generation.answering import Slots
    from qlora.run import Run

    session = Run(config, folder).session
    model = session.add_adapter(session.load_base())
    placement = session.placement
    slots = Slots(config.generation, placement.device, placement.compute_dtype, placement.autocast)
    with evaluation_mode(model):
        reason = slots.unsupported_reason(model)
    if reason is None:
        return model, lambda prompts, tokens: answer_by_slots(slots, model, prompts, tokens)
    return model, lambda prompts, tokens: answer_by_loop(slots, model, prompts, tokens)


def load_unsloth(base: str, config: Any, placement: Any, length: int) -> tuple[Any, Answer]:
    """Returns the saved base with an adapter as Unsloth answers with it."""
    from rivals import load_model
    from unsloth import FastLanguageModel

    from qlora.generation.answering import Slots

    model, _ = load_model(UNSLOTH, base, config, placement, max_seq_length=length)
    FastLanguageModel.for_inference(model)
    slots = Slots(config.generation, placement.device, placement.compute_dtype, placement.autocast)
    return model, lambda prompts, tokens: answer_by_loop(slots, model, prompts, tokens)


def _seconds(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def answer_by_slots(slots: Any, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Returns the seconds to the first token, and the tokens a second of the steps after it."""
    import torch

    from qlora.errors import ResourceError
    from qlora.generation.engine import Engine
    from qlora.generation.sampling import Sampler

    length = len(prompts[0]) + tokens
    slots = replace(slots, config=replace(slots.config, batch_size=len(prompts)))
    with slots.serving(model), torch.inference_mode(), slots.autocast():
        try:
            fit = slots.fit_rows(model, length)
        except ResourceError:
            fit = 0
        if fit < len(prompts):
            return {"failure": f"{fit} rows fit"}
        engine = Engine(model, Sampler(slots.config, []), slots=len(prompts), length=length)
        for _ in range(2):
            for index, prompt in enumerate(prompts):
                engine.add(index, prompt)
            started = _seconds(slots.device)
            while engine.waiting:
                engine.step()
            first = _seconds(slots.device)
            while engine.is_busy:
                engine.step()
            ended = _seconds(slots.device)
    return {"first_token_seconds": first - started, "tokens_per_second": len(prompts) * (tokens - 1) / (ended - first)}


def answer_by_loop(slots: Any, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Returns the same with transformers' loop; the first token is timed by a loop of one."""
    import torch

    from qlora.evaluation.generation import build_settings, left_pad, own_settings_aside
    from qlora.upstream.transformers import generate

    inputs = left_pad(prompts, 0, slots.device)

    def run(count: int) -> float:
        settings = build_settings(slots.config, pad_token_id=0, end_ids=[])
        settings.max_new_tokens = settings.min_new_tokens = count
        started = _seconds(slots.device)
        with torch.inference_mode(), slots.autocast(), own_settings_aside(model):
            generate(model, inputs, generation_config=settings)
        return _seconds(slots.device) - started

    first, whole = [(run(1), run(tokens)) for _ in range(2)][1]
    return {"first_token_seconds": first, "tokens_per_second": len(prompts) * (tokens - 1) / (whole - first)}


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the measurements, in their order."""
    lines = [["contestant", "prompt", "batch", "tokens/s", "first token, s", "peak, GB"], ["---", *["---:"] * 5]]
    for result in results:
        about = [f"{result[name]}" if name in result else "" for name in ("prompt", "batch")]
        numbers = [result.get("failure", ""), "", ""]
        if "failure" not in result:
            speed, first = result["tokens_per_second"], result["first_token_seconds"]
            numbers = [f"{speed:,.0f}", f"{first:.3f}", f"{result['peak_gb']:.1f}"]
        lines.append([result["contestant"], *about, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_rows_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of what `measure_rows` returned."""
    lines = ["| contestant | the first time, s | again, s | peak, GB |", "| --- | ---: | ---: | ---: |"]
    for result in results:
        numbers = [result.get("failure", ""), "", ""]
        if "failure" not in result:
            numbers = [f"{result[name]:.1f}" for name in ("first_seconds", "again_seconds", "peak_gb")]
        lines.append(f"| {' | '.join([result['contestant'], *numbers])} |")
    return "\n".join(lines)


def run_apart(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Does a task in a process of its own; returns what it measured, or the end of what it said when it failed."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return [{"failure": said[-1] if said else "no message"}]
    output: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return output


def work(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Does a task in this process."""
    if task.pop("save", False):
        from rivals import save_base

        save_base(task["base"], task["overrides"])
        return []
    if "rows" in task:
        return [measure_rows(**task)]
    if "base" in task:
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(task["base"]).with_name("unsloth_compiled_cache"))
        import unsloth  # noqa: F401  (before all that it changes)
    return measure(**task)


def run_contestant(name: str, shape: list[str], sizes: dict[str, Any], base: str) -> list[dict[str, Any]]:
    """Returns what a contestant's process measured, or why it did not run."""
    overrides = [*shape, *CONTESTANTS[name]]
    if name != UNSLOTH:
        return run_apart({"overrides": overrides, **sizes})
    if find_spec(UNSLOTH) is None:
        return [{"failure": "not installed"}]
    failed = run_apart({"save": True, "base": base, "overrides": overrides})
    return failed or run_apart({"base": base, "overrides": overrides, **sizes})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a preset")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048], help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--rows", type=int, help="time the exact match of as many rows instead")
    parser.add_argument("--small", action="store_true", help="a narrow model, for a try on a CPU")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(json.loads(arguments.worker))))
        return
    shape = [f"model={arguments.model}", *(small_shape(arguments.model) if arguments.small else [])]
    shape += [*(ADAPTED_EXPERTS if is_mixture(shape) else []), *arguments.overrides]
    sizes: dict[str, Any] = {"batches": arguments.batches, "prompts": arguments.prompts, "tokens": arguments.tokens}
    if arguments.rows:
        sizes = {"rows": arguments.rows, "tokens": arguments.tokens}
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions('peft', 'bitsandbytes')}"
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.contestants:
            if arguments.rows and name == UNSLOTH:
                continue
            measured = run_contestant(name, shape, sizes, str(Path(folder) / "base"))
            results += [{"contestant": name, **result} for result in measured]
            print(*measured, sep="\n", file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2), encoding="utf-8")
    devices = {result["device"] for result in results if "device" in result}
    table = to_rows_table(results) if arguments.rows else to_table(results)
    print("\n\n".join([", ".join([about, *sorted(devices)]), table]))


if __name__ == "__main__":
    main()
