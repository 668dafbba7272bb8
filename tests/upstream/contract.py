"""Checks of another library's private names: that they take what we give them, and that a body we override is known."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from typing import Any


def check_signature(function: Callable[..., Any], parameters: Sequence[str]) -> None:
    """Fails unless a function takes exactly these parameters, `self` included, in this order."""
    names = list(inspect.signature(function).parameters)
    assert names == list(parameters), f"{name_of(function)} takes {names}, and our code gives {list(parameters)}"


def check_body(function: Callable[..., Any], known: Mapping[str, str]) -> None:
    """Fails unless the source of a function that we override or replace is that of a tested version.

    `known` holds the SHA-256 of the source by version. After a failure: read what changed upstream, adapt our code,
    and add the hash of the new version.
    """
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    assert digest in known.values(), (
        f"the body of {name_of(function)} is that of no tested version ({', '.join(known)}); {_version(function)} has "
        f"{digest}: read what changed, adapt what overrides it, and add this hash"
    )


def name_of(function: Callable[..., Any]) -> str:
    """Returns the full name of a function."""
    return f"{function.__module__}.{function.__qualname__}"


def _version(function: Callable[..., Any]) -> str:
    package = function.__module__.partition(".")[0]
    distribution = packages_distributions()[package][0]
    return f"{distribution} {version(distribution)}"
