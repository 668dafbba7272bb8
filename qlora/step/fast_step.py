"""The fast training step: it replaces parts of transformers' and PEFT's forward pass while a step runs, and only then.

`qlora.step.parts` lists the parts. Each is switched by a key of `trainer`, and says for itself why it cannot run with
a model. Evaluation, generation and saving see the unchanged model. What stays after a step is documented in
`qlora.step.parts.fused_linear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora.config.schema import QuantizationConfig, TrainerConfig
from qlora.errors import ConfigError
from qlora.runtime.device import Placement
from qlora.runtime.row_processes import row_processes
from qlora.step.forward_passes import ForwardPasses
from qlora.step.kernels.sharded_rows import share_rows
from qlora.step.layer_calls import LayerCalls
from qlora.step.layers import find_layers
from qlora.step.part import ON, Packs, Part, Request, StepContext, StepObjective
from qlora.step.parts import PARTS, find_part
from qlora.step.parts.attention import FusedAttention
from qlora.step.parts.loss import FusedLoss
from qlora.step.reference import ReferenceWeights
from qlora.upstream.peft import base_of
from qlora.upstream.torch import compile_options


class FastStep:
    """The model as a training step sees it; a context manager around the forward and backward pass of a batch."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        trainer: TrainerConfig,
        quantization: QuantizationConfig,
        placement: Placement,
        packs: Packs | None,
        objective: StepObjective,
        reference: ReferenceWeights | None = None,
    ) -> None:
        """Decides which parts are on; raises `ConfigError` for one that the config demands and that cannot run."""
        self.base: PreTrainedModel = base_of(model) if isinstance(model, PeftModel) else model
        self.layers = find_layers(self.base)
        self.objective = objective
        self.checkpointed = len(self.layers) if trainer.gradient_checkpointing else 0
        """The number of decoder layers, the first ones, that recompute their activations in the backward pass."""
        self.offloaded = 0
        """The number of those layers, the first ones, whose inputs are kept in the host's memory."""
        self.kept = 0
        """The number of layers with experts, the first ones, whose experts are kept decoded between passes."""
        self.targets: int | None = None
        """The number of labels in the batch of the next step that the loss counts, or more; None: it is not known."""
        self._context = StepContext(
            model, self.base, self.layers, trainer, quantization, placement, packs, objective
        )  # fmt: skip
        self._reads_reference = False
        self._active: dict[str, Part] = {}
        for name in PARTS:
            self._decide(name, find_part(name)(self._context))
        for name in trainer.step_parts:
            self._add(name, find_part(name)(self._context))
        self.is_compiled = self._context.is_on("compile")
        as_graphs = self._context.is_on("cuda_graphs")
        self._calls = LayerCalls(self._context, compiled=self.is_compiled, as_graphs=as_graphs)
        attention, loss = self._active.get("fused_attention"), self._active.get("fused_loss")
        share_rows(row_processes(trainer.context_parallel))
        self._attention = attention if isinstance(attention, FusedAttention) else None
        self._loss = loss if isinstance(loss, FusedLoss) else None
        objective.prepare(compiled=self.is_compiled, **(self._loss.transform_options if self._loss else {}))
        self._replaces_forward = self._attention or self._loss or not objective.is_model_loss
        self._passes = ForwardPasses(self.base, self._attention, self._loss, reference, self._measure_weights, packs)

    def _decide(self, name: str, part: Any) -> None:
        """Switches a shipped part on as the config asks for it, and notes why not."""
        request: Request | None = part.request()
        if request is None:
            return
        reason = part.unsupported_reason()
        if request.value is True and reason is not None:
            raise ConfigError(f"{request.setting}: {reason}; {request.remedy}")
        if request.value is False:
            reason = request.setting
        elif request.value == "auto" and reason is None and self._context.placement.device.type != "cuda":
            reason = "auto switches it on with CUDA only"
        self.parts[part.label] = reason or ON
        if reason is None:
            self._active[name] = part
            part.prepare()

    def _add(self, name: str, part: Part) -> None:
        """Switches on a part of another package, which the config names."""
        if (reason := part.unsupported_reason()) is not None:
            raise ConfigError(f"trainer.step_parts: {name} cannot run: {reason}; leave it out")
        self.parts[name], self._active[name] = ON, part
        part.prepare()

    @property
    def parts(self) -> dict[str, str]:
        """The parts by name: `on`, or why not."""
        return self._context.states

    @property
    def is_active(self) -> bool:
        """Whether anything is replaced at all."""
        return any(state == ON for state in self.parts.values())

    def take_packs(self, packs: Packs | None) -> None:
        """Takes the limits of other packs than those that it was built with."""
        self._context.packs = self._passes.packs = packs

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers of a pair share their prompt where a batch says how."""
        return self._attention is not None and self._attention.shares_prompts

    @property
    def packed_experts(self) -> int:
        """The number of layers whose experts the step decodes, as far as they are not kept decoded."""
        return sum(layer.is_packed for layer in self._context.experts)

    def keep(self, layers: int) -> None:
        """Keeps the decoded experts of some layers, the first ones that have experts, and frees those of the others.

        What is computed has the same bits. It stays from step to step; 0: the model holds no more than it did before.
        """
        experts, dtype = self._context.experts, self._context.placement.compute_dtype
        for layer in experts[layers:]:
            layer.release()
        for layer in experts[:layers]:
            layer.keep(dtype)
        self.kept = min(layers, len(experts))

    def free(self) -> None:
        """Frees what steps keep: decoded experts, and the graphs of layers."""
        self.keep(0)
        if self._calls.graphs is not None:
            self._calls.graphs.forget()

    def give_up_graphs(self) -> bool:
        """Computes layers without graphs from now on; returns whether there were any."""
        graphs = self._calls.graphs
        return graphs is not None and graphs.give_up()

    @property
    def graph_bytes(self) -> int:
        """What graphs compute in, which torch does not count among the tensors that there are."""
        return 0 if self._calls.graphs is None else self._calls.graphs.bytes

    def packed_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the logits of rows that restart `position_ids`, as a step attends: [rows, tokens, vocabulary].

        `batch` has `input_ids` of at most 3 restarts a row, and `position_ids` where there are any.
        """
        if self._attention is None or "position_ids" not in batch:
            unpacked: Tensor = self.base(**batch).logits
            return unpacked
        rows, width = batch["input_ids"].shape
        packs = Packs(width, 3, width)
        self._attention.enter()
        try:
            inputs = self._attention.lay_out({**batch, "labels": batch["input_ids"]}, packs)
            inputs.pop("labels")
            logits: Tensor = self.base(use_cache=False, **inputs).logits
        finally:
            self._attention.exit(failed=False)
        return logits.view(rows, width, -1)

    def extra_bytes(self, rows: int, length: int) -> float:
        """Returns what the parts need for a micro-batch beyond the memory plan of the fast step, in bytes."""
        return sum(part.extra_bytes(rows, length) for part in self._active.values())

    def _measure_weights(self) -> None:
        for part in self._active.values():
            if hasattr(part, "measure_weights"):  # a part of another package may do without
                part.measure_weights()

    @contextlib.contextmanager
    def reading_reference(self) -> Iterator[None]:
        """Makes steps inside the block return what the reference says of answers, float32 [rows, sides], as logits."""
        self._reads_reference = True
        try:
            yield
        finally:
            self._reads_reference = False

    def __str__(self) -> str:
        on = [name for name, state in self.parts.items() if state == ON]
        off = [f"{name}: {state}" for name, state in self.parts.items() if state != ON]
        return "; ".join([", ".join(on), *off])

    def __enter__(self) -> FastStep:
        self._options = contextlib.ExitStack()
        self._options.enter_context(compile_options())
        for part in self._active.values():
            part.enter()
        self._calls.enter(self.checkpointed, self.offloaded)
        if self._replaces_forward:
            self.base.forward = self._forward
        return self

    def __exit__(self, *error: object) -> None:
        self.base.__dict__.pop("forward", None)
        self._calls.exit()
        self.targets = None
        for part in reversed(self._active.values()):
            part.exit(failed=any(error))
        self._options.close()

    def _forward(self, **batch: Any) -> CausalLMOutputWithPast:
        """The forward pass of one batch, as the trainer asks for it."""
        batch = {name: value for name, value in batch.items() if value is not None}  # PEFT passes all it knows
        self._calls.begin(batch["input_ids"].shape[1])
        if self._reads_reference:
            self._passes.targets = self.targets
            answers: Any = self.objective
            return CausalLMOutputWithPast(logits=answers.reference_on_batch(batch, self._passes))
        if (loss_on_batch := getattr(self.objective, "loss_on_batch", None)) is not None:
            self._passes.targets = self.targets
            return CausalLMOutputWithPast(loss=loss_on_batch(batch, self._passes))
        if self._attention is not None:
            batch = self._attention.lay_out(batch, self._context.packs)
        if self._loss is not None:
            return CausalLMOutputWithPast(loss=self._loss.loss(batch, self.targets))
        forward = type(self.base).forward
        if self.objective.is_model_loss:
            return forward(self.base, use_cache=False, **batch)
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch", None)
        logits = forward(self.base, use_cache=False, **batch).logits
        return CausalLMOutputWithPast(loss=self.objective.loss_on_logits(logits, labels, count), logits=logits)
