"""`task=plan`: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.paths import short_path
from qlora.config.schema import Config, DataConfig, PlanStep
from qlora.config.schema.adapter_kind import describe_adapter
from qlora.config.schema.loss import may_share_prompts
from qlora.config.training_length import TokenCount, stream_units
from qlora.errors import UserError
from qlora.models.context import describe_limit, fit_rows
from qlora.models.embedded import embedded_warning
from qlora.models.local_tokenizer import find_local_tokenizer, load_local_tokenizer
from qlora.models.model_files import EMBEDDED
from qlora.planning.advice import fewest_checkpointed
from qlora.planning.model_shape import Shape
from qlora.planning.time_plan import EFFICIENCY
from qlora.planning.training_plan import Plan, build_plan, find_shape
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text
from qlora.runtime.needs import Needs
from qlora.runtime.run_folder import RunFolder
from qlora.runtime.task_result import TaskResult
from qlora.tasks.lora_start import with_start
from qlora.tasks.protocol import TaskJob
from qlora.text import format_count, format_duration, format_number, format_speed

log = logging.getLogger(__name__)

PLAN_KEYS = {"bf16_adapters": "narrow"}
"""The keys of `plan.json` that are not the names of fields."""


PAGED = {
    True: "These states lie on the GPU; if it fills up, the driver moves some to the host's memory.",
    False: "The GPU has no room for all of these states: some lie in the host's memory, which costs time.",
}
"""What becomes of paged optimizer states, by whether the GPU has room for them beside what is needed."""


@dataclass(frozen=True)
class Unit:
    """What amounts of memory are shown in."""

    name: str
    size: float
    digits: int

    def show(self, value: float) -> str:
        """Returns an amount of bytes as a number."""
        return format_number(value / self.size, 0 if value >= 1000 * self.size else self.digits)


GB, MB = Unit("GB", 1e9, 2), Unit("MB", 1e6, 1)


def needs(config: Config) -> Needs:
    """Returns what planning needs: the shape of the model, and the number of rows in local files."""
    return Needs(caches=True)


def run(job: TaskJob) -> TaskResult:
    """Prints the plan of the training run that the config describes, and writes it to `plan.json`."""
    config = with_start(job.config, job.overrides)
    tokens, why_not = count_tokens(config)
    plan = build_plan(config, _count_rows(config.data) if tokens is None else None, tokens)
    job.create_folder()
    print_plan(plan, why_not)
    result = _build_result(plan, job.folder)
    write_text(job.folder.result("plan"), json.dumps(result.to_dict(), indent=2) + "\n")
    console.say()
    console.say_rows([("plan", short_path(result.paths["plan"]))])
    return result


def _count_rows(data: DataConfig) -> int | None:
    """Returns the rows to train on where they lie in local files; None: nothing is read."""
    if data.streaming or not _are_files(data):
        return None
    from qlora.data.row_count import count_training_rows  # imports `datasets`

    return count_training_rows(data)


def _are_files(data: DataConfig) -> bool:
    """Returns whether the rows may lie in local files; where they do not, nothing slow is imported."""
    return bool(data.mix) or Path(data.path or "").expanduser().exists() or "*" in (data.path or "")


def count_tokens(config: Config) -> tuple[TokenCount | None, str]:
    """Returns the tokens of the rows to train on, where rows and tokenizer are on this machine; else None, and why."""
    data, model, trainer = config.data, config.model, config.trainer
    if config.plan.length is not None:
        return None, "plan.length says how long a row is"
    folder, name = find_local_tokenizer(model), model.tokenizer or model.name
    why_not = "" if folder is not None else f"the tokenizer of {name} is not on this machine"
    if why_not and not (_are_files(data)):
        return None, why_not
    from qlora.data import token_count  # imports `datasets` and transformers, and no torch

    if not token_count.are_at_hand(data):
        return None, f"the rows of data={data.name} are not on this machine"
    fitted = fit_rows(data, find_shape(config).context)
    options: dict[str, Any] = {
        "batch": trainer.per_device_train_batch_size,
        "grouped": trainer.group_by_length,
        "kind": config.loss.rows,
        "shares_prompts": may_share_prompts(config.loss, trainer, on_gpu=config.plan.step is not PlanStep.plain),
    }
    units: dict[str, Any] = {"units": stream_units(trainer)} if data.streaming else {}
    try:
        tokenizer = load_local_tokenizer(folder or EMBEDDED["tiny"], model.new_tokens)
        if folder is not None:
            return token_count.count_tokens(fitted, tokenizer, **options, **units), ""
        if data.streaming:
            return None, why_not
        return token_count.guess_tokens(fitted, tokenizer, why_not, **options), ""
    except UserError as error:
        return None, str(error)


def planned_time(config: Config, tokens: TokenCount) -> str | None:
    """Returns how long a training run takes on this machine's GPU, as its plan says it; None: a plan cannot."""
    try:
        plan = build_plan(replace(config, plan=replace(config.plan, device="this")), tokens=tokens)
    except UserError:
        return None
    return None if plan.hours is None else f"about {format_duration(3600 * plan.hours)}, as task=plan estimates it"


