"""The socket that is listened on, and the thread that answers HTTP there."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from qlora.config.schema import ServeConfig
from qlora.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from starlette.applications import Starlette

SHORTEST_TOKEN = 16
"""Characters of a token that cannot be guessed."""
PATIENCE = 2
"""Seconds that streams have to end when the server does."""


def check_packages() -> None:
    """Raises `ResourceError` where the packages of the extra `serve` are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ResourceError(f"task=serve needs the package {error.name}; pip install 'qlora[serve]'") from error


def read_token(config: ServeConfig) -> str | None:
    """Returns the token that clients must send; None: nobody needs one.

    Raises `ConfigError` where other machines could ask without one.
    """
    name = config.token_variable
    token = os.environ.get(name, "").strip()
    if not token:
        if not is_loopback(config.host):
            raise ConfigError(
                f"serve.host={config.host} can be reached from other machines, and {name} holds no token; set that "
                "variable to a long random text, which clients send as their API key, or leave serve.host out"
            )
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"the token in {name} (serve.token_variable) must be {SHORTEST_TOKEN} or more characters of ASCII; make "
            "one with `openssl rand -hex 32`, or unset the variable"
        )
    return token


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(config: ServeConfig) -> socket.socket:
    """Takes the port; raises a `UserError` where that cannot be."""
    host, port = ("127.0.0.1" if config.host.lower() == "localhost" else config.host), config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"serve.host={host} is no address of this machine ({error}); leave it out") from error
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen(2048)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"serve.port={port} is in use, perhaps by another server; choose another with serve.port="
                f"{port % 65535 + 1}, or any free one with serve.port=0"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"serve.host={host} is no address of this machine; leave it out") from error
        raise ResourceError(
            f"serve.port={port} cannot be opened on {host} ({error.strerror}); choose another, or any free one with "
            "serve.port=0"
        ) from error
    return taken


class HttpServer:
    """Answers HTTP on a socket in a thread of its own, until it is stopped."""

    def __init__(self, app: Starlette, taken: socket.socket) -> None:
        import uvicorn

        settings: Any = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None, "log_level": "critical"}
        config = uvicorn.Config(
            app, access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=PATIENCE,
            **settings,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.host, self.port = taken.getsockname()[:2]
        self.thread = threading.Thread(target=self.server.run, args=([taken],), name="http", daemon=True)

    @property
    def url(self) -> str:
        """The base address for clients."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def start(self) -> None:
        """Returns once requests are answered."""
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends the server; answers that are being sent have a moment to end."""
        self.server.should_exit = True
        self.thread.join(3 * PATIENCE)
