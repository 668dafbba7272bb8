"""What the columns of a row mean: a table of pure functions from a row to segments of text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora.errors import ConfigError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]

# The prompts of Stanford Alpaca as the original qlora.py has them, the space at the end included.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)


class Segment(NamedTuple):
    """A piece of text, and whether the loss counts its tokens."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one layout become segments."""

    render: Callable[[Row], list[Segment]]
    """A pure function; rows reach it with at least one of the alternatives in `needs`."""
    needs: tuple[tuple[str, ...], ...]
    """The columns without which it cannot work; each tuple is an alternative."""

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Returns the columns that are missing for the alternative nearest to `columns`."""
        found = set(columns)
        return min(([c for c in names if c not in found] for names in self.needs), key=len)

    def describe_needs(self) -> str:
        """Returns the columns in words: "instruction and output"."""
        return " or ".join(" and ".join(names) for names in self.needs)


def alpaca(row: Row) -> list[Segment]:
    """Renders instruction, input (may be absent or empty) and output with the Alpaca prompts."""
    instruction, context = _text(row, "instruction"), _text(row, "input")
    prompt = PROMPT_WITH_INPUT if context else PROMPT_WITHOUT_INPUT
    source = prompt.format(instruction=instruction, input=context)
    return [Segment(source, False), Segment(_text(row, "output"), True)]


def input_output(row: Row) -> list[Segment]:
    """Renders input and output verbatim."""
    return [Segment(_text(row, "input"), False), Segment(_text(row, "output"), True)]


def text(row: Row) -> list[Segment]:
    """Renders a whole text without a prompt (OpenAssistant-Guanaco)."""
    return [Segment("", False), Segment(_text(row, "text"), True)]


def chosen(row: Row) -> list[Segment]:
    """Renders the preferred dialogue of a pair without a prompt (HH-RLHF)."""
    return [Segment("", False), Segment(_text(row, "chosen"), True)]


def segments(row: Row) -> list[Segment]:
    """Renders a list of [text, trained] pairs, or source and target."""
    pairs = row.get("segments")
    if pairs is None:
        return [Segment(_text(row, "source"), False), Segment(_text(row, "target"), True)]
    try:
        rendered = [Segment(text, trained) for text, trained in pairs]
    except (TypeError, ValueError):
        rendered = None
    if rendered is None or not all(isinstance(s.text, str) and isinstance(s.trained, bool) for s in rendered):
        raise ConfigError(f"data.format=segments: a row holds {_short(pairs)} as segments; each must be a pair "
                          "[text, true or false]")  # fmt: skip
    return rendered


# In the order in which `auto` tries them: the first whose columns are all there wins.
FORMATS: dict[str, Format] = {
    "alpaca": Format(alpaca, needs=(("instruction", "output"),)),
    "segments": Format(segments, needs=(("segments",), ("source", "target"))),
    "input-output": Format(input_output, needs=(("input", "output"),)),
    "chosen": Format(chosen, needs=(("chosen",),)),
    "text": Format(text, needs=(("text",),)),
}


def choose_format(name: str, columns: Sequence[str], *, key: str = "data.path") -> str:
    """Returns the name of the format that renders `columns`: `name` itself, or the one that `auto` recognises."""
    if name == "auto":
        return recognise(columns, key=key)
    if FORMATS[name].lacks(columns):
        raise ConfigError(
            f"data.format={name} needs the columns {FORMATS[name].describe_needs()}; {key} has "
            f"{_listed(columns)}. {_way_out(columns)}"
        )
    return name


def recognise(columns: Sequence[str], *, key: str = "data.path") -> str:
    """Returns the first format whose columns are all there and logs why; raises `ConfigError` where none fits."""
    fitting = [name for name, layout in FORMATS.items() if not layout.lacks(columns)]
    if not fitting:
        raise ConfigError(f"data.format=auto recognises no format: {key} has the columns {_listed(columns)}. "
                          f"{_way_out(columns)}")  # fmt: skip
    others = f"; {', '.join(fitting[1:])} would fit too, set data.format to choose" if fitting[1:] else ""
    log.info("data.format=auto: %s, by the columns %s%s", fitting[0], _listed(columns), others)
    return fitting[0]


def _way_out(columns: Sequence[str]) -> str:
    """Says which format is nearest, and what is missing for it."""
    fitting = [name for name, layout in FORMATS.items() if not layout.lacks(columns)]
    if fitting:
        return f"They fit data.format={fitting[0]}"
    nearest = min(FORMATS, key=lambda name: (_missing_share(name, columns), len(FORMATS[name].lacks(columns))))
    lacking = " and ".join(FORMATS[nearest].lacks(columns))
    if _missing_share(nearest, columns) == 1:
        known = "; ".join(f"{name} ({layout.describe_needs()})" for name, layout in FORMATS.items())
        return f"Rename them to the columns of a format: {known}"
    return f"Closest is {nearest}, which lacks {lacking}; rename the columns in the data"


def _missing_share(name: str, columns: Sequence[str]) -> float:
    found = set(columns)
    return min(sum(c not in found for c in names) / len(names) for names in FORMATS[name].needs)


def _text(row: Row, column: str) -> str:
    """Returns a cell as text; an absent or empty one is ""."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise ConfigError(f"data.format needs text in column {column}, but a row holds {_short(value)}")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
