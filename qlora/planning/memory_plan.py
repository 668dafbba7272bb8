"""What a training step needs of a GPU's memory, part by part.

The sizes follow what the libraries allocate: bitsandbytes 0.50 (weights, optimizer states), PEFT 0.21 (adapters),
torch's autograd on a GPU (tensors kept for the backward pass). Tests compare each part with real modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from qlora.config.registries.adapter_kinds import LayerSize
from qlora.config.registries.optimizer_states import Trained
from qlora.config.registries.optimizers import OPTIMIZERS
from qlora.config.schema import PlanStep
from qlora.experts.waiting import ROOM
from qlora.planning.activations import Activations
from qlora.planning.model_shape import Linear, Shape
from qlora.planning.setup import Setup

CONTEXT = 0.6e9
"""Bytes of a CUDA context with the libraries' kernels, which torch does not count."""
FRAGMENTS = 0.03
"""Fraction of torch's memory that lies between its tensors."""
WORKSPACE = 64 * 2**20
"""Bytes that torch sets aside for cuBLAS (twice 32 MiB on Hopper, less before)."""
GRAPHS = 2.2
"""What CUDA graphs compute in, by what a layer keeps for its backward pass: 1.9 to 2.4 measured, 0.6 to 30 billion
parameters."""
OPTIMIZER_STEP = "the optimizer's step"
"""The moment that has no activations."""
LOADING = "loading the last layer's experts"
"""The moment before training."""


@dataclass(frozen=True)
class Memory:
    """The memory of a training run, in bytes; `parts` are those of the moment that needs most."""

    parts: dict[str, float]
    moment: str
    paged: float
    """Optimizer states that may move to the host; torch does not count them."""
    host: float = 0
    """Experts that wait in the host's memory."""
    offloaded: float = 0
    """What checkpointed layers keep in the host's memory."""

    @property
    def peak(self) -> float:
        """The most that torch allocates, as `peak_memory_gb` reports it."""
        return sum(self.parts.values())

    @property
    def context(self) -> float:
        """What the GPU needs beyond that: the CUDA context and gaps between tensors."""
        return CONTEXT + FRAGMENTS * self.peak

    @property
    def needed(self) -> float:
        """What a GPU must have at least, with paged states on the host."""
        return self.peak + self.context

    @property
    def comfortable(self) -> float:
        """What a GPU must have for the paged states to stay on it."""
        return self.needed + self.paged


