"""The energy that GPUs have used, as NVIDIA's driver counts it."""

from __future__ import annotations

import functools

import torch


def read_energy() -> float | None:
    """Returns the joules that the GPUs this process sees have used since the driver was loaded.

    None without NVIDIA GPUs, and for GPUs that do not count (before Volta, in some virtual machines). All processes on
    a GPU count. Only differences mean something.
    """
    if not (torch.cuda.is_available() and _has_driver()):
        return None
    import pynvml

    total = 0.0
    for index in range(torch.cuda.device_count()):
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            total += pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # millijoules
        except pynvml.NVMLError:
            return None
    return total


@functools.cache
def _has_driver() -> bool:
    """Returns whether NVML, which comes with NVIDIA's driver, starts."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True
