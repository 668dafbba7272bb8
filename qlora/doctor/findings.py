"""What a check finds: a line of the table of `task=doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """How it is."""

    ok = "ok"
    warning = "warning"
    """A run works, but slower or in another way than was asked for."""
    error = "error"
    """The run that the config describes cannot work, or would be wrong."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    status: Status
    says: str
    fix: str = ""


def fine(name: str, says: str) -> Finding:
    """Returns a finding that asks for nothing."""
    return Finding(name, Status.ok, says)


def warn(name: str, says: str, fix: str) -> Finding:
    """Returns a finding that a run survives."""
    return Finding(name, Status.warning, says, fix)


def fail(name: str, says: str, fix: str) -> Finding:
    """Returns a finding that a run does not survive."""
    return Finding(name, Status.error, says, fix)


def look(name: str, check: Callable[[], Iterator[Finding]], fix: str) -> Iterator[Finding]:
    """Yields what `check` finds; what it raises is a finding too, with `fix`."""
    try:
        yield from check()
    except Exception as error:
        yield fail(name, f"{type(error).__name__}: {first_line(error)}", fix)


def first_line(error: BaseException) -> str:
    """Returns the first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else "no reason given"
