"""The loss without the logits of all tokens: the objective computes it from the hidden states and the output matrix."""

from __future__ import annotations

from typing import Any

import torch

from qlora.step.part import SPREAD, ConfiguredPart, Request, StepContext

SPECIAL_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of architectures that change their logits after the matmul with the output matrix."""


class FusedLoss(ConfiguredPart):
    """The part that hands the objective hidden states instead of logits."""

    label = "fused_loss"

    def __init__(self, context: StepContext) -> None:
        self.context, self.base = context, context.base

    def request(self) -> Request:
        """Returns what `trainer.fused_loss` asks for."""
        return Request.of_switch(self.context.trainer, "fused_loss")

    def unsupported_reason(self) -> str | None:
        """Returns why the logits of all tokens are needed."""
        if self.context.is_spread:
            return SPREAD
        settings = self.base.config.get_text_config()
        if (output := self.base.get_output_embeddings()) is None or type(output) is not torch.nn.Linear:
            return "the output layer is not a plain torch.nn.Linear, or it is trained"
        if output.bias is not None or output.weight.requires_grad:
            return "the output layer is trained, or has a bias"
        if changed := [name for name in SPECIAL_LOGITS if getattr(settings, name, None)]:
            return f"{settings.model_type} changes its logits ({changed[0]})"
        return None

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """Returns the loss of a batch."""
        labels, count = batch.pop("labels"), batch.pop("num_items_in_batch", None)
        embedded = self.base.get_input_embeddings()(batch.pop("input_ids"))
        if not embedded.requires_grad:  # all layers then see the same kind of tensor, and share their code
            embedded.requires_grad_()
        hidden = self.base.base_model(inputs_embeds=embedded, use_cache=False, **batch).last_hidden_state
        weight = self.base.get_output_embeddings().weight
        kind = hidden.device.type
        # As autocast computes any other linear layer: the matrix may be stored in 32 bits.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            return self.context.objective.loss_on_hidden(hidden.to(dtype), weight.to(dtype), labels, count)
