"""Tokens, keys and passwords: found in texts, taken out of what is written, and refused in configs.

A config is stored, printed and sent to trackers; a secret belongs into the environment, where the libraries read it.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "[hidden]"
SHORTEST = 8
"""Characters; a shorter value of a variable is not a secret, and would match everywhere."""

NAMES = re.compile(
    r"(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?_?\d*$"
    r"|(?:(?:ACCESS|SECRET|PRIVATE|ACCOUNT|MASTER|SIGNING|ENCRYPTION)_?|(?<!GPG)_)KEY(?:_?\d+|_BASE|_ID)?$"
    r"|(?:CONNECTION_STRING|_PWD|_PAT|_AUTH|(?<!ASK)(?<!COM)(?<!BY)PASS)$",
    re.IGNORECASE,
)
"""Variables of the environment that hold one: `HF_TOKEN` and `HFTOKEN`, `PGPASSWORD`, `MYSQL_PWD`, `SSHPASS` ..."""

KINDS = {
    "a password in an address": re.compile(
        r"(?<=://)[^\s/@:'\"]*:(?!\d{1,5}(?:[/?#]|$))[^\s'\"]+(?=@)"
        r"|(?<=[?&])(?i:password|passwd|pwd|sslpassword|(?:[\w-]*[_-])?token|\w*api_?key|\w*secret|sig|"
        r"(?:[\w-]*-)?signature)=[^\s&#'\"]+"
    ),
    "a token of the Hugging Face hub": re.compile(r"\bhf_(?:oauth_)?[A-Za-z0-9]{20,}"),
    "a key of an API": re.compile(
        r"\b(?:sk|rk|pk)-[A-Za-z0-9_-]{20,}|\b[sr]k_(?:live|test)_\w{16,}|\bAIza[0-9A-Za-z_-]{35}|\bglpat-[\w-]{20,}"
        r"|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{40,}|\bSG\.[\w-]{16,}\.[\w-]{16,}"
    ),
    "a token of a header": re.compile(r"(?i)(?<=authorization: )(?:bearer|basic|token) [^\s'\"]+"),
    "a signed token": re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"),
    "a key of wandb": re.compile(r"\bwandb_v\d_\w{20,}"),
    "a token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    "a key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of Slack": re.compile(r"\bxox[abeoprs]-[\w-]{10,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
}
"""What a secret looks like by itself."""


def find_secret(text: str) -> str | None:
    """Says in words which secret a text holds; None: none that is known."""
    for kind, pattern in KINDS.items():
        if pattern.search(text):
            return kind
    return next((f"the value of {name}" for name, spelling in _spellings() if spelling in text), None)


def is_secret_variable(name: str) -> bool:
    """Returns whether a variable of the environment holds a secret, by its name or by what its value looks like."""
    value = os.environ.get(name, "")
    return bool(NAMES.search(name)) or any(pattern.search(value) for pattern in KINDS.values())


def hide(text: str) -> str:
    """Returns a text with every secret in it replaced."""
    for _, spelling in _spellings():
        text = text.replace(spelling, HIDDEN)
    for pattern in KINDS.values():
        text = pattern.sub(HIDDEN, text)
    return text


def hide_all(tree: Any) -> Any:
    """Returns nested dicts and lists with every secret in their texts replaced, keys included."""
    if isinstance(tree, str):
        return hide(tree)
    if isinstance(tree, Mapping):
        return {hide_all(key): hide_all(value) for key, value in tree.items()}
    return [hide_all(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _spellings() -> list[tuple[str, str]]:
    """Returns the environment's secrets by name, as they are and as addresses, JSON and Python write them; long ones
    first, for one may be the beginning of another."""
    return _spell(tuple(os.environ.items()))


@functools.lru_cache(maxsize=4)
def _spell(environment: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    named = [(name, value.strip()) for name, value in environment if NAMES.search(name)]
    spelled = [
        (name, spelling)
        for name, value in named
        if len(value) >= SHORTEST
        for spelling in {*_quoted(value), value, json.dumps(value)[1:-1], repr(value)[1:-1]}
    ]
    return sorted(spelled, key=lambda item: -len(item[1]))


def _quoted(value: str) -> Iterator[str]:
    """Yields how addresses write a value: with the signs of a path or without, in either case of the digits."""
    for text in (quote(value, safe=""), quote(value), quote_plus(value)):
        yield text
        yield re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), text)


# Diffs: what code and settings hold has no name that is known, so it is better to hide too much.

SUSPICIOUS = re.compile(
    r"(?i)secret|passw|passphrase|(?<![a-z])pass(?![a-z])|pwd|token|credential|authori[sz]ation|bearer|cookie|"
    r"connection_?string|conn_?str|(?<![a-z])(?:auth|dsn|salt|pin|login)(?![a-z])|key(?![a-z])|-----BEGIN"
)
"""What a line says that holds a secret."""
SECRET_FILES = re.compile(
    r"(?i)(?:^|/)(?:\.env[^/]*|[^/]*\.env|\.netrc|_netrc|\.pgpass|\.my\.cnf|\.pypirc|\.npmrc|\.htpasswd|id_[a-z0-9_]+|"
    r"[^/]*\.(?:pem|key|p12|pfx|jks|kdbx|ppk|asc)|[^/]*(?:secret|credential|password|token)s?[^/]*\.(?:ya?ml|json|toml|"
    r"ini|cfg|conf|txt))$"
)
"""Files whose every line may be one."""
LITERAL = re.compile(r"(\"\"\"|'''|[\"'`])((?:\\.|(?!\1).)*)(\1|$)")
"""A quoted text, or what follows a quote that the line does not close."""
RANDOM = re.compile(r"(?<![\w+/=-])(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])(?=[\w+/=-]*\d)[\w+/=-]{32,}")
"""What looks drawn at random, whatever it is called."""
WORD = re.compile(r"\[hidden\]|[^\s\"'`=:,;()\[\]{}<>]{4,}")
"""An unquoted value after a suspicious name."""
GOES_ON = re.compile(r"(?:[(\[{=:,|>\\]|[|>][+-]?\d*)\s*$")
"""The end of a line whose value is below it."""


VALUE_OF = re.compile(r"(?i)^\W*(?:value|default|data|content)s?\W*[:=]")
"""A line that gives the value of what the line above it names."""


def hide_in_diff(diff: str) -> str:
    """Returns a unified diff without secrets: on a suspicious line every literal and every value is hidden, in a file
    for secrets every line, and a value below its name as long as its lines are indented or a literal is open."""
    body, lines = _Body(is_secret=False), []
    in_head = True
    for line in diff.split("\n"):
        if line.startswith("diff --git "):
            in_head, body = True, _Body(is_secret=bool(SECRET_FILES.search(line.rstrip('"'))))
        elif line.startswith("@@"):
            in_head, body = False, _Body(is_secret=body.is_secret)
            header, marks, context = line.rpartition("@@")
            lines.append(header + marks + (f" {HIDDEN}" if body.is_secret and context else _hide_values(context)))
            continue
        lines.append(hide(line) if in_head else line[:1] + body.hide(line[1:]))
    return "\n".join(lines)


class _Body:
    """The lines of a hunk, and the state that carries over from line to line."""

    def __init__(self, *, is_secret: bool) -> None:
        self.is_secret = is_secret
        self.quote_mark = ""
        """The triple quote that is open."""
        self.indent: int | None = None
        """The indent of the suspicious line whose value is below it."""
        self.value_follows = False
        """Whether the value begins with the next line."""
        self.was_suspicious = False

    def hide(self, line: str) -> str:
        """Returns the next line without its sign."""
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        goes_on = self.indent is not None and (self.value_follows or depth > self.indent)
        if bare and (self.is_secret or self.quote_mark or goes_on):
            self.value_follows = False
            if self.quote_mark and self.quote_mark in line:
                self.quote_mark = ""
            return f"{line[:depth]}{HIDDEN}"
        if not bare:
            return line
        is_value = self.was_suspicious and VALUE_OF.search(line) is not None
        self.was_suspicious = SUSPICIOUS.search(line) is not None
        self.indent = depth if self.was_suspicious and GOES_ON.search(line) else None
        self.value_follows = self.indent is not None
        self.quote_mark = _open_quote(line) if self.was_suspicious else ""
        return _hide_values(line, is_suspicious=is_value)


def _open_quote(line: str) -> str:
    """Returns the triple quote that a line opens and does not close, or an empty text."""
    return next((mark for mark in ('"""', "'''") if line.count(mark) % 2), "")


def _hide_values(line: str, *, is_suspicious: bool = False) -> str:
    """Returns a line without its literals, and without the words behind a suspicious name; a plain one as it is."""
    if is_suspicious or SUSPICIOUS.search(line):
        line = LITERAL.sub(lambda literal: f"{literal[1]}{HIDDEN}{literal[3]}", line)
        name = SUSPICIOUS.search(line) or VALUE_OF.search(line)
        start = name.end() if name else 0
        value = re.search(r"[=:\s]", line[start:])  # the name may continue
        if value is not None:
            start += value.start()
            line = line[:start] + WORD.sub(HIDDEN, line[start:])
    return RANDOM.sub(HIDDEN, hide(line))
