"""The energy that GPUs have used, as NVIDIA's driver counts it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver


def read_energy() -> float | None:
    """Returns the joules that the GPUs this process sees have used since the driver was loaded.

    None where there are none, or where they do not tell (before Volta, on other makers', in some virtual machines). All
    processes on a GPU count. Only differences mean something.
    """
    library = _load()
    if library is None or not torch.cuda.is_available():
        return None
    total = 0.0
    for index in range(torch.cuda.device_count()):
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
        if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        total += millijoules.value / 1e3
    return total


@functools.cache
def _load() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
        return None if library.nvmlInit_v2() else library
    except (OSError, AttributeError):
        return None
