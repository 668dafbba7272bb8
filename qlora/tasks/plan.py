"""What `task=plan` reads, prints and writes: memory and time of a training before anything is loaded.

Needs no torch, so that it answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora.config.options import model_presets
from qlora.config.schema import BaseProducts, ComputeDtype, Config, LoraDtype, PlanStep, Weights
from qlora.errors import ConfigError, did_you_mean
from qlora.models.json_files import read_object
from qlora.models.model_files import is_local, locate
from qlora.planning.advice import Change, Training, changes, fewest_checkpointed, fewest_offloaded, largest_rows
from qlora.planning.gpus import Gpu, find_gpu
from qlora.planning.memory_plan import CONTEXT, Memory
from qlora.planning.model_shape import Shape, find_targets, read_shape
from qlora.planning.optimizer_states import OPTIMIZERS
from qlora.planning.setup import Setup
from qlora.planning.time_plan import EFFICIENCY, Speed, plan_speed
from qlora.quantization.method import find_method
from qlora.runtime import console
from qlora.runtime.atomic_files import write_text
from qlora.runtime.run_folder import RunFolder
from qlora.text import format_duration, parse_size

EMBEDDED = "tiny"
PLAN_KEYS = {"bf16_adapters": "narrow"}
"""The keys of `plan.json` that are not the names of fields."""
PAPER = {"llama-7b": 6.9, "llama-13b": 11.3, "llama-33b": 24.7, "llama-65b": 45.0}
"""The memory that the QLoRA paper (arXiv 2305.14314) needs by model, 10^9 bytes: one row of 512 tokens, paged states
counted in."""


@dataclass(frozen=True)
class Plan:
    """A training on a card."""

    config: Config
    training: Training
    card: Gpu

    @property
    def setup(self) -> Setup:
        """What decides the memory."""
        return self.training.setup

    @cached_property
    def memory(self) -> Memory:
        """What the training needs."""
        return self.training.memory

    @property
    def speed(self) -> Speed | None:
        """The time of a micro-batch; None for a card whose speed is unknown."""
        return plan_speed(self.training.shape, self.setup, self.card)

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.training.fits(self.card)

    @property
    def hours(self) -> float | None:
        """How long the steps of the whole training take; None where their number or the card's speed is unknown."""
        if self.speed is None or self.config.trainer.max_steps is None:
            return None
        return self.config.trainer.max_steps * self.training.accumulation * self.speed.seconds / 3600

    @cached_property
    def largest(self) -> dict[str, int]:
        """The largest micro-batch by what is checkpointed."""
        layers = self.training.shape.layers
        kinds = {"no layer checkpointed": 0, f"all {layers} layers checkpointed": layers}
        trainings = {name: _with(self.training, checkpointed=count, offloaded=0) for name, count in kinds.items()}
        return {name: largest_rows(training, self.card) for name, training in trainings.items()}

    @cached_property
    def changes(self) -> list[Change]:
        """The cheapest changes, if it does not fit."""
        if self.fits:
            return []
        key = "data.pack_length" if self.config.data.packing else "data.max_length"
        key = "plan.length" if self.config.plan.length else key
        return list(changes(self.training, self.card, _smaller(self.config), length_key=key))

    @property
    def paper(self) -> dict[str, float] | None:
        """What the paper measured for this model, and what is planned for the same row; None for another model."""
        preset = next((option for option in PAPER if model_presets()[option]["name"] == self.config.model.name), None)
        if preset is None or self.config.model.weights is Weights.random:
            return None
        same = _with(self.training, rows=1, length=512, checkpointed=self.training.shape.layers).memory
        return {"paper_gb": PAPER[preset], "planned_gb": (same.peak + same.paged) / 1e9}


def plan(config: Config, output_dir: Path) -> dict[str, Any]:
    """Plans the training that the config describes; prints it, and returns the result as stored in `plan.json`."""
    found = build_plan(config)
    folder = RunFolder(output_dir)
    folder.create()
    _print(found)
    result = _result(found, folder)
    write_text(folder.result("plan"), json.dumps(result, indent=2) + "\n")
    console.say()
    console.say_rows([("plan", result["paths"]["plan"])])
    return result


