"""What decides the memory and the time of a training run, beside the shape of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.config.registries.adapter_kinds import AdapterKind
from qlora.config.schema import LossConfig, PlanStep
from qlora.quantization.stored_base import StoredBase
from qlora.runtime.long_rows import is_long


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a training run beside the model's shape."""

    base: StoredBase
    fp32: bool
    """Whether matrix products are in 32 bits instead of 16."""
    r: int
    """Rank of the adapters; 0: all weights are trained."""
    targets: tuple[frozenset[str], ...]
    """For each decoder layer, the linear layers with an adapter."""
    dora: bool
    bf16_adapters: bool
    """Whether the adapters are stored in 16 bits."""
    dropout: bool
    optim: str
    rows: int
    """Rows a micro-batch."""
    length: int
    """Tokens a row."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are there already."""
    checkpointed: int
    """Decoder layers, the first ones, that compute their activations again in the backward pass."""
    step: PlanStep
    graphs: bool = False
    """Whether checkpointed layers are computed by CUDA graphs."""
    fp8: bool = False
    """Whether the matmuls with the base are in 8 bits."""
    guarded: bool = False
    """Whether the previous weights are kept during the optimizer's step, to undo an update."""
    offloaded: int = 0
    """How many of the checkpointed layers, the first ones, have their inputs wait in the host's memory."""
    kept: int = 0
    """Layers with experts whose experts stay decoded from pass to pass."""
    waiting: int = 0
    """Layers whose experts wait in the host's memory."""
    expert_r: int = 0
    """Rank of the adapters on the experts of a mixture; 0: they have none."""
    most_targets: int | None = None
    """The most tokens of a row that the loss counts; None: all of them."""
    target_share: float = 1.0
    """The share of the tokens that the loss counts."""
    attended: float = 1.0
    """Tokens in attention for each token that layers compute: more than 1 where answers share their prompts."""
    reference_passes: float = 0.0
    """Forward passes with the reference for each step: 1, or fewer where it is computed once for several epochs."""
    ranks: tuple[frozenset[tuple[str, int]], ...] = ()
    """For each decoder layer, the linear layers whose adapter has another rank than `r`, with it; (): none has."""
    frozen_a: bool = False
    """Whether the A matrices of the adapters stay as they are drawn."""
    kind: AdapterKind | None = None
    """The kind of the adapters where it is not LoRA."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The settings of that kind."""
    whole: tuple[tuple[int, ...], ...] = ()
    """The shapes of the tensors of modules that train whole beside the adapters."""
    trains_output: bool = False
    """Whether the output layer is one of them."""
    head_outputs: int = 0
    """The numbers that a head makes of a text; 0: there is no matrix for them."""
    shared_by: int = 1
    """Processes that share each row."""
    optim_args: Mapping[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    """The training objective, which knows what its loss needs."""

    @property
    def tokens(self) -> int:
        """Tokens a micro-batch that one process computes."""
        return -(-self.rows * self.length // self.shared_by)

    @property
    def loss_tokens(self) -> int | None:
        """The most tokens of those that the loss counts; None: all of them."""
        if self.most_targets is None:
            return None
        return min(self.rows * min(self.most_targets, self.length), self.tokens)

    @property
    def is_long(self) -> bool:
        """Whether checkpointed layers compute their feed-forward layer in chunks and attention once."""
        return self.step is PlanStep.fast and is_long(-(-self.length // self.shared_by))

    @property
    def width(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.fp32 else 2
