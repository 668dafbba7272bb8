"""The plan of a training run: what of a config decides memory and time, and what both come to on a GPU.

Needs no torch for the architectures of the table of families, so that it answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora.config.options import model_presets
from qlora.config.paths import cache_root
from qlora.config.registries.rope_scaling import scaled_context
from qlora.config.schema import (
    BaseProducts,
    ComputeDtype,
    Config,
    ExpertsOffload,
    LoraDtype,
    Parallel,
    PlanStep,
    Weights,
    described_settings,
)
from qlora.config.schema.head import planned_outputs
from qlora.config.training_length import TokenCount, TrainingLength, training_length
from qlora.errors import DataError, ResourceError
from qlora.models.context import fit_rows
from qlora.models.json_files import read_object
from qlora.models.model_files import is_local, locate
from qlora.models.whole_names import choose_whole
from qlora.planning.adapter_targets import adapter_rank, choose_targets, find_expert_rank, find_ranks
from qlora.planning.advice import (
    Change,
    Training,
    changes,
    fewest_checkpointed,
    fewest_offloaded,
    fewest_waiting,
    largest_rows,
    most_kept,
)
from qlora.planning.built_shape import build_modules
from qlora.planning.gpus import Gpu, find_gpu
from qlora.planning.memory_plan import CONTEXT, Memory, Setup
from qlora.planning.model_shape import Shape
from qlora.planning.read_shape import read_shape
from qlora.planning.time_plan import Speed, plan_speed
from qlora.quantization.method import find_method
from qlora.text import parse_size
from qlora.upstream.huggingface_hub import read_cache_without_network, why_offline

EMBEDDED = "tiny"
INDEX = re.compile(r"\.\d+\.")
"""In the names of modules within a decoder layer."""
PAPER = {"llama-7b": 6.9, "llama-13b": 11.3, "llama-33b": 24.7, "llama-65b": 45.0}
"""The memory that each model needs in the QLoRA paper (arXiv 2305.14314), 10^9 bytes: one row of 512 tokens, with
paged states."""


@dataclass(frozen=True)
class Plan:
    """A training run on a GPU."""

    config: Config
    training: Training
    gpu: Gpu
    length: TrainingLength | None
    """Its steps and epochs; None: the rows are not known here."""
    tokens: TokenCount | None = None
    """The tokens of its rows; None: they were not counted, so every row is taken to be full."""

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
        """The time of a micro-batch of rows as long as they are; None for a GPU whose speed is unknown."""
        if self.tokens is None:
            return plan_speed(self.training.shape, self.setup, self.gpu)
        units, padded, targets = self.tokens.units, self.tokens.padded, self.tokens.targets
        fraction = 1.0 if targets is None else min(targets / max(units * padded, 1), 1.0)
        setup = replace(self.setup, length=max(round(padded), 1), target_share=fraction)
        speed = plan_speed(self.training.shape, setup, self.gpu)
        without_padding = self.setup.rows * self.tokens.tokens / units / self.setup.shared_by
        return speed and replace(speed, tokens_per_second=without_padding / speed.seconds)

    @property
    def room(self) -> Gpu:
        """The GPU without what is not there for tensors that torch counts: a budget holds paged states, too."""
        return self.gpu if self.config.trainer.memory_budget is None else without_paged(self.gpu, self.training)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds it."""
        return self.training.fits(self.gpu)

    @property
    def steps(self) -> int | None:
        """The optimizer steps; None: they follow from rows that are not known here."""
        return self.config.trainer.max_steps if self.length is None else self.length.steps

    @property
    def hours(self) -> float | None:
        """How long the steps of the whole training take; None where their number or the GPU's speed is unknown."""
        if self.speed is None or self.steps is None:
            return None
        return self.steps * self.training.accumulation * self.speed.seconds / 3600

    @cached_property
    def most_rows(self) -> dict[str, int]:
        """The most rows of a micro-batch, by what is checkpointed."""
        layers = self.training.shape.layers
        kinds = {"no layer checkpointed": 0, f"all {layers} layers checkpointed": layers}
        runs = {name: change(self.training, checkpointed=count, offloaded=0, kept=0) for name, count in kinds.items()}
        return {name: largest_rows(training, self.room) for name, training in runs.items()}

    @cached_property
    def changes(self) -> list[Change]:
        """The cheapest changes, if it does not fit."""
        if self.fits:
            return []
        key = "data.pack_length" if self.config.data.packing else "data.max_length"
        key = "plan.length" if self.config.plan.length else key
        return list(changes(self.training, self.gpu, _smaller(self.config), length_key=key))

    @property
    def paper(self) -> dict[str, float] | None:
        """What the paper measured for this model, and what is planned for the same row; None for another model."""
        preset = next((option for option in PAPER if model_presets()[option]["name"] == self.config.model.name), None)
        if preset is None or self.config.model.weights is Weights.random:
            return None
        layers = self.training.shape.layers
        same = change(self.training, rows=1, length=512, most_targets=None, checkpointed=layers).memory
        return {"paper_gb": PAPER[preset], "planned_gb": (same.peak + same.paged) / 1e9}