def build_plan(config: Config) -> Plan:
    """Returns the plan of a training; raises `ConfigError` where a part of it is not known."""
    card = find_gpu(config.plan.device)
    shape = find_shape(config)
    training = Training(shape, read_setup(config, shape), config.trainer.gradient_accumulation_steps)
    if config.trainer.memory_budget is None:
        return Plan(config, training, card)
    if (budget := parse_size(config.trainer.memory_budget)) is not None:
        card = replace(card, memory=min(card.memory, budget + CONTEXT))
    if (fewest := fewest_checkpointed(training, card)) is not None:
        return Plan(config, _with(training, checkpointed=fewest), card)
    offloaded = fewest_offloaded(training, card)
    return Plan(config, _with(training, checkpointed=shape.layers, offloaded=offloaded), card)


def find_shape(config: Config) -> Shape:
    """Returns the shape of `model.architecture`, or of the `config.json` of another model than a preset's.

    Raises `ConfigError` for one that cannot be had.
    """
    model = config.model
    architecture = asdict(model.architecture) if model.architecture is not None else None
    if model.weights is Weights.random or model.name == EMBEDDED:
        assert architecture is not None
        return read_shape(architecture, "model.architecture")
    place = locate(model.name)
    if is_local(place):
        return read_shape(_read_config(Path(place) / "config.json", model.name), f"model.name={model.name}")
    # A model named on the command line alone still has the architecture of the default preset.
    if architecture is not None and architecture != _default_architecture():
        return read_shape(architecture, "model.architecture")
    return read_shape(_download_config(config), f"model.name={model.name}")


def read_setup(config: Config, shape: Shape) -> Setup:
    """Returns what decides the memory of the training; raises `ConfigError` for an optimizer that is not known."""
    quantization, lora, trainer, data = config.quantization, config.lora, config.trainer, config.data
    if trainer.optim not in OPTIMIZERS:
        raise ConfigError(
            f"trainer.optim={trainer.optim}: task=plan does not know what it stores"
            f"{did_you_mean(trainer.optim, OPTIMIZERS)}; it knows {', '.join(OPTIMIZERS)}"
        )
    return Setup(
        base=find_method(quantization).stored_base(quantization),
        fp32=quantization.compute_dtype is ComputeDtype.fp32,
        r=lora.r if lora.enabled else 0,
        targets=find_targets(shape, lora.target_modules) if lora.enabled else (),
        dora=lora.use_dora,
        bf16_adapters=lora.dtype is LoraDtype.bf16,
        dropout=lora.dropout > 0,
        optim=trainer.optim,
        rows=trainer.per_device_train_batch_size,
        length=config.plan.length or data.pack_length or data.longest_row or shape.context,
        accumulates=trainer.gradient_accumulation_steps > 1,
        checkpointed=shape.layers if trainer.gradient_checkpointing else 0,
        step=_find_step(config),
        fp8=quantization.compute is BaseProducts.fp8,
        guarded=config.watchdog.nonfinite.keeps_out,
        loss=config.loss,
    )


def _find_step(config: Config) -> PlanStep:
    """Returns how the step is computed on a GPU: fast where no part is switched off and the layers allow it."""
    if config.plan.step is not PlanStep.auto:
        return config.plan.step
    trainer, lora = config.trainer, config.lora
    parts = (trainer.compile, trainer.fused_linear, trainer.fused_attention, trainer.fused_loss)
    plain_adapter = lora.enabled and not lora.use_dora
    can_fuse = find_method(config.quantization).fast_step_unsupported_reason() is None
    return PlanStep.fast if can_fuse and plain_adapter and False not in parts else PlanStep.plain


def _with(training: Training, **changed: Any) -> Training:
    return replace(training, setup=replace(training.setup, **changed))


