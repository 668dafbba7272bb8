"""The board's server: on this machine's loopback alone, read-only, and of one folder.

A web page that a person has open elsewhere may send requests to any port of this machine. It can read no answer from
another origin, and one that gives its own name the address 127.0.0.1 (DNS rebinding) is refused by its `Host`.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import mimetypes
import re
import shutil
import socketserver
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from qlora.board.run_details import read_curves, read_details
from qlora.board.run_list import RunList
from qlora.board.served_folder import ServedFolder
from qlora.errors import ResourceError
from qlora.reporting.rendering import FOLDER as PAGE_FOLDER

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
"""The names under which a browser on this machine asks; a tunnel may have another port."""
MAX_CURVES = 50
"""The most runs whose curves are sent at once."""
IDLE_SECONDS = 30
"""A connection that sends nothing is closed."""
ASSETS = {
    "board.html": (Path(__file__).parent / "page", "text/html; charset=utf-8"),
    "board.css": (Path(__file__).parent / "page", "text/css; charset=utf-8"),
    "board.js": (Path(__file__).parent / "page", "text/javascript; charset=utf-8"),
    "page.css": (PAGE_FOLDER, "text/css; charset=utf-8"),
    "charts.js": (PAGE_FOLDER, "text/javascript; charset=utf-8"),
}
PLOTLY = "plotly.js"
PAGES = ("report.html", "preview.html")
"""The HTML files that runs and sweeps write; any other is shown as text."""
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Board(ThreadingHTTPServer):
    """The server of one folder; `port` 0 takes any free one."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = ServedFolder(folder.resolve())
        self.runs = RunList(self.folder)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ResourceError(
                    f"task.port={port} is in use, perhaps by another board; choose another with task.port={port + 1}, "
                    "or any free one with task.port=0"
                ) from error
            raise ResourceError(
                f"task.port={port} cannot be opened ({error.strerror}); choose another, or any free one with "
                "task.port=0"
            ) from error

    def server_bind(self) -> None:
        """Binds the port; the base class would ask a name server who this machine is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the board."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Notes a fault for `hydra.verbose=true`; a browser may close its connection at any time."""
        log.debug("a request failed", exc_info=True)

    @cached_property
    def plotly(self) -> bytes:
        """The plotting library, compressed."""
        from plotly.offline import get_plotlyjs

        return gzip.compress(get_plotlyjs().encode(), 6, mtime=0)


class Handler(BaseHTTPRequestHandler):
    """Answers one browser."""

    server: Board
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server_version, sys_version = "qlora", ""

    def do_GET(self) -> None:
        """Answers with a page, a list or a file; refuses who asks by another name."""
        hosts = self.headers.get_all("Host") or []
        target = urlsplit(self.path)
        if len(hosts) != 1 or not HOSTS.fullmatch(hosts[0].strip()):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"open this page as {self.server.url}")
        elif not self.path.startswith("/"):
            self._refuse(HTTPStatus.BAD_REQUEST, "the path begins with /")
        elif target.path == "/":
            self._send_asset("board.html")
        elif target.path.startswith("/assets/"):
            self._send_asset(target.path.removeprefix("/assets/"))
        elif target.path.startswith("/files/"):
            self._send_file(unquote(target.path.removeprefix("/files/"), errors="replace"))
        elif target.path.startswith("/api/"):
            self._send_answer(target.path.removeprefix("/api/"), target.query)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    do_HEAD = do_GET

    def _only_read(self) -> None:
        self.close_connection = True  # a body may follow
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "the board is read only", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _only_read

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the terminal is for what a person should know."""
        log.debug(format, *args)

    # Answers

    def _send_answer(self, name: str, query: str) -> None:
        """Sends the list of runs, the curves of some, or all of one."""
        try:
            names = dict.fromkeys(parse_qs(query, max_num_fields=MAX_CURVES).get("run", []))
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, f"ask for at most {MAX_CURVES} runs at once")
            return
        folders = {text: folder for text in names if (folder := self.server.folder.find_run(text)) is not None}
        try:
            if name == "runs":
                answer: Any = self.server.runs.read()
            elif name == "curves":
                answer = {"runs": list(folders), "charts": read_curves(folders)}
            else:
                answer = read_details(next(iter(folders.values()))) if name == "run" and folders else None
        except OSError:  # of another owner, or removed just now
            answer = None
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such run")
        else:
            self._send_json(answer)

    def _send_json(self, value: Any) -> None:
        text = json.dumps(_finite(value), separators=(",", ":"))
        body = text.encode("utf-8", "replace")
        tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
        if self.headers.get("If-None-Match") == tag:
            self._begin(HTTPStatus.NOT_MODIFIED, {"ETag": tag})
            return
        headers = {"ETag": tag, "Content-Type": "application/json"}
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        self._send(body, headers)

    def _send_asset(self, name: str) -> None:
        if name == PLOTLY:
            headers = {"Content-Type": "text/javascript; charset=utf-8", "Content-Encoding": "gzip"}
            self._send(self.server.plotly, headers | {"Cache-Control": "max-age=3600"})
        elif name in ASSETS:
            folder, kind = ASSETS[name]
            # The plotting library draws parallel axes with code that it makes.
            policy = POLICY.format(scripts="'self' 'unsafe-eval'")
            self._send((folder / name).read_bytes(), {"Content-Type": kind, "Content-Security-Policy": policy})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _send_file(self, relative: str) -> None:
        path = self.server.folder.find(relative)
        if path is None or not path.is_file():
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file in the folder of the board")
            return
        is_page = path.name in PAGES
        policy = POLICY.format(scripts="'unsafe-inline' 'unsafe-eval'") if is_page else "default-src 'none'; sandbox"
        with path.open("rb") as file:
            size = path.stat().st_size
            headers = {"Content-Type": _kind(path), "Content-Security-Policy": policy, "Content-Length": str(size)}
            self._begin(HTTPStatus.OK, headers)
            if self.command != "HEAD":
                shutil.copyfileobj(_Limited(file, size), self.wfile)

    def _refuse(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        body = f"{text}\n".encode()
        self._send(body, {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}, status)

    def _send(self, body: bytes, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Cache-Control": "no-store", **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


class _Limited:
    """The first bytes of a file that may grow while it is sent."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.left = file, size

    def read(self, count: int = -1) -> bytes:
        data: bytes = self.file.read(min(count, self.left) if count >= 0 else self.left)
        self.left -= len(data)
        return data


def _kind(path: Path) -> str:
    """Returns the type by which a browser shows a file: pages of runs, pictures and text; all else is saved."""
    if path.name in PAGES:
        return "text/html; charset=utf-8"
    if path.suffix == ".png":
        return "image/png"
    known = mimetypes.guess_type(path.name)[0] or ""
    is_text = known.startswith("text/") or path.suffix in (".json", ".jsonl", ".yaml", ".yml", ".md", ".log", ".csv")
    return "text/plain; charset=utf-8" if is_text else "application/octet-stream"


def _finite(value: Any) -> Any:
    """Returns JSON's types: numbers rounded to six digits, those that JSON lacks by their names."""
    if isinstance(value, float):
        is_finite = value - value == 0
        return float(f"{value:.6g}") if is_finite and abs(value) < 1e9 else value if is_finite else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