def build_plan(config: Config, rows: int | None = None, tokens: TokenCount | None = None) -> Plan:
    """Returns the plan of a training run on `rows` rows, where they are known; `tokens` are those of its rows.

    Raises a `UserError` where another part of it is not known.
    """
    if tokens is not None:
        units, unit = tokens.units, tokens.unit
    else:
        units, unit = rows or 0, "packs" if config.data.streaming and config.data.packing else "rows"
    is_stream = config.data.streaming
    length = training_length(config.trainer, units, unit=unit, is_stream=is_stream) if units or is_stream else None
    gpu = find_gpu(config.plan.device)
    shape = find_shape(config)
    setup = read_setup(config, shape)
    if tokens is not None:
        setup = replace(setup, most_targets=tokens.most_targets, attended=tokens.attended)
    training = Training(shape, setup, config.trainer.gradient_accumulation_steps)
    budget = config.trainer.memory_budget
    if (size := parse_size(budget or "auto")) is not None:
        gpu = replace(gpu, memory=min(gpu.memory, size + CONTEXT))
    training = change(training, waiting=find_waiting(config, training, gpu))
    if budget is None:
        return Plan(config, training, gpu, length, tokens)
    room = without_paged(gpu, training)
    if (fewest := fewest_checkpointed(training, room)) is not None:
        training = change(training, checkpointed=fewest)
        kept = 0 if fewest else most_kept(training, gpu)
        return Plan(config, change(training, kept=kept), gpu, length, tokens)
    offloaded = fewest_offloaded(training, room)
    return Plan(config, change(training, checkpointed=shape.layers, offloaded=offloaded), gpu, length, tokens)


def find_waiting(config: Config, training: Training, gpu: Gpu) -> int:
    """Returns in how many layers the experts wait in the host's memory, as `quantization.experts_offload` asks."""
    is_auto, model = config.quantization.experts_offload is ExpertsOffload.auto, config.model
    if not is_auto or config.trainer.parallel is Parallel.fsdp or model.device_map or model.max_memory:
        return training.setup.waiting
    if not find_method(config.quantization).offloads_experts:
        return 0
    return fewest_waiting(training, gpu, lean=config.trainer.memory_budget is not None)


def find_shape(config: Config) -> Shape:
    """Returns the shape of `model.architecture`, or of the `config.json` of another model than a preset's.

    Raises `DataError` for one that is incomplete, and `ResourceError` where it cannot be downloaded.
    """
    shape, scaling = read_shape(*_described(config)), config.model.rope_scaling
    return shape if scaling is None else replace(shape, context=scaled_context(scaling, shape.context) or shape.context)


@dataclass(frozen=True)
class WholeChoice:
    """The modules that train whole beside an adapter."""

    shapes: tuple[tuple[int, ...], ...] = ()
    """Those of their tensors."""
    has_output: bool = False
    """Whether the output layer is one of them, which needs the logits of all tokens."""
    slows: bool = False
    """Whether parts of the fast step stay off: `fused_loss` there, and `compile` with modules inside of layers."""


def find_whole(config: Config, shape: Shape, targets: tuple[frozenset[str], ...]) -> WholeChoice:
    """Returns the modules that `lora.modules_to_save` means.

    Raises `ConfigError` for what the model does not have, and for modules that cannot train whole. transformers builds
    the model without its weights, which imports torch.
    """
    if not config.lora.modules_to_save:
        return WholeChoice()
    modules = build_modules(*_described(config))
    named = [(name, linear) for layer in range(shape.layers) for name, linear in shape.full_names(layer).items()]
    packed = find_method(config.quantization).is_quantized
    adapted = {
        name
        for layer, chosen in enumerate(targets)
        for name, linear in shape.full_names(layer).items()
        if linear.name in chosen
    }
    quantized = {name for name, linear in named if packed and linear.is_quantized}
    chosen = choose_whole(
        config.lora.modules_to_save, modules.shapes, tied=modules.tied, quantized=quantized, adapted=adapted
    )
    return WholeChoice(
        tuple(tuple(tensor) for name in chosen for tensor in modules.shapes[name]),
        has_output=modules.output in chosen,
        slows=any(name == modules.output or INDEX.search(f"{name}.") for name in chosen),
    )


def _described(config: Config) -> tuple[Mapping[str, Any], str, Path, Mapping[str, Any] | None]:
    """Returns the settings of the model, what names them in errors, the folder of layouts, and their options."""
    model = config.model
    architecture = described_settings(model.architecture) if model.architecture is not None else None
    options = model.architecture.options if model.architecture is not None else None
    cache = cache_root(config.data.cache_dir) / "shapes"
    if model.weights is Weights.random or model.name == EMBEDDED:
        assert architecture is not None
        return architecture, "model.architecture", cache, options
    location, where = locate(model.name), f"model.name={model.name}"
    if is_local(location):
        return _read_config(Path(location) / "config.json", model.name), where, cache, None
    # A model named on the command line alone still has the architecture of the default preset.
    if architecture is not None and architecture != _default_architecture():
        return architecture, "model.architecture", cache, options
    return _download_config(config), where, cache, None


