"""The hub's library without a network: it reads its cache at once, instead of trying each file for 23 seconds."""

from __future__ import annotations

import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

VARIABLE = "HF_HUB_OFFLINE"
_unreachable: list[str] = []
"""The host that has no address, while this module keeps the library offline."""


def read_cache_without_network() -> None:
    """Has the library work offline while the hub's host has no address; called before something is read from the hub.

    Behind a proxy nothing is looked up, for the proxy knows the addresses.
    """
    from huggingface_hub import constants  # slow to import

    if constants.HF_HUB_OFFLINE and not _unreachable:
        return
    host = urlsplit(constants.ENDPOINT).hostname or ""
    _unreachable[:] = [] if getproxies() or _has_address(host) else [host]
    constants.HF_HUB_OFFLINE = bool(_unreachable)
    if "datasets" in sys.modules:  # which has copied it
        sys.modules["datasets"].config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE


def why_offline() -> str | None:
    """Returns why nothing can be downloaded, for a message; None: the library may use the network."""
    if _unreachable:
        return f"there is no network ({_unreachable[0]} has no address)"
    from huggingface_hub import constants

    return f"{VARIABLE}={os.environ.get(VARIABLE, '1')} forbids downloads" if constants.HF_HUB_OFFLINE else None


def _has_address(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
