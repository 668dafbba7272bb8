from __future__ import annotations

from pathlib import Path

import pytest

from tests.warnings_as_errors import fail_on_warnings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fail_on_warnings(items, Path(__file__).parent)
