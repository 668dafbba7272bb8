"""The data type of the frozen base: the group `quantization`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from qlora.config.registries.quantization_methods import AUTO, BITS, DEFAULTS, METHODS, check_method
from qlora.errors import ConfigError, require

QuantType = StrEnum("QuantType", "nf4 fp4")
"""The 4-bit data types of bitsandbytes."""

ComputeDtype = StrEnum("ComputeDtype", "auto bf16 fp16 fp32")
"""The precision of matmuls."""

ExpertsBits = StrEnum("ExpertsBits", "same none")
"""How the experts of a mixture are stored: as the linear layers, or in 16 bits."""

ExpertsOffload = StrEnum("ExpertsOffload", "auto none all")
"""Whose experts wait in the host's memory."""

BaseProducts = StrEnum("BaseProducts", "native fp8")
"""The precision of matmuls with the frozen weights."""

INT8_THRESHOLD = 6.0
"""That of LLM.int8()."""


@dataclass(kw_only=True, slots=True)
class QuantizationConfig:
    """The data type of the frozen base weights (QLoRA paper, section 3)."""

    bits: int = MISSING
    """4, 8, 16 or 32 bits a base weight; other methods than bitsandbytes have others."""
    method: str = "auto"
    """How the base is quantized: `auto` takes the method of `bits` (`bnb4`, `bnb8` or `none`); another package's is
    named by its entry point of the group `qlora.quantization`, or as `module:Class` with `trusted=[module]`."""
    quant_type: QuantType = QuantType.nf4
    """The 4-bit data type: `nf4` (normal float) or `fp4`; read with `bits=4` only."""
    double_quant: bool = False
    """Quantize the quantization constants too (saves 0.37 bits a parameter); with `bits=4` only."""
    experts: ExpertsBits = ExpertsBits.same
    """The experts of a mixture: `same` quantizes each matrix of an expert as a linear layer, `none` keeps them in
    16 bits (most of a mixture's memory); routers and norms are never quantized."""
    experts_offload: ExpertsOffload = ExpertsOffload.auto
    """Layers of a mixture whose 4-bit experts wait in the host's memory and are copied to the GPU one layer before they
    are needed, forward and backward: `auto`, as few as must for the run to fit on a CUDA GPU, by the formula of
    `task=plan`; `none`; or `all`."""
    compute_dtype: ComputeDtype = ComputeDtype.auto
    """The precision of matmuls and, with `bits=16`, of the stored weights. `auto`: bf16 where the
    device computes in it natively, else fp16 on a GPU and fp32 on a CPU (with `bits=16`: bf16 on any CPU)."""
    compute: BaseProducts = BaseProducts.native
    """The precision of training's matmuls with the 4-bit weights: `native` is that of `compute_dtype`, `fp8` rounds
    weights, activations and gradients to 8-bit floats for them (NVIDIA Ada, Hopper and later; emulated on a CPU). The
    adapter, evaluation and generation compute as ever."""
    int8_threshold: float = INT8_THRESHOLD
    """Activations above this stay in 16 bit (LLM.int8(), arXiv 2208.07339); read with `bits=8` only."""

    def __post_init__(self) -> None:
        *others, last = map(str, BITS)
        require(self.bits in BITS, "quantization.bits", f"be {', '.join(others)} or {last}", self.bits)
        check_method(self.method, self.bits)
        require(self.int8_threshold >= 0, "quantization.int8_threshold", "not be negative", self.int8_threshold)
        self._check_settings()
        if self.bits == 16 and self.compute_dtype is ComputeDtype.fp32:
            raise ConfigError(
                "quantization.compute_dtype=fp32 contradicts quantization.bits=16; use quantization=fp32 for "
                "32-bit weights, or compute_dtype=auto, bf16 or fp16"
            )

    def _check_settings(self) -> None:
        """Refuses settings of other methods than the one that is chosen."""
        name = DEFAULTS[self.bits] if self.method == AUTO else self.method
        got = f"quantization.bits={self.bits}" if self.method == AUTO else f"quantization.method={self.method}"
        if self.double_quant and (self.bits != 4 or name in METHODS.keys() - {"bnb4"}):
            raise ConfigError(
                f"quantization.double_quant=true needs quantization.bits=4 of bitsandbytes, got {got}; choose "
                "quantization=int8, quantization=none or quantization=fp32, or set quantization.double_quant=false"
            )
        if self.compute is BaseProducts.fp8 and (self.bits != 4 or name in METHODS.keys() - {"bnb4"}):
            raise ConfigError(
                f"quantization.compute=fp8 is for 4-bit weights of bitsandbytes, got {got}; choose "
                "quantization=nf4 or quantization=fp4, or leave it out"
            )
        if name in METHODS and self.method != AUTO:
            others = {
                f"quantization.quant_type={self.quant_type.value}": (self.quant_type is not QuantType.nf4, "bnb4"),
                f"quantization.int8_threshold={self.int8_threshold:g}": (self.int8_threshold != INT8_THRESHOLD, "bnb8"),
            }
            for key, (is_set, reader) in others.items():
                if is_set and name != reader:
                    raise ConfigError(
                        f"{key} is read by quantization.method={reader}, got {got}; leave one of them out"
                    )
