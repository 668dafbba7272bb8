"""How long a training takes, from its matrix products; measured on one H200, so take it as a rough guide."""

from __future__ import annotations

from dataclasses import dataclass

from qlora.planning.cards import Card
from qlora.planning.memory import Ledger, Setup
from qlora.planning.shape import Shape
from qlora.schema import PlanStep

EFFICIENCY = {PlanStep.plain: 0.28, PlanStep.fast: 0.5}
"""Share of a card's matrix products that steps of many tokens reach."""
LAUNCHES = {PlanStep.plain: 7e-3, PlanStep.fast: 1.5e-3}
"""Seconds that the host needs to start the kernels of one layer in one pass; few tokens wait for it."""


@dataclass(frozen=True)
class Speed:
    """The time of one micro-batch, forward and backward."""

    operations: float
    """Floating-point operations."""
    seconds: float
    tokens_per_second: float
    bound: str
    """What the time is spent on: `matrix products` or `starting kernels`."""


def plan_speed(shape: Shape, setup: Setup, card: Card) -> Speed | None:
    """Returns the time of a micro-batch; None for a card whose speed is unknown."""
    if card.tflops is None or card.bandwidth is None:
        return None
    operations = setup.tokens * operations_per_token(shape, setup)
    products = operations / (EFFICIENCY[setup.step] * card.tflops * 1e12)
    again = setup.checkpointed / shape.layers
    if setup.bits < 16:  # each pass reads the weights, writes them decoded, and reads those
        products += (2 + again) * shape.linear_weights * (setup.bits / 8 + 2 * setup.width) / (card.bandwidth * 1e9)
    launches = (2 + again) * shape.layers * LAUNCHES[setup.step]
    seconds = max(products, launches)
    bound = "matrix products" if products >= launches else "starting kernels"
    return Speed(operations, seconds, setup.tokens / seconds, bound)


def operations_per_token(shape: Shape, setup: Setup) -> float:
    """Returns the operations of the forward and the backward pass; a product of n weights takes 2 n a token.

    The backward pass takes as many for frozen weights and twice as many for trained ones, and 2.5 times those of causal
    attention; a checkpointed layer does its forward pass again.
    """
    again = setup.checkpointed / shape.layers
    output = shape.hidden * shape.vocabulary
    attention = 4 * shape.queries * setup.length / 2 * shape.layers
    if setup.r == 0:
        return (6 + 2 * again) * shape.linear_weights + 6 * output + (3.5 + again) * attention
    adapters = Ledger(shape, setup).trained_count
    return (4 + 2 * again) * shape.linear_weights + 4 * output + (6 + 2 * again) * adapters + (3.5 + again) * attention
