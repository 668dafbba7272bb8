"""Files of rows that lie elsewhere: found and read through fsspec, with errors that hold no secret of an address."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import fsspec

from qlora.config.addresses import (
    VARIABLE,
    missing_package,
    scheme_of,
    unreadable_reason,
    variable_of,
)
from qlora.errors import DataError, ResourceError, UserError
from qlora.secrets import HIDDEN, hide

BUFFER = 2**20
"""Bytes that are read at a time."""
NOT_THERE = (401, 403, 404, 410)
"""How a web server answers where there is no file, or none for this login."""
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
"""An address in what an error says: that to which a server has redirected may be signed."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file that an address names; it is read from its beginning to its end."""

    address: str
    """As the user wrote it: what it stands for is looked up whenever the file is opened."""
    path: str | None
    """Its path in its file system; None: it is what the address itself names."""
    name: str
    label: str
    """The key and the address, for messages."""

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Opens it to read bytes; whatever fails then is a `ResourceError`."""
        assert mode == "rb"
        with _sentences(self.label, self.address):
            system, path = _find_system(self.address, self.label)
            options = {"block_size": 0} if scheme_of(resolve(self.address, self.label)) in ("https", "http") else {}
            file = system.open(self.path or path, "rb", **options)
        return io.BufferedReader(_Reader(file, self), BUFFER)

    @property
    def size(self) -> int:
        """Its bytes; 0 where its server does not say."""
        with _sentences(self.label, self.address):
            system, path = _find_system(self.address, self.label)
            return int(system.info(self.path or path).get("size") or 0)

    def copy_to(self, folder: Path, number: int) -> Path:
        """Copies it to a folder here, and returns its copy."""
        target = folder / f"{number}-{self.name}"
        with self.open() as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, BUFFER)
        return target


def find_remote(address: str, label: str, *, is_readable: Any) -> list[RemoteFile]:
    """Returns the files that an address names, sorted: one, those below a folder, or those of a pattern.

    `is_readable` says whether a file holds rows, by its name.
    """
    with _sentences(label, address):
        system, path = _find_system(address, label)
        is_web = scheme_of(resolve(address, label)) in ("https", "http")
        if not is_web and "*" in path:
            matches = system.glob(path)
        elif not is_web and system.isdir(path):
            matches = system.find(path)
        else:
            name = PurePosixPath(unquote(urlsplit(path).path if is_web else path)).name
            if not is_readable(name):
                raise DataError(f"{label}: its file name must end in a form that is read, such as .jsonl or .parquet")
            return [RemoteFile(address, None, name, label)]
    names = sorted(str(path) for path in matches if is_readable(PurePosixPath(path).name))
    if not names:
        raise DataError(f"{label}: no files of rows there")
    return [RemoteFile(address, path, PurePosixPath(path).name, f"{label}, file {path}") for path in names]


def resolve(address: str, label: str) -> str:
    """Returns an address, or that in the variable which it names."""
    if scheme_of(address) != VARIABLE:
        return address
    name = variable_of(address)
    if not (value := os.environ.get(name, "").strip()):
        raise DataError(
            f"{label}: the variable {name} of the environment is not set; set it to the address of the rows"
        )
    if (reason := unreadable_reason(value)) is not None:
        raise DataError(f"{label}: the address in {name} cannot be read: {reason}")
    return value


def _find_system(address: str, label: str) -> tuple[Any, str]:
    url = resolve(address, label)
    if (remedy := missing_package(url)) is not None:
        raise ResourceError(f"{label}: {scheme_of(url)}:// is read by a package that is not installed; {remedy}")
    options = {"client_kwargs": {"trust_env": True}} if scheme_of(url) in ("https", "http") else {}
    return fsspec.core.url_to_fs(url, **options)


class _Reader(io.RawIOBase):
    """The bytes of a file elsewhere, one after the other."""

    def __init__(self, file: Any, source: RemoteFile) -> None:
        self._file, self._source = file, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _sentences(self._source.label, self._source.address):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _sentences(label: str, address: str) -> Iterator[None]:
    """Turns what file systems raise, which are errors of many libraries, into a `ResourceError` without secrets."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if (cause := error.__cause__) is not None and _is_fault(cause):
            raise _unreadable(label, address, cause) from None
        raise DataError(f"{label}: there is no such file, or this login may not see it") from None
    except ImportError as error:
        raise ResourceError(f"{label}: cannot be read: {_reason(error, address)}") from None
    except Exception as error:
        raise _unreadable(label, address, error) from None


def _is_fault(cause: BaseException) -> bool:
    """Returns whether a web server was not there, or answered with a fault: fsspec calls either a missing file."""
    is_answer = type(cause).__module__.startswith("aiohttp.")
    return isinstance(cause, OSError) or (is_answer and getattr(cause, "status", None) not in NOT_THERE)


def _unreadable(label: str, address: str, error: BaseException) -> ResourceError:
    return ResourceError(
        f"{label}: cannot be read ({_reason(error, address)}); what was trained so far is in the last checkpoint, and "
        "the same command resumes there"
    )


def _reason(error: BaseException, address: str) -> str:
    """Returns what an error says, without the address that a variable holds: in it any part may be a secret."""
    status = getattr(error, "status", None)
    text = f"HTTP status {status}" if isinstance(status, int) and status else " ".join(str(error).split())
    if scheme_of(address) == VARIABLE:
        secret = os.environ.get(variable_of(address), "")
        parts = urlsplit(secret)
        parts_of_it = [secret, parts.query, parts.netloc, parts.path, unquote(parts.query), *parts.query.split("&")]
        if any(piece and piece in text for piece in parts_of_it):
            return type(error).__name__
    text = hide(ADDRESS.sub(HIDDEN, text))[:200].rstrip(".")
    return type(error).__name__ if text in ("", HIDDEN) or status == 0 else text
