"""Whether torch, the driver and bitsandbytes find each other; everything here is cheap and loads no model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora.config.schema import Config, Device
from qlora.doctor.findings import Finding, fail, fine, first_line, warn
from qlora.errors import ResourceError
from qlora.quantization.method import find_method

DRIVER = Path("/proc/driver/nvidia/version")
TORCH_SITE = "https://pytorch.org/get-started/locally/"


def check_torch(config: Config) -> Iterator[Finding]:
    """Looks whether torch can be imported and sees the device that the config asks for."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield fail(
            "torch", f"cannot be imported: {first_line(error)}", f"install a build for this machine: {TORCH_SITE}"
        )
        return
    kind = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield fine("torch", f"{torch.__version__}, built for {kind}")
    if not torch.cuda.is_available():
        yield from _without_gpu(config, torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)


def _without_gpu(config: Config, cuda: str | None) -> Iterator[Finding]:
    driver = read_driver()
    if driver is None:
        if config.device is Device.cuda:
            yield fail("gpu", "device=cuda, but there is no NVIDIA driver", "use device=cpu, or install a driver")
        else:
            yield fine("gpu", "none; the run computes on the CPU")
        return
    if cuda is None:
        says, fix = (
            f"driver {driver} is here, but this torch was built without CUDA",
            f"install a CUDA build: {TORCH_SITE}",
        )
    else:
        says = f"driver {driver} is here, but torch for CUDA {cuda} sees no GPU"
        fix = "run nvidia-smi, look at CUDA_VISIBLE_DEVICES, and update the driver or take a torch for an older CUDA"
    yield (fail if config.device is Device.cuda else warn)("gpu", says, fix)


def _gpu(index: int) -> Iterator[Finding]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    says = (f"{index}: {properties.name}, {properties.total_memory / 1e9:.1f} GB, capability {properties.major}."
            f"{properties.minor}, driver {read_driver() or 'unknown'}")  # fmt: skip
    built = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]
    capability = 10 * properties.major + properties.minor
    numbers = [int("".join(filter(str.isdigit, name))) for name in built]
    if (
        numbers
        and not any(number // 10 == properties.major and number <= capability for number in numbers)
        and not any(
            name.startswith("compute_") and number <= capability for name, number in zip(built, numbers, strict=True)
        )
    ):
        yield fail(
            "gpu",
            f"{says}: this torch has no code for it, only {', '.join(built)}",
            f"install another build: {TORCH_SITE}",
        )
        return
    yield fine("gpu", says)


def read_driver() -> str | None:
    """Returns the version of NVIDIA's kernel driver; None: there is none, or it does not tell."""
    try:
        parts = DRIVER.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    return next((word for word in parts if word[0].isdigit() and "." in word), None)


def check_quantizer(config: Config) -> Iterator[Finding]:
    """Looks for the package of the quantization method, where that is an extra."""
    method = find_method(config.quantization)
    try:
        method.check_installed(config.quantization)
    except ResourceError:
        yield fail(str(method.package), "is not installed", f"pip install 'qlora[{method.package}]'")


def check_bitsandbytes(config: Config) -> Iterator[Finding]:
    """Looks whether bitsandbytes has loaded its native library, and the one for this device."""
    try:
        import bitsandbytes
        import torch
        from bitsandbytes import cextension
    except Exception as error:  # it raises whatever its set-up meets
        yield fail("bitsandbytes", f"cannot be imported: {first_line(error)}", "pip install -U bitsandbytes")
        return
    library, needed = (
        cextension.lib,
        find_method(config.quantization).package == "bitsandbytes" or "8bit" in config.trainer.optim,
    )
    says = f"{bitsandbytes.__version__}"
    on_gpu = torch.cuda.is_available() and config.device is not Device.cpu
    if isinstance(library, cextension.ErrorHandlerMockBNBNativeLibrary):
        reason = f"{says}: its native library was not loaded ({first_line(Exception(library.error_msg))})"
        fix = "python -m bitsandbytes says why; install the bitsandbytes for this CUDA, or set BNB_CUDA_VERSION"
        if on_gpu and needed:
            yield fail("bitsandbytes", reason, fix)
        else:
            yield warn(
                "bitsandbytes", f"{reason}; on a CPU it then computes slower, with torch", "pip install -U bitsandbytes"
            )
    elif on_gpu and not library.compiled_with_cuda and hasattr(library, "compiled_with_cuda") and needed:
        yield fail("bitsandbytes", f"{says}: its library is the one for a CPU, but the run computes on a GPU",
                   "pip install -U bitsandbytes, after the CUDA build of torch")  # fmt: skip
    else:
        yield fine("bitsandbytes", f"{says}, native library {Path(library._lib._name).name}")
