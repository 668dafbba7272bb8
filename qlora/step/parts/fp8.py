"""Matmuls with the frozen weights in 8-bit floats (`quantization.compute=fp8`), computed by the fused linear layers."""

from __future__ import annotations

import logging
from collections import defaultdict

import torch
from torch import Tensor

from qlora.config.schema import BaseProducts
from qlora.errors import ConfigError
from qlora.quantization.bnb4.quantized_weight import weight_scale
from qlora.runtime.device import Placement
from qlora.step.kernels.matmul_fp8 import AMAX_A, AMAX_B, WEIGHT_SCALE
from qlora.step.part import ON, ConfiguredPart, Request, StepContext
from qlora.step.parts.fused_linear import LinearGroup
from qlora.upstream.torch import foreach_norm
from qlora.upstream.torch_models import weight_of

log = logging.getLogger(__name__)


class Fp8(ConfiguredPart):
    """Gives the groups of fused layers the scales of their weights, and measures their adapters before each step."""

    label = "fp8"

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self._trackers: list[AmaxTracker] = []

    def request(self) -> Request | None:
        """Asks for 8 bits where the config does; where they are not available, a warning says why."""
        if self.context.quantization.compute is not BaseProducts.fp8:
            return None
        if self.context.trainer.fused_linear is False:
            raise ConfigError(
                "quantization.compute=fp8 contradicts trainer.fused_linear=false, whose layers compute it; leave one "
                "of them out"
            )
        if (reason := self.unsupported_reason()) is not None:
            log.warning("quantization.compute=fp8: %s; computing in %s", reason, self.context.placement.compute_dtype)
        return Request(reason is None or "auto", "quantization.compute=fp8", "set quantization.compute=native")

    def unsupported_reason(self) -> str | None:
        """Returns why matmuls in 8 bits cannot run."""
        fused = self.context.states["fused_linear"]
        return fp8_unsupported_reason(self.context.placement) if fused == ON else fused

    def prepare(self) -> None:
        """Computes the scales of all weights."""
        by_device: dict[torch.device, list[LinearGroup]] = defaultdict(list)
        for group in self.context.groups:
            group.weight_scale = weight_scale(group.codes)
            by_device[group.weight_scale.device].append(group)
        self._trackers = [AmaxTracker(groups) for groups in by_device.values()]
        for experts in self.context.experts:
            experts.scale_weights()

    def enter(self) -> None:
        """Measures the adapters."""
        self.measure_weights()

    def measure_weights(self) -> None:
        """Measures the adapters as they are now."""
        for tracker in self._trackers:
            tracker.measure()


class AmaxTracker:
    """The largest absolute values of all adapters, measured at once where a step begins.

    Measured layer by layer, they would take a seventh of all kernels of a step, each hardly longer than its launch.
    """

    def __init__(self, groups: list[LinearGroup]) -> None:
        """Takes groups with a `weight_scale`, on one device."""
        most = max(len(group.members) for group in groups)
        # Four numbers instead of three, so that compiled code can read each group's with one aligned load of 16 bytes.
        assert groups[0].weight_scale is not None
        self.scales = groups[0].weight_scale.new_zeros(len(groups), 4)
        self.matrices: list[Tensor] = []
        scalings, indices = [], []
        for scales, group in zip(self.scales, groups, strict=True):
            assert group.weight_scale is not None
            scales[WEIGHT_SCALE] = group.weight_scale
            group.scales = scales[:3]
            first = len(self.matrices)
            for member in group.members:
                self.matrices += [weight_of(member.lora_A["default"]), weight_of(member.lora_B["default"])]
                scalings += [1.0, abs(member.scaling["default"])]
            last = len(self.matrices) - 2
            indices.append([[min(first + 2 * slot, last) + kind for slot in range(most)] for kind in (0, 1)])
        self.scalings = self.scales.new_tensor(scalings)
        self.indices = torch.tensor(indices, device=self.scales.device)
        """Which matrices a group has of each kind, [groups, 2, most members]; the last one is repeated as a filler."""

    @torch.no_grad()
    def measure(self) -> None:
        """Measures the matrices as they are now."""
        amax = torch.stack(foreach_norm(self.matrices, torch.inf)).float() * self.scalings
        self.scales[:, AMAX_A.start : AMAX_B.stop] = amax[self.indices].amax(2)


def fp8_unsupported_reason(placement: Placement) -> str | None:
    """Returns why a device cannot multiply 8-bit floats; a CPU emulates them."""
    if placement.device.type == "cpu":
        return None
    if placement.device.type != "cuda" or torch.version.hip is not None:
        return "matmuls in 8-bit floats need an NVIDIA GPU"
    if torch.cuda.get_device_capability(placement.device) < (8, 9):
        return "this GPU multiplies no 8-bit floats (Ada, Hopper and later do)"
    if placement.compute_dtype is not torch.bfloat16:
        return "the other matmuls must be in bf16 (quantization.compute_dtype)"
    return None
