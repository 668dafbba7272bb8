"""Times one training step of QLoRA in each mode, on the same random weights and the same tokens, side by side.

    python benchmarks/step.py [--small] [--model llama-7b] [--workloads long ...] [--contestants fp8 ...]
                              [--steps N] [--layers N] [--end-to-end] [--profile] [--json FILE] [-- KEY=VALUE]

`long` is 8 rows of 2,048 tokens an optimizer step, `32k` one row of 32,768 and `128k` one of 131,072; these two are
measured where they are named. `guanaco` is rows of lengths as of chats (log-normal, 32 to 512
tokens): packs of 8,192 tokens, where a contestant packs, else 16 rows, grouped by length and padded to the longest.
Tokens are counted without padding. Every contestant is a process of its own: NF4 with double quantization, LoRA r=64 on
all linear layers without dropout, paged AdamW in 32 bits; some steps after warm-up, in one go as in a training run. A
mixture of experts (`--model qwen3-30b-a3b`) has r=16 on attention and experts and AdamW in 8 bits, and contestants of
its own. The peak is all that the GPU must hold: what torch held, and the optimizer states that it does not count.
`--end-to-end` runs `python -m qlora` itself on a file of such rows for 250 steps, with a log every 10 and a checkpoint
at the end, as the original does by default, and takes all time after the first 10.

Unsloth and TRL take part where they are installed (`rivals.py`): they load what qlora draws from a checkpoint.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kernel_parts  # noqa: E402
import numpy as np  # noqa: E402
from data_pipeline import describe_machine, describe_versions  # noqa: E402

LONG, PACK, WARM_UP = 2048, 8192, 3
LOG, SAVE = 10, 250
"""Steps between two logs and two checkpoints end to end: the defaults of qlora.py."""
LIBRARIES = ("peft", "bitsandbytes", "unsloth", "liger-kernel")
"""What decides a step's speed, besides what every benchmark names."""
PLAIN = [f"trainer.{part}=false" for part in ("compile", "fused_linear", "fused_attention", "fused_loss")]
FP8 = ["quantization.compute=fp8"]
KEEP, AGAIN = (["trainer.gradient_checkpointing=false"], ["trainer.gradient_checkpointing=true"])
LEAN = ["lora.dtype=bf16", "trainer.memory_budget=7.3GB"]
MIDDLE = ["trainer.memory_budget=16GB"]
LARGE = ["trainer.memory_budget=80GB"]
FREE = ["lora.dtype=bf16", "trainer.memory_budget=auto"]
CONSUMER = ["lora.dtype=bf16", "trainer.memory_budget=24GB"]


class Contestant(NamedTuple):
    """One way to train."""

    overrides: list[str]
    """What qlora's config says of it; rivals read it too."""
    micro: dict[str, int]
    """Rows a micro-batch, by workload; it takes no part in others."""
    packs: bool = False
    package: str = "qlora"
    """What trains."""


