"""What a training step needs of a GPU's memory, part by part.

The sizes follow what the libraries allocate: bitsandbytes 0.50 (weights, optimizer states), PEFT 0.21 (adapters),
torch's autograd on a GPU (tensors kept for the backward pass). Tests compare each part with real modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from qlora.config.schema import LossConfig, PlanStep
from qlora.objectives import TokenWork, build_objective
from qlora.planning.model_shape import Linear, Shape

BLOCK, GROUP = 64, 256
"""4-bit weights that share a scale, and scales that share one with double quantization."""
CONTEXT = 0.6e9
"""Bytes of a CUDA context with the libraries' kernels, which torch does not count."""
FRAGMENTS = 0.03
"""Share of torch's memory that lies between its tensors."""
WORKSPACE = 64 * 2**20
"""Bytes that torch sets aside for cuBLAS (twice 32 MiB on Hopper, less before)."""
PIECE = 2**27
"""Most bytes that the `fast` step decodes at a time in 16 bits."""
OPTIMIZER_STEP = "the optimizer's step"
"""The moment that has no activations."""
PAGED_FROM, EIGHT_BIT_FROM = 100_000, 4096
"""Elements from which bitsandbytes pages a state, and stores it in 8 bits."""


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer stores its state."""

    states: int
    """Numbers a parameter."""
    bits: int = 32
    paged: bool = False
    own: bool = False
    """Whether states have the parameters' dtype (torch's optimizers) instead of float32."""
    scratch: int = 0
    """Copies of all parameters while a step is taken."""


OPTIMIZERS = {
    "adamw_torch": Optimizer(2, own=True, scratch=1),
    "adamw_torch_fused": Optimizer(2, own=True),
    "sgd": Optimizer(0),
    "adagrad": Optimizer(1, own=True),
    **{name: Optimizer(2, bits=8) for name in ("adamw_bnb_8bit", "adamw_8bit")},
    "paged_adamw_32bit": Optimizer(2, paged=True),
    "paged_adamw_8bit": Optimizer(2, bits=8, paged=True),
    "lion_32bit": Optimizer(1),
    "lion_8bit": Optimizer(1, bits=8),
    "paged_lion_32bit": Optimizer(1, paged=True),
    "paged_lion_8bit": Optimizer(1, bits=8, paged=True),
    **{name: Optimizer(1) for name in ("rmsprop_bnb", "rmsprop_bnb_32bit")},
    "rmsprop_bnb_8bit": Optimizer(1, bits=8),
}
"""By transformers' names; those that are missing store something of another form."""


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a training beside the model's shape."""

    bits: int
    double_quant: bool
    wide: bool
    """Computing in 32 bits instead of 16."""
    r: int
    """Rank of the adapters; 0: all weights are trained."""
    targets: tuple[frozenset[str], ...]
    """For each decoder layer, the linear layers with an adapter."""
    dora: bool
    narrow: bool
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
    fp8: bool = False
    """Whether the products with the base are in 8 bits."""
    guarded: bool = False
    """Whether the weights of before are kept during the optimizer's step, for an update that is to be undone."""
    offloaded: int = 0
    """How many of the checkpointed layers, the first ones, have their inputs wait in the host's memory."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The training objective, which knows what its loss needs."""

    @property
    def tokens(self) -> int:
        """Tokens a micro-batch."""
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.wide else 2

    @property
    def stored(self) -> int:
        """Bytes of a parameter that is not quantized."""
        return 4 if self.bits == 32 or self.wide else 2


@dataclass(frozen=True)
class Memory:
    """The memory of one training, in bytes; `parts` are those of the moment that needs most."""

    parts: dict[str, float]
    moment: str
    paged: float
    """Optimizer states that may move to the host; torch does not count them."""

    @property
    def peak(self) -> float:
        """The most that torch allocates, as `peak_memory_gb` reports it."""
        return sum(self.parts.values())

    @property
    def context(self) -> float:
        """What the card needs beyond that: the CUDA context and gaps between tensors."""
        return CONTEXT + FRAGMENTS * self.peak

    @property
    def needed(self) -> float:
        """What a card must have at least, with paged states on the host."""
        return self.peak + self.context

    @property
    def comfortable(self) -> float:
        """What a card must have for the paged states to stay on it."""
        return self.needed + self.paged


