"""`task=plan`: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.paths import short_path
from qlora.config.schema import Config, DataConfig
from qlora.planning.advice import fewest_checkpointed
from qlora.planning.time_plan import EFFICIENCY
from qlora.planning.training_plan import Plan, build_plan
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text
from qlora.runtime.needs import Needs
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.task_result import TaskResult
from qlora.tasks.lora_start import with_start
from qlora.tasks.protocol import TaskJob
from qlora.text import format_duration

log = logging.getLogger(__name__)

PLAN_KEYS = {"bf16_adapters": "narrow"}
"""The keys of `plan.json` that are not the names of fields."""


def needs(config: Config) -> Needs:
    """Returns what planning needs: the shape of the model, and the number of rows in local files."""
    return Needs(caches=True)


def run(job: TaskJob) -> TaskResult:
    """Prints the plan of the training run that the config describes, and writes it to `plan.json`."""
    config = with_start(job.config, job.overrides)
    plan = build_plan(config, _count_rows(config.data))
    job.create_folder()
    print_plan(plan)
    result = _build_result(plan, job.folder)
    write_text(job.folder.result("plan"), json.dumps(result.to_dict(), indent=2) + "\n")
    console.say()
    console.say_rows([("plan", short_path(result.paths["plan"]))])
    return result


def _count_rows(data: DataConfig) -> int | None:
    """Returns the rows to train on where they lie in local files; None: nothing is read."""
    if not (data.mix or Path(data.path or "").expanduser().exists() or "*" in (data.path or "")):
        return None
    from qlora.data.row_count import count_training_rows  # imports `datasets`

    return count_training_rows(data)


def _build_result(plan: Plan, folder: RunFolder) -> TaskResult:
    memory, speed = plan.memory, plan.speed
    metrics = {
        "plan_peak_gb": memory.peak / 1e9,
        "plan_needed_gb": memory.needed / 1e9,
        "plan_paged_gb": memory.paged / 1e9,
        "plan_fits": float(plan.fits),
        **({"plan_tokens_per_second": speed.tokens_per_second} if speed else {}),
        **({"plan_hours": plan.hours} if plan.hours is not None else {}),
        **({"plan_steps": plan.steps} if plan.steps is not None else {}),
        **({"plan_epochs": plan.length.epochs} if plan.length is not None else {}),
    }
    quantization = plan.config.quantization
    setup = {"bits": quantization.bits, "double_quant": quantization.double_quant, "wide": plan.setup.fp32}
    setup |= {PLAN_KEYS.get(name, name): value for name, value in _without(plan.setup, "base", "fp32").items()}
    del setup["targets"], setup["step"], setup["loss"]
    return TaskResult(
        "plan",
        metrics,
        {"plan": str(folder.result("plan"))},
        more={
            "gpu": asdict(plan.gpu),
            "model": {**asdict(plan.training.shape), "parameters": plan.training.shape.parameters},
            "setup": {**setup, "step": plan.setup.step.value},
            "parts_gb": {name: value / 1e9 for name, value in memory.parts.items()},
            "moment": memory.moment,
            "fewest_checkpointed_layers": fewest_checkpointed(plan.training, plan.gpu),
            "largest_micro_batch": plan.most_rows,
            "changes": [{"words": change.overrides, **_without(change, "overrides")} for change in plan.changes],
            "paper": plan.paper,
        },
    )


def _without(item: Any, *names: str) -> dict[str, Any]:
    """Returns the fields of a dataclass but for those of `names`."""
    return {field.name: getattr(item, field.name) for field in fields(item) if field.name not in names}


# The screen


def print_plan(plan: Plan) -> None:
    """Prints what is planned, its memory, what fits, and how long it takes."""
    config, setup, shape, memory, gpu = plan.config, plan.setup, plan.training.shape, plan.memory, plan.gpu
    trained = f"LoRA r={setup.r}" if setup.r else "all weights"
    if setup.checkpointed:
        checkpointing = f"{setup.checkpointed} of {shape.layers} layers checkpointed"
        checkpointing += f" (inputs of {setup.offloaded} on the host)" if setup.offloaded else ""
    else:
        checkpointing = "no checkpointing"
    console.start_screen(
        [
            ("model", f"{config.model.name}: {shape.parameters / 1e9:,.2f} billion parameters"),
            ("GPU", f"{gpu.name}: {_gb(gpu.memory)} GB"),
            ("training", f"{trained}, {setup.optim}, {setup.rows} x {plan.training.accumulation} rows of "
             f"{setup.length:,} tokens, {checkpointing}, {setup.step.value} step"),
        ]
    )  # fmt: skip
    _heading("Memory, GB")
    rows = [(name, memory.parts[name], "") for name in memory.parts if memory.parts[name]]
    rows += [("most that torch holds", memory.peak, f"at {memory.moment}"), ("context, gaps", memory.context, "")]
    _numbers(rows)
    left = gpu.memory - memory.needed
    verdict = f"fits, {_gb(left)} GB are left" if plan.fits else f"does not fit: {_gb(-left)} GB are missing"
    style = "bold green" if plan.fits else "bold red"
    console.say(Text.assemble(("  needed".ljust(30), "cyan"), _gb(memory.needed).rjust(8), "  ", (verdict, style)))
    if memory.paged:
        where = "on the GPU too" if memory.comfortable <= gpu.memory else "partly on the host, which costs time"
        _numbers([("paged optimizer states", memory.paged, where)])
    console.say()
    _heading("What fits")
    console.say_rows(_fitting(plan))
    if not plan.fits:
        console.say()
        _heading("The cheapest changes, one on top of the other")
        for change in plan.changes:
            what = f"saves {_gb(change.saves)} GB -> {_gb(change.needed)} GB" + (", fits" if change.fits else "")
            console.say_rows([(change.overrides, f"{what} ({change.loses})")])
        if not any(change.fits for change in plan.changes):
            console.say("  all of this is not enough: take a larger GPU")
    console.say()
    _heading("Time")
    console.say_rows(_times(plan))
    if plan.length is not None and plan.length.warning is not None:
        log.warning(plan.length.warning)
    if (paper := plan.paper) is not None:
        console.say()
        _heading("Beside the paper, one row of 512 tokens with paged states")
        bits = 16 if plan.setup.bf16_adapters else 32
        _numbers([("QLoRA paper", paper["paper_gb"] * 1e9, ""), ("this plan", paper["planned_gb"] * 1e9,
                  f"adapters and their gradients in {bits} bits")])  # fmt: skip


def _fitting(plan: Plan) -> list[tuple[str, str]]:
    fewest, layers = fewest_checkpointed(plan.training, plan.gpu), plan.training.shape.layers
    if fewest is None:
        text = "not even with all layers checkpointed"
        if plan.fits:
            text = f"with all layers checkpointed and the inputs of {plan.setup.offloaded} on the host"
    else:
        text = f"with at least {fewest} of {layers} layers checkpointed" if fewest else "without checkpointing"
    rows = [("this micro-batch", text)]
    for name, count in plan.most_rows.items():
        plural = "row" if count == 1 else "rows"
        rows.append((name, f"up to {count:,} {plural} a micro-batch" if count else "not even one row"))
    return rows


def _times(plan: Plan) -> list[tuple[str, str]]:
    speed = plan.speed
    length = [("steps", str(plan.length))] if plan.length is not None else []
    if speed is None:
        return [*length, ("tokens a second", f"unknown: {plan.gpu.name} is not in the table of GPUs")]
    efficiency = f"{EFFICIENCY[plan.setup.step]:.0%} of the GPU's {plan.gpu.tflops:,.0f} TFLOP/s"
    rows = [*length, ("tokens a second", f"{speed.tokens_per_second:,.0f} (the time goes into {speed.bound})")]
    if plan.hours is None:
        why = "trainer.num_train_epochs counts rows, which are read from local files only"
        rows.append(("whole training", f"unknown: {why}"))
    else:
        step = plan.setup.rows * plan.training.accumulation
        time = format_duration(3600 * plan.hours)
        rows.append(("whole training", f"{time} for {plan.steps:,} steps of {step:,} rows"))
    return [*rows, ("assumed", f"matrix products at {efficiency}, and every row {plan.setup.length:,} tokens long")]


def _heading(text: str) -> None:
    console.say(Text(text, style="bold"))


def _numbers(rows: list[tuple[str, float, str]]) -> None:
    for name, value, note in rows:
        behind = f"  {note}" if note else ""
        console.say(Text.assemble((f"  {name}".ljust(30), "cyan"), _gb(value).rjust(8), (behind, "dim")), hang=40)


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}" if value < 1e12 else f"{value / 1e9:,.0f}"
