"""Ranges of numbers that the libraries check, or divide by."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The range of a number: from `low`, or right above it, to below `high`."""

    low: float = 0.0
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is excluded."""

    def allows(self, number: float) -> bool:
        """Returns whether a number is in the range."""
        return (self.low < number if self.is_open else self.low <= number) and number < self.high

    @property
    def rule(self) -> str:
        """The rule, as a message states it."""
        if self.high == math.inf:
            if self.is_open:
                return f"be above {self.low:g}"
            return f"be {self.low:g} or more" if self.low else "not be negative"
        return f"be {'above' if self.is_open else 'at least'} {self.low:g} and below {self.high:g}"


NOT_NEGATIVE, SHARE, INNER_SHARE, COUNT = Bound(), Bound(high=1), Bound(high=1, is_open=True), Bound(low=1)
