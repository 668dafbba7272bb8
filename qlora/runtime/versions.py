"""The versions of this project and of the libraries that decide how it runs, read without importing them."""

from __future__ import annotations

import platform
from importlib import metadata

from qlora import __version__

LIBRARIES = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "hydra-core", "omegaconf"),
    *("safetensors", "tokenizers", "huggingface_hub", "triton"),
)
"""The packages that decide whether and how a run works."""


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions_page() -> str:
    """Returns this project's version, and a line for each library, as `--version` prints them."""
    rows = {"python": platform.python_version(), **{name: installed_version(name) for name in LIBRARIES}}
    lines = (f"  {name:<17}{version or 'not installed'}" for name, version in rows.items())
    return "\n".join([f"qlora {__version__}", *lines])
