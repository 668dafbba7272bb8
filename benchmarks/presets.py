"""Times a decoder layer of dense presets, and sets the share of the matmul rate that it reaches beside LLaMA-7B's.

    python benchmarks/presets.py [--small] [--presets llama-3.1-8b ...] [--bf16] [--steps N] [--json FILE]
                                 [-- KEY=VALUE]

Each preset is trained as `step.py` trains `fp8` (or `bf16`) on `long`, with random weights and few layers: the first 2,
and those with some more, which are of the kinds that the preset has, in its proportions. What they take longer is the
time of these layers, without embedding and output layer. Floating-point operations are those of `train_mfu`: a product
of each weight forward and one backward, those of the adapters, and of attention what causal rows see. All presets are
measured in one process, LLaMA-7B first.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data_pipeline import describe_machine, describe_versions  # noqa: E402
from step import ALL, EVERY, FEWER, LIBRARIES, LONG, ROWS, architecture_of, few_layers, measure, narrow_shape  # noqa: E402

REFERENCE = "llama-7b"
PRESETS = (
    "llama-3.1-8b", "ministral-3-8b", "qwen2.5-7b", "qwen3-8b", "qwen3-4b", "gemma-2-9b", "gemma-3-12b", "gemma-4-31b",
    "gemma-4-e4b", "phi-4", "olmo-3-7b", "smollm3-3b", "granite-4.0-micro", "pythia-6.9b", "lfm2.5-1.2b-base",
    "qwen3.5-9b",
)  # fmt: skip
"""One for each dense architecture, and a smaller one of some; those that do not mix tokens by attention alone last."""
FIRST, FEWEST, MOST = 2, 4, 12
"""The layers of both measurements, and the least and the most that one of them has beside."""


def shape_of(preset: str, *, small: bool) -> list[str]:
    """Returns the overrides that make a preset's model with all its layers."""
    options = architecture_of(f"model={preset}").options
    fewer = [f"model.architecture.options.{name}={value}" for name, value in FEWER.items() if name in options]
    return [f"model={preset}", *(narrow_shape(preset) if small else []), *fewer]


def count_layers(order: Sequence[int]) -> int:
    """Returns how many layers the longer measurement has: those beside the first 2 are mixed as `order` is.

    `order` is the kind of each layer of the model.
    """
    fractions = {kind: count / len(order) for kind, count in Counter(order).items()}

    def distance(end: int) -> float:
        counts = Counter(order[FIRST:end])
        return sum(abs(counts[kind] / (end - FIRST) - part) for kind, part in fractions.items())

    ends = range(min(FIRST + FEWEST, len(order)), min(FIRST + MOST, len(order)) + 1)
    return min(ends, key=lambda end: (round(distance(end), 9), end))


def row_length(*, small: bool) -> int:
    """Returns the tokens of a row."""
    return LONG // 16 if small else LONG


@functools.cache
def plan_of(length: int, *overrides: str) -> Any:
    """Returns the plan of a training run on rows of `length` tokens."""
    from qlora.config.compose import compose
    from qlora.planning.training_plan import build_plan

    return build_plan(compose([*EVERY, *overrides, f"plan.length={length}", "plan.device=h200"])).training


def operations(overrides: list[str], length: int) -> float:
    """Returns the floating-point operations of an optimizer step."""
    from qlora.planning.time_plan import operations_per_token

    training = plan_of(length, *overrides)
    return ROWS["long"] * length * operations_per_token(training.shape, training.setup)


def time_layers(shape: list[str], contestant: str, steps: int, *, small: bool) -> dict[str, Any]:
    """Returns the milliseconds and operations of an average layer of a model, in an optimizer step."""
    started = time.monotonic()
    length, micro = row_length(small=small), ALL[contestant].micro["long"]
    batch = [f"trainer.per_device_train_batch_size={micro}",
             f"trainer.gradient_accumulation_steps={ROWS['long'] // micro}"]  # fmt: skip
    last = count_layers(plan_of(length, *shape).shape.order)
    seconds, work, parts, peak, first = [], [], {}, 0.0, 0.0
    for count in (FIRST, last):
        shortened = [*shape, *few_layers(shape, count), *ALL[contestant].overrides, *batch]
        timed = measure("long", contestant, shortened, steps, profile=False, small=small)
        seconds.append(ROWS["long"] * length / timed["tokens_per_second"])
        work.append(operations(shortened, length))
        parts, peak, first = timed["parts"], timed["peak_gb"], first + timed["first_step_seconds"]
        device = timed["device"]
        free()
    layers = last - FIRST
    return {
        "layers": layers,
        "ms": 1e3 * (seconds[1] - seconds[0]) / layers,
        "tflop": (work[1] - work[0]) / layers / 1e12,
        "tflops": (work[1] - work[0]) / (seconds[1] - seconds[0]) / 1e12,
        "peak_gb": peak,
        "first_steps_seconds": first,
        "seconds": time.monotonic() - started,
        "parts": parts,
        "device": device,
    }


def free() -> None:
    """Frees what a model that is gone held on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the measurements, in their order."""
    head = ["preset", "layers", "ms a layer", "TFLOP a layer", "TFLOP/s", f"of {REFERENCE}'s", "off"]
    lines = [head, ["---", *["---:"] * 5, "---"]]
    reference = results[0].get("tflops")
    for result in results:
        if "failure" in result:
            lines.append([result["preset"], result["failure"], *[""] * 5])
            continue
        ratio = f"{result['tflops'] / reference:.0%}" if reference else ""
        off = ", ".join(name for name, state in result["parts"].items() if state != "on")
        numbers = [f"{result['ms']:.2f}", f"{result['tflop']:.3g}", f"{result['tflops']:,.0f}", ratio]
        lines.append([result["preset"], str(result["layers"]), *numbers, off])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow models and short rows, for a try on a CPU")
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="dense presets; LLaMA-7B is always one")
    parser.add_argument("--bf16", action="store_true", help="matmuls in 16 bits instead of 8")
    parser.add_argument("--steps", type=int, default=4, help="measured steps")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    small, presets = arguments.small, dict.fromkeys((REFERENCE, *arguments.presets))
    shapes = {name: [*shape_of(name, small=small), *arguments.overrides] for name in presets}
    length = row_length(small=small)
    if mixtures := [name for name, shape in shapes.items() if plan_of(length, *shape).shape.experts]:
        parser.error(f"{', '.join(mixtures)}: a mixture of experts is not dense; step.py times it")
    import torch

    contestant = "bf16" if arguments.bf16 else "fp8"
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions(*LIBRARIES)}, {contestant}"
    results: list[dict[str, Any]] = []
    for preset, shape in shapes.items():
        torch.compiler.reset()  # code of other models would be looked through in each call
        try:
            result = time_layers(shape, contestant, arguments.steps, small=small)
        except Exception as error:  # the others are measured all the same
            result = {"failure": " ".join(str(error).split())[:200] or type(error).__name__}
        free()
        results.append({"preset": preset, **result})
        print(results[-1], file=sys.stderr, flush=True)
        if arguments.json:  # after each: a machine may go away
            arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=2), encoding="utf-8")
    devices = {result["device"] for result in results if "device" in result}
    print("\n\n".join([", ".join([about, *sorted(devices)]), to_table(results)]))


if __name__ == "__main__":
    main()
