"""The names of quantization methods and where each is implemented; a method is imported when it is first used.

Needs no torch. Another package adds a method with an entry point of the group `qlora.quantization`, or a config names
a class as `module:Class`. `qlora.quantization.method.QuantizationMethod` says what a method answers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora.config.registries.installed import check_name, installed_names
from qlora.config.user_code import import_function
from qlora.errors import ConfigError

KEY = "quantization.method"
GROUP = "qlora.quantization"
"""The entry points that add a method: `NAME = "module:Class"`."""


@dataclass(frozen=True)
class Entry:
    """A method of this package."""

    path: str
    """Where it is implemented, as `module:Class`."""
    bits: tuple[int, ...]
    """The values of `quantization.bits` that it has."""


METHODS = {
    "bnb4": Entry("qlora.quantization.bnb4.method:Bnb4", (4,)),
    "bnb8": Entry("qlora.quantization.bnb8.method:Bnb8", (8,)),
    "hqq": Entry("qlora.quantization.hqq:Hqq", (2, 3, 4)),
    "torchao": Entry("qlora.quantization.torchao:Torchao", (8,)),
    "packed": Entry("qlora.quantization.packed:Packed", (2, 4, 8)),
    "none": Entry("qlora.quantization.none:Unquantized", (16, 32)),
}
DEFAULTS = {4: "bnb4", 8: "bnb8", 16: "none", 32: "none"}
"""The method that `quantization.method=auto` takes, by `quantization.bits`."""
DECODED = ("fp8", "compressed-tensors", "gptq", "awq", "hqq", "torchao", "mxfp4")
"""What the files of a base may be quantized by, as `quant_method` in `config.json`, and are decoded from."""
KEPT = ("gptq", "awq")
"""Those of which `quantization=stored` keeps the integers packed (`packed`); experts of a mixture are decoded."""
BITS = tuple(sorted({count for entry in METHODS.values() for count in entry.bits}))
"""The values of `quantization.bits` that any method has."""
AUTO = "auto"


def check_method(name: str, bits: int) -> None:
    """Raises `ConfigError` for a method that is not known, and for one that does not have the bits; imports none."""
    check_name(KEY, name, (AUTO, *METHODS), GROUP)
    if name == AUTO and bits not in DEFAULTS:
        named = " or ".join(f"quantization.method={method}" for method, entry in METHODS.items() if bits in entry.bits)
        raise ConfigError(f"quantization.bits={bits} needs {named}; or choose bits={_either(DEFAULTS)}")
    if name in METHODS and bits not in METHODS[name].bits:
        raise ConfigError(
            f"quantization.method={name} needs quantization.bits={_either(METHODS[name].bits)}, got bits={bits}; leave "
            "quantization.method out, which takes the method of these bits"
        )


def load_method(name: str, bits: int) -> Any:
    """Returns the method that a config names, a `QuantizationMethod`; imports its module, which needs no torch.

    Raises `ConfigError` for a class that cannot be imported. Whether its package is trusted is checked with the config.
    """
    name = DEFAULTS[bits] if name == AUTO else name
    if name in METHODS:
        return _load(METHODS[name].path)
    return _load(name if ":" in name else installed_names(GROUP)[name])


@functools.cache
def _load(path: str) -> Any:
    method = import_function(path, KEY, "class")
    if not isinstance(method, type):
        raise ConfigError(f"{KEY}={path} is not a class; name a subclass of QuantizationMethod")
    return method()


def _either(counts: Iterable[int]) -> str:
    *others, last = map(str, counts)
    return f"{', '.join(others)} or {last}" if others else last