def read_setup(config: Config, shape: Shape) -> Setup:
    """Returns what decides the memory of the training."""
    quantization, lora, trainer = config.quantization, config.lora, config.trainer
    data, offload = fit_rows(config.data, shape.context), quantization.experts_offload
    targets = choose_targets(shape, lora) if lora.enabled else ()
    whole = find_whole(config, shape, targets)
    return Setup(
        base=find_method(quantization).stored_base(quantization),
        fp32=quantization.compute_dtype is ComputeDtype.fp32,
        r=adapter_rank(lora) if lora.enabled else 0,
        targets=targets,
        ranks=find_ranks(shape, targets, lora.rank_pattern) if lora.enabled else (),
        frozen_a=lora.freeze_a,
        kind=lora.other_kind,
        options=lora.other_kind.filled(lora.options) if lora.other_kind is not None else {},
        expert_r=find_expert_rank(shape, lora) if lora.enabled else 0,
        dora=lora.use_dora,
        bf16_adapters=lora.dtype is LoraDtype.bf16,
        dropout=lora.dropout > 0,
        optim=trainer.optim,
        optim_args=trainer.optim_args,
        rows=trainer.per_device_train_batch_size,
        length=config.plan.length or data.pack_length or data.longest_row or shape.context,
        accumulates=trainer.gradient_accumulation_steps > 1,
        checkpointed=shape.layers if trainer.gradient_checkpointing else 0,
        whole=whole.shapes,
        trains_output=whole.has_output,
        step=_find_step(config, shape, slowed=whole.slows),
        graphs=trainer.asks_for_graphs(shape.hidden, is_mixture=shape.experts is not None),
        fp8=quantization.compute is BaseProducts.fp8,
        guarded=config.watchdog.nonfinite.keeps_out,
        reference_passes=_reference_passes(config),
        head_outputs=planned_outputs(config.head, config.loss, config.data),
        loss=config.loss,
        shared_by=trainer.context_parallel,
        waiting=len(shape.experts.layers) if offload is ExpertsOffload.all and shape.experts is not None else 0,
    )


def _reference_passes(config: Config) -> float:
    """Returns the forward passes with the reference for each step, those before the first step spread over all."""
    loss, epochs = config.loss, config.trainer.num_train_epochs or 1
    if not loss.compares:
        return 0
    return 1 / max(epochs, 1) if loss.can_cache_reference and loss.cache_reference is not False else 1


def _find_step(config: Config, shape: Shape, *, slowed: bool) -> PlanStep:
    """Returns how the step is computed on a GPU: fast where no part is switched off and the layers allow it.

    `slowed`: modules that train whole switch one off.
    """
    if config.plan.step is not PlanStep.auto:
        return config.plan.step
    trainer, lora = config.trainer, config.lora
    parts: tuple[Any, ...] = (trainer.compile, trainer.fused_linear, trainer.fused_attention, trainer.fused_loss)
    if shape.experts is not None:
        parts = (*parts, trainer.fused_experts)
    plain_adapter = lora.enabled and not lora.use_dora and lora.other_kind is None and not slowed
    can_fuse = find_method(config.quantization).fast_step_unsupported_reason() is None
    return PlanStep.fast if can_fuse and plain_adapter and False not in parts else PlanStep.plain


def without_paged(gpu: Gpu, training: Training) -> Gpu:
    """Returns the GPU without the room that paged states take."""
    return replace(gpu, memory=gpu.memory - training.memory.paged)


def change(training: Training, **changed: Any) -> Training:
    return replace(training, setup=replace(training.setup, **changed))


def _default_architecture() -> dict[str, Any]:
    return described_settings(model_presets()[EMBEDDED]["architecture"])


def _smaller(config: Config) -> dict[str, Shape]:
    """Returns the shapes of the presets of the model's kind, by name: `llama-2-` and `llama-` are two kinds."""
    presets = model_presets()
    preset_name = next((option for option, preset in presets.items() if preset["name"] == config.model.name), "")
    kind = preset_name.rpartition("-")[0]
    cache = cache_root(config.data.cache_dir) / "shapes"
    same = {option: preset for option, preset in presets.items() if kind and option.rpartition("-")[0] == kind}
    return {
        option: read_shape(described_settings(preset["architecture"]), f"model={option}", cache)
        for option, preset in same.items()
    }


def _read_config(path: Path, name: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise DataError(_no_config(name, f"{path} is missing"))
    return read_object(path, f"model.name={name}")


def _download_config(config: Config) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download  # slow to import

    model = config.model
    read_cache_without_network()
    try:
        path = hf_hub_download(model.name, "config.json", revision=model.revision, cache_dir=model.cache_dir)
    except (OSError, ValueError) as error:
        raise ResourceError(_no_config(model.name, why_offline() or str(error))) from error
    return _read_config(Path(path), model.name)


def _no_config(name: str, reason: str) -> str:
    first = reason.strip().splitlines()[0].rstrip(".") if reason.strip() else "no reason given"
    return (
        f"model.name={name}: its config.json is not available ({first}); choose a preset with model=NAME, or give the "
        "shape with model.weights=random and model.architecture.* fields"
    )
