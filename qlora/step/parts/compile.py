"""Decoder layers compiled one by one by `torch.compile`; all of them share the compiled code."""

from __future__ import annotations

from peft.utils.other import ModulesToSaveWrapper

from qlora.step.part import SPREAD, ConfiguredPart, Request, StepContext
from qlora.upstream.peft import has_plain_lora


class CompiledLayers(ConfiguredPart):
    """The part that decides whether layers are compiled; `qlora.step.layer_calls` calls them."""

    label = "compile"

    def __init__(self, context: StepContext) -> None:
        self.context = context

    def request(self) -> Request:
        """Returns what `trainer.compile` asks for."""
        return Request.of_switch(self.context.trainer, "compile")

    def unsupported_reason(self) -> str | None:
        """Returns why there are no layers to compile."""
        if self.context.is_spread:
            return SPREAD
        if not has_plain_lora(self.context.model):
            return "the adapter is another kind than LoRA"
        if any(isinstance(module, ModulesToSaveWrapper) for layer in self.context.layers for module in layer.modules()):
            return "modules inside layers train whole (lora.modules_to_save)"
        if not self.context.layers:
            return f"{self.context.base.config.model_type} has no list of decoder layers"
        return None
