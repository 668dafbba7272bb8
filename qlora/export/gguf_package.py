"""The package `gguf`, which an extra installs."""

from __future__ import annotations

from typing import Any

from qlora.errors import ConfigError


def load_gguf(key: str = "task=export") -> Any:
    """Returns the module `gguf`; raises `ConfigError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"{key} needs the package gguf, which is not installed: pip install 'qlora[gguf]'") from error
    return gguf
