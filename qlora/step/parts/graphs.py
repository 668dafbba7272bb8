"""The forward pass of checkpointed layers as CUDA graphs (`qlora.step.layer_graphs`)."""

from __future__ import annotations

from qlora.experts.layout import find_experts
from qlora.runtime import distributed
from qlora.step.part import ON, ConfiguredPart, Request, StepContext


class GraphedLayers(ConfiguredPart):
    """The part that decides whether checkpointed layers are computed by graphs; `qlora.step.layer_calls` calls them."""

    label = "cuda_graphs"

    def __init__(self, context: StepContext) -> None:
        self.context = context

    def request(self) -> Request | None:
        """Returns what `trainer.cuda_graphs` asks for; `auto` asks for narrow models with CUDA only."""
        trainer, settings = self.context.trainer, self.context.base.config.get_text_config()
        asks = trainer.asks_for_graphs(settings.hidden_size, is_mixture=bool(find_experts(self.context.base)))
        asks &= self.context.placement.device.type == "cuda"
        return None if trainer.cuda_graphs == "auto" and not asks else Request.of_switch(trainer, "cuda_graphs")

    def unsupported_reason(self) -> str | None:
        """Returns why no layer can be captured."""
        if self.context.placement.device.type != "cuda":
            return "the device is no GPU of NVIDIA"
        if (compiled := self.context.states["compile"]) != ON:
            return f"layers are not compiled ({compiled})"
        if distributed.world_size() > 1:
            return "several processes train"
        if any(experts.waits for experts in self.context.experts):
            return "experts wait in the host's memory"
        return None
