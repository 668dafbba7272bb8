"""`lora.parameters`: finds the rank that trains as many parameters as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from qlora.config.schema import Config, LoraConfig
from qlora.errors import ConfigError


def with_size(config: Config) -> Config:
    """Returns a config whose adapter trains at most `lora.parameters`, and no larger one of its kind does.

    Without `lora.parameters` it is returned unchanged. Raises `ConfigError` where the smallest one trains more.
    """
    limit = config.lora.parameters
    if limit is None:
        return config
    from qlora.planning.memory_plan import Ledger
    from qlora.planning.training_plan import find_shape, read_setup

    shape = find_shape(config)

    def count(size: int) -> int:
        sized = replace(config, lora=_sized(config.lora, size))
        return Ledger(shape, read_setup(sized, shape)).trained_count

    size = _highest(count, limit) if _has_rank(config.lora) else _best(count, limit)
    if size is None:
        least = count(1 if _has_rank(config.lora) else 2)
        raise ConfigError(
            f"lora.parameters={limit}: the smallest adapter of this choice trains {least:,} parameters; raise it, or "
            "adapt fewer layers (lora.target_modules, lora.layers)"
        )
    return replace(config, lora=_sized(config.lora, size))


def _highest(count: Callable[[int], int], limit: int) -> int | None:
    """Returns the largest rank of those whose parameters, which grow with it, keep to the limit."""
    low, high = 0, 1
    while high < LARGEST and count(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle)
    return low or None


def _best(count: Callable[[int], int], limit: int) -> int | None:
    """Returns a size of those that train most within the limit, a power of 2 if one does; few divide every layer."""
    counts = {size: count(size) for size in range(2, LARGEST_BLOCK + 1)}
    fitting = {size: parameters for size, parameters in counts.items() if parameters <= limit}
    return max(fitting, key=lambda size: (fitting[size], size.bit_count() == 1, -size), default=None)


LARGEST = 1 << 20
"""No rank is larger than this."""
LARGEST_BLOCK = 512
"""No block is larger than this."""


def _has_rank(lora: LoraConfig) -> bool:
    return lora.other_kind is None or lora.other_kind.has_rank


def _sized(lora: LoraConfig, size: int) -> LoraConfig:
    """Returns an adapter of a size, which `lora.parameters` no longer asks for."""
    if _has_rank(lora):
        return replace(lora, r=size, alpha=lora.alpha * size / lora.r, parameters=None)
    kind = lora.other_kind
    assert kind is not None
    assert kind.size is not None
    return replace(lora, options={**lora.options, kind.size: size}, parameters=None)