OURS, ROWWISE, PACKED = {"long": 4, "guanaco": 1}, {"long": 4, "guanaco": 16}, {"guanaco": 4}
ONE = {"32k": 1}
CONTESTANTS = {
    "fp8": Contestant([*FP8, *KEEP], OURS, packs=True),
    "bf16": Contestant(KEEP, OURS, packs=True),
    "fp8, one micro-batch": Contestant([*FP8, *KEEP], {"long": 8}),
    "bf16, one micro-batch": Contestant(KEEP, {"long": 8}),
    "fp8, 16 GB": Contestant([*FP8, *MIDDLE], OURS | ONE, packs=True),
    "bf16, 16 GB": Contestant(MIDDLE, OURS | ONE, packs=True),
    "fp8, 80 GB": Contestant([*FP8, *LARGE], {"128k": 1}),
    "bf16, 80 GB": Contestant(LARGE, {"128k": 1}),
    "fp8, 7.3 GB": Contestant([*FP8, *LEAN], OURS, packs=True),
    "bf16, 7.3 GB": Contestant(LEAN, OURS, packs=True),
    "bf16, checkpointed": Contestant(AGAIN, OURS, packs=True),
    "bf16, checkpointed, no graphs": Contestant([*AGAIN, "trainer.cuda_graphs=false"], OURS, packs=True),
    "plain": Contestant([*PLAIN, *AGAIN], ROWWISE),
    "original": Contestant([*PLAIN, *AGAIN], {"long": 1, "guanaco": 1}),
    "unsloth": Contestant(AGAIN, ROWWISE | ONE, package="unsloth"),
    "unsloth, keep": Contestant(KEEP, ROWWISE, package="unsloth"),
    "unsloth, packed": Contestant(AGAIN, PACKED, packs=True, package="unsloth"),
    "unsloth, packed, keep": Contestant(KEEP, PACKED, packs=True, package="unsloth"),
    "trl": Contestant(AGAIN, ROWWISE, package="trl"),
    "trl, packed": Contestant(AGAIN, PACKED, packs=True, package="trl"),
}
MIXTURES = {
    "fp8, 24 GB": Contestant([*FP8, *CONSUMER], {"long": 8, "guanaco": 1}, packs=True),
    "bf16, 24 GB": Contestant(CONSUMER, {"long": 8, "guanaco": 1}, packs=True),
    "fp8, memory free": Contestant([*FP8, *FREE], {"long": 8, "guanaco": 1}, packs=True),
    "bf16, memory free": Contestant(FREE, {"long": 8, "guanaco": 1}, packs=True),
    **{name: CONTESTANTS[name] for name in ("plain", "unsloth", "unsloth, keep")},
}
"""Those that train a mixture of experts, whose adapters TRL cannot make in 4 bits."""
ALL = {**CONTESTANTS, **MIXTURES}
"""By name."""
ROWS = {"long": 8, "guanaco": 16, "32k": 1, "128k": 1}
"""Rows an optimizer step, where they are not packed."""
USUAL = ["long", "guanaco"]
"""What is measured where no workload is named."""
LENGTHS = {"long": LONG, "32k": 32_768, "128k": 131_072}
"""Tokens of a row, where all have as many."""
NARROW = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "num_attention_heads": 4,
          "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2048}  # fmt: skip
"""The sizes of a narrow model, as far as its shape has them."""
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "shared_intermediate_size": 512}
NARROW_OPTIONS = {"linear_num_value_heads": _LINEAR, "mamba_n_heads": _MAMBA,
                 "num_global_key_value_heads": {"num_global_key_value_heads": 2}}  # fmt: skip
"""What some have of that in their options, by an option that they name."""
FEWER = {"num_kv_shared_layers": 0}
"""Options that do not go with few layers: Gemma 4's that share keys and values have their own then."""
EVERY = ["model.weights=random", "model.tokenizer=tiny", "lora.r=64", "lora.dropout=0", "data=demo"]
ADAPTED_EXPERTS = ["lora.r=16", "lora.experts=all", "lora.expert_r=16", "trainer.optim=adamw_8bit"]


def lengths(count: int) -> list[int]:
    """Returns tokens of rows as chats have them."""
    row_lengths = np.random.default_rng(0).lognormal(5.9, 0.6, count)
    return [int(length) for length in np.clip(row_lengths, 32, 512)]


