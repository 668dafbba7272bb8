"""What fits on a GPU, and the cheapest changes to a training run that does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from qlora.config.schema import PlanStep
from qlora.experts.waiting import ROOM
from qlora.planning.adapter_targets import find_targets
from qlora.planning.gpus import Gpu
from qlora.planning.memory_plan import FRAGMENTS, Ledger, Memory, plan_memory
from qlora.planning.model_shape import Shape
from qlora.planning.setup import Setup
from qlora.quantization.bnb4.layout import stored_base

MOST_ROWS = 4096
SHORTEST_ROW = 256
LOWEST_RANK = 8
ANSWERING = 1e9
"""Bytes that a base which is not trained needs beside its weights: the tokens of answers or of held-out rows."""
EIGHT_BIT = {
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "lion_8bit", "paged_lion_8bit"), "paged_lion_8bit"),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), "paged_ademamix_8bit"
    ),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"), "rmsprop_bnb_8bit"),
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
        "paged_adamw_8bit",
    ),
}
"""The optimizer of least memory that computes the same."""


@dataclass(frozen=True)
class Training:
    """A setup and how many micro-batches make a step."""

    shape: Shape
    setup: Setup
    accumulation: int

    @property
    def memory(self) -> Memory:
        """What it needs."""
        return plan_memory(self.shape, self.setup)

    def fits(self, gpu: Gpu) -> bool:
        """Returns whether the GPU holds it, with paged states on the host."""
        return self.memory.needed <= gpu.memory


@dataclass(frozen=True)
class Change:
    """One step down."""

    overrides: str
    """The words of the command line that make it."""
    loses: str
    """What it costs."""
    saves: float
    """Bytes that it gives, after the changes before it."""
    needed: float
    """Bytes that a GPU must have then."""
    fits: bool


def fewest_checkpointed(training: Training, gpu: Gpu) -> int | None:
    """Returns the fewest decoder layers that must be checkpointed; None: all are not enough.

    transformers' own layers are checkpointed all or none.
    """
    layers = training.shape.layers
    counts = range(layers + 1) if training.setup.step is PlanStep.fast else (0, layers)
    return next((count for count in counts if _checkpointed(training, count).fits(gpu)), None)


def most_kept(training: Training, gpu: Gpu) -> int:
    """Returns in how many layers the experts can stay decoded, with paged states on the GPU."""
    most = Ledger(training.shape, training.setup).can_be_kept
    setups = (replace(training.setup, kept=count) for count in range(most, 0, -1))
    fits = (setup for setup in setups if replace(training, setup=setup).memory.comfortable <= gpu.memory)
    return next((setup.kept for setup in fits), 0)


def fewest_waiting(training: Training, gpu: Gpu, *, lean: bool) -> int:
    """Returns in how many layers the experts must wait in the host's memory; where all are not enough, all.

    `lean`: a budget may checkpoint all layers, and have their inputs wait too.
    """
    layers = training.shape.layers
    setup = replace(training.setup, checkpointed=layers, offloaded=layers) if lean else training.setup

    def fits(count: int) -> bool:
        return replace(training, setup=replace(setup, waiting=count)).fits(gpu)

    counts = _waiting_counts(training.shape, setup)
    return next(filter(fits, counts), counts[-1])


def fewest_waiting_untrained(shape: Shape, setup: Setup, free: float) -> int:
    """Returns in how many layers the experts must wait for a base that is not trained, with `free` bytes for it."""

    def fits(count: int) -> bool:
        return Ledger(shape, replace(setup, waiting=count)).untrained + ANSWERING <= free * (1 - FRAGMENTS)

    counts = _waiting_counts(shape, setup)
    return next(filter(fits, counts), counts[-1])


def _waiting_counts(shape: Shape, setup: Setup) -> list[int]:
    """Returns in how many layers experts can wait; a few would need as much room as they leave."""
    if shape.experts is None or setup.base.experts_bytes is None:
        return [0]
    return [0, *range(ROOM + 1, len(shape.experts.layers) + 1)]


def fewest_offloaded(training: Training, gpu: Gpu) -> int:
    """Returns of how many layers, all of them checkpointed, the inputs must wait in the host's memory: at most all."""
    layers = training.shape.layers
    setups = (replace(training.setup, checkpointed=layers, offloaded=count) for count in range(layers))
    fits = (replace(training, setup=setup).fits(gpu) for setup in setups)
    return next((count for count, fit in enumerate(fits) if fit), layers)


