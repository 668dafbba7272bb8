"""The memory of a forward and a backward pass: what layers keep, what they decode, logits and temporary tensors.

The sizes follow torch's autograd on a GPU (tensors kept for the backward pass) with PEFT 0.21 and bitsandbytes 0.50.
Tests compare each with real modules.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property

from qlora.config.schema import PlanStep
from qlora.objectives import TokenWork, build_objective
from qlora.planning.model_shape import Layer, Mixer, Shape
from qlora.planning.routed_rows import RoutedRows
from qlora.planning.setup import Setup
from qlora.runtime.long_rows import chunk_size

USUAL_NORMS = 2
"""Norms of a layer that adds the output of its feed-forward layer to its input, and ends so."""
DECODED_CHUNK = 2**27
"""Most bytes that the `fast` step decodes at a time in 16 bits."""


class Activations:
    """The memory of a pass, in bytes."""

    def __init__(self, shape: Shape, setup: Setup) -> None:
        self.shape, self.setup = shape, setup

    def saved(self, layer: int, names: frozenset[str]) -> float:
        """Returns what a layer keeps for the backward pass; `names` are its linear layers with an adapter."""
        kept = self._saved_fast if self.setup.step is PlanStep.fast else self._saved_plain
        described = self.shape.layer(layer)
        experts = self.routed.saved if described.has_experts else 0
        return self.setup.tokens * kept(described, names) + experts

    def saved_again(self, layer: int, names: frozenset[str]) -> float:
        """Returns what a layer keeps for the backward pass when it is computed again.

        Of a long row its input and the outputs of attention are left out, which it has kept.
        """
        saved, described = self.saved(layer, names), self.shape.layer(layer)
        if not self.setup.is_long:
            return saved
        saved -= self.setup.tokens * self.shape.hidden * self.setup.width + self.outputs(layer)
        if not self._is_chunked(described):
            return saved
        # The input of the feed-forward layer in place of all that it keeps.
        chunked = self._middle(described) - self.shape.hidden
        return saved - self.setup.tokens * chunked * self.setup.width

    def outputs(self, layer: int) -> float:
        """Returns what a checkpointed layer keeps beside its input: of long rows the outputs of its attention."""
        family, setup = self.shape.family, self.setup
        if not setup.is_long or family.capped or family.sinks:
            return 0
        mixers = [mixer for mixer in self.shape.layer(layer).mixers if mixer.queries]
        return setup.tokens * sum(mixer.values * setup.width + 4 * mixer.heads for mixer in mixers)

    def _is_chunked(self, layer: Layer) -> bool:
        """Returns whether a checkpointed layer computes its feed-forward layer in chunks."""
        family = self.shape.family
        is_usual = family.gated and not family.layer_norm and family.norms == USUAL_NORMS
        return self.setup.is_long and is_usual and not layer.has_experts

    def _middle(self, layer: Layer) -> int:
        """Numbers a token that the fast step keeps of a feed-forward layer beside its input."""
        return layer.feed_forward * (2 if self.shape.family.gated else 1)

    @cached_property
    def routed(self) -> RoutedRows:
        """What the experts of a layer need."""
        assert self.shape.experts is not None
        return RoutedRows(self.shape.experts, self.setup)

    def _weighed(self, layer: Layer) -> int:
        """Bytes a token of the output of shared experts and of the gate that weighs it; 0: there is no gate."""
        experts = self.shape.experts
        is_weighed = layer.has_experts and experts is not None and experts.family.shared_gate
        return (self.shape.hidden + 2) * self.setup.width if is_weighed else 0

    def _saved_plain(self, layer: Layer, names: frozenset[str]) -> float:
        """Bytes a token with transformers' layers and PEFT's adapters under autocast, operation by operation."""
        setup, family, c = self.setup, self.shape.family, self.setup.width
        # RMSNorm keeps its input in float32 and a scale; LayerNorm a mean and a scale, of one input where it is shared.
        norms = sum(4 * width + (8 if family.layer_norm else 4) * rows for width, rows in layer.norms)
        if self.has_fp32_stream:
            norms -= 4 * self.shape.hidden
        act = layer.feed_forward * (3 * c if family.gated else 4 if self.has_fp32_stream else c)
        inputs = 0
        shared = set()
        for linear in layer.linears:
            if setup.r and linear.name not in names:
                continue
            inputs += setup.r * c
            if setup.r and setup.dropout:
                inputs += linear.inputs * (c + 1)  # the input with zeros, and where they are
            elif setup.r and not setup.base.is_quantized:
                inputs += linear.inputs * c  # PEFT casts the input for each layer
            elif linear.reads != "heads" or not self._keeps_output:
                shared.add((linear.reads, linear.inputs))
        if setup.base.keeps_input and setup.dropout:  # the int8 product keeps the input as it was, too
            shared |= {(linear.reads, linear.inputs) for linear in layer.linears if linear.reads != "heads"}
        act += self._weighed(layer)
        return norms + act + inputs + sum(size * c for _, size in shared) + self._mixed(layer)

    def _mixed(self, layer: Layer) -> float:
        """Bytes a token that attention keeps: queries, keys, values, output and the rows' sums; and recurrences."""
        family, c, kept = self.shape.family, self.setup.width, 0.0
        is_plain = self.setup.step is PlanStep.plain
        for mixer in layer.mixers:
            if mixer.queries and family.capped and is_plain:
                # Keys and values repeated for each head; scores behind tanh, and their softmax in float32 and 16 bits.
                kept += c * 3 * mixer.queries + mixer.heads * self.setup.length * (2 * c + 4)
            elif mixer.queries and family.sinks and is_plain:  # without tanh, with the sink's column; and maxima
                kept += c * 3 * mixer.queries + mixer.heads * ((self.setup.length + 1) * c + 8)
            else:
                # Of a joined matrix all outputs are kept for the values' sake.
                joined = mixer.queries + mixer.keys if family.joined and not self.has_fp32_stream else 0
                kept += c * (mixer.kept + joined) + 4 * mixer.heads
                kept += self._gathered(mixer) - self._gathered(mixer, 1)
                if mixer.queries and self.setup.attended > 1:  # whole rows of them, beside the output of each token
                    kept += (self.setup.attended - 1) * (c * mixer.kept + 4 * mixer.heads) + c * mixer.queries
                if mixer.queries and family.sinks:  # the output without them, and their share
                    kept += c * mixer.queries + 4 * mixer.heads
        return kept

    def _gathered(self, mixer: Mixer, processes: int | None = None) -> int:
        """Bytes a token of this process of the keys and values of all processes that share a row."""
        return (processes or self.setup.shared_by) * 2 * mixer.keys * self.setup.width

    @property
    def has_fp32_stream(self) -> bool:
        """Whether the hidden state is in float32: autocast's LayerNorm returns that, and so do 4- and 8-bit layers."""
        return self.shape.family.layer_norm and self.setup.base.is_quantized and self.setup.step is PlanStep.plain

    @property
    def _keeps_output(self) -> bool:
        """Whether the output that attention keeps is what the next layer reads, and not laid out otherwise."""
        family = self.shape.family
        return not (family.capped or family.joined or family.sinks)

    def _saved_fast(self, layer: Layer, names: frozenset[str]) -> float:
        """Bytes a token with fused linear layers and attention by rows; compiled norms are computed again."""
        shape, setup, c = self.shape, self.setup, self.setup.width
        norms = shape.family.norms
        residual = 2 * shape.hidden * c + 4 * norms
        # Norms inside attention read what is kept for them alone: queries and keys as they come from their layers.
        residual += (sum(width for width, _ in layer.norms) - norms * shape.hidden) * c
        residual += 4 * (sum(rows for _, rows in layer.norms) - norms)
        act = self._middle(layer) * c
        act += self._weighed(layer)
        return residual + setup.r * c * len(names) + act + self._mixed(layer)

    @cached_property
    def decoded_matrix(self) -> float:
        """What is decoded of the largest matrix, or group of matrices, at a time."""
        setup = self.setup
        if not setup.base.is_quantized:
            return 0
        if setup.step is PlanStep.plain:
            elements = max(linear.weights for linear in self.shape.linears)
            return elements * (setup.width + setup.base.decoding_bytes)
        joint = max(map(self._joint, self.shape.kinds))
        return joint if setup.fp8 else joint * setup.width / math.ceil(joint * setup.width / DECODED_CHUNK)

    @staticmethod
    def _joint(layer: Layer) -> int:
        """Returns the elements of the matrices of a layer that read the same, of the largest group."""
        groups: Counter[str] = Counter()
        for linear in layer.linears:
            groups[linear.reads] += linear.weights
        return max(groups.values(), default=0)

    def backward_again(self, layer: int) -> float:
        """As `backward`, for a layer that is computed again."""
        described, setup, c = self.shape.layer(layer), self.setup, self.setup.width
        if not self._is_chunked(described):
            return self.backward(layer)
        size, hidden = chunk_size(setup.tokens), self.shape.hidden * c
        # Of a chunk its input and gradient, what it keeps, the product, three gradients; of all tokens two gradients.
        mlp = (
            size * (2 * hidden + (self._middle(described) + 4 * described.feed_forward) * c) + 2 * hidden * setup.tokens
        )
        # Gradients of output, queries, keys and values; those of queries in 32 bits, too; those of keys and values as
        # often as there are heads. What the feed-forward layer kept is gone by then.
        queries = sum(mixer.queries for mixer in described.mixers)
        attention = setup.tokens * (queries * (6 * c + 4) - 2 * hidden) + self._gathered_gradients(described)
        return max(mlp + self.decoded_matrix, attention)

    def backward(self, layer: int) -> float:
        """Returns what the backward pass of one layer needs beyond what the layer kept."""
        described = self.shape.layer(layer)
        return max(self._backward(described), self.routed.backward if described.has_experts else 0)

    def _backward(self, layer: Layer) -> float:
        setup, c = self.setup, self.setup.width
        hidden, middle = self.shape.hidden * c * setup.tokens, layer.feed_forward * c * setup.tokens
        if setup.step is PlanStep.fast:  # the product, its gradient, and those of gate and up
            return max(hidden + 4 * middle + self.decoded_matrix, self._gathered_gradients(layer))
        zeros = setup.r > 0 and setup.dropout
        sums = hidden + (1.5 if zeros else 2) * middle  # two gradients of the product and their sum
        decoding = hidden + middle + self.decoded_matrix
        again = 5 * hidden + (middle if zeros else 0)  # the end of the layer's second forward pass
        return max(sums, decoding, again if setup.checkpointed else 0, self._scores)

    def _gathered_gradients(self, layer: Layer) -> float:
        """Bytes of gradients of gathered keys and values: those of two chunks, and their sum."""
        if self.setup.shared_by == 1:
            return 0
        return self.setup.tokens * sum(3 * self._gathered(mixer) for mixer in layer.mixers if mixer.queries)

    @property
    def _scores(self) -> float:
        """Bytes of the scores where the plain step's attention keeps a matrix of them, for the sake of its sinks.

        Four matrices are there at once: the scores, the same with the mask, both with the sink's column, and a copy
        without that column, which a GPU's matmuls take.
        """
        setup = self.setup
        elements = self.shape.heads * setup.length * setup.tokens
        return 4 * elements * setup.width if self.shape.family.sinks else 0

    def copies(self, layer: int, names: frozenset[str]) -> float:
        """Returns the 16-bit copies of one layer's trained or 32-bit weights that autocast makes."""
        if self.setup.fp32:
            return 0
        names = frozenset() if self.setup.bf16_adapters else names
        linears = self.shape.linears_of(layer)
        adapted = (linear for linear in linears if linear.name in names)
        adapters = sum(self.setup.r * (linear.inputs + linear.outputs) for linear in adapted)
        base = sum(linear.weights for linear in linears) if self.setup.base.is_fp32 else 0
        return 2 * (adapters + base)

    @property
    def logits(self) -> tuple[float, float]:
        """The output layer and the loss, in the forward and in the backward pass."""
        setup, vocabulary, c = self.setup, self.shape.vocabulary, self.setup.width
        is_fp32 = setup.base.is_fp32 or (setup.trains_output and not setup.bf16_adapters)
        copy = vocabulary * self.shape.hidden * c if is_fp32 and c < 4 else 0  # of the output matrix
        fast = setup.step is PlanStep.fast
        capped = self.shape.family.capped_logits
        work = TokenWork(setup.tokens, self.shape.hidden, vocabulary, c, fast, targets=setup.loss_tokens, capped=capped)
        forward, backward = build_objective(setup.loss).activation_bytes(work)
        return forward + copy, backward + (0 if fast else copy)
