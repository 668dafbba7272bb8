"""In how many layers of a base the experts wait in the host's memory (`quantization.experts_offload`), in a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.config.schema import Config, ExpertsOffload
from qlora.errors import ConfigError, UserError
from qlora.planning.advice import Training, fewest_waiting_untrained
from qlora.planning.gpus import Gpu
from qlora.planning.memory_plan import CONTEXT
from qlora.planning.read_shape import read_shape
from qlora.planning.training_plan import find_waiting, read_setup
from qlora.quantization.method import find_method
from qlora.text import parse_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOnGpu:
    """What decides it beside the config; what costs time to know is asked for where it is needed."""

    device_type: str
    is_spread: bool
    """Whether the base lies on several devices."""
    settings: Callable[[], Mapping[str, Any]]
    """Returns the settings of the model."""
    free: Callable[[], float]
    """Returns the bytes that torch may hold on the GPU."""
    longest_row: Callable[[], int | None]
    """Returns the tokens of the longest row or pack to train on; None: nothing is trained."""


def waiting_for_run(config: Config, run: RunOnGpu) -> int | None:
    """Returns the number of layers whose experts wait; None: those of all layers.

    A model type that no plan knows keeps all its experts on the GPU. Raises `ConfigError` where experts are asked to
    wait for another device than a CUDA GPU.
    """
    offload, is_cuda = config.quantization.experts_offload, run.device_type == "cuda"
    if offload is ExpertsOffload.all:
        if not is_cuda:
            raise ConfigError(
                "quantization.experts_offload=all has experts wait for a CUDA GPU, and this run computes on "
                f"{run.device_type}; leave it out"
            )
        return None
    can_wait = is_cuda and not run.is_spread and find_method(config.quantization).offloads_experts
    if offload is ExpertsOffload.none or not can_wait:
        return 0
    try:
        return _fewest(config, run)
    except UserError as error:  # what no plan knows, and a run may do all the same
        log.warning("quantization.experts_offload=auto: %s; all experts stay on the GPU", error)
        return 0


def _fewest(config: Config, run: RunOnGpu) -> int:
    """Returns the least number with which the run fits, as far as any does."""
    shape = read_shape(run.settings(), f"model.name={config.model.name}")
    if shape.experts is None:
        return 0
    setup, row, free = read_setup(config, shape), run.longest_row(), run.free()
    if row is None:
        return fewest_waiting_untrained(shape, setup, free)
    training = Training(shape, replace(setup, length=row), config.trainer.gradient_accumulation_steps)
    size = parse_size(config.trainer.memory_budget or "auto")
    memory = free if size is None else min(free, size)
    return find_waiting(config, training, Gpu("this GPU", memory + CONTEXT, None, None, None))
