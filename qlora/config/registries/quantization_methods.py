"""The names of quantization methods and where each is implemented; a method is imported when it is first used.

Needs no torch. Another package adds a method with an entry point of the group `qlora.quantization`, or a config names
a class as `module:Class`. `qlora.quantization.method.QuantizationMethod` says what a method answers.
"""

from __future__ import annotations

import functools
from typing import Any

from qlora.config.registries.installed import check_name, installed_names
from qlora.config.user_code import import_function
from qlora.errors import ConfigError

KEY = "quantization.method"
GROUP = "qlora.quantization"
"""The entry points that add a method: `NAME = "module:Class"`."""
METHODS = {
    "bnb4": "qlora.quantization.bnb4.method:Bnb4",
    "bnb8": "qlora.quantization.bnb8.method:Bnb8",
    "none": "qlora.quantization.none:Unquantized",
}
BITS = {4: "bnb4", 8: "bnb8", 16: "none", 32: "none"}
"""The method that `quantization.method=auto` takes, by `quantization.bits`."""
AUTO = "auto"


def check_method(name: str, bits: int) -> None:
    """Raises `ConfigError` for a method that is not known, and for one that does not have the bits; imports none."""
    check_name(KEY, name, (AUTO, *METHODS), GROUP)
    if name in METHODS and BITS[bits] != name:
        supported = " or ".join(str(count) for count, method in BITS.items() if method == name)
        raise ConfigError(
            f"quantization.method={name} needs quantization.bits={supported}, got bits={bits}; leave quantization."
            "method out, which takes the method of these bits"
        )


def load_method(name: str, bits: int) -> Any:
    """Returns the method that a config names, a `QuantizationMethod`; imports its module, which needs no torch.

    Raises `ConfigError` for a class that cannot be imported. Whether its package is trusted is checked with the config.
    """
    name = BITS[bits] if name == AUTO else name
    return _load(METHODS.get(name) or (name if ":" in name else installed_names(GROUP)[name]))


@functools.cache
def _load(path: str) -> Any:
    method = import_function(path, KEY, "class")
    if not isinstance(method, type):
        raise ConfigError(f"{KEY}={path} is not a class; name a subclass of QuantizationMethod")
    return method()
