"""Long matrices of tests: some of their cases run by default, and all of them once a week."""

from collections.abc import Sequence
from typing import Any

import pytest


def thinned(cases: Sequence[Any], count: int) -> list[Any]:
    """Returns the cases of a matrix, of which all but `count`, spread evenly, are marked `full`."""
    kept = {round(index * (len(cases) - 1) / max(count - 1, 1)) for index in range(count)}
    return [case if index in kept else _full(case) for index, case in enumerate(cases)]


def _full(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.full)