def _build_result(plan: Plan, folder: RunFolder) -> TaskResult:
    memory, speed, is_stream = plan.memory, plan.speed, plan.config.data.streaming
    metrics = {
        "plan_peak_gb": memory.peak / 1e9,
        "plan_needed_gb": memory.needed / 1e9,
        "plan_paged_gb": memory.paged / 1e9,
        "plan_needed_with_paged_gb": memory.comfortable / 1e9,
        "plan_host_gb": (memory.host + memory.offloaded) / 1e9,
        "plan_fits": float(plan.fits),
        **({"plan_tokens_per_second": speed.tokens_per_second} if speed else {}),
        **({"plan_hours": plan.hours} if plan.hours is not None else {}),
        **({"plan_steps": plan.steps} if plan.steps is not None else {}),
        **({"plan_epochs": plan.length.epochs} if plan.length is not None and not is_stream else {}),
        **({"plan_epoch_tokens": plan.tokens.tokens} if plan.tokens is not None and not is_stream else {}),
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
            "model": _describe_shape(plan.training.shape),
            "setup": {**setup, "step": plan.setup.step.value},
            "parts_gb": {name: value / 1e9 for name, value in memory.parts.items()},
            "moment": memory.moment,
            "fewest_checkpointed_layers": fewest_checkpointed(plan.training, plan.gpu),
            "largest_micro_batch": plan.most_rows,
            "changes": [{"words": change.overrides, **_without(change, "overrides")} for change in plan.changes],
            "paper": plan.paper,
        },
    )


def _describe_shape(shape: Shape) -> dict[str, Any]:
    hidden = ("experts", "family", "kinds", "order", "unquantized")
    described = {**_without(shape, *hidden), "parameters": shape.parameters}
    if (experts := shape.experts) is None:
        return described
    layers = {"layers": sorted(experts.layers)}
    return described | {
        "active_parameters": shape.active_parameters,
        "experts": {**_without(experts, "family", "layers"), **layers},
    }


def _without(item: Any, *names: str) -> dict[str, Any]:
    """Returns the fields of a dataclass but for those of `names`."""
    return {field.name: getattr(item, field.name) for field in fields(item) if field.name not in names}


# The screen


def print_plan(plan: Plan, why_not: str = "") -> None:
    """Prints what is planned, its memory, what fits, and how long it takes.

    `why_not` says why the tokens of the rows are not counted.
    """
    config, setup, shape, memory, gpu = plan.config, plan.setup, plan.training.shape, plan.memory, plan.gpu
    trained = describe_adapter(config.lora, short=True) if setup.r else "all weights"
    trained += f" (r={setup.expert_r} on experts)" if setup.expert_r else ""
    if config.loss.reads_whole_texts:
        trained += f", head={config.head.name.value}"
        trained += f" ({setup.head_outputs * shape.hidden:,} parameters)" if setup.head_outputs else ""
    if setup.checkpointed:
        checkpointing = f"{setup.checkpointed} of {shape.layers} layers checkpointed"
        checkpointing += f" (inputs of {setup.offloaded} on the host)" if setup.offloaded else ""
    else:
        checkpointing = "no checkpointing"
        checkpointing += f", decoded experts of {setup.kept} layers kept" if setup.kept else ""
    shared = f", each shared by {setup.shared_by} GPUs like this" if setup.shared_by > 1 else ""
    checkpointing += f", experts of {setup.waiting} layers on the host" if setup.waiting else ""
    console.start_screen(
        [
            ("model", f"{config.model.name}: {format_count(shape.parameters)} parameters{_describe_experts(shape)}"),
            ("GPU", f"{gpu.name}: {_gb(gpu.memory)} GB"),
            ("limit", describe_limit(config.data, config.model.name, shape.context)),
            ("training", f"{trained}, {setup.optim}, {setup.rows} x {plan.training.accumulation} rows of "
             f"up to {setup.length:,} tokens{shared}, {checkpointing}, {setup.step.value} step"),
        ]
    )  # fmt: skip
    unit = GB if memory.needed >= GB.size else MB
    _heading(f"Memory, {unit.name}")
    rows = [(name, memory.parts[name], "") for name in memory.parts if memory.parts[name]]
    rows += [("most that torch holds", memory.peak, f"at {memory.moment}"), ("context, gaps", memory.context, "")]
    _numbers(rows, unit)
    left = gpu.memory - memory.needed
    verdict = f"fits, {_gb(left)} GB are left" if plan.fits else f"does not fit: {_gb(-left)} GB are missing"
    style = "bold green" if plan.fits else "bold red"
    console.say(
        Text.assemble(("  needed".ljust(30), "cyan"), unit.show(memory.needed).rjust(8), "  ", (verdict, style))
    )
    if memory.offloaded:
        kept = "inputs and outputs of attention" if setup.is_long else "inputs of layers"
        _numbers([("layers on the host", memory.offloaded, f'{kept}, in its pinned memory, not in "needed"')], unit)
    if memory.host:
        _numbers([("experts on the host", memory.host, 'in its pinned memory, not in "needed"')], unit)
    if memory.paged:
        _numbers([("paged optimizer states", memory.paged, 'not in "needed"'),
                  ("needed with these states", memory.comfortable, "")], unit)  # fmt: skip
        console.say(Text(f"  {PAGED[memory.comfortable <= gpu.memory]}", style="dim"))
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
    console.say_rows(_times(plan, why_not))
    for warning in filter(None, (plan.length and plan.length.warning, embedded_warning(config))):
        log.warning(warning)
    if (paper := plan.paper) is not None:
        console.say()
        _heading("Beside the paper, one row of 512 tokens with paged states")
        bits = 16 if plan.setup.bf16_adapters else 32
        _numbers([("QLoRA paper", paper["paper_gb"] * 1e9, ""), ("this plan", paper["planned_gb"] * 1e9,
                  f"adapters and their gradients in {bits} bits")], GB)  # fmt: skip


