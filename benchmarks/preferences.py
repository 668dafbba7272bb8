"""Times one training step of DPO beside TRL and Unsloth, on the same random weights and the same pairs.

    python benchmarks/preferences.py [--small] [--model llama-7b] [--contestants "fp8, memory free" ...] [--micro 8]
                                     [--memory 40GB] [--steps N] [--layers N] [--json FILE] [-- KEY=VALUE]

An optimizer step is 8 pairs: a prompt of 128 tokens with two answers of 384. Both answers count with their prompt,
8,192 tokens a step, whatever a contestant computes. Every contestant is a process of its own and trains as its users
do: NF4 with double quantization, LoRA r=64 on all linear layers without dropout, paged AdamW in 32 bits. qlora is
`python -m qlora`; the others are the `DPOTrainer` of TRL, with the model of transformers and the kernels of Liger, or
with the model of Unsloth. TRL reads log-probabilities from a fused output layer by itself; it has no padding-free pairs
in these versions, and the pairs have no padding. "keep" keeps all activations. Where the reference is cached, the time
that filled the cache is counted apart, as seconds for the pairs of one optimizer step. The first half of the steps
warms up.

`equal memory` is the peak of the fastest of the others in the same call, or `--memory`. `sft` are as many tokens,
finetuned: 16 rows of prompt and chosen answer. The peak is all that the GPU must hold, states of the optimizer
included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline import describe_machine, describe_versions
from rivals import load_model, set_up, time_training, trainer_options
from step import AGAIN, EVERY, FP8, KEEP, LIBRARIES, choose, is_mixture, run_apart, run_program, shape_of

PAIRS, PROMPT, ANSWER = 8, 128, 384
HELD_OUT = 8
WORDS = ["the", "stone", "owl", "of", "river", "bird", "and", "house"]
"""Each is one token."""
LEAN = ["lora.dtype=bf16"]
FREE = [*LEAN, "trainer.memory_budget=auto"]
COMPUTED = re.compile(r"of ([\d,]+) pairs are computed once, in ([\d.]+) s")
SAID = ("fast step", "prompts", "memory")
"""Lines of a run's screen that say how it trains."""


class Contestant(NamedTuple):
    """One way to train."""

    overrides: list[str]
    """What qlora's config says of it; rivals read it too."""
    package: str = "qlora"
    """What trains."""
    loss: str = "dpo"
    is_cached: bool = False
    """Whether the log-probabilities of the reference are computed before training."""
    is_equal: bool = False
    """Whether its budget is what a rival took."""


RIVALS = {
    f"{package}{', keep' if keeps else ''}{', cached reference' if cached else ''}": Contestant(
        KEEP if keeps else AGAIN, package, is_cached=cached
    )
    for package in ("trl", "unsloth")
    for cached in (False, True)
    for keeps in (False, True)
}
CONTESTANTS = RIVALS | {
    "bf16, equal memory": Contestant(LEAN, is_equal=True),
    "fp8, equal memory": Contestant([*FP8, *LEAN], is_equal=True),
    "bf16, equal memory, cached reference": Contestant(LEAN, is_cached=True, is_equal=True),
    "fp8, equal memory, cached reference": Contestant([*FP8, *LEAN], is_cached=True, is_equal=True),
    "bf16, memory free": Contestant(FREE),
    "fp8, memory free": Contestant([*FP8, *FREE]),
    "bf16, memory free, cached reference": Contestant(FREE, is_cached=True),
    "fp8, memory free, cached reference": Contestant([*FP8, *FREE], is_cached=True),
    "sft, bf16, memory free": Contestant(FREE, loss="sft"),
    "sft, fp8, memory free": Contestant([*FP8, *FREE], loss="sft"),
}
"""By name; the rivals first, whose memory others are given."""


