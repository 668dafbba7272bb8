"""How long a training run takes, from its matmuls; calibrated on one H200, so a rough guide."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from qlora.config.schema import PlanStep
from qlora.planning.gpus import Gpu
from qlora.planning.memory_plan import Ledger
from qlora.planning.model_shape import Shape
from qlora.planning.setup import Setup

EFFICIENCY = {PlanStep.plain: 0.28, PlanStep.fast: 0.5}
"""Fraction of a GPU's peak matmul speed that steps of many tokens reach."""
LAUNCHES = {PlanStep.plain: 7e-3, PlanStep.fast: 1.5e-3}
"""Seconds that the host needs to start the kernels of one layer in one pass; few tokens wait for it."""
HOST_BANDWIDTH = 25e9
"""Bytes a second from the host's memory to a GPU: PCIe 4.0 with 16 lanes, of which an H200 has the double."""


@dataclass(frozen=True)
class Speed:
    """The time of one micro-batch, forward and backward."""

    operations: float
    """Floating-point operations."""
    seconds: float
    tokens_per_second: float
    bound: str
    """What the time is spent on: `matrix products`, `starting kernels` or `copying experts` from the host."""


def plan_speed(shape: Shape, setup: Setup, gpu: Gpu) -> Speed | None:
    """Returns the time of a micro-batch; None for a GPU whose speed is unknown."""
    if gpu.tflops is None or gpu.bandwidth is None:
        return None
    operations = setup.tokens * operations_per_token(shape, setup)
    matmul_seconds = operations / (EFFICIENCY[setup.step] * gpu.tflops * 1e12)
    again = setup.checkpointed / shape.layers
    if setup.base.is_quantized:  # each pass reads the weights, writes them decoded, and reads those
        decoded = shape.linear_weights + _decoded_experts(shape, setup)
        matmul_seconds += (2 + again) * decoded * (setup.base.weight_bytes + 2 * setup.width) / (gpu.bandwidth * 1e9)
    if (experts := shape.experts) is not None:  # rows that are written sorted, and read again
        width = 2 * experts.hidden + 6 * experts.intermediate
        routed = len(experts.layers) * setup.tokens * experts.per_token * width * setup.width
        matmul_seconds += (3 + again) * routed / (gpu.bandwidth * 1e9)
    launches = (2 + again) * shape.layers * LAUNCHES[setup.step]
    copies = (2 + again) * Ledger(shape, setup).on_host / HOST_BANDWIDTH
    kinds = {"matrix products": matmul_seconds, "starting kernels": launches, "copying experts": copies}
    bound, seconds = max(kinds.items(), key=lambda kind: kind[1])
    return Speed(operations, seconds, setup.tokens / seconds, bound)


def _decoded_experts(shape: Shape, setup: Setup) -> float:
    """Returns the weights of experts that a pass decodes: of few tokens only those of their experts."""
    if shape.experts is None or setup.base.experts_bytes is None:
        return 0
    packed = shape.expert_weights - setup.kept * shape.experts.weights
    return packed * min(1.0, setup.tokens * shape.experts.per_token / shape.experts.count)


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the matmuls of a forward and a backward pass."""

    per_token: float
    per_pair: dict[int | None, float]
    """By how far back layers look (None: to the first token), for each token and each token that it sees, itself
    included."""
    output: float = 0.0
    """Those of the output layer in `per_token`, which a token without a label does not need."""

    def total(self, tokens: int, *pairs: int) -> float:
        """Returns the operations of a number of tokens, and of the pairs for each of `per_pair`."""
        return self.per_token * tokens + sum(map(operator.mul, self.per_pair.values(), pairs))


def count_operations(shape: Shape, adapters: int, again: float = 0.0, attends_again: float | None = None) -> Operations:
    """Returns the operations with `adapters` parameters in adapters; 0: all weights are trained.

    Of a mixture's experts, and of their adapters, those count that compute a token (`active_adapters`). A matmul of n
    weights takes 2 n a token. The backward pass takes as many for frozen weights and twice as many for trained ones,
    2.5 times those of attention, and twice those of a recurrence's state. `again` is how often layers do
    their forward pass once more, on average, and `attends_again` how often attention does; None: as often.
    """
    attends_again = again if attends_again is None else attends_again
    frozen = 4 if adapters else 6
    output = shape.hidden * shape.vocabulary
    mixers = [(mixer, shape.counts[kind]) for kind, layer in enumerate(shape.kinds) for mixer in layer.mixers]
    state = sum(count * mixer.state for mixer, count in mixers)
    products = (frozen + 2 * again) * shape.active_weights + frozen * output + (6 + 2 * again) * (adapters + state)
    pairs: dict[int | None, float] = dict.fromkeys(shape.windows, 0.0)
    for mixer, count in mixers:
        if mixer.queries:
            pairs[mixer.window] += (3.5 + attends_again) * 2 * count * (mixer.queries + mixer.values)
    return Operations(products, pairs, frozen * output)


def active_adapters(shape: Shape, trained: int, on_experts: int) -> int:
    """Returns how many of the `trained` parameters compute a token; `on_experts` are those of adapters on experts."""
    if shape.experts is None:
        return trained
    return trained - on_experts + round(on_experts * shape.experts.per_token / shape.experts.count)


def operations_per_token(shape: Shape, setup: Setup) -> float:
    """Returns the operations a token in rows of `setup.length` tokens, with those of checkpoints and the reference."""
    ledger = Ledger(shape, setup)
    adapters = active_adapters(shape, ledger.trained_count, ledger.trained_on_experts) if setup.r else 0
    again = setup.checkpointed / shape.layers
    attends_again = again * (max(map(ledger.activations.outputs, range(shape.layers))) == 0)  # else they are kept
    operations = count_operations(
        shape, adapters, again + setup.reference_passes, attends_again + setup.reference_passes
    )
    left_out = 1 - setup.target_share if setup.step is PlanStep.fast else 0  # transformers computes all logits
    pairs = sum(count * _seen(setup.length, window) for window, count in operations.per_pair.items())
    return operations.per_token - left_out * operations.output + pairs


def _seen(length: int, window: int | None) -> float:
    """Returns how many tokens a token of a row sees on average: half of them, or nearly all of a shorter window."""
    return length / 2 if window is None or window >= length else window * (1 - window / (2 * length))
