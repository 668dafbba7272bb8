"""Times the decoding of answers with an adapter attached to a 4-bit base: by slots, and by transformers' own loop.

    python benchmarks/generation.py [--model llama-7b] [--batches 1 16 64] [--prompt 128] [--tokens 128] [--small]
                                    [--contestants slots transformers] [--json FILE] [-- KEY=VALUE]

Random weights in NF4 with double quantization, adapters of rank 64 on all linear layers, greedy; no token ends an
answer. Each contestant is a process of its own and answers random prompts of the same length twice; the second time
counts. The first token, with the reading of prompts, is timed apart from the steps that decode one token of each row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_pipeline import describe_machine, describe_versions  # noqa: E402
from step import small_shape  # noqa: E402

EVERY = ["model.weights=random", "model.tokenizer=tiny", "lora.r=64", "lora.dropout=0", "data=demo", "recipe=none"]
CONTESTANTS = {
    "slots": ["generation.loop=slots", "generation.weights=16bit"],
    "slots, 4 bits": ["generation.loop=slots", "generation.weights=4bit"],
    "transformers": ["generation.loop=transformers"],
}


def measure(overrides: list[str], batches: list[int], prompt: int, tokens: int) -> list[dict[str, Any]]:
    """Answers batches of prompts in this process; returns the times and the memory of each batch size."""
    import numpy as np

    from qlora.config.compose import compose
    from qlora.evaluation.measure import evaluation_mode
    from qlora.generation.answering import Slots
    from qlora.run import Run
    from qlora.runtime.device import device_name, peak_memory_gb, reset_peak_memory

    config = compose([*EVERY, *overrides, f"generation.max_new_tokens={tokens}", f"generation.min_new_tokens={tokens}"])
    with tempfile.TemporaryDirectory() as folder:
        session = Run(config, folder).session
        model = session.add_adapter(session.load_base())
        placement, device = session.placement, session.placement.device
        vocabulary = config.model.architecture.vocab_size if config.model.architecture else 1600
        slots = Slots(config.generation, device, placement.compute_dtype, placement.autocast)
        results = []
        with evaluation_mode(model):
            reason = slots.unsupported_reason(model)
            for size in batches:
                prompts = np.random.default_rng(size).integers(3, vocabulary, (size, prompt)).tolist()
                answer = answer_by_transformers if reason is not None else answer_by_slots
                reset_peak_memory(device)
                timed = [answer(slots, model, prompts, tokens) for _ in range(2)][1]
                memory = {"peak_gb": peak_memory_gb(device), "device": device_name(device)}
                results.append({"batch": size, **timed, **memory})
    return results


def _seconds(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def answer_by_slots(slots: Any, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """Returns the seconds to the first token, and the tokens a second of the steps after it."""
    import torch

    from qlora.generation.engine import Engine
    from qlora.generation.sampling import Sampler

    engine = Engine(model, Sampler(slots.config, []), slots=len(prompts), length=len(prompts[0]) + tokens)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt)
    with slots.serving(model), torch.inference_mode(), slots.autocast():
        started = _seconds(slots.device)
        while engine.waiting:
            engine.step()
        first = _seconds(slots.device)
        while engine.is_busy:
            engine.step()
        ended = _seconds(slots.device)
    return {"first_token_seconds": first - started, "tokens_per_second": len(prompts) * (tokens - 1) / (ended - first)}


def answer_by_transformers(slots: Any, model: Any, prompts: list[list[int]], tokens: int) -> dict[str, float]:
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

    first = run(1)
    return {"first_token_seconds": first, "tokens_per_second": len(prompts) * (tokens - 1) / (run(tokens) - first)}


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the measurements, in their order."""
    lines = [["contestant", "batch", "tokens/s", "first token, s", "peak, GB"], ["---", *["---:"] * 4]]
    for result in results:
        numbers = (
            [result["failure"], "", "", ""]
            if "failure" in result
            else [
                f"{result['batch']}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['first_token_seconds']:.3f}",
                f"{result['peak_gb']:.1f}",
            ]
        )
        lines.append([result["contestant"], *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_apart(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures in a process of its own; returns what it measured, or the end of what it said when it failed."""
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return [{"failure": said[-1] if said else "no message"}]
    output: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return output


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a preset")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--small", action="store_true", help="a narrow model, for a try on a CPU")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    shape = [f"model={arguments.model}", *(small_shape(arguments.model) if arguments.small else [])]
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions('peft', 'bitsandbytes')}"
    results: list[dict[str, Any]] = []
    for name in arguments.contestants:
        overrides = [*shape, *CONTESTANTS[name], *arguments.overrides]
        sizes = {"batches": arguments.batches, "prompt": arguments.prompt, "tokens": arguments.tokens}
        results += [{"contestant": name, **result} for result in run_apart({"overrides": overrides, **sizes})]
        print(results[-1], file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2), encoding="utf-8")
    devices = {result["device"] for result in results if "device" in result}
    print("\n\n".join([", ".join([about, *sorted(devices)]), to_table(results)]))


if __name__ == "__main__":
    main()