def _default_architecture() -> dict[str, Any]:
    return model_presets()[EMBEDDED]["architecture"]


def _smaller(config: Config) -> dict[str, Shape]:
    """Returns the shapes of the presets of the model's kind, by name: `llama-2-` and `llama-` are two kinds."""
    presets = model_presets()
    own = next((option for option, preset in presets.items() if preset["name"] == config.model.name), "")
    kind = own.rpartition("-")[0]
    same = {option: preset for option, preset in presets.items() if kind and option.rpartition("-")[0] == kind}
    return {option: read_shape(preset["architecture"], f"model={option}") for option, preset in same.items()}


def _read_config(path: Path, name: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise _no_config(name, f"{path} is missing")
    return read_object(path, f"model.name={name}")


def _download_config(config: Config) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download  # slow to import

    model = config.model
    try:
        path = hf_hub_download(model.name, "config.json", revision=model.revision, cache_dir=model.cache_dir)
    except (OSError, ValueError) as error:
        raise _no_config(model.name, str(error)) from error
    return _read_config(Path(path), model.name)


def _no_config(name: str, reason: str) -> ConfigError:
    first = reason.strip().splitlines()[0].rstrip(".") if reason.strip() else "no reason given"
    return ConfigError(
        f"model.name={name}: its config.json cannot be had ({first}); choose a preset with model=NAME, or give the "
        "shape with model.weights=random and model.architecture.* fields"
    )


# The screen


def _print(found: Plan) -> None:
    config, setup, shape, memory, card = found.config, found.setup, found.training.shape, found.memory, found.card
    trained = f"LoRA r={setup.r}" if setup.r else "all weights"
    if setup.checkpointed:
        checkpointing = f"{setup.checkpointed} of {shape.layers} layers checkpointed"
        checkpointing += f" (inputs of {setup.offloaded} on the host)" if setup.offloaded else ""
    else:
        checkpointing = "no checkpointing"
    console.start_screen(
        [
            ("model", f"{config.model.name}: {shape.parameters / 1e9:,.2f} billion parameters"),
            ("card", f"{card.name}: {_gb(card.memory)} GB"),
            ("training", f"{trained}, {setup.optim}, {setup.rows} x {found.training.accumulation} rows of "
             f"{setup.length:,} tokens, {checkpointing}, {setup.step.value} step"),
        ]
    )  # fmt: skip
    _heading("Memory, GB")
    rows = [(name, memory.parts[name], "") for name in memory.parts if memory.parts[name]]
    rows += [("most that torch holds", memory.peak, f"at {memory.moment}"), ("context, gaps", memory.context, "")]
    _numbers(rows)
    left = card.memory - memory.needed
    verdict = f"fits, {_gb(left)} GB are left" if found.fits else f"does not fit: {_gb(-left)} GB are missing"
    style = "bold green" if found.fits else "bold red"
    console.say(Text.assemble(("  needed".ljust(30), "cyan"), _gb(memory.needed).rjust(8), "  ", (verdict, style)))
    if memory.paged:
        where = "on the card too" if memory.comfortable <= card.memory else "partly on the host, which costs time"
        _numbers([("paged optimizer states", memory.paged, where)])
    console.say()
    _heading("What fits")
    console.say_rows(_fitting(found))
    if not found.fits:
        console.say()
        _heading("The cheapest changes, one on top of the other")
        for change in found.changes:
            what = f"saves {_gb(change.saves)} GB -> {_gb(change.needed)} GB" + (", fits" if change.fits else "")
            console.say_rows([(change.overrides, f"{what} ({change.loses})")])
        if not any(change.fits for change in found.changes):
            console.say("  all of this is not enough: take a larger card")
    console.say()
    _heading("Time")
    console.say_rows(_times(found))
    if (paper := found.paper) is not None:
        console.say()
        _heading("Beside the paper, one row of 512 tokens with paged states")
        bits = 16 if found.setup.bf16_adapters else 32
        _numbers([("QLoRA paper", paper["paper_gb"] * 1e9, ""), ("this plan", paper["planned_gb"] * 1e9,
                  f"adapters and their gradients in {bits} bits")])  # fmt: skip


def _fitting(found: Plan) -> list[tuple[str, str]]:
    fewest, layers = fewest_checkpointed(found.training, found.card), found.training.shape.layers
    if fewest is None:
        words = "not even with all layers checkpointed"
        if found.fits:
            words = f"with all layers checkpointed and the inputs of {found.setup.offloaded} on the host"
    else:
        words = f"with at least {fewest} of {layers} layers checkpointed" if fewest else "without checkpointing"
    rows = [("this micro-batch", words)]
    for name, count in found.largest.items():
        plural = "row" if count == 1 else "rows"
        rows.append((name, f"up to {count:,} {plural} a micro-batch" if count else "not even one row"))
    return rows


def _times(found: Plan) -> list[tuple[str, str]]:
    speed, trainer = found.speed, found.config.trainer
    if speed is None:
        return [("tokens a second", f"unknown: {found.card.name} is not in the table of cards")]
    share = f"{EFFICIENCY[found.setup.step]:.0%} of the card's {found.card.tflops:,.0f} TFLOP/s"
    rows = [("tokens a second", f"{speed.tokens_per_second:,.0f} (the time goes into {speed.bound})")]
    if found.hours is None:
        rows.append(("whole training", "unknown: trainer.num_train_epochs counts rows, which are not read here"))
    else:
        step = found.setup.rows * found.training.accumulation
        time = format_duration(3600 * found.hours)
        rows.append(("whole training", f"{time} for {trainer.max_steps:,} steps of {step:,} rows"))
    return [*rows, ("assumed", f"matrix products at {share}, and every row {found.setup.length:,} tokens long")]


def _heading(text: str) -> None:
    console.say(Text(text, style="bold"))


def _numbers(rows: list[tuple[str, float, str]]) -> None:
    for name, value, note in rows:
        behind = f"  {note}" if note else ""
        console.say(Text.assemble((f"  {name}".ljust(30), "cyan"), _gb(value).rjust(8), (behind, "dim")))


def _gb(value: float) -> str:
    return f"{value / 1e9:,.2f}" if value < 1e12 else f"{value / 1e9:,.0f}"


def _without(item: Any, *names: str) -> dict[str, Any]:
    """Returns the fields of a dataclass but for those of `names`."""
    return {field.name: getattr(item, field.name) for field in fields(item) if field.name not in names}


def _result(found: Plan, folder: RunFolder) -> dict[str, Any]:
    memory, speed = found.memory, found.speed
    metrics = {
        "plan_peak_gb": memory.peak / 1e9,
        "plan_needed_gb": memory.needed / 1e9,
        "plan_paged_gb": memory.paged / 1e9,
        "plan_fits": float(found.fits),
        **({"plan_tokens_per_second": speed.tokens_per_second} if speed else {}),
        **({"plan_hours": found.hours} if found.hours is not None else {}),
    }
    quantization = found.config.quantization
    setup = {"bits": quantization.bits, "double_quant": quantization.double_quant, "wide": found.setup.fp32}
    setup |= {PLAN_KEYS.get(name, name): value for name, value in _without(found.setup, "base", "fp32").items()}
    del setup["targets"], setup["step"], setup["loss"]
    return {
        "status": "finished",
        "task": "plan",
        "objective": None,
        "metrics": metrics,
        "paths": {"plan": str(folder.result("plan"))},
        "card": asdict(found.card),
        "model": {**asdict(found.training.shape), "parameters": found.training.shape.parameters},
        "setup": {**setup, "step": found.setup.step.value},
        "parts_gb": {name: value / 1e9 for name, value in memory.parts.items()},
        "moment": memory.moment,
        "fewest_checkpointed_layers": fewest_checkpointed(found.training, found.card),
        "largest_micro_batch": found.largest,
        "changes": [{"words": change.overrides, **_without(change, "overrides")} for change in found.changes],
        "paper": found.paper,
    }
