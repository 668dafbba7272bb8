"""The memory of a layer's experts in a pass: a row for each token and each of its experts.

The plain sizes follow `qlora.experts`, the fast ones `qlora.step.kernels.experts`. Tests compare the
plain ones with real modules.
"""

from __future__ import annotations

from qlora.config.schema import PlanStep
from qlora.experts.ranks import kernel_rank
from qlora.planning.mixture import Experts
from qlora.planning.setup import Setup


class RoutedRows:
    """What the experts of one layer keep and need, in bytes."""

    def __init__(self, experts: Experts, setup: Setup) -> None:
        self.experts, self.setup = experts, setup
        self.rows = setup.tokens * experts.per_token
        self.is_fast = setup.step is PlanStep.fast
        self.rank = setup.expert_r if not self.is_fast or not setup.expert_r else kernel_rank(setup.expert_r)

    @property
    def saved(self) -> float:
        """What the experts keep for the backward pass, with the router's scores and the copies of adapters."""
        chosen = self.experts.per_token * (8 + 4)  # the experts of a token, and what each counts
        scores = self.setup.tokens * (self.experts.count * 4 + chosen)
        return scores + self.copies + (self._saved_fast if self.is_fast else self._saved_plain)

    @property
    def _saved_plain(self) -> float:
        """The sorted rows where something trained reads them, what the activation keeps, and the outputs unsorted."""
        experts, setup, c = self.experts, self.setup, self.setup.width
        is_trained = setup.r == 0
        inputs = experts.hidden + experts.intermediate
        read = inputs * c if is_trained or setup.expert_r else 0
        masks = inputs if setup.expert_r and setup.dropout else 0
        act = experts.family.act_widths * experts.intermediate * c
        order = 3 * 8  # each row's index among the unsorted and its expert; and of each unsorted row its index
        return self.rows * (read + masks + act + 2 * self.rank * c + experts.hidden * c + order)

    @property
    def _saved_fast(self) -> float:
        """The outputs of gate and up, from which the rest is computed again, and the adapters' narrow products."""
        experts, setup, c = self.experts, self.setup, self.setup.width
        dropped = setup.dropout and setup.expert_r > 0
        read = (setup.tokens * experts.hidden + self.rows * experts.intermediate) * c if dropped else 0
        order = 8 + 4 + 4  # each row's index among the unsorted and its token; and of each unsorted row its index
        return self.rows * (2 * experts.intermediate * c + 2 * self.rank * c + order) + read

    @property
    def copies(self) -> float:
        """The copies of the adapters' matrices: of a kernel's dtype and rank, and B scaled."""
        experts, setup = self.experts, self.setup
        if not setup.expert_r:
            return 0
        a, b = experts.hidden + experts.intermediate, experts.hidden + 2 * experts.intermediate
        converts = not (setup.bf16_adapters or setup.fp32)
        copied = 0
        if converts or (self.is_fast and self.rank > setup.expert_r):
            copied += a
        if converts or self.is_fast:
            copied += b
        return experts.count * self.rank * copied * setup.width

    @property
    def backward(self) -> float:
        """What the backward pass needs beyond what was kept, at its larger end: that of gate and up."""
        experts, c = self.experts, self.setup.width
        gate_up, hidden = 2 * experts.intermediate * c * self.rows, experts.hidden * c * self.rows
        if self.is_fast:  # the gradients of the outputs and of the rows, which are not summed yet
            eighth = gate_up / c if self.setup.fp8 else 0
            return gate_up + eighth + hidden + self.decoded
        adapted = 2 * hidden if self.setup.expert_r else 0  # the adapter's own gradient of the rows, and the sum
        return max(gate_up + hidden + self.decoded, gate_up + hidden + adapted)

    @property
    def decoded(self) -> float:
        """The weights of gate and up of all experts as a matmul reads them, and what decoding them takes."""
        experts, setup = self.experts, self.setup
        elements = 2 * experts.intermediate * experts.hidden * experts.count
        if setup.base.experts_bytes is None or setup.kept >= len(experts.layers):
            return 0
        if self.is_fast:
            return elements * (1 if setup.fp8 else setup.width)
        return elements * (1.5 * setup.width + setup.base.decoding_bytes / 2)  # one of the two at a time