def steps_of_rows(workload: str, vocabulary: int, shrink: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of optimizer steps that do not pack, without end."""
    generator, together = np.random.default_rng(1), ROWS[workload]
    row_lengths = _row_lengths(workload, shrink)
    while True:
        for first in range(0, len(row_lengths) - together + 1, together):
            yield [_row(generator, vocabulary, count) for count in sorted(row_lengths[first : first + together])]


def steps_of_packs(vocabulary: int, shrink: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the one pack of each optimizer step on chats, without end."""
    from qlora.data.batching.packing import pack

    generator, row_lengths = np.random.default_rng(1), _row_lengths("guanaco", shrink)
    while True:
        for members in pack(np.array(row_lengths), PACK // shrink):
            counts = [row_lengths[index] for index in members]
            parts = [_row(generator, vocabulary, count) for count in counts]
            joint = {key: np.concatenate([part[key] for part in parts]) for key in ("input_ids", "labels")}
            joint["labels"][np.cumsum([0, *counts[:-1]])] = -100
            positions = np.concatenate([np.arange(count) for count in counts])
            yield [{**joint, "position_ids": positions, "length": sum(counts)}]


def _row_lengths(workload: str, shrink: int) -> list[int]:
    if workload in LENGTHS:
        return [LENGTHS[workload] // shrink] * 4096
    return [max(item // shrink, 2) for item in lengths(8192)]


def _row(generator: np.random.Generator, vocabulary: int, count: int) -> dict[str, Any]:
    ids = generator.integers(3, vocabulary, count)
    return {"input_ids": ids, "labels": ids, "length": count}


class MicroBatch(NamedTuple):
    """A micro-batch on its device, and what is counted on the host: asking the device would be waiting for it."""

    inputs: dict[str, Any]
    tokens: int
    """Without padding."""
    targets: int


def batches(workload: str, name: str, vocabulary: int, device: Any, shrink: int) -> Iterator[list[MicroBatch]]:
    """Yields the micro-batches of optimizer steps without end."""
    from qlora.data.batching.collate import Collator

    packs, micro = ALL[name].packs and workload == "guanaco", ALL[name].micro[workload]
    collate = Collator(0, width=PACK // shrink if packs else 0)
    for rows in steps_of_packs(vocabulary, shrink) if packs else steps_of_rows(workload, vocabulary, shrink):
        step = []
        for part in (rows[first : first + micro] for first in range(0, len(rows), micro)):
            batch, tokens = collate(part), sum(item["length"] for item in part)
            targets = int((batch["labels"][:, 1:] != -100).sum())
            if device.type == "cuda":
                batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
            inputs = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            step.append(MicroBatch(inputs, tokens, targets))
        yield step


def write_texts(file: Path, shrink: int) -> None:
    """Writes rows as of chats as text, of one token a word, one before them and one at their end."""
    vocab = ["the", "stone", "owl", "of", "river", "bird", "and", "house"]
    row_lengths = _row_lengths("guanaco", shrink)
    rows = [" ".join(vocab[index % 8] for index in range(max(count - 2, 1))) for count in row_lengths]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def build_optimizer(config: Any, model: Any) -> Any:
    """Returns the optimizer of `trainer.optim` over what a model trains."""
    from transformers import TrainingArguments

    from qlora.training.optimizers import optimizer_class

    arguments = TrainingArguments("unused", optim=config.trainer.optim, learning_rate=1e-4, report_to="none")
    kind, options = optimizer_class(arguments, model)
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], **options)


def enable_checkpointing(model: Any) -> None:
    """Switches gradient checkpointing on; newer versions of transformers call it activation checkpointing."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})


def time_steps(
    model: Any,
    optimizer: Any,
    source: Iterator[list[MicroBatch]],
    around: Callable[[MicroBatch], AbstractContextManager[None]],
    device: Any,
    *,
    steps: int,
    profile: bool,
    graphs: Callable[[], int] = int,
) -> dict[str, Any]:
    """Trains a bare loop, each micro-batch inside `around(it)`; returns its speed, memory and first step's seconds.

    `graphs` says the bytes in which CUDA graphs compute.
    """
    import torch

    from qlora.runtime.device import device_name, reset_peak_memory
    from qlora.training.garbage import unsearched
    from qlora.training.peak_memory import PeakMemory

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    reset_peak_memory(device)
    memory = PeakMemory(device)
    memory.watch(optimizer, graphs)

    def once() -> tuple[int, Any]:
        micro = next(source)
        count = sum(batch.targets for batch in micro)
        for batch in micro:
            with around(batch):
                loss = model(**batch.inputs, num_items_in_batch=count).loss
                loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        for parameter in trained:
            parameter.grad = None
        return sum(batch.tokens for batch in micro), loss.detach()

    def timed(count: int) -> tuple[int, float]:
        wait()
        started = time.perf_counter()
        done = [once() for _ in range(count)]
        wait()
        seconds = time.perf_counter() - started
        assert all(torch.isfinite(loss) for _, loss in done)
        return sum(tokens for tokens, _ in done), seconds

    _, first = timed(1)
    timed(WARM_UP - 1)
    with unsearched():
        tokens, seconds = timed(steps)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        with record(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as trace:
            once()
        print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=40), file=sys.stderr)
        parts = kernel_parts.by_part(kernel_parts.of_trace(trace))
        print(kernel_parts.to_table(parts, model.config.get_text_config().num_hidden_layers), file=sys.stderr)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_gb": memory.gb(),
        "first_step_seconds": first,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "device": device_name(device),
    }


def measure(
    workload: str, name: str, overrides: list[str], steps: int, *, profile: bool, small: bool
) -> dict[str, Any]:
    """Trains some steps in this process and returns their speed and memory."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    from qlora.config.compose import compose
    from qlora.run import Run
    from qlora.runtime.device import peak_memory_gb
    from qlora.step.fast_step import FastStep
    from qlora.step.part import Packs
    from qlora.tasks.build_trainer import build_budget
    from qlora.training.flat_optimizer import flatten_groups, run_ahead

    shrink = 16 if small else 1
    config = compose([*EVERY, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, folder).session
        started = time.monotonic()
        model = run.add_adapter(run.load_base()).train()
        loading = time.monotonic() - started
        device = run.placement.device
        loading_peak = peak_memory_gb(device)
        if config.trainer.gradient_checkpointing:
            enable_checkpointing(model)
        model.config.use_cache = False
        packed = workload == "guanaco" and ALL[name].packs
        width = (PACK if packed else LENGTHS.get(workload, LONG)) // shrink
        packs = Packs(PACK // shrink, 64, 512 // shrink) if packed else None
        step = FastStep(model, config.trainer, config.quantization, run.placement, packs, run.objective)
        optimizer = build_optimizer(config, model)
        if step.is_active and isinstance(optimizer, Optimizer8bit):
            flatten_groups(optimizer)
            run_ahead(optimizer)
        if (budget := build_budget(run, step, max_length=width)) is not None:
            plan = budget.choose()
            step.checkpointed, step.offloaded = plan.checkpointed, plan.offloaded
            step.keep(plan.kept)

        @contextmanager
        def around(batch: MicroBatch) -> Iterator[None]:
            step.targets = batch.targets
            with step, run.placement.autocast():
                yield

        source = batches(workload, name, config.model.architecture.vocab_size, device, shrink)
        return {
            **time_steps(
                model, optimizer, source, around, device, steps=steps, profile=profile, graphs=lambda: step.graph_bytes
            ),
            "loading_seconds": loading,
            "loading_peak_gb": loading_peak,
            "parts": step.parts,
            "checkpointed": step.checkpointed,
            "offloaded": step.offloaded,
            "kept": step.kept,
        }


def steps_end_to_end(*, small: bool) -> int:
    """Returns how many steps a whole program trains; the last one ends with a checkpoint."""
    return 3 * LOG if small else SAVE


def end_to_end(name: str, overrides: list[str], *, small: bool) -> dict[str, Any]:
    """Runs `python -m qlora` on a file of rows as of chats; returns the speed after its first log, saving included."""
    shrink, steps = 16 if small else 1, steps_end_to_end(small=small)
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "rows.jsonl", Path(folder) / "run"
        write_texts(file, shrink)
        packing = ["data.packing=true", f"data.pack_length={PACK // shrink}"] if ALL[name].packs else []
        command = [
            *(*EVERY, "data=local", f"data.path={file}", "data.format=text", *packing),
            *("data.source_max_len=null", "data.target_max_len=null", "data.max_length=512"),
            *("data.eval_dataset_size=16", f"trainer.max_steps={steps}", f"trainer.logging_steps={LOG}"),
            *(f"trainer.save_steps={steps}", "trainer.eval_steps=null", "task.evaluate=false", "task.predict=false"),
            *("evaluation=loss", "evaluation.baseline=false", *overrides),
        ]
        output = run_program(command, run)
    if "failure" in output:
        return output
    logs, metrics = output["logs"], output["metrics"]
    seen = [0, *(entry["num_input_tokens_seen"] for entry in logs)]
    speeds = [entry["train_tokens_per_second"] for entry in logs]
    seconds = [(end - start) / speed for (start, end), speed in zip(itertools.pairwise(seen), speeds, strict=True)]
    warm = sum(entry["step"] <= LOG for entry in logs)
    return {
        "tokens_per_second": (seen[-1] - seen[warm]) / (metrics["train_runtime"] - sum(seconds[:warm])),
        "saving_seconds": metrics["train_runtime"] - sum(seconds),
        "peak_gb": metrics["peak_memory_gb"],
    }


def run_program(overrides: list[str], run: Path) -> dict[str, Any]:
    """Runs `python -m qlora` in the folder `run`; returns its logs and metrics, or the end of what it said."""
    command = [sys.executable, "-m", "qlora", *overrides, f"hydra.run.dir={run}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"failure": said[-1] if said else "no message"}
    logs = [entry for entry in json.loads((run / "history.json").read_text()) if "loss" in entry]
    return {"logs": logs, "metrics": json.loads((run / "result.json").read_text())["metrics"], "said": done.stdout}


def run_apart(task: dict[str, Any], script: str = "step.py") -> dict[str, Any]:
    """Runs a task in a process of its own; returns its numbers, or the end of what it said when it failed."""
    command = [sys.executable, str(Path(__file__).with_name(script)), "--worker", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if task.get("profile") or done.returncode:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return {"failure": said[-1] if said else "no message"}
    output: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith('{"')][-1])
    return output


def is_mixture(overrides: list[str]) -> bool:
    """Returns whether the model is a mixture of experts."""
    from qlora.config.compose import compose
    from qlora.planning.training_plan import find_shape

    return find_shape(compose([*overrides, "model.weights=random"])).experts is not None


@functools.cache
def architecture_of(*overrides: str) -> Any:
    """Returns the shape of a model that is to be read only."""
    from qlora.config.compose import compose

    return compose(overrides).model.architecture


def narrow_shape(model: str) -> list[str]:
    """Returns the overrides that make a preset's model narrow."""
    architecture = architecture_of(f"model={model}")
    sizes = {key: size for key, size in NARROW.items() if getattr(architecture, key)}
    for name in NARROW_OPTIONS.keys() & architecture.options.keys():
        sizes |= {f"options.{key}": size for key, size in NARROW_OPTIONS[name].items()}
    return [f"model.architecture.{key}={size}" for key, size in sizes.items()]


def small_shape(model: str) -> list[str]:
    """Returns the overrides that make a preset's model narrow, with two layers."""
    return [*narrow_shape(model), *few_layers([f"model={model}"], 2)]


def few_layers(overrides: list[str], count: int) -> list[str]:
    """Returns the overrides that leave the first layers of a model, whose kinds some presets name one by one."""
    options = architecture_of(*overrides).options
    left: dict[str, Any] = {name: value for name, value in FEWER.items() if name in options}
    if "layer_types" in options:
        left["layer_types"] = f"[{','.join(options['layer_types'][:count])}]"
    if "full_attn_idxs" in options:
        left["full_attn_idxs"] = f"[{','.join(str(index) for index in options['full_attn_idxs'] if index < count)}]"
    named = (f"model.architecture.options.{name}={value}" for name, value in left.items())
    return [f"model.architecture.num_hidden_layers={count}", *named]


def shape_of(arguments: argparse.Namespace, *, mixture: bool) -> list[str]:
    """Returns the overrides that all contestants have."""
    layers = few_layers([f"model={arguments.model}"], arguments.layers) if arguments.layers else []
    small = small_shape(arguments.model) if arguments.small else []
    adapters = ADAPTED_EXPERTS if mixture else []
    return [f"model={arguments.model}", *small, *layers, *adapters, *arguments.overrides]


def choose(names: list[str], contestants: Mapping[str, Any] = ALL) -> list[str]:
    """Returns the contestants whose packages are installed; says of each missing package who is left out for it."""
    missing = {name: package for name in names if find_spec(package := contestants[name].package) is None}
    for package in dict.fromkeys(missing.values()):
        without = ", ".join(f'"{name}"' for name in names if missing.get(name) == package)
        print(f"{without} left out: {package} is not installed (pip install {package})", file=sys.stderr, flush=True)
    return [name for name in names if name not in missing]


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
        contestant = result["contestant"] + (", with its loader" if result.get("is_trainer") else "")
        lines.append([result["workload"], contestant, *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a narrow model and short rows, for a try on a CPU")
    parser.add_argument("--model", default="llama-7b", help="a preset")
    parser.add_argument("--workloads", nargs="+", default=USUAL, choices=list(ROWS))
    parser.add_argument("--contestants", nargs="+", choices=list(ALL), help="all that train this kind of model")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, where a disk or a GPU is small")
    parser.add_argument("--end-to-end", action="store_true", help="also the whole program, on guanaco")
    parser.add_argument(
        "--profile", action="store_true", help="also print the kernels of a step, and their time by part"
    )
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as on qlora's own command line")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    about = f"{datetime.date.today()}, {describe_machine()}, {describe_versions(*LIBRARIES)}"
    mixture = is_mixture([f"model={arguments.model}", *arguments.overrides])
    contestants, shape = MIXTURES if mixture else CONTESTANTS, shape_of(arguments, mixture=mixture)
    names, results = choose(arguments.contestants or list(contestants)), []
    if unfit := [name for name in names if name not in contestants]:
        parser.error(f"{', '.join(unfit)}: no contestant for {arguments.model}; these are: {', '.join(contestants)}")
    with tempfile.TemporaryDirectory() as folder:
        base = str(Path(folder) / "base")
        common = {"steps": arguments.steps, "profile": arguments.profile, "small": arguments.small}
        saved: dict[str, Any] = {}
        if any(contestants[name].package != "qlora" for name in names):
            saved = run_apart({"do": "save", "base": base, "overrides": shape}, "rivals.py")
        for workload, name in ((workload, name) for workload in arguments.workloads for name in names):
            local, micro, packs, package = contestants[name]
            if workload not in micro:
                continue
            parts = 1 if packs and workload == "guanaco" else ROWS[workload] // micro[workload]
            batch = [f"trainer.per_device_train_batch_size={micro[workload]}"]
            overrides = [*shape, *local, *batch, f"trainer.gradient_accumulation_steps={parts}"]
            task = {"workload": workload, "name": name, "overrides": overrides, **common}
            whole = workload == "guanaco" and arguments.end_to_end
            if package == "qlora":
                measurements = {workload: run_apart(task)}
                if whole:
                    measurements["guanaco, end to end"] = end_to_end(name, overrides, small=arguments.small)
            else:
                doings = {workload: "step"} | ({"guanaco, end to end": "end to end"} if whole else {})
                measurements = {
                    title: saved if "failure" in saved else run_apart({"do": do, "base": base, **task}, "rivals.py")
                    for title, do in doings.items()
                }
            for title, numbers in measurements.items():
                results.append({"workload": title, "contestant": name, **numbers})
                print(results[-1], file=sys.stderr, flush=True)
            if arguments.json:  # after each: a machine may go away
                text = json.dumps({"about": about, "model": arguments.model, "results": results}, indent=2)
                arguments.json.write_text(text, encoding="utf-8")
    devices = {result["device"] for result in results if "device" in result}
    print("\n\n".join([", ".join([about, *sorted(devices)]), to_table(results)]))


if __name__ == "__main__":
    main()
