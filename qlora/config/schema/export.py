"""What is written for other programs: the group `export`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ExportFormat = StrEnum("ExportFormat", {"gguf": "gguf", "gguf-adapter": "gguf-adapter"})
"""What a file holds."""

GgufType = StrEnum("GgufType", "f16 q8_0 q4_k_m")
"""How a GGUF file holds weights."""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Which file `task=export` writes for llama.cpp and what is built on it, such as Ollama."""

    format: ExportFormat = ExportFormat.gguf
    """`gguf`: one model of base and adapter, merged and proved as `task=merge` does; `gguf-adapter`: the adapter, and
    the untouched base that llama.cpp adds it to."""
    type: GgufType = GgufType.f16
    """The precision of the weights: `f16`, `q8_0` (8 bits, 32 numbers a scale) or `q4_k_m` (4 to 6 bits, which
    llama.cpp's own library quantizes: `llama-cpp-python`, or `llama-quantize` on the PATH)."""
    base: bool = True
    """Whether `export=gguf-adapter` writes the base, too, with tokenizer, template and end tokens of the training;
    adapters of one base and one template can share it."""
    path: str | None = None
    """The file to write, which ends in `.gguf`; unset: in the run's folder, named after the run and the type."""
