"""Which layers' experts wait in the host's memory, and for how many there is room on the device. Imports no torch."""

ROOM = 2
"""Layers whose waiting experts are on the device at a time: one that computes, and the next."""


def spread(layers: int, count: int) -> list[int]:
    """Returns `count` of the numbers below `layers`, spread evenly."""
    return [(2 * index + 1) * layers // (2 * count) for index in range(count)]