def write_pairs(file: Path, count: int, shrink: int) -> None:
    """Writes pairs as text, of one token a word, one before the prompt and one after an answer.

    The answers of a pair differ from their first word on.
    """
    import numpy as np

    generator = np.random.default_rng(0)

    def text(count: int, first: int | None = None) -> str:
        indices = generator.integers(0, len(WORDS), count)
        if first is not None:
            indices[0] = first
        return " ".join(WORDS[index] for index in indices)

    rows = [
        {
            "prompt": text(PROMPT // shrink - 1),
            "chosen": f" {text(ANSWER // shrink - 1, 0)}",
            "rejected": f" {text(ANSWER // shrink - 1, 1)}",
        }
        for _ in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokens_a_step(shrink: int) -> int:
    """Returns the tokens of both answers of all pairs, with their prompts."""
    return PAIRS * 2 * (PROMPT + ANSWER) // shrink


def measure_ours(task: dict[str, Any]) -> dict[str, Any]:
    """Runs `python -m qlora`, and returns the speed of its last steps."""
    name, steps, shrink = task["name"], task["steps"], task["shrink"]
    loss, is_cached, rows = CONTESTANTS[name].loss, CONTESTANTS[name].is_cached, 1
    settings = [f"loss.cache_reference={str(is_cached).lower()}"]
    if loss == "sft":
        rows, settings = 2, []
    overrides = [
        *(f"loss={loss}", *settings, *EVERY, *task["overrides"], "data=local", f"data.path={task['file']}"),
        *("data.source_max_len=null", "data.target_max_len=null", f"data.max_length={(PROMPT + ANSWER) // shrink}"),
        *(f"data.eval_dataset_size={HELD_OUT}", f"trainer.max_steps={2 * steps}", f"trainer.logging_steps={steps}"),
        *("trainer.save_steps=1000000", "trainer.eval_steps=null", "task.evaluate=false", "task.predict=false"),
        *("evaluation=loss", "evaluation.baseline=false"),
        f"trainer.per_device_train_batch_size={rows * task['micro']}",
        f"trainer.gradient_accumulation_steps={PAIRS // task['micro']}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = run_program([*overrides, f"data.cache_dir={folder}/cache"], Path(folder) / "run")
    if "failure" in output:
        return output
    *_, first, last = output["logs"]
    counted = last["num_input_tokens_seen"] - first["num_input_tokens_seen"]
    assert counted == steps * tokens_a_step(shrink), f"{counted} tokens in {steps} steps"
    said = [line.strip() for line in output["said"].splitlines() if line.strip().startswith(SAID)]
    results = {
        "tokens_per_second": last["train_tokens_per_second"],
        "peak_gb": output["metrics"]["peak_memory_gb"],
        "said": said,
    }
    if is_cached:
        pairs, seconds = COMPUTED.findall(" ".join(output["said"].split()))[0]
        results["reference_seconds"] = float(seconds) / int(pairs.replace(",", "")) * PAIRS
    return results


def measure_rival(task: dict[str, Any]) -> dict[str, Any]:
    """Trains with `DPOTrainer` in this process, into which the package of the rival has been imported."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from qlora.config.compose import compose
    from qlora.quantization.placement import find_placement
    from qlora.runtime.device import find_device

    package, is_cached = CONTESTANTS[task["name"]].package, CONTESTANTS[task["name"]].is_cached
    steps, shrink = task["steps"], task["shrink"]
    config = compose([*EVERY, *task["overrides"]])
    placement = find_placement(config.quantization, find_device(config.device))
    on_gpu = placement.device.type == "cuda"
    model, peft = load_model(package, task["base"], config, placement)
    waited = 0.0

    class Trainer(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **named: Any) -> Any:
            nonlocal waited
            started = time.monotonic()
            rows = super()._precompute_ref_logps(*args, **named)
            if on_gpu:
                torch.cuda.synchronize()
            waited = time.monotonic() - started
            return rows

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(task["base"])
        begin = tokenizer.bos_token  # which it does not add by itself
        rows = load_dataset("json", data_files=task["file"], split="train", cache_dir=folder)
        rows = rows.map(lambda row: {"prompt": f"{begin} {row['prompt']}"})

        def build(callback: Any) -> Any:
            arguments = DPOConfig(
                **trainer_options(placement, folder, 2 * steps),
                per_device_train_batch_size=task["micro"],
                gradient_accumulation_steps=PAIRS // task["micro"],
                gradient_checkpointing=bool(config.trainer.gradient_checkpointing),
                max_length=(PROMPT + ANSWER) // shrink,
                precompute_ref_log_probs=is_cached,
                use_liger_kernel=package == "trl" and on_gpu and bool(find_spec("liger_kernel")),
                save_strategy="no",
            )
            trainer: Any = Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=peft,
                callbacks=[callback],
            )
            row = next(iter(trainer.train_dataset))
            counts = [len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
            if counts != [PROMPT // shrink, ANSWER // shrink, ANSWER // shrink]:
                sys.exit(f"the trainer reads {counts} tokens")
            return trainer

        results = time_training(build, placement.device, range(steps + 1, 2 * steps + 1))
        count = len(rows)
    results |= {"tokens_per_second": steps * tokens_a_step(shrink) / results.pop("seconds")}
    return results | ({"reference_seconds": waited / count * PAIRS} if is_cached else {})


def equal_memory(results: list[dict[str, Any]], requested: str | None) -> str | None:
    """Returns the memory that ours are given: what was asked for, else what the fastest rival took; None: unknown."""
    trained = [result for result in results if result["contestant"] in RIVALS and "tokens_per_second" in result]
    if requested or not trained:
        return requested
    return f"{max(trained, key=lambda result: result['tokens_per_second'])['peak_gb']:.2f}GB"


def to_table(results: list[dict[str, Any]]) -> str:
    """Returns a table of the measurements, in their order."""
    head = ["contestant", "rows a micro-batch", "tokens/s", "peak, GB", "first step, s", "reference apart, s a step"]
    lines = [head, ["---", *["---:"] * 5]]
    for result in results:
        if "failure" in result:
            numbers = [result["failure"], "", "", ""]
        else:
            seconds = [
                f"{result[name]:.{digits}f}" if name in result else ""
                for name, digits in (("first_step_seconds", 0), ("reference_seconds", 2))
            ]
            numbers = [f"{result['tokens_per_second']:,.0f}", f"{result['peak_gb']:.1f}", *seconds]
        budget = f" ({result['budget']})" if "budget" in result else ""
        lines.append([result["contestant"] + budget, str(result["micro"] * 2), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_all(arguments: argparse.Namespace, about: str) -> list[dict[str, Any]]:
    """Runs the contestants one after the other; writes the numbers after each: a machine may go away."""
    shape = shape_of(arguments, mixture=False)
    results: list[dict[str, Any]] = []
    requested = [name for name in CONTESTANTS if name in (arguments.contestants or CONTESTANTS)]
    names = choose(requested, CONTESTANTS)
    with tempfile.TemporaryDirectory() as folder:
        base, file, shrink = str(Path(folder) / "base"), Path(folder) / "pairs.jsonl", 16 if arguments.small else 1
        write_pairs(file, 2 * arguments.steps * PAIRS + HELD_OUT, shrink)
        saved: dict[str, Any] = {}
        if any(name in RIVALS for name in names):
            saved = run_apart({"do": "save", "base": base, "overrides": shape}, "rivals.py")
        common = {"steps": arguments.steps, "micro": arguments.micro, "shrink": shrink, "file": str(file), "base": base}
        for name in names:
            overrides, extra = [*shape, *CONTESTANTS[name].overrides], {}
            if CONTESTANTS[name].is_equal:
                if (budget := equal_memory(results, arguments.memory)) is None:
                    print(f"{name} left out: no rival was measured, and --memory is not given", file=sys.stderr)
                    continue
                overrides, extra = [*overrides, f"trainer.memory_budget={budget}"], {"budget": budget}
            task = {"name": name, "overrides": overrides, **common}
            if name not in RIVALS:
                numbers = measure_ours(task)
            else:
                numbers = saved if "failure" in saved else run_apart(task, "preferences.py")
            results.append({"contestant": name, "micro": arguments.micro, **extra, **numbers})
            print(results[-1], file=sys.stderr, flush=True)
            if arguments.json:
                text = json.dumps({"about": about, "model": arguments.model, "results": results}, indent=2)
                arguments.json.write_text(text, encoding="utf-8")
    return results


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a narrow model and short rows, for a try on a CPU")
    parser.add_argument("--model", default="llama-7b", help="a preset")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help="all by default")
    parser.add_argument("--micro", type=int, default=PAIRS, choices=[1, 2, 4, 8], help="pairs a micro-batch")
    parser.add_argument("--memory", help="the memory of those with equal memory, for example 40GB")
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after as many to warm up")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, where a disk or a GPU is small")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    if arguments.worker:
        task = json.loads(arguments.worker)
        set_up(CONTESTANTS[task["name"]].package, task["base"])
        print(json.dumps(measure_rival(task)))
        return
    if is_mixture([f"model={arguments.model}", *arguments.overrides]):
        parser.error(f"{arguments.model} is a mixture of experts, which the others do not load in 4 bits")
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions(*LIBRARIES)}"
    results = run_all(arguments, about)
    devices = {result["device"] for result in results if "device" in result}
    print("\n\n".join([", ".join([about, *sorted(devices)]), to_table(results)]))


if __name__ == "__main__":
    main()