def quantized_bytes(linear: Linear, bits: int, *, double_quant: bool = False) -> int:
    """Returns what one linear layer's matrix takes in 4, 8, 16 or 32 bits, scales and tables counted in."""
    count = linear.weights
    if bits == 8:
        return count + 4 * linear.outputs
    if bits != 4:
        return count * bits // 8
    scales, table = math.ceil(count / BLOCK), 16 * 4
    packed = math.ceil(count / 2) + table
    if not double_quant:
        return packed + 4 * scales
    return packed + scales + 4 * math.ceil(scales / GROUP) + 256 * 4 + 4  # the scales' own table, and their offset


class Ledger:
    """The parts of one setup's memory, in bytes."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self.shape, self.setup = shape, setup
        self._objective = build_objective(setup.loss)
        self.linears = {linear.name: linear for linear in shape.linears}
        self._layers = Counter(setup.targets) if setup.r else Counter({frozenset[str](): shape.layers})

    # What stays from step to step

    @property
    def weights(self) -> int:
        """The matrices of the decoder layers."""
        setup = self.setup
        bits = 8 * setup.stored if setup.bits > 8 else setup.bits
        each = sum(quantized_bytes(linear, bits, double_quant=setup.double_quant) for linear in self.shape.linears)
        return self.shape.layers * each

    @property
    def unquantized(self) -> int:
        """Embedding, output matrix, norms and biases."""
        return self.shape.unquantized * self.setup.stored

    @cached_property
    def trained(self) -> Counter[int]:
        """How many trained tensors there are of each number of elements."""
        if self.setup.r == 0:
            embeddings = 1 if self.shape.tied else 2
            matrices = Counter({linear.weights: 0 for linear in self.shape.linears})
            for linear in self.shape.linears:
                matrices[linear.weights] += self.shape.layers
            small = self.shape.unquantized - embeddings * self.shape.hidden * self.shape.vocabulary
            matrices[self.shape.hidden * self.shape.vocabulary] += embeddings
            matrices[self.shape.hidden] += small // self.shape.hidden
            return matrices
        found: Counter[int] = Counter()
        for names, count in self._layers.items():
            for name in names:
                found.update({size: count * copies for size, copies in self._adapter(self.linears[name]).items()})
        return found

    def _adapter(self, linear: Linear) -> Counter[int]:
        """Returns the tensors of one adapter; trained bias vectors are too small to count."""
        sizes = Counter([self.setup.r * linear.inputs, self.setup.r * linear.outputs])
        return sizes + Counter([linear.outputs] if self.setup.dora else [])

    @property
    def trained_count(self) -> int:
        """Parameters that are trained."""
        return sum(size * copies for size, copies in self.trained.items())

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter and of its gradient."""
        if self.setup.r == 0:
            return self.setup.stored
        return 2 if self.setup.narrow else 4

    @property
    def adapters(self) -> int:
        """The adapters' matrices."""
        return self.trained_count * self.trained_bytes if self.setup.r else 0

    @property
    def gradients(self) -> int:
        """One gradient for each trained parameter."""
        return self.trained_count * self.trained_bytes

    @property
    def optimizer(self) -> tuple[int, int]:
        """The states on the card, and the paged ones."""
        kind = OPTIMIZERS[self.setup.optim]
        fixed = paged = 0
        for size, copies in self.trained.items():
            small = kind.bits == 8 and size < EIGHT_BIT_FROM
            number = self.trained_bytes if kind.own else 4 if small else kind.bits // 8
            states = kind.states * size * number * copies
            if kind.paged and size >= PAGED_FROM:
                paged += states
            else:
                fixed += states
            if kind.bits == 8 and not small:
                fixed += kind.states * 4 * math.ceil(size / 256) * copies
        return fixed, paged

    @property
    def resident(self) -> dict[str, float]:
        """What is there at any moment."""
        parts = {"weights": self.weights, "embeddings and norms": self.unquantized, "adapters": self.adapters}
        return {**parts, "optimizer": self.optimizer[0], "workspace": WORKSPACE}

    @property
    def before(self) -> float:
        """What is there when a step's last micro-batch begins: earlier ones have left their gradients."""
        return sum(self.resident.values()) + (self.gradients if self.setup.accumulates else 0)

    # What a step adds

    @property
    def added(self) -> float:
        """The most that forward and backward pass of a micro-batch hold beyond `before`."""
        moments = (sum(parts.values()) for moment, parts in self.moments() if moment != OPTIMIZER_STEP)
        return max(moments) - self.before

    def saved(self, names: frozenset[str]) -> float:
        """Returns what one layer keeps for the backward pass; `names` are its linear layers with an adapter."""
        each = self._saved_fast(names) if self.setup.step is PlanStep.fast else self._saved_plain(names)
        return self.setup.tokens * each

    def _saved_plain(self, names: frozenset[str]) -> float:
        """Bytes a token with transformers' layers and PEFT's adapters under autocast, operation by operation."""
        shape, setup, family, c = self.shape, self.setup, self.shape.family, self.setup.width
        trained = names if setup.r else frozenset(self.linears)
        # RMSNorm keeps its input in float32 and a scale; LayerNorm a mean and a scale, of one input where it is shared.
        norms = family.norms * (4 * shape.hidden + (8 if family.layer_norm else 4))
        if self._wide_stream:
            norms -= 4 * shape.hidden
        if family.head_norms:
            norms += 4 * (shape.queries + shape.keys) + 4 * (shape.heads + shape.key_value_heads)
        act = shape.intermediate * (3 * c if family.gated else 4 if self._wide_stream else c)
        inputs = sum(setup.r * c for _ in names)
        shared = set()
        for linear in (self.linears[name] for name in trained):
            if setup.r and setup.dropout:
                inputs += linear.inputs * (c + 1)  # the input with zeros, and where they are
            elif setup.r and setup.bits > 8:
                inputs += linear.inputs * c  # PEFT casts the input for each layer
            elif linear.reads != "heads" or not self._keeps_output:
                shared.add((linear.reads, linear.inputs))
        if setup.bits == 8 and setup.dropout:  # the int8 product keeps the input as it was, too
            shared |= {(linear.reads, linear.inputs) for linear in shape.linears if linear.reads != "heads"}
        return norms + act + inputs + sum(size * c for _, size in shared) + self._attention

    @property
    def _attention(self) -> float:
        """Bytes a token that attention keeps: queries, keys, values, output and the rows' sums."""
        shape, c = self.shape, self.setup.width
        if shape.family.capped:
            # Keys and values repeated for each head; scores behind tanh, and their softmax in float32 and in 16 bits.
            return c * 3 * shape.queries + shape.heads * self.setup.length * (2 * c + 4)
        # Of a joined matrix all outputs are kept for the values' sake.
        joined = shape.family.joined and not self._wide_stream
        values = shape.queries + 2 * shape.keys if joined else shape.keys
        return c * (2 * shape.queries + shape.keys + values) + 4 * shape.heads

    @property
    def _wide_stream(self) -> bool:
        """Whether the hidden state is in float32: autocast's LayerNorm returns that, and so do 4- and 8-bit layers."""
        return self.shape.family.layer_norm and self.setup.bits < 16 and self.setup.step is PlanStep.plain

    @property
    def _keeps_output(self) -> bool:
        """Whether the output that attention keeps is what the next layer reads, and not laid out otherwise."""
        return not (self.shape.family.capped or self.shape.family.joined)

    def _saved_fast(self, names: frozenset[str]) -> float:
        """Bytes a token with fused linear layers and attention by rows; compiled norms are computed again."""
        shape, setup, c = self.shape, self.setup, self.setup.width
        residual = 2 * shape.hidden * c + 4 * shape.family.norms
        act = shape.intermediate * c * (2 if shape.family.gated else 1)
        return residual + setup.r * c * len(names) + act + self._attention

    @cached_property
    def largest_matrix(self) -> float:
        """What is decoded of the largest matrix, or group of matrices, at a time."""
        setup = self.setup
        if setup.bits >= 16:
            return 0
        if setup.step is PlanStep.plain:
            scales = 4 / BLOCK if setup.double_quant else 0
            return max(linear.weights for linear in self.shape.linears) * (setup.width + scales)
        groups: Counter[str] = Counter()
        for linear in self.shape.linears:
            groups[linear.reads] += linear.weights
        largest = max(groups.values())
        return largest if setup.fp8 else largest * setup.width / math.ceil(largest * setup.width / PIECE)

    @property
    def backward(self) -> float:
        """What the backward pass of one layer needs beyond what the layer kept."""
        setup, c = self.setup, self.setup.width
        hidden, middle = self.shape.hidden * c * setup.tokens, self.shape.intermediate * c * setup.tokens
        if setup.step is PlanStep.fast:  # the product, its gradient, and those of gate and up
            return hidden + 4 * middle + self.largest_matrix
        zeros = setup.r > 0 and setup.dropout
        sums = hidden + (1.5 if zeros else 2) * middle  # two gradients of the product and their sum
        decoding = hidden + middle + self.largest_matrix
        again = 5 * hidden + (middle if zeros else 0)  # the end of the layer's second forward pass
        return max(sums, decoding, again if setup.checkpointed else 0)

    def copies(self, names: frozenset[str]) -> float:
        """Returns the 16-bit copies of one layer's trained or 32-bit weights that autocast makes."""
        if self.setup.wide:
            return 0
        names = frozenset() if self.setup.narrow else names
        adapters = sum(self.setup.r * (self.linears[name].inputs + self.linears[name].outputs) for name in names)
        base = sum(linear.weights for linear in self.shape.linears) if self.setup.bits == 32 else 0
        return 2 * (adapters + base)

    @property
    def logits(self) -> tuple[float, float]:
        """The output layer and the loss, in the forward and in the backward pass."""
        setup, vocabulary, c = self.setup, self.shape.vocabulary, self.setup.width
        copy = vocabulary * self.shape.hidden * c if setup.bits == 32 and c < 4 else 0  # of the output matrix
        fast = setup.step is PlanStep.fast
        work = TokenWork(setup.tokens, self.shape.hidden, vocabulary, c, fast, capped=self.shape.family.capped)
        forward, backward = self._objective.activation_bytes(work)
        return forward + copy, backward

    # Moments

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields what is there at each moment that may need most."""
        setup, layers = self.setup, self.shape.layers
        kept = layers - setup.checkpointed
        targets = list(setup.targets) if setup.r else [frozenset[str]()] * layers
        input_bytes = setup.tokens * self.shape.hidden * (4 if self._wide_stream else setup.width)
        moving = min(setup.offloaded, 2)  # one on its way, and the next
        inputs = (setup.checkpointed - setup.offloaded + moving) * input_bytes
        late = targets[setup.checkpointed :]
        saved, copies = sum(map(self.saved, late)), sum(map(self.copies, late))
        earlier = self.gradients if setup.accumulates else 0
        angles = setup.tokens * 2 * self.shape.head_dim * setup.width
        cached = sum(map(self.copies, targets)) if setup.step is PlanStep.plain else copies
        base = self.resident
        forward, backward = self.logits
        common = {**base, "gradients": earlier, "activations": saved + inputs + angles}
        yield "the loss", {**common, "adapters in 16 bits": cached, "logits": forward}
        yield "the loss's backward pass", {**common, "adapters in 16 bits": copies, "logits": backward}
        if kept:
            norm = 20 * self.shape.hidden * setup.tokens if setup.step is PlanStep.plain else 0  # five in float32
            yield "the last layer's backward pass", {
                **common, "adapters in 16 bits": copies, "backward pass of a layer": max(self.backward, norm),
            }  # fmt: skip
        for done in {layers - setup.checkpointed, layers - 1} if setup.checkpointed else set():
            names = targets[layers - 1 - done]
            gradients = self.gradients if setup.accumulates else self.gradients * done / layers
            yield "a checkpointed layer's backward pass", {
                **base, "gradients": gradients, "adapters in 16 bits": self.copies(names),
                "activations": (max(layers - done - setup.offloaded, 0) + moving) * input_bytes
                + angles + self.saved(names),
                "backward pass of a layer": self.backward,
            }  # fmt: skip
        kind = OPTIMIZERS[setup.optim]
        scratch = (kind.scratch + (kind.own and setup.guarded)) * self.gradients  # others keep a piece at a time
        yield OPTIMIZER_STEP, {**base, "gradients": self.gradients, "optimizer's step": scratch}

    def memory(self) -> Memory:
        """Returns the parts at the moment that needs most."""
        moment, parts = max(self.moments(), key=lambda each: sum(each[1].values()))
        return Memory(parts, moment, self.optimizer[1])


def plan_memory(shape: Shape, setup: Setup) -> Memory:
    """Returns what a training of this shape and setup needs."""
    return Ledger(shape, setup).memory()
