"""Private parts of Ray: the address of a running cluster, and the printing of its daemons' output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ray._private import services, worker


def running_address() -> str | None:
    """Returns the address that `address=auto` means, so that it can be tried before `ray.init` waits for minutes."""
    address: str | None = services.get_ray_address_from_environment("auto", None)
    return address


@contextlib.contextmanager
def printing_to(write: Callable[[Mapping[str, Any], bool], None]) -> Iterator[None]:
    """Hands the output of Ray's daemons to `write` for the time of the block.

    Ray prints the last 20 lines of a lost node's daemon, whatever `log_to_driver` says.
    """
    original, worker.print_to_stdstream = worker.print_to_stdstream, write  # type: ignore[assignment]
    try:
        yield
    finally:
        worker.print_to_stdstream = original
