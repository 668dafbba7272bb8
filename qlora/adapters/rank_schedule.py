"""AdaLoRA's schedule: which singular values of which layers stay, from step to step (arXiv 2303.10512).

PEFT keeps what it decides by in memory alone, and writes an adapter without what is switched off for now. Here
checkpoints hold whole adapters and the state beside them, so that a run resumes exactly; what is switched off is zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.config.schema import LoraConfig
from qlora.errors import ConfigError

STATE, PATTERN = "adapter_ranks.safetensors", "adapter_ranks.json"
MEANS = ("exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator keeps of each parameter."""


class RankSchedule:
    """Follows the importance of singular values in the training, and switches off the least important ones."""

    def __init__(self, config: LoraConfig, model: PeftModel) -> None:
        assert config.other_kind is not None
        tuner: Any = model.base_model
        self.options, self.model, self.config = config.other_kind.filled(config.options), tuner.model, config
        self.allocator = tuner.rankallocator
        self.settings = self.allocator.peft_config
        self.kept: dict[str, list[bool]] = {}
        """By the names of the vectors of singular values, those that are on; {}: none was switched off yet."""
        weights = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.weights = [weight for name, weight in weights if ".lora_" in name]
        self.turned = [weight if ".lora_A." in name else weight.T for name, weight in weights if ".lora_E." not in name]

    def begin(self, steps: int) -> None:
        """Takes the number of steps; raises `ConfigError` where the phases of the schedule are longer."""
        first, last = (self._steps(self.options[name], steps) for name in ("tinit", "tfinal"))
        if first >= steps - last:
            raise ConfigError(
                f"lora.options.tinit={self.options['tinit']:g} and tfinal={self.options['tfinal']:g} leave none of the "
                f"{steps} steps to choose ranks in; set smaller ones, or a larger trainer.max_steps"
            )
        self.settings.total_step, self.settings.tinit, self.settings.tfinal = steps, first, last

    @staticmethod
    def _steps(value: float, steps: int) -> int:
        """Returns a number of steps, of which below 1 stands for a share of all of them."""
        return round(value * steps) if value < 1 else int(value)

    @torch.enable_grad()
    def penalise(self, scale: float) -> None:
        """Adds the gradient of how far A and B are from orthonormal, times `scale`, once a step, to the loss's own."""
        weight = self.options["orth_reg_weight"]
        if not weight or not self.turned:
            return
        device = self.weights[0].device
        penalty = torch.stack([_distance(matrix).to(device) for matrix in self.turned]).mean()
        weights = [matrix for matrix in self.weights if matrix.grad is not None]
        for matrix, gradient in zip(
            weights, torch.autograd.grad(weight * scale * penalty, weights, allow_unused=True), strict=True
        ):
            if gradient is not None and matrix.grad is not None:
                matrix.grad.add_(gradient)

    @torch.no_grad()
    def choose(self, step: int) -> None:
        """Follows the step with this number from 1, whose gradients are still there."""
        last = self.settings.total_step - self.settings.tfinal
        if step > last:
            self._mask()
        elif all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in self.weights):
            _, kept = self.allocator.update_and_allocate(self.model, step, force_mask=step == last)
            self.kept = kept or self.kept

    def _mask(self) -> None:
        for name, weight in self.model.named_parameters():
            if name in self.kept:
                weight.masked_fill_(~torch.tensor(self.kept[name], device=weight.device).view(-1, 1), 0.0)

    def save(self, folder: Path) -> None:
        """Writes the state into a checkpoint."""
        tensors = {
            f"{mean}/{name}": tensor.contiguous()
            for mean in MEANS
            for name, tensor in getattr(self.allocator, mean).items()
        }
        save_file(tensors, folder / STATE)
        (folder / PATTERN).write_text(json.dumps(self.kept), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads the state of a checkpoint."""
        self.allocator.reset_ipt()
        device = self.weights[0].device
        for name, tensor in load_file(folder / STATE).items():
            mean, _, parameter = name.partition("/")
            getattr(self.allocator, mean)[parameter] = tensor.to(device)
        self.allocator.ipt = dict(getattr(self.allocator, MEANS[0]))  # each is computed anew before it is read
        self.kept = json.loads((folder / PATTERN).read_text(encoding="utf-8"))


def build_rank_schedule(config: LoraConfig, model: torch.nn.Module) -> RankSchedule | None:
    """Returns the schedule of an adapter that is trained; None: its ranks stay."""
    if isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel):
        return RankSchedule(config, model)
    return None


def _distance(matrix: Tensor) -> Tensor:
    """Returns how far the rows of a matrix are from orthonormal."""
    products = matrix @ matrix.T
    return torch.linalg.norm(products - torch.eye(len(products), device=products.device, dtype=products.dtype))
