"""Quantizes a GGUF file to K-quants by llama.cpp's own library: `llama-cpp-python`, or its program."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora.errors import ConfigError, ResourceError
from qlora.text import brief_text

PROGRAM, NAME = "llama-quantize", "Q4_K_M"
Quantizer = Callable[[Path, Path], None]
"""Reads the first file and writes the second."""


def find_quantizer(key: str = "export.type=q4_k_m") -> Quantizer:
    """Returns what quantizes on this machine; raises `ConfigError` where nothing does."""
    try:
        import llama_cpp
    except ImportError:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(
                f"{key} is quantized by llama.cpp's library, which is not installed: pip install llama-cpp-python, put "
                f"its {PROGRAM} on the PATH, or use export.type=q8_0"
            ) from None
        return lambda source, target: _by_program(program, source, target)
    return lambda source, target: _by_library(llama_cpp, source, target)


def _by_library(library: Any, source: Path, target: Path) -> None:
    settings = library.llama_model_quantize_default_params()
    settings.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_K_M
    status = library.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    _check(target, status, f"llama_model_quantize ended with {status}")


def _by_program(program: str, source: Path, target: Path) -> None:
    run = subprocess.run([program, str(source), str(target), NAME], capture_output=True, text=True, check=False)
    lines = (run.stderr or run.stdout).strip().splitlines()
    _check(target, run.returncode, brief_text(lines[-1]) if lines else f"it ended with {run.returncode}")


def _check(target: Path, status: int, reason: str) -> None:
    if status != 0 or not target.is_file():
        raise ResourceError(
            f"export.type=q4_k_m: llama.cpp could not quantize the file ({reason}); use export.type=q8_0, or "
            "another disk with export.path=FILE.gguf"
        )