class Ledger:
    """The parts of one setup's memory, in bytes."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self.shape, self.setup = shape, setup
        self.activations = Activations(shape, setup)
        self.targets = setup.targets if setup.r else (frozenset[str](),) * shape.layers

    # What stays from step to step

    @property
    def weights(self) -> int:
        """The matrices of the decoder layers that a base may quantize, without those of experts."""
        matrix_bytes = self.setup.base.matrix_bytes
        return self._sum(lambda linear: matrix_bytes(linear.outputs, linear.inputs) if linear.is_quantized else 0)

    def _sum(self, size: Callable[[Linear], int]) -> int:
        """Returns the sum over the linear layers of all decoder layers."""
        sizes = [sum(map(size, layer.linears)) for layer in self.shape.kinds]
        return sum(count * sizes[kind] for kind, count in self.shape.counts.items())

    @property
    def experts(self) -> int:
        """The matrices of the experts of a mixture, with the room for those that wait on the host."""
        experts, base = self.shape.experts, self.setup.base
        if experts is None:
            return 0
        if base.experts_bytes is None:
            return self.shape.expert_weights * base.unquantized_bytes
        waiting = max(self.setup.waiting - ROOM, 0)
        return (len(experts.layers) - waiting) * base.experts_bytes(experts.count, experts.units)

    @property
    def on_host(self) -> int:
        """The experts that wait in the host's memory, whose pinned memory torch hands out in powers of two."""
        experts, base = self.shape.experts, self.setup.base
        if experts is None or base.experts_bytes is None:
            return 0
        packed = [math.ceil(experts.count * rows * columns / 2) for rows, columns in experts.units]
        scales = base.experts_bytes(experts.count, experts.units) - sum(packed)
        return self.setup.waiting * (scales + sum(1 << (size - 1).bit_length() for size in packed))

    @property
    def decoded_experts(self) -> int:
        """The experts of one layer as the matmuls of the fast step read them; 0: they cannot be kept so."""
        experts, setup = self.shape.experts, self.setup
        if experts is None or setup.base.experts_bytes is None or setup.step is not PlanStep.fast:
            return 0
        return experts.weights * (2 if setup.fp8 else setup.width)  # in 8 bits the backward pass reads them turned

    @property
    def can_be_kept(self) -> int:
        """The layers whose experts can be kept decoded."""
        return len(self.shape.experts.layers) if self.shape.experts is not None and self.decoded_experts else 0

    @property
    def unquantized(self) -> int:
        """Embedding, output matrix, norms and biases, and the linear layers that no base quantizes."""
        matrices = self._sum(lambda linear: 0 if linear.is_quantized else linear.weights)
        return (self.shape.unquantized + matrices) * self.setup.base.unquantized_bytes

    @cached_property
    def trained(self) -> Counter[int]:
        """How many trained tensors there are of each number of elements."""
        if self.setup.r == 0:
            return self._all_weights
        head = self.shape.hidden * self.setup.head_outputs
        whole = Counter(map(math.prod, self.setup.whole))
        return self._on_layers(self._adapter) + self._on_experts + whole + Counter([head] if head else [])

    def _on_layers(self, tensors: Callable[[Linear, int], Counter[int]]) -> Counter[int]:
        """Returns the tensors of the adapters on linear layers, of a function from a layer and its rank."""
        sizes: Counter[int] = Counter()
        ranks = self.setup.ranks or (frozenset[tuple[str, int]](),) * self.shape.layers
        for (kind, names, special), count in Counter(zip(self.shape.order, self.targets, ranks, strict=True)).items():
            for linear in self.shape.kinds[kind].linears:
                if linear.name in names:
                    made = tensors(linear, dict(special).get(linear.name, self.setup.r))
                    sizes.update({size: count * copies for size, copies in made.items()})
        return sizes

    @property
    def _on_experts(self) -> Counter[int]:
        """How many tensors of adapters on experts there are of each number of elements."""
        experts = self.shape.experts
        if experts is None or not self.setup.expert_r:
            return Counter()
        adapter = experts.adapter(self.setup.expert_r)
        return Counter({size: len(experts.layers) * copies for size, copies in adapter.items()})

    @property
    def trained_on_experts(self) -> int:
        """Parameters of adapters on experts."""
        return sum(size * copies for size, copies in self._on_experts.items())

    @property
    def _all_weights(self) -> Counter[int]:
        sizes: Counter[int] = Counter()
        for tensor, copies in self._weights.items():
            sizes[tensor.size] += copies
        return sizes

    @property
    def _weights(self) -> Counter[Trained]:
        """The tensors of the whole model."""
        shape, embeddings = self.shape, 1 if self.shape.tied else 2
        tensors = Counter(
            Trained((linear.outputs, linear.inputs))
            for layer in range(shape.layers)
            for linear in shape.linears_of(layer)
        )
        if (experts := shape.experts) is not None:
            first = (2 if experts.has_gate else 1) * experts.intermediate
            tensors[Trained((experts.count, first, experts.hidden))] += len(experts.layers)
            tensors[Trained((experts.count, experts.hidden, experts.intermediate))] += len(experts.layers)
        small = shape.unquantized - embeddings * shape.hidden * shape.vocabulary
        tensors[Trained((shape.vocabulary, shape.hidden), is_matrix=False)] += embeddings
        tensors[Trained((shape.hidden,), is_matrix=False)] += small // shape.hidden
        return tensors

    @cached_property
    def _tensors(self) -> Counter[Trained]:
        """How many trained tensors there are of each kind; an adapter's matrices by rank and width."""
        if self.setup.r == 0:
            return self._weights
        vectors: Counter[int] = Counter()
        if self.setup.dora:
            for layer, names in enumerate(self.targets):
                vectors.update(linear.outputs for linear in self.shape.linears_of(layer) if linear.name in names)
        tensors: Counter[Trained] = Counter(Trained(shape, is_matrix=False) for shape in self.setup.whole)
        for size, copies in (self.trained - Counter(map(math.prod, self.setup.whole))).items():
            rank = math.gcd(size, self.setup.r)
            tensors[Trained((rank, size // rank))] += copies - vectors[size]
            tensors[Trained((size,), is_matrix=False)] += vectors[size]
        return +tensors

    def _adapter(self, linear: Linear, rank: int) -> Counter[int]:
        """Returns the trained tensors of one adapter; trained bias vectors are too small to count."""
        if self.setup.kind is not None:
            return Counter(self.setup.kind.sizes(_size(linear), rank, self.setup.options))
        sizes = Counter(
            [rank * linear.outputs] if self.setup.frozen_a else [rank * linear.inputs, rank * linear.outputs]
        )
        return sizes + Counter([linear.outputs] if self.setup.dora else [])

    @property
    def frozen_adapters(self) -> int:
        """The elements of adapters that are not trained: A matrices that stay, or what all layers share."""
        setup = self.setup
        if setup.kind is not None:
            names = frozenset[str]().union(*self.targets)
            linears = (linear for kind in self.shape.kinds for linear in kind.linears if linear.name in names)
            return setup.kind.shared([_size(linear) for linear in linears], setup.r)
        frozen = self._on_layers(lambda linear, rank: Counter([rank * linear.inputs])) if setup.frozen_a else {}
        return sum(size * copies for size, copies in frozen.items())

    @property
    def trained_count(self) -> int:
        """Parameters that are trained."""
        return sum(size * copies for size, copies in self.trained.items())

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter and of its gradient."""
        if self.setup.r == 0:
            return self.setup.base.unquantized_bytes
        return 2 if self.setup.bf16_adapters else 4

    @property
    def adapters(self) -> int:
        """The adapters' matrices."""
        return (self.trained_count + self.frozen_adapters) * self.trained_bytes if self.setup.r else 0

    @property
    def gradients(self) -> int:
        """One gradient for each trained parameter."""
        return self.trained_count * self.trained_bytes

    @property
    def optimizer(self) -> tuple[int, int]:
        """The states on the GPU, and the paged ones."""
        states, arguments = OPTIMIZERS[self.setup.optim].states, self.setup.optim_args
        fixed = paged = 0
        for tensor, copies in self._tensors.items():
            kept = states.bytes_of(tensor, self.trained_bytes, arguments)
            fixed, paged = fixed + copies * kept[0], paged + copies * kept[1]
        return fixed, paged

    @property
    def resident(self) -> dict[str, float]:
        """What is there at any moment."""
        parts: dict[str, float] = {
            "weights": self.weights,
            "embeddings and norms": self.unquantized,
            "adapters": self.adapters,
        }
        if self.shape.experts is not None:
            parts["experts"] = self.experts
            parts["decoded experts"] = self.setup.kept * self.decoded_experts
        if self.graphs:
            parts["CUDA graphs"] = self.graphs
        return {**parts, "optimizer": self.optimizer[0], "workspace": WORKSPACE}

    @property
    def graphs(self) -> float:
        """What the graphs of checkpointed layers compute in, one after the other."""
        setup = self.setup
        if not (setup.graphs and setup.checkpointed and setup.step is PlanStep.fast) or setup.is_long:
            return 0
        return GRAPHS * max(self.saved(layer) for layer in self._recomputed)

    @property
    def at_start(self) -> float:
        """What is there when a step's last micro-batch begins: earlier ones have left their gradients."""
        return sum(self.resident.values()) + (self.gradients if self.setup.accumulates else 0)

    @property
    def untrained(self) -> int:
        """What a base needs that is not trained: its weights with an adapter, and a layer's experts in 16 bits.

        These exist while it is loaded, and nearly so where many tokens are read.
        """
        merged = self.shape.experts.weights * self.setup.base.unquantized_bytes if self.shape.experts else 0
        return self.weights + self.experts + self.unquantized + self.adapters + merged

    # What a step adds

    @property
    def added(self) -> float:
        """The most that forward and backward pass of a micro-batch hold beyond `at_start`."""
        others = (OPTIMIZER_STEP, LOADING)
        moments = (sum(parts.values()) for moment, parts in self.moments() if moment not in others)
        return max(moments) - self.at_start

    @property
    def added_by_optimizer(self) -> float:
        """What the optimizer's step holds beyond `at_start`, without paged states."""
        return sum(dict(self.moments())[OPTIMIZER_STEP].values()) - self.at_start

    def saved(self, layer: int) -> float:
        """Returns what a decoder layer keeps for the backward pass."""
        return self.activations.saved(layer, self.targets[layer])

    @property
    def kept_of_checkpointed(self) -> float:
        """What a checkpointed layer keeps until the backward pass: its input, and of long rows outputs of attention."""
        width = 4 if self.activations.has_fp32_stream else self.setup.width
        outputs = max(map(self.activations.outputs, range(self.shape.layers)))
        return self.setup.tokens * self.shape.hidden * width + outputs

    @property
    def offloaded(self) -> float:
        """What checkpointed layers keep in the host's memory."""
        return self.setup.offloaded * self.kept_of_checkpointed

    def _copies(self, layer: int) -> float:
        return self.activations.copies(layer, self.targets[layer])

    @property
    def _recomputed(self) -> set[int]:
        """The checkpointed layers whose backward pass may need most: the first and last ones, of each kind."""
        order = self.shape.order[: self.setup.checkpointed]
        first = {kind: index for index, kind in reversed([*enumerate(order)])}
        last = {kind: index for index, kind in enumerate(order)}
        return {*first.values(), *last.values()}

    # Moments

    def moments(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields what is there at each moment that may need most."""
        setup, layers, activations = self.setup, self.shape.layers, self.activations
        kept = layers - setup.checkpointed
        input_bytes = self.kept_of_checkpointed
        moving = min(setup.offloaded, 2)  # one on its way, and the next
        inputs = (setup.checkpointed - setup.offloaded + moving) * input_bytes
        late = range(setup.checkpointed, layers)
        saved, copies = sum(map(self.saved, late)), sum(self._copies(layer) for layer in late)
        earlier = self.gradients if setup.accumulates else 0
        angles = setup.tokens * 2 * self.shape.head_dim * setup.width
        cached = sum(map(self._copies, range(layers))) if setup.step is PlanStep.plain else copies
        base = self.resident
        forward, backward = activations.logits
        common = {**base, "gradients": earlier, "activations": saved + inputs + angles}
        yield "the loss", {**common, "adapters in 16 bits": cached, "logits": forward}
        yield "the loss's backward pass", {**common, "adapters in 16 bits": copies, "logits": backward}
        if kept:
            last = activations.backward(layers - 1)
            norm = 20 * self.shape.hidden * setup.tokens if setup.step is PlanStep.plain else 0  # five in float32
            yield "the last layer's backward pass", {
                **common, "adapters in 16 bits": copies, "backward pass of a layer": max(last, norm),
            }  # fmt: skip
        for layer in self._recomputed:
            done = layers - 1 - layer
            gradients = self.gradients if setup.accumulates else self.gradients * done / layers
            yield "a checkpointed layer's backward pass", {
                **base, "gradients": gradients, "adapters in 16 bits": self._copies(layer),
                "activations": (max(layers - done - setup.offloaded, 0) + moving) * input_bytes
                + angles + activations.saved_again(layer, self.targets[layer]),
                "backward pass of a layer": activations.backward_again(layer),
            }  # fmt: skip
        states = OPTIMIZERS[setup.optim].states
        copied = states.scratch + (states.is_in_parameter_dtype and setup.guarded)  # others copy a chunk at a time
        one = max((tensor.size for tensor in self._tensors), default=0)
        scratch = copied * self.gradients + states.one_tensor * one * self.trained_bytes
        yield OPTIMIZER_STEP, {**base, "gradients": self.gradients, "optimizer's step": scratch}
        if self.shape.experts is not None and setup.base.experts_bytes is not None:  # merged, then quantized
            merged = self.shape.experts.weights * setup.base.unquantized_bytes
            loaded = {name: base[name] for name in ("weights", "embeddings and norms", "experts")}
            yield LOADING, {**loaded, "a layer's experts in 16 bits": merged}

    def memory(self) -> Memory:
        """Returns the parts at the moment that needs most."""
        moment, parts = max(self.moments(), key=lambda moment: sum(moment[1].values()))
        return Memory(parts, moment, self.optimizer[1], self.on_host, self.offloaded)


def plan_memory(shape: Shape, setup: Setup) -> Memory:
    """Returns what a training run of this shape and setup needs."""
    return Ledger(shape, setup).memory()


def _size(linear: Linear) -> LayerSize:
    return LayerSize(linear.name.rpartition(".")[2], linear.inputs, linear.outputs)
