"""Sizes as people write them."""

import pytest

from qlora.text import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("7.3GB", 7_300_000_000),
        ("22 GiB", 22 * 2**30),
        ("0.5KiB", 512),
        ("100B", 100),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "GB", "-1GB", "1.GB", ".5GB", "1,5GB", "24gb", "1e3MB"])
def test_other_texts_are_none(text: str) -> None:
    assert parse_size(text) is None
