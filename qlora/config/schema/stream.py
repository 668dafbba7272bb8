"""Which settings go with rows that are streamed, and which do not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qlora.errors import ConfigError, require

if TYPE_CHECKING:
    from qlora.config.schema.data import DataConfig

SHUFFLE_BUFFER = 1000
"""Rows from among which the next one of a stream is drawn, by default."""
SLACK = 1e-3
"""How far the sum of probabilities may be from 1: thirds are written as 0.333."""


def check_stream(data: DataConfig) -> None:
    """Refuses what does not go with rows that are streamed, and what is read of these alone."""
    require(data.shuffle_buffer > 0, "data.shuffle_buffer", "be positive (1: the order of the stream)",
            data.shuffle_buffer)  # fmt: skip
    given = {name: part.probability for name, part in data.mix.items() if part.probability is not None}
    if not data.streaming:
        _refuse_unread(data, given)
        return
    if data.stop is not None and not data.mix:
        raise ConfigError(f"data.stop={data.stop.value} says which of several sets ends a pass, and there is one; "
                          "leave it out, or name several with data.mix")  # fmt: skip
    for name, part in data.mix.items():
        if part.weight != 1:
            raise ConfigError(
                f"data.mix.{name}.weight={part.weight:g} counts passes over rows, and the number of streamed rows is "
                f"not known; set data.mix.{name}.probability in its place"
            )
        if part.max_samples is not None and given:
            raise ConfigError(
                f"data.mix.{name}.max_samples={part.max_samples} and data.mix.{next(iter(given))}.probability both say "
                "how much of a set is shown; leave one of them out"
            )
    if given and len(given) < len(data.mix):
        lacking = next(name for name in data.mix if name not in given)
        raise ConfigError(f"data.mix.{lacking}.probability is not set, and other sets have one; set it for each, or "
                          "for none")  # fmt: skip
    if given and not math.isclose(total := sum(given.values()), 1, abs_tol=SLACK):
        raise ConfigError(f"the probabilities of data.mix add up to {total:g} ({_listed(given)}); they must add up to "
                          "1")  # fmt: skip
    if data.max_train_samples is not None:
        raise ConfigError(
            f"data.max_train_samples={data.max_train_samples} draws from all rows, and streamed rows are not all "
            "known; take the first ones with data.max_samples, or set trainer.max_steps alone"
        )
    if data.eval_dataset_size is not None and 0 < data.eval_dataset_size < 1:
        raise ConfigError(
            f"data.eval_dataset_size={data.eval_dataset_size:g} is a share of all rows, and the number of streamed "
            "rows is not known; set a number of rows, the first ones of the stream, or data.eval_path=FILE"
        )
    if data.longest_row is None and data.pack_length is None:
        raise ConfigError("data.streaming=true needs the longest length of a row beforehand; set data.max_length")


def _refuse_unread(data: DataConfig, probabilities: dict[str, float]) -> None:
    for name, value in probabilities.items():
        raise ConfigError(
            f"data.mix.{name}.probability={value:g} is only read with data.streaming=true; to show rows of a set "
            f"more or less often, set data.mix.{name}.weight"
        )
    if data.stop is not None:
        raise ConfigError(f"data.stop={data.stop.value} is only read with data.streaming=true, where passes end; leave "
                          "it out")  # fmt: skip
    if data.shuffle_buffer != SHUFFLE_BUFFER:
        raise ConfigError(
            f"data.shuffle_buffer={data.shuffle_buffer} is only read with data.streaming=true; other rows are shuffled "
            "as a whole: leave it out"
        )


def _listed(probabilities: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:g}" for name, value in probabilities.items())
