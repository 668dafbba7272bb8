"""Warnings of what upstream will remove fail tests, except those that other libraries raise among themselves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

UPSTREAM = (
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # PEFT 0.21 reads it of transformers 5.23
    "ignore:.*should not be instantiated:DeprecationWarning",  # torch 2.13 does so while it compiles a function
    "ignore:.*noload.*:DeprecationWarning",  # MLflow 3.17 asks SQLAlchemy 2.1 for it
)


def fail_on_warnings(items: Iterable[pytest.Item], folder: Path) -> None:
    """Makes the tests in a folder fail on `FutureWarning` and `DeprecationWarning`."""
    filters = ("error::FutureWarning", "error::DeprecationWarning", *UPSTREAM)
    for item in items:
        if item.path.is_relative_to(folder):
            for text in reversed(filters):
                item.add_marker(pytest.mark.filterwarnings(text), append=False)