def _fitting(plan: Plan) -> list[tuple[str, str]]:
    fewest, layers = fewest_checkpointed(plan.training, plan.room), plan.training.shape.layers
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


def _times(plan: Plan, why_not: str) -> list[tuple[str, str]]:
    speed, tokens, length = plan.speed, plan.tokens, plan.setup.length
    rows = [("steps", str(plan.length))] if plan.length is not None else []
    if tokens is None:
        rows.append(("tokens", f"not counted: {why_not}" if why_not else "not counted"))
    elif plan.length is not None:
        rows.append(("tokens", plan.length.describe_tokens(tokens.tokens, tokens.estimate)))
    if tokens is not None and tokens.attended > 1:
        rows.append(
            ("prompts", f"once for both answers of a pair: {1 - 1 / tokens.attended:.0%} of the tokens are saved")
        )
    if speed is None:
        return [*rows, ("tokens a second", f"unknown: {plan.gpu.name} is not in the table of GPUs")]
    rows.append(("tokens a second", f"{format_speed(speed.tokens_per_second)} (the time goes into {speed.bound})"))
    if plan.hours is None:
        why = "trainer.num_train_epochs counts rows, and they are not read here"
        rows.append(("whole training", f"unknown: {why}"))
    else:
        step = plan.setup.rows * plan.training.accumulation
        full = f" if every row is full ({length:,} tokens), less otherwise" if tokens is None else ""
        unit = "rows" if plan.length is None else plan.length.unit
        time = format_duration(3600 * plan.hours) if 3600 * plan.hours >= 1 else "a second"
        rows.append(("whole training", f"about {time}{full}: {plan.steps:,} steps of {step:,} {unit}"))
    efficiency = f"{EFFICIENCY[plan.setup.step]:.0%} of the GPU's {plan.gpu.tflops:,.0f} TFLOP/s"
    memory = "" if tokens is None else f", and memory for rows of {length:,} tokens"
    mixture = ", as dense models reach it" if plan.training.shape.experts is not None else ""
    rows.append(("assumed", f"matrix products at {efficiency}{mixture}{memory}"))
    return [*rows, *_estimate(plan.training.shape)]


def _estimate(shape: Shape) -> list[tuple[str, str]]:
    """Returns the row that says what of a plan was compared with no model of its type."""
    kind = shape.model_type
    text = f"what layers of {kind} keep, from their modules; parameters and bytes of weights are exact"
    return [("estimated", text)] if shape.is_estimate else []


def _heading(text: str) -> None:
    console.say(Text(text, style="bold"))


def _numbers(rows: list[tuple[str, float, str]], unit: Unit) -> None:
    for name, value, note in rows:
        behind = f"  {note}" if note else ""
        console.say(Text.assemble((f"  {name}".ljust(30), "cyan"), unit.show(value).rjust(8), (behind, "dim")), hang=40)


def _gb(value: float) -> str:
    return GB.show(value)


def _describe_experts(shape: Shape) -> str:
    """Returns what a line on the model says of a mixture's experts."""
    if (experts := shape.experts) is None:
        return ""
    active, of = format_count(shape.active_parameters), f"{experts.per_token} of {experts.count} experts"
    return f", {active} of them for each token ({of})"
