"""Which modules `lora.modules_to_save` means; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from qlora.errors import ConfigError, did_you_mean

KEY = "lora.modules_to_save"


def choose_whole(
    requested: Iterable[str],
    names: Collection[str],
    *,
    tied: Collection[str],
    quantized: Collection[str],
    adapted: Collection[str],
) -> list[str]:
    """Returns the full names of the modules that names or regular expressions mean, of those in `names`.

    Raises `ConfigError` for one that matches none, for a matrix that is two modules at once (`tied`), and for layers
    that are quantized, or have an adapter.
    """
    chosen: dict[str, None] = {}
    for pattern in requested:
        if not (matches := _matches(pattern, names)):
            kinds = sorted({name.rpartition(".")[2] for name in names if name not in {*quantized, *adapted}})
            raise ConfigError(
                f"{KEY} [{pattern!r}] matches no module that can train whole{did_you_mean(pattern, kinds)}; these are "
                f"{kinds}"
            )
        chosen |= dict.fromkeys(matches)
    if both := next((name for name in chosen if name in tied), None):
        raise ConfigError(
            f"{KEY}: in this model {' and '.join(sorted(tied))} are one matrix (tie_word_embeddings), and a trained "
            f"copy for {both} alone would untie them; name other modules, or train the rows of model.new_tokens"
        )
    if packed := next((name for name in chosen if name in quantized), None):
        raise ConfigError(
            f"{KEY}: {packed} is quantized, and a module trains whole in 16 or 32 bits alone; give it an adapter "
            "(lora.target_modules), or use quantization=none"
        )
    if twice := next((name for name in chosen if name in adapted), None):
        raise ConfigError(
            f"{KEY}: {twice} has an adapter too; leave it out of one of both, e.g. with "
            f"lora.exclude=[{twice.rpartition('.')[2]}]"
        )
    return list(chosen)


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    plain = [name for name in names if name == pattern or name.endswith(f".{pattern}")]
    try:
        return plain or [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{KEY}: {pattern!r} is not a regular expression: {error}") from error
