"""The shape of a model: what the memory and time plans need to know of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from qlora.planning.families import Family
from qlora.planning.mixture import Experts


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer."""

    name: str
    """Its name below the decoder layer, e.g. `self_attn.q_proj`."""
    inputs: int
    outputs: int
    reads: str
    """What it reads: `attention` or `mlp` (shared with others), `heads` or `product`, or a name of its own."""
    bias: bool
    path: str
    """Its full name, with `{}` for the number of the layer; without one it stands outside of all layers."""
    is_adapted: bool = True
    """Whether `all-linear` gives it an adapter: routers, and what Mamba's kernels read, get none."""

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Mixer:
    """What mixes the tokens of a row in a decoder layer: attention, or a recurrence (Mamba, linear attention)."""

    queries: int
    """Width of all queries of a token, as scores are computed with them; 0: a recurrence, which compares no pairs."""
    keys: int
    values: int
    """Width of all values of a token, as attention returns them for each query head."""
    heads: int
    kept: int
    """Numbers a token that the backward pass needs: queries, keys, values and the output; what stands for them."""
    window: int | None = None
    """How many tokens a token looks back at most, itself included; None: all of them."""
    state: int = 0
    """Multiplications a token with the state of a recurrence, and in its convolution."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer."""

    linears: tuple[Linear, ...]
    mixers: tuple[Mixer, ...]
    norms: tuple[tuple[int, int], ...]
    """For each norm the numbers of a token that it reads, and how many rows they are: a head's queries are one."""
    feed_forward: int
    """Width of the feed-forward layer that computes every token; 0: the layer has experts alone."""
    has_experts: bool = False


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int
    """Longest row, in tokens."""
    family: Family
    kinds: tuple[Layer, ...]
    """The decoder layers that differ."""
    order: tuple[int, ...]
    """The kind of each decoder layer."""
    unquantized: int
    """Parameters that stay in 16 or 32 bits: embedding, output matrix, norms, biases, routers."""
    experts: Experts | None = None
    """Those of a mixture."""
    is_estimate: bool = False
    """Whether what layers keep is estimated from their modules, and was not compared with what such models keep."""

    def layer(self, index: int) -> Layer:
        """Returns a decoder layer."""
        return self.kinds[self.order[index]]

    @cached_property
    def counts(self) -> Counter[int]:
        """How many decoder layers there are of each of `kinds`."""
        return Counter(self.order)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers that decoder layers have, those that differ."""
        return tuple(dict.fromkeys(linear for layer in self.kinds for linear in layer.linears))

    def linears_of(self, layer: int) -> tuple[Linear, ...]:
        """Returns the linear layers of one decoder layer."""
        return self.layer(layer).linears

    def has_experts(self, layer: int) -> bool:
        """Returns whether a decoder layer has experts."""
        return self.layer(layer).has_experts

    @cached_property
    def linear_weights(self) -> int:
        """Elements of the matrices of the linear layers of all decoder layers."""
        sizes = [sum(linear.weights for linear in layer.linears) for layer in self.kinds]
        return sum(count * sizes[kind] for kind, count in self.counts.items())

    @property
    def expert_weights(self) -> int:
        """Elements of the matrices of all experts that tokens are routed to."""
        return 0 if self.experts is None else len(self.experts.layers) * self.experts.weights

    @property
    def active_weights(self) -> int:
        """Elements of the matrices of all decoder layers that compute a token."""
        active = 0 if self.experts is None else len(self.experts.layers) * self.experts.active
        return self.linear_weights + active

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_weights + self.expert_weights + self.unquantized

    @property
    def active_parameters(self) -> int:
        """The parameters that compute a token: of a layer's experts those that it is routed to."""
        return self.parameters - self.linear_weights - self.expert_weights + self.active_weights

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """How far back its layers look, each distance once; None, all tokens, comes first."""
        windows = {mixer.window for layer in self.kinds for mixer in layer.mixers if mixer.queries}
        return (None, *sorted(window for window in windows if window is not None))

    def full_names(self, layer: int) -> Mapping[str, Linear]:
        """Returns the linear layers of a decoder layer by their names in the model."""
        return {linear.path.format(layer): linear for linear in self.linears_of(layer)}


def gated_linears(module: str, hidden: int, intermediate: int) -> list[tuple[str, int, int, str]]:
    """Returns the linear layers of a gated feed-forward layer: name, inputs, outputs and what they read."""
    rows = [(f"{module}.{name}", hidden, intermediate, "mlp") for name in ("gate_proj", "up_proj")]
    product = "product" if module == "mlp" else "shared product"
    return [*rows, (f"{module}.down_proj", intermediate, hidden, product)]
