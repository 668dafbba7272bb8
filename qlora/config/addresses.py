"""Rows that lie elsewhere: which addresses `data.path` takes, and that none of them holds a secret."""

from __future__ import annotations

import re
from importlib.util import find_spec
from urllib.parse import parse_qsl, urlsplit

from qlora.errors import ConfigError, did_you_mean
from qlora.secrets import SUSPICIOUS, find_secret

PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "https": ("aiohttp", None),
    "http": ("aiohttp", None),
    "hf": ("huggingface_hub", None),
    "memory": ("fsspec", None),
}
"""For each scheme the package that reads it, and the extra that installs it; None: it is there with `datasets`."""
VARIABLE = "env"
"""The scheme of an address that stands in a variable of the environment: `env://NAME`."""
SCHEMES = ("s3", "gs", "https", "hf", VARIABLE)
"""The schemes that users choose from; `memory` is fsspec's own, for tests."""
LONGEST_VALUE = 15
"""Characters of a value in the query of an address; a longer one may be a signature or a key."""
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_address(path: str) -> bool:
    """Returns whether a path is an address such as `s3://bucket/rows.jsonl`."""
    return ADDRESS.match(path) is not None


def scheme_of(path: str) -> str:
    """Returns what stands before `://`, in lower case."""
    match = ADDRESS.match(path)
    return match[1].lower() if match else ""


def check_address(key: str, path: str) -> None:
    """Raises `ConfigError` for an address that cannot be read, or that holds a secret, which is not printed."""
    if not is_address(path):
        return
    scheme = scheme_of(path)
    if scheme == VARIABLE:
        if not re.fullmatch(r"\w+", variable_of(path)):
            raise ConfigError(f"{key}={path} must name a variable of the environment that holds an address: env://NAME")
        return
    if (reason := secret_reason(path)) is not None:
        raise ConfigError(
            f"{key} holds {reason}; configs are stored, printed and sent to trackers. Put the whole address into a "
            f"variable of the environment and name it: {key}=env://NAME"
        )
    if (reason := unreadable_reason(path)) is not None:
        raise ConfigError(f"{key}={path}: {reason}")


def variable_of(path: str) -> str:
    """Returns the variable of `env://NAME`."""
    return path.partition("://")[2]


def unreadable_reason(path: str) -> str | None:
    """Returns why an address cannot be read, and what can; None: it can. What it returns holds nothing of the address
    but its scheme."""
    scheme = scheme_of(path)
    if scheme not in PACKAGES:
        near = did_you_mean(scheme, SCHEMES)
        if not scheme:
            return f"it is no address, which begins with one of {', '.join(f'{name}://' for name in SCHEMES[:-1])}"
        if scheme in ("file", "local"):
            return f"a file of this machine is named without {scheme}://"
        return f"rows are not read by {scheme}://{near}; the schemes are {', '.join(SCHEMES)}"
    if "::" in path:
        return "addresses inside others (::) are not read; name the file itself"
    if not urlsplit(path).netloc and scheme != "memory":
        return f"it names no {'bucket' if scheme in ('s3', 'gs', 'gcs') else 'host'}; write {scheme}://NAME/FILE"
    return None


def secret_reason(path: str) -> str | None:
    """Says in words which secret an address holds; None: none that is known."""
    parts = urlsplit(path)
    if "@" in parts.netloc:
        return "a name or password in an address"
    if scheme_of(path) in ("https", "http"):
        query = [
            *parse_qsl(parts.query, keep_blank_values=True),
            *parse_qsl(parts.path.partition(";")[2], keep_blank_values=True),
        ]
        if any(SUSPICIOUS.search(name) for name, value in query if value):
            return "a key or password in the query of an address"
        if any(len(text) > LONGEST_VALUE for name, value in query for text in (value, "" if value else name)):
            return "a long value in the query of an address, as signed ones have"
        if parts.fragment:
            return "a part behind # in an address, which no server is sent"
    return find_secret(path)


def missing_package(path: str) -> str | None:
    """Returns what to install to read a path; None: it is there, or no address."""
    if not is_address(path):
        return None
    package, extra = PACKAGES.get(scheme_of(path), ("fsspec", None))
    if find_spec(package) is not None:
        return None
    return f"pip install 'qlora[{extra}]'" if extra else f"pip install {package}"