def largest_rows(training: Training, gpu: Gpu) -> int:
    """Returns the largest micro-batch that fits, in rows; 0: not even one row does."""
    low, high = 0, 1
    while high <= MOST_ROWS and _rows(training, high).fits(gpu):
        low, high = high, 2 * high
    high = min(high, MOST_ROWS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _rows(training, middle).fits(gpu) else (low, middle)
    return low


def changes(training: Training, gpu: Gpu, smaller: Mapping[str, Shape], *, length_key: str) -> Iterator[Change]:
    """Yields the cheapest changes in order, each on top of those before, until the training fits.

    `smaller` are the shapes of other models by their names; `length_key` is the key that decides the length of a row.
    """
    steps = (_checkpoint, _offload_experts, _fewer_rows, partial(_shorter, key=length_key), _smaller_states,
             _fewer_bits, _lower_rank, partial(_smaller_model, models=smaller))  # fmt: skip
    for step in steps:
        if (change := step(training, gpu)) is None:
            continue
        overrides, loses, changed = change
        previous, needed = training.memory.needed, changed.memory.needed
        if previous - needed < 1e6:
            continue
        yield Change(overrides, loses, previous - needed, needed, changed.fits(gpu))
        if changed.fits(gpu):
            return
        training = changed


Step = tuple[str, str, Training] | None
"""The overrides of a change, what it costs, and the training after it; None: there is nothing to change."""


def _checkpoint(training: Training, gpu: Gpu) -> Step:
    layers = training.shape.layers
    if training.setup.checkpointed == layers:
        return None
    return "trainer.gradient_checkpointing=true", "about a third more time", _checkpointed(training, layers)


def _offload_experts(training: Training, gpu: Gpu) -> Step:
    if training.setup.waiting or not (count := fewest_waiting(training, gpu, lean=False)):
        return None
    changed = replace(training, setup=replace(training.setup, waiting=count))
    return "quantization.experts_offload=auto", "time to copy experts, where the layers compute too briefly", changed


def _fewer_rows(training: Training, gpu: Gpu) -> Step:
    """Takes the largest micro-batch that fits and makes up the same step, or one row."""
    step = training.setup.rows * training.accumulation
    most = min(largest_rows(training, gpu), training.setup.rows)
    micro = max((rows for rows in range(1, most + 1) if step % rows == 0), default=1)
    overrides = f"trainer.per_device_train_batch_size={micro} trainer.gradient_accumulation_steps={step // micro}"
    setup = replace(training.setup, rows=micro, accumulates=step > micro)
    return overrides, "speed; the same rows a step", Training(training.shape, setup, step // micro)


def _shorter(training: Training, gpu: Gpu, *, key: str) -> Step:
    changed = _halved(training, gpu, "length", SHORTEST_ROW)
    return f"{key}={changed.setup.length}", "longer rows are cut", changed


def _smaller_states(training: Training, gpu: Gpu) -> Step:
    same = EIGHT_BIT.get(training.setup.optim)
    optim = same or "paged_adamw_8bit"
    changed = replace(training, setup=replace(training.setup, optim=optim, optim_args={}))
    loses = "states are rounded to 8 bits" if same else "AdamW takes its place, with states in 8 bits"
    return f"trainer.optim={optim}", loses, changed


def _fewer_bits(training: Training, gpu: Gpu) -> Step:
    base = stored_base(double_quant=True, unquantized_bytes=training.setup.width, experts=True)
    setup = replace(training.setup, base=base)
    if setup.r == 0:
        setup = replace(setup, r=64, targets=find_targets(training.shape, ["all-linear"]))
        changed = replace(training, setup=setup)
        return "lora=all-linear quantization=nf4", "an adapter is trained instead of all weights", changed
    return "quantization=nf4", "the base is rounded to 4 bits, and its scales to 8", replace(training, setup=setup)


def _lower_rank(training: Training, gpu: Gpu) -> Step:
    """Halves the rank, and that of adapters on experts with it."""
    first, setup = training.setup, training.setup
    if setup.kind is not None and not setup.kind.has_rank:
        return None
    while setup.r > LOWEST_RANK and not training.fits(gpu):
        rank = max(setup.r // 2, LOWEST_RANK)
        expert_rank = max(first.expert_r * rank // first.r, 1) if first.expert_r else 0
        setup = replace(setup, r=rank, expert_r=expert_rank)
        training = replace(training, setup=setup)
    on_experts = f" lora.expert_r={setup.expert_r}" if setup.expert_r else ""
    return f"lora.r={setup.r}{on_experts}", "adapters of a smaller rank", training


def _smaller_model(training: Training, gpu: Gpu, *, models: Mapping[str, Shape]) -> Step:
    """Takes the largest of the models that fits."""
    for name, shape in sorted(models.items(), key=lambda option: -option[1].parameters):
        setup = replace(training.setup, targets=find_targets(shape, ["all-linear"]), ranks=(),
                        checkpointed=shape.layers)  # fmt: skip
        changed = Training(shape, setup, training.accumulation)
        if shape.parameters < training.shape.parameters and changed.fits(gpu):
            return f"model={name}", "a smaller model", changed
    return None


def _checkpointed(training: Training, count: int) -> Training:
    return replace(training, setup=replace(training.setup, checkpointed=count, offloaded=0))


def _halved(training: Training, gpu: Gpu, name: str, least: int) -> Training:
    """Returns the training with a number of its setup halved until it fits, or down to `least`."""
    value = getattr(training.setup, name)
    while value > least and not training.fits(gpu):
        value = max(value // 2, least)
        training = replace(training, setup=replace(training.setup, **{name: value}))
    return training


def _rows(training: Training, rows: int) -> Training:
    return replace(training, setup=replace(training.setup, rows=rows))
